"""Destinations of quantized layers: a checkpoint for PT²-LLM, only the model in memory for a baseline.

A run treats both alike; this module holds all differences between PT²-LLM and a baseline.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from harness.backends import Backend
from harness.calibration.grid_range import require_in_range
from harness.calibration.layerwise import FittedLayer
from harness.calibration.methods import FitError, Method, baseline, ternarizer, two_bits
from harness.distributed.ranks import ALONE, Ranks
from harness.errors import UserError
from harness.hf import load_stored
from harness.models.decoder import locate_layers
from harness.models.folder import WEIGHT_FILES, require_free, require_space, require_vacant, unfinished
from harness.models.identity import identify
from harness.models.original import Original
from harness.progress import Say
from harness.quantize.estimate import Plan
from harness.quantize.options import PT2_LLM, Options
from harness.quantize.prepare import Ready, require_other_folder
from harness.quantize.record import Record
from harness.quantize.resume import stored_weights
from harness.quantize.target import choose, require_foldable, require_supported
from harness.ternary.format import is_ternary
from harness.ternary.writing import CheckpointWriter


class Sink(ABC):
    """Takes the layers of a run, one after the other.

    Parameters
    ----------
    options : Options
        Options of the run.
    """

    # Appended to the error message if the final report cannot be written.
    without_report = ""

    def __init__(self, options: Options) -> None:
        self.options = options

    @abstractmethod
    def require_folder(self, say: Say) -> dict[str, Any] | None:
        """Refuse an unusable output folder; return the record of an interrupted run in it, if any."""

    @abstractmethod
    def settle(self, original: Original) -> Options:
        """Settle the options once the model is loaded; refuse a model that the sink cannot take."""

    @abstractmethod
    def require_space(self, plan: Plan) -> None:
        """Refuse a run whose output would not fit on the disk."""

    @abstractmethod
    def fitted_by(self, backend: Backend) -> str:
        """Return the name of the backend that fits matrices."""

    @abstractmethod
    def plan_lines(self, ready: Ready) -> list[str]:
        """Return the lines that print the estimate."""

    @abstractmethod
    def computed(self, ready: Ready, say: Say) -> dict[str, Any]:
        """Return the record's entries for the original, backend, settings, plan and bits per weight."""

    @abstractmethod
    def method(self, ready: Ready) -> Method:
        """Return the method that quantizes a matrix."""

    def own_methods(self, ready: Ready) -> dict[str, Method]:
        """Return the methods of matrices that are quantized otherwise, by their names."""
        return {}

    @contextmanager
    def open(self, ready: Ready, record: Record, say: Say) -> Iterator[None]:
        """Take layers inside this context; after a failure, keep what can be resumed."""
        yield

    @abstractmethod
    def stored(self, index: int) -> dict[str, torch.Tensor]:
        """Return the dense weights of a layer that an interrupted run finished."""

    @abstractmethod
    def add(self, layer: FittedLayer, index: int) -> None:
        """Take a layer."""

    @abstractmethod
    def note(self, record: Record) -> None:
        """Save the progress of the run."""

    @abstractmethod
    def finish(self, record: Record) -> None:
        """Complete the output after the last layer."""

    @abstractmethod
    def quantized(self, say: Say) -> Original:
        """Return the quantized model for measurement."""

    def weight_bytes(self) -> int | None:
        """Return the size of the stored weights; None if none are stored."""
        return None


