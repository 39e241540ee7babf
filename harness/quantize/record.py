"""The record of a run: the contents of report.json, and of progress.json during the run."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from harness import text
from harness.calibration import gram
from harness.calibration.layerwise import FittedLayer
from harness.compute import dtype_name
from harness.machine import environment
from harness.perplexity import Perplexity
from harness.quantize.options import Options
from harness.quantize.prepare import Ready
from harness.quantize.report import layer_row


@dataclass
class Record:
    """The record of a run from its start to its last finished layer.

    Attributes
    ----------
    created : str
        UTC time of the start.
    model, dtype : str
        The original model, and the dtype of its weights.
    original : dict of str to str, optional
        What the original is, by `harness.models.identity`; None if its method cannot be resumed.
    method, backend, config, bits_per_weight
        Method and backend, their settings, and all stored bits per weight.
    options : dict
        Options of the command line, except those in `config`.
    calibration : dict
        Text, windows and arithmetic of the calibration.
    evaluation_checksum : str, optional
        SHA-256 of the text that perplexity is measured on.
    original_bytes : int
        Size of all weights of the original.
    command : str, optional
        The command line, if the run was started by one.
    versions, machine, cores, device
        Software and hardware, which can change results.
    processes : int
        Processes that shared the work.
    plan : dict, optional
        The estimate of the run, if its method has one.
    perplexity : dict
        Results "before" and "after".
    divergence : dict, optional
        `harness.divergence.Divergence` from the original, on the first windows of the evaluation text.
    seconds : dict of str to float
        Time by stage.
    layers : list of dict
        One row per finished layer, which holds one row per matrix.
    resumed_after : list of int
        Number of finished layers at each resume.
    mean_relative_output_error, peak_memory_bytes, peak_device_bytes, checkpoint_bytes
        Known at the end; memory is that of the process that used most, the last is the size of all weights as
        stored.
    """

    created: str
    model: str
    dtype: str
    original: dict[str, str] | None
    method: str
    backend: str
    config: dict[str, Any]
    plan: dict[str, Any] | None
    bits_per_weight: float
    options: dict[str, Any]
    calibration: dict[str, Any]
    versions: dict[str, str]
    machine: str
    cores: int | None
    device: str
    processes: int
    evaluation_checksum: str | None
    original_bytes: int
    command: str | None
    perplexity: dict[str, dict[str, Any]] = field(default_factory=dict)
    divergence: dict[str, Any] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    layers: list[dict[str, Any]] = field(default_factory=list)
    resumed_after: list[int] = field(default_factory=list)
    mean_relative_output_error: float | None = None
    peak_memory_bytes: int | None = None
    peak_device_bytes: int | None = None
    checkpoint_bytes: int | None = None

    @classmethod
    def of(
        cls,
        options: Options,
        ready: Ready,
        calibration_text: text.AnyText,
        evaluation_text: text.AnyText | None,
        computed: dict[str, Any],
    ) -> Record:
        """Start the record of a run; `computed` holds the sink's entries about the method."""
        passage, model = ready.passage, ready.original.model
        return cls(
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            model=ready.original.name,
            dtype=dtype_name(model.dtype),
            method=options.method,
            options={
                name: value
                for name, value in asdict(options).items()
                if name not in ("config", "given", "command")
            },
            calibration={
                "text": calibration_text.protocol,
                "tokens": ready.tokens,
                "bos": ready.beginning,
                "nsamples": options.nsamples,
                "seqlen": options.seqlen,
                "seed": options.config.seed,
                "true_sequential": options.true_sequential,
                "targets": options.targets,
                "strength": options.strength,
                "token_weights": options.token_weights,
                "computed_in": dtype_name(passage.compute.dtype or model.dtype),
                "activations_kept_in": dtype_name(passage.hidden[0].dtype),
                "gram": gram.SUMS,
                "windows_checksum": hashlib.sha256(ready.windows.numpy().tobytes()).hexdigest(),
                "inputs_checksum": passage.checksum(),
            },
            device=passage.compute.describe(),
            original_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
            command=options.command,
            evaluation_checksum=None if evaluation_text is None else evaluation_text.checksum(),
            processes=passage.compute.ranks.size,
            **environment(),
            **computed,
        )

    @property
    def done(self) -> int:
        """Number of finished layers."""
        return len(self.layers)

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Add the time spent in this context to a stage."""
        began = time.perf_counter()
        yield
        self.spent(stage, began)

    def spent(self, stage: str, began: float) -> None:
        """Add the time since `began`, a value of `time.perf_counter`, to a stage."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - began

    def add(self, layer: FittedLayer, checksums: dict[str, int]) -> None:
        """Add a finished layer; `checksums` are those of its outputs."""
        self.layers.append({**layer_row(self.done, layer), **checksums})

    def measured(self, when: str, result: Perplexity) -> None:
        """Add a perplexity, "before" or "after"."""
        self.perplexity[when] = asdict(result)

    def to_json(self) -> dict[str, Any]:
        """Return the object for report.json, without entries that are not known yet."""
        return {name: value for name, value in asdict(self).items() if value is not None}
