"""Measure what methods make of one model, on the same texts and windows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness import text
from harness.comparison.methods import Method
from harness.compute import Compute, default_compute
from harness.divergence import Divergence, divergence_on, require_comparable
from harness.errors import UserError
from harness.models.loading import load_original
from harness.models.original import Original
from harness.perplexity import Perplexity, measure_on
from harness.progress import say_on_stderr
from harness.quantize.options import NO_EVALUATION, Options
from harness.quantize.run import quantize


@dataclass(frozen=True)
class Comparison:
    """An original model, and the texts that it and its quantized versions are measured on.

    Attributes
    ----------
    options : Options
        Model, backend, and the windows of the evaluation.
    original : Original
        The model.
    streams : dict of str to AnyText
        The texts by label: the name of the data set, or of the file.
    compute : Compute
        Device that runs the models.
    """

    options: Options
    original: Original
    streams: dict[str, text.AnyText]
    compute: Compute

    @classmethod
    def of(cls, options: Options, texts: list[str]) -> Comparison:
        """Read the texts and load the model.

        Raises
        ------
        UserError
            If there is no text, one cannot be read, or the model cannot be loaded or is too large.
        """
        streams = read_by_label(texts, options.text_column)
        original = load_original(options.model, options.gguf_dtype, options.trust_remote_code)
        require_comparable(original, original)
        return cls(options, original, streams, default_compute())

    @property
    def windows(self) -> tuple[int, int | None, Compute]:
        """Tokens of a window, number of windows, and device."""
        return self.options.evaluation_seqlen, self.options.evaluation_windows, self.compute

    def perplexities(self) -> dict[str, Perplexity]:
        """Measure the original on every text."""
        return {
            label: measure_on(self.original, stream, *self.windows) for label, stream in self.streams.items()
        }

    def divergences(self, model: Original) -> dict[str, tuple[Perplexity, Divergence]]:
        """Measure a quantized model on every text: its perplexity, and its divergence from the original."""
        found = {}
        for label, stream in self.streams.items():
            perplexity, divergence = divergence_on(self.original, model, stream, *self.windows)
            if perplexity is None:  # of a classifier
                raise UserError(
                    f"{self.original.name} is no language model; methods are compared by perplexity"
                )
            found[label] = perplexity, divergence
        return found

    def quantize(
        self, method: Method, folder: Path, options: Options | None = None
    ) -> tuple[dict[str, Any], Original]:
        """Quantize the model by a method.

        Parameters
        ----------
        method : Method
            The method.
        folder : Path
            For a checkpoint, which replaces what the folder holds.
        options : Options, optional
            Model and calibration; by default those of the comparison.

        Returns
        -------
        dict, Original
            The report of the run, and the quantized model.

        Raises
        ------
        FitError
            If the method diverges.
        """
        examined: list[Original] = []
        record = quantize(
            replace(method.options(options or self.options, folder), evaluation=NO_EVALUATION, force=True),
            say=say_on_stderr,
            say_result=lambda line: None,
            examine=examined.append,
        )
        return record, examined.pop()


def read_by_label(texts: list[str], column: str | None) -> dict[str, text.AnyText]:
    """Read texts to measure on, by their names in results: without their files if that tells them apart.

    Raises
    ------
    UserError
        If one cannot be read, or is none.
    """
    if NO_EVALUATION in texts:
        raise UserError("methods are compared by perplexity, which needs a text; pass one with --eval")
    streams = [text.read_text(name, text.EVALUATION, column) for name in texts]
    labels = [stream.protocol.partition(":")[0] for stream in streams]
    return dict(zip(labels if len(set(labels)) == len(labels) else texts, streams, strict=True))
