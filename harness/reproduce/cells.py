"""Cells of tables, each measured once and kept in a file."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

from harness import text
from harness.backends import load_backend
from harness.calibration.methods import FitError
from harness.comparison.measure import Comparison
from harness.comparison.methods import METHODS, Method
from harness.comparison.speed import fill, generation_rates, make_ternary
from harness.compute import default_compute
from harness.errors import UserError
from harness.files import read_json, write_json
from harness.models.decoder import locate_layers
from harness.models.gguf import embedded_gguf
from harness.models.identity import identify
from harness.models.loading import load_original
from harness.models.original import Original
from harness.progress import say_on_stderr
from harness.quantize.options import PT2_LLM, Options
from harness.reproduce.peers import PEERS, quantize_by
from harness.reproduce.settings import Settings
from harness.reproduce.stages import summarize_stages
from harness.reproduce.tables import ORIGINAL, SPEED, Cell
from harness.ternary.kernels.launches import use_kernels
from harness.ternary.linear import TernaryLinear
from harness.windows import bos_of, calibration_windows, tokenize
from harness.words import counted
from reference.types import TernaryConfig

CELLS, UNFINISHED = "cells", "unfinished"


class Cells:
    """Measure cells, or find them where an earlier command has measured them.

    A cell is found by everything that its figures depend on: the content of model and texts, the method, and
    all sizes. So a command may be repeated, ask for other tables, or name moved files.

    Parameters
    ----------
    folder : Path
        Where files of cells are kept.
    settings : Settings
        What all cells share.
    """

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder, self.settings = folder, settings
        self._checksums: dict[tuple[str, str], str] = {}

    def find(self, cell: Cell) -> dict[str, Any] | None:
        """Return the figures of a cell that is measured already.

        Raises
        ------
        UserError
            If its file is damaged.
        """
        file = self.file(cell)
        if not file.is_file():
            return None
        found = read_json(file)
        if found.get("key") != self.key(cell) or not isinstance(found.get("figures"), dict):
            raise UserError(f"{file} is damaged; delete it to measure the cell again")
        return found["figures"]

    def measure(self, cell: Cell) -> None:
        """Measure a cell, and keep its figures. A method that diverges is a result as well."""
        began = time.perf_counter()
        try:
            figures = self._speed(cell) if cell.measured == SPEED else self._quality(cell)
        except FitError as error:
            figures = {"error": str(error)}
        figures["seconds_in_all"] = round(time.perf_counter() - began, 1)
        file = self.file(cell)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"key": self.key(cell), "figures": figures})

    def file(self, cell: Cell) -> Path:
        """Return the file of a cell."""
        digest = hashlib.sha256(json.dumps(self.key(cell), sort_keys=True).encode()).hexdigest()
        return self.folder / CELLS / f"{cell.method}-{cell.measured}-{digest[:12]}.json"

    def key(self, cell: Cell) -> dict[str, Any]:
        """Return everything that the figures of a cell depend on, but the machine and the libraries."""
        settings = self.settings
        found: dict[str, Any] = {
            "original": self._identity,
            "gguf_dtype": settings.gguf_dtype,
            "measured": cell.measured,
            "method": _described(cell.method),
        }
        if cell.measured == SPEED:
            return {**found, "tokens": asdict(settings.lengths)}
        if cell.method != ORIGINAL:
            found["calibration"] = {
                "text": self._checksum(cell.calibration, text.CALIBRATION),
                "windows": [cell.samples, settings.seqlen],
            }
        if cell.method in PEERS and PEERS[cell.method].trains:
            found["iterations"] = settings.peer_iterations
        return {
            **found,
            "evaluation": {
                "texts": [self._checksum(name, text.EVALUATION) for name in settings.texts],
                "windows": [settings.eval_windows, settings.eval_seqlen],
            },
            "tasks": [self._tasks_key, settings.limit] if settings.tasks else None,
        }

    @property
    def model_name(self) -> str:
        """Name of the model, without folders of this machine."""
        source = self.settings.model
        path = embedded_gguf() if source is None else Path(source)
        return path.stem if path.suffix == ".gguf" else path.name if path.exists() else str(source)

    def describe(self, cell: Cell) -> str:
        """Say what is measured."""
        if cell.measured == SPEED:
            lengths = self.settings.lengths
            return f"{cell.method}, {counted(lengths.prefill, 'token')} read, {lengths.decode} written"
        if cell.method == ORIGINAL:
            return cell.method
        windows = counted(cell.samples, "window")
        return f"{cell.method}, {windows} of {self.settings.seqlen} tokens, {cell.calibration}"

    def summary(self, cell: Cell) -> str:
        """Say what was measured."""
        figures = self.find(cell) or {}
        if "error" in figures:
            return figures["error"]
        if cell.measured == SPEED:
            found = [f"{stage} {figures[stage]:g} tokens/s" for stage in ("prefill", "decode", "both")]
        else:
            found = [
                f"{label}: perplexity {float(values['perplexity']):.4g}, KL {float(values['mean']):.4g}"
                for label, values in figures["texts"].items()
            ]
        return "; ".join([*found, f"{figures['seconds_in_all']:.0f} s"])

    @cached_property
    def comparison(self) -> Comparison:
        """The original model and the texts to measure on."""
        return Comparison.of(self.settings.options, list(self.settings.texts))

    @cached_property
    def _identity(self) -> dict[str, str]:
        return identify(self.settings.model, say_on_stderr)

    def _checksum(self, source: str, use: str) -> str:
        if (source, use) not in self._checksums:
            self._checksums[source, use] = self._read(source, use).checksum()
        return self._checksums[source, use]

    def _read(self, source: str, use: str) -> text.AnyText:
        return text.read_text(source, use, self.settings.text_column)

    @cached_property
    def _tasks_key(self) -> dict[str, str]:
        folder = self.settings.tasks_dir
        if folder is None:
            return dict.fromkeys(self.settings.tasks, "hub")
        files = {name: sorted(folder.glob(f"{name}_*.jsonl")) for name in self.settings.tasks}
        return {
            name: hashlib.sha256(b"".join(file.read_bytes() for file in found)).hexdigest()
            for name, found in files.items()
        }

    @cached_property
    def _tasks(self) -> dict[str, Any]:
        from harness.zeroshot.tasks import load_tasks

        return load_tasks(self.settings.tasks, self.settings.tasks_dir, self.settings.limit)

    def _quality(self, cell: Cell) -> dict[str, Any]:
        if cell.method == ORIGINAL:
            return self._of_original()
        if cell.method in PEERS:
            return self._of_peer(cell)
        method = METHODS[cell.method]
        with self._unfinished() as folder:
            began = time.process_time()
            record, model = self.comparison.quantize(method, folder, self._options(cell, method))
            cpu_seconds = round(time.process_time() - began, 1)
            figures = self._of_quantized(model)
        shapes = [matrix["shape"] for layer in record["layers"] for matrix in layer["matrices"]]
        weights = sum(rows * columns for rows, columns in shapes)
        seconds = record["seconds"]
        return {
            **self._size(weights, record["bits_per_weight"]),
            **figures,
            "mean_relative_output_error": record["mean_relative_output_error"],
            "seconds": round(seconds["load"] + seconds["layers"], 1),
            "cpu_seconds": cpu_seconds,
            "calibration": record["calibration"]["text"],
            **({"stages": summarize_stages(record["layers"])} if method.method == PT2_LLM else {}),
        }

    @contextmanager
    def _unfinished(self) -> Iterator[Path]:
        """Name a folder for what a cell needs on disk; what a killed command left in it is deleted."""
        folder = self.folder / UNFINISHED
        shutil.rmtree(folder, ignore_errors=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _options(self, cell: Cell, method: Method) -> Options:
        options = replace(self.settings.options, calibration=cell.calibration, nsamples=cell.samples)
        # The GPU backend leaves out Eq. 13 as printed.
        printed = method.config.aga == "printed"
        if printed and "aga.align_grid_printed" in load_backend(options.backend).refused:
            return replace(options, backend="cpu")
        return options

    def _of_original(self) -> dict[str, Any]:
        original = self.comparison.original
        figures: dict[str, Any] = {
            "bits_per_weight": 8 * original.model.dtype.itemsize,
            "bytes": _bytes(original.model),
            "texts": {
                label: {"perplexity": found.value, "mean": 0.0, "protocol": found.protocol}
                for label, found in self.comparison.perplexities().items()
            },
        }
        return figures | self._accuracies(original)

    def _of_peer(self, cell: Cell) -> dict[str, Any]:
        peer, settings, original = PEERS[cell.method], self.settings, self.comparison.original
        stream = self._read(cell.calibration, text.CALIBRATION)
        tokens = tokenize(stream, original.tokenizer)
        bos = bos_of(original.model, original.tokenizer)
        windows = calibration_windows(tokens, cell.samples, settings.seqlen, TernaryConfig().seed, bos)
        linears = locate_layers(original.model).named_linears().values()
        shapes = [(linear.out_features, linear.in_features) for linear in linears]
        with self._unfinished() as folder:
            began = time.perf_counter()
            folder.mkdir(parents=True)
            quantized = quantize_by(peer, original, windows, settings.peer_iterations, folder)
            seconds = round(time.perf_counter() - began, 1)
            loaded = load_original(str(quantized), trust_remote_code=settings.trust_remote_code)
        figures = self._of_quantized(loaded)
        return {
            **self._size(sum(n * m for n, m in shapes), peer.bits_per_weight(shapes)),
            **figures,
            "seconds": seconds,
            "calibration": stream.protocol,
            **({"iterations": settings.peer_iterations} if peer.trains else {}),
        }

    def _of_quantized(self, model: Original) -> dict[str, Any]:
        texts = {
            label: {"perplexity": perplexity.value, **asdict(divergence), "protocol": perplexity.protocol}
            for label, (perplexity, divergence) in self.comparison.divergences(model).items()
        }
        return {"texts": texts} | self._accuracies(model)

    def _accuracies(self, model: Original) -> dict[str, Any]:
        if not self.settings.tasks:
            return {}
        tasks = self._tasks
        from harness.zeroshot.measure import measure_tasks  # imports lm-eval

        compute, batch = self.comparison.compute, self.settings.batch_size
        return {"tasks": measure_tasks(model, tasks, self.settings.limit, compute, batch).to_json()}

    def _size(self, weights: int, bits: float) -> dict[str, Any]:
        original = self.comparison.original.model
        saved = weights * (original.dtype.itemsize - bits / 8)
        return {"bits_per_weight": round(bits, 3), "bytes": round(_bytes(original) - saved)}

    def _speed(self, cell: Cell) -> dict[str, Any]:
        settings, compute = self.settings, default_compute()
        loaded = load_original(settings.model, settings.gguf_dtype, settings.trust_remote_code)
        model = loaded.model
        if loaded.read is not None or not compute.holds(model, settings.lengths.prefill):
            raise UserError(f"{loaded.name} is too large for the memory of this machine; drop figure4")
        if cell.method != ORIGINAL:
            names = list(locate_layers(model).named_linears())
            make_ternary(model, names, METHODS[cell.method].config, model.dtype)
            for module in model.modules():
                if isinstance(module, TernaryLinear):
                    fill(module)
        model.to(compute.device)
        if cell.method != ORIGINAL:
            use_kernels(model)
        return dict(generation_rates(model, compute, settings.lengths))


def _bytes(model: Any) -> int:
    """Bytes of the weights of a model; tied ones count once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def _described(method: str) -> dict[str, Any]:
    """What a method is, but for its name."""
    if method == ORIGINAL:
        return {}
    if method in PEERS:
        peer = PEERS[method]
        return {"package": peer.package, "version": metadata.version(peer.package), "group": peer.group}
    return {name: value for name, value in asdict(METHODS[method]).items() if name != "words"}