class CheckpointSink(Sink):
    """PT²-LLM: every layer becomes a shard of a checkpoint, and an interrupted run can be resumed."""

    without_report = "; the checkpoint is complete, but its report lacks the perplexity"

    def require_folder(self, say: Say) -> dict[str, Any] | None:
        options = self.options
        if options.out is None:
            raise UserError("--out DIR is missing: name a folder for the checkpoint")
        self.out: Path = options.out
        if options.resume and not options.force and is_ternary(self.out) and unfinished(self.out) is None:
            raise UserError(f"{self.out} holds a complete checkpoint: there is nothing to resume")
        require_free(self.out, options.force, options.resume)
        require_other_folder(options, self.out)
        self._earlier = unfinished(self.out) if options.resume else None
        if options.resume and self._earlier is None:
            say(f"{self.out} holds no interrupted run: starting from the first layer")
        return deepcopy(self._earlier)  # which the run will add to

    def settle(self, original: Original) -> Options:
        decoder = locate_layers(original.model, original.read)
        notes = require_supported(self.options.target, original, decoder)
        columns = {linear.in_features for linear in decoder.named_linears().values()}
        self.options, chosen = choose(self.options, columns)
        self._chosen = chosen + notes
        require_foldable(self.options, original.model.config)
        require_in_range(decoder, self.options.config)
        return self.options

    def require_space(self, plan: Plan) -> None:
        require_space(self.out, plan.packed_bytes + plan.other_bytes)

    def fitted_by(self, backend: Backend) -> str:
        return backend.name

    def plan_lines(self, ready: Ready) -> list[str]:
        return [f"  {line}" for line in self._chosen] + ready.plan.lines()

    def computed(self, ready: Ready, say: Say) -> dict[str, Any]:
        return {
            "original": identify(self.options.model, say, ready.passage.compute.ranks),
            "backend": ready.backend.name,
            "config": asdict(self.options.config),
            "plan": asdict(ready.plan),
            "bits_per_weight": ready.plan.bits_per_weight,
        }

    def method(self, ready: Ready) -> Method:
        return ternarizer(ready.backend, ready.passage.compute, self.options.config)

    def own_methods(self, ready: Ready) -> dict[str, Method]:
        if not self.options.foldable:
            return {}
        in_order = replace(self.options.config, reorder="none")
        method = ternarizer(ready.backend, ready.passage.compute, in_order)
        names = ready.passage.decoder.named_linears()
        return {name: method for name in names if not self.options.reorders(name)}

    @contextmanager
    def open(self, ready: Ready, record: Record, say: Say) -> Iterator[None]:
        # The original model is freed before the quantized one is loaded; these outlive it.
        self._tokenizer, self._streamed = ready.original.tokenizer, ready.original.read is not None
        self._ready = ready
        count = len(ready.passage.calls)
        done, check = record.done, self._require_unchanged
        with CheckpointWriter(self.out, count + 1, ready.backend, done, check) as self._writer:
            try:
                yield
            except FitError:
                self._writer.forget()  # a resumed run would fail again
                raise
            except BaseException:
                kept = unfinished(self.out)
                if kept is not None and len(kept["layers"]) > self._writer.done:
                    say(f"{len(kept['layers'])} of {count} layers are kept: add --resume to continue")
                raise
            finally:
                del self._ready

    def _require_unchanged(self) -> None:
        """Refuse a folder that another run has written to while this one loaded and measured."""
        if self._earlier is None:
            require_vacant(self.out, self.options.force)
        elif unfinished(self.out) != self._earlier:
            raise UserError(f"another run has written to {self.out} since this one began; repeat the command")

    def stored(self, index: int) -> dict[str, torch.Tensor]:
        passage = self._ready.passage
        shard, device = self._writer.shard(index + 1), passage.compute.device
        return stored_weights(shard, passage.decoder, index, self.options.config, device)

    def add(self, layer: FittedLayer, index: int) -> None:
        results = {matrix.name: matrix.result for matrix in layer.matrices}
        tied = _tied(self._ready)
        others = self._ready.passage.decoder.other_tensors(index)
        self._writer.add({name: tensor for name, tensor in others.items() if name not in tied}, results)

    def note(self, record: Record) -> None:
        self._writer.note(record.to_json())

    def finish(self, record: Record) -> None:
        self._writer.add(_outside_layers(self._ready))
        self._writer.finish(
            self._ready.original,
            self.options.config,
            modules=list(self._ready.passage.decoder.named_linears()),
            shared_inputs=_shared_inputs(record),
            coded=list(self._ready.coded),
            report=record.to_json(),
        )

    def quantized(self, say: Say) -> Original:
        say(f"reading {self.out} back")
        # If the original did not fit in memory, neither would the dense weights.
        trusted = self.options.trust_remote_code
        model = load_stored(self.out, dense=not self._streamed, trust_remote_code=trusted)
        return Original(model, self._tokenizer, str(self.out))

    def weight_bytes(self) -> int | None:
        weights = [file for pattern in WEIGHT_FILES for file in self.out.glob(pattern)]
        return sum(file.stat().st_size for file in weights)


