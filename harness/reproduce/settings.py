"""What the command line chooses: model, texts, sizes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from harness.comparison.speed import Lengths
from harness.quantize.options import Options


@dataclass(frozen=True)
class Settings:
    """Settings that all tables share.

    Attributes
    ----------
    model : str or None
        As for `harness.models.loading.load_original`.
    calibration : tuple of str
        Calibration texts. The first is that of all tables; table 2d compares them all.
    texts : tuple of str
        Texts to measure on.
    samples, seqlen : int
        Calibration windows, and tokens in each.
    eval_seqlen, eval_windows
        Tokens in an evaluation window; number of windows, None for all.
    tasks : tuple of str
        Zero-shot tasks, names of `harness.zeroshot.tasks.TASKS`; none by default.
    tasks_dir, limit, batch_size
        As for ``harness.evaluate``.
    lengths : Lengths
        Tokens of figure 4.
    peers : tuple of str
        Names of `harness.reproduce.peers.PEERS`.
    peer_iterations : int
        Steps of gradient descent per layer of a peer that trains.
    paper_model : str or None
        The model of the paper that `model` is.
    text_column, backend, gguf_dtype, trust_remote_code
        As for ``harness.quantize``.
    """

    model: str | None = None
    calibration: tuple[str, ...] = ("wikitext2", "c4", "ptb")
    texts: tuple[str, ...] = ("wikitext2", "c4")
    samples: int = 128
    seqlen: int = 2048
    eval_seqlen: int = 2048
    eval_windows: int | None = None
    tasks: tuple[str, ...] = ()
    tasks_dir: Path | None = None
    limit: int | None = None
    batch_size: int = 8
    lengths: Lengths = field(default_factory=Lengths)
    peers: tuple[str, ...] = ()
    peer_iterations: int = 200
    paper_model: str | None = None
    text_column: str | None = None
    backend: str = "auto"
    gguf_dtype: str = "bfloat16"
    trust_remote_code: bool = False

    @property
    def options(self) -> Options:
        """Options of a run on the first calibration text."""
        return Options(
            model=self.model,
            backend=self.backend,
            gguf_dtype=self.gguf_dtype,
            trust_remote_code=self.trust_remote_code,
            calibration=self.calibration[0],
            text_column=self.text_column,
            nsamples=self.samples,
            seqlen=self.seqlen,
            evaluation_seqlen=self.eval_seqlen,
            evaluation_windows=self.eval_windows,
        )