class BaselineSink(Sink):
    """A baseline: its dense matrices replace those of the model in memory, and nothing is stored."""

    def require_folder(self, say: Say) -> dict[str, Any] | None:
        options, out = self.options, self.options.out
        if options.resume:
            raise UserError(
                f"{options.method} cannot be resumed: baselines write no checkpoint; drop --resume"
            )
        if options.target is not None:
            raise UserError(f"{options.method} writes no checkpoint; drop --for {options.target}")
        if out is not None:
            require_free(out, options.force)
            require_other_folder(options, out)
            if is_ternary(out):
                raise UserError(f"{out} holds a checkpoint, but a baseline writes none; choose another --out")
        return None

    def settle(self, original: Original) -> Options:
        if original.read is not None:
            method = self.options.method
            raise UserError(f"{method} needs the whole model in memory; {original.name} is too large")
        return self.options

    def require_space(self, plan: Plan) -> None:
        """Nothing: only a report is written."""

    def fitted_by(self, backend: Backend) -> str:
        return "reference"  # baselines exist only in NumPy, whichever device runs the layers

    def plan_lines(self, ready: Ready) -> list[str]:
        return []

    def computed(self, ready: Ready, say: Say) -> dict[str, Any]:
        config, ranks = self.options.config, ready.passage.compute.ranks
        linears = ready.passage.decoder.named_linears().values()
        shapes = [(linear.out_features, linear.in_features) for linear in linears]
        return {
            # A run of one process is not resumed, so nobody asks what the original was.
            "original": identify(self.options.model, say, ranks) if ranks.size > 1 else None,
            "backend": self.fitted_by(ready.backend),
            "config": {"block_size": config.block_size, "damping": config.damping},
            "plan": None,
            "bits_per_weight": two_bits(shapes, config.block_size),
        }

    def method(self, ready: Ready) -> Method:
        return baseline(self.options.method, self.options.config)

    @contextmanager
    def open(self, ready: Ready, record: Record, say: Say) -> Iterator[None]:
        self._original = ready.original
        yield

    def stored(self, index: int) -> dict[str, torch.Tensor]:
        raise AssertionError("a baseline cannot be resumed")

    def add(self, layer: FittedLayer, index: int) -> None:
        """Do nothing: the layer is already in the model."""

    def note(self, record: Record) -> None:
        """Do nothing: a baseline cannot be resumed."""

    def finish(self, record: Record) -> None:
        """Do nothing: there is no output file."""

    def quantized(self, say: Say) -> Original:
        return self._original


class FollowingSink(CheckpointSink):
    """PT²-LLM in a process that is not the first: needs no folder, and no disk."""

    def require_folder(self, say: Say) -> dict[str, Any] | None:
        return None

    def require_space(self, plan: Plan) -> None:
        """Nothing: the first process writes."""

    @contextmanager
    def open(self, ready: Ready, record: Record, say: Say) -> Iterator[None]:
        self._original = ready.original
        yield

    def stored(self, index: int) -> dict[str, torch.Tensor]:
        raise AssertionError("the first process reads finished layers")

    def add(self, layer: FittedLayer, index: int) -> None:
        """Do nothing: the layer is already in the model."""

    def note(self, record: Record) -> None:
        """Do nothing: the first process does."""

    def finish(self, record: Record) -> None:
        """Do nothing: the first process does."""

    def quantized(self, say: Say) -> Original:
        return self._original

    def weight_bytes(self) -> int | None:
        return None


def sink_for(options: Options, ranks: Ranks = ALONE) -> Sink:
    """Return the sink for the method of the options, in this process."""
    if options.method != PT2_LLM:
        return BaselineSink(options if ranks.first else replace(options, out=None))
    return CheckpointSink(options) if ranks.first else FollowingSink(options)


def _shared_inputs(record: Record) -> list[list[str]] | None:
    """Groups of matrices that read one input; None if an older version began the run, which noted none."""
    if any("shared_inputs" not in row for row in record.layers):
        return None
    return [group for row in record.layers for group in row["shared_inputs"]]


def _tied(ready: Ready) -> Collection[str]:
    """Names of the tensors that are tied to another, which alone is stored."""
    tied: dict[str, str] = getattr(ready.original.model, "all_tied_weights_keys", {})
    return tied.keys()


def _outside_layers(ready: Ready) -> dict[str, torch.Tensor]:
    """Return the tensors outside the decoder layers, except those tied to another."""
    model, prefix = ready.original.model, ready.passage.decoder.prefix
    tied = _tied(ready)
    tensors = {
        name: value
        for name, value in model.state_dict().items()
        if not name.startswith(f"{prefix}.") and name not in tied
    }
    for module, matrix in ready.coded.items():
        tensors |= {f"{module}.{part}": tensor for part, tensor in matrix.parts.items()}
    return tensors
