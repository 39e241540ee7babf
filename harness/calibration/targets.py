"""Targets from the original model: run it beside the ternary one, and sum what the ternary outputs lack.

Hidden states of both models pass through every layer, the original ones through the original layer. A matrix
is then fitted to what brings its outputs, computed from the ternary model's inputs, closest to the original
model's; see `reference.targets`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch

from harness.calibration.experts import Routing
from harness.calibration.passage import Passage, WorkingLayer, brought
from harness.calibration.stream import Seen, Wanted, Writer, rows_of, stream_writers, watch
from harness.calibration.sums import Rows, Statistics, Sums
from harness.models.experts import DOWN, Experts, place_of

# Maps weights (n, m), the Gram matrix (m, m) of their inputs and the lost products (n, m) to the weights to
# quantize; `reference.targets.shift_targets` with its settings.
Shift = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any]

# What one pass of an original layer shows is kept up to this size; more is computed again when it is needed.
KEPT_BYTES = 2e9

# Turns in which the experts that add to the residual stream are fitted: those of a later turn make up for
# what the earlier ones left. All turns are taken `SWEEPS` times, so that the first ones make up for the last
# ones too. Every turn takes a pass over all windows.
TURNS, SWEEPS = 4, 2


@dataclass(frozen=True)
class Targets:
    """What matrices are fitted to, instead of their own weights.

    Attributes
    ----------
    shift : callable
        Computes the weights to quantize.
    stream : bool
        Whether a matrix that adds to the residual stream makes up for all that the stream lacks, and not only
        for its own outputs.
    token_weights : bool
        Whether tokens count by the inverse square of their stream, for such matrices.
    """

    shift: Shift
    stream: bool = True
    token_weights: bool = True


class Beside:
    """The original layer, which runs beside the layer that is quantized.

    What a pass over all windows shows is kept if it takes at most `KEPT_BYTES`, so that one pass is enough.

    Parameters
    ----------
    passage : Passage
        Hidden states of both models.
    layer : WorkingLayer
        The layer before its quantization.
    groups : list of lists of str
        Matrices that share an input, in the order of their use.
    targets : Targets
        What matrices are fitted to.

    Notes
    -----
    An expert e is fitted to the tokens t that are routed to it in the ternary model, whatever the original
    model does with them. The matrix that reads tokens should give what it gives for the original model's
    input of the same token. Errors of ``down_proj`` D_e count by the routing weight w_te, so its rows have in
    `reference.targets.lost_products` the weights w_te^2, times those of the tokens (`token_weights`).

    Of a mixture that adds to the stream, r_t is what the stream lacks after it: the original stream less the
    ternary one, with the experts that are not ternary yet as they were. It is divided among the token's
    experts f of a turn, so that Y_t = D_e h_te + w_te r_t / sum_f w_tf^2 is wanted; of all moves of their
    outputs that move the weighted sum by r_t, these are the smallest. Experts of later turns are then fitted
    to what is left. When all have been, each is fitted again: wanted is what its ternary form gives, and what
    is lacking now, while damping still draws it to its own weights. In Llama 4 routing weights multiply what
    experts read: there w_te is 1, and inputs are those of the token's expert of the same rank. Where the
    mixture does not add to the stream as it is, wanted is D_e h with the inner states h of the original
    expert, on the original model's input of the token.
    """

    def __init__(
        self, passage: Passage, layer: WorkingLayer, groups: list[list[str]], targets: Targets
    ) -> None:
        self.passage, self.targets = passage, targets
        self.layer = passage.enter(layer.index, original=True)
        writers = self._writers(passage, layer, groups) if targets.stream else []
        # Every writer, and what must have run before the stream holds its output.
        blocks = list(dict.fromkeys(writer.block for writer in writers))
        self.writers = {writer.name: blocks[: 1 + blocks.index(writer.block)] for writer in writers}
        names = [group[0] for group in groups]
        self._places = {name: place for name in names if (place := place_of(layer.module, name))}
        mixtures = dict.fromkeys(place.experts for place in self._places.values())
        inputs = [name for name in names if name not in self._places and name not in self.writers]
        self._all = Wanted(inputs, list(mixtures), blocks)
        tokens = sum(states[..., 0].numel() for states in passage.originals)
        width = passage.originals[0].shape[-1] * (1 + len(blocks) + len(mixtures))
        width += sum(layer.linears[name].in_features for name in inputs)
        self._kept: list[Seen] | None = [] if 4 * tokens * width <= KEPT_BYTES else None

    @staticmethod
    def _writers(passage: Passage, layer: WorkingLayer, groups: list[list[str]]) -> list[Writer]:
        """What adds to the stream, as the first process finds it: its windows decide for all."""
        ranks = passage.compute.ranks
        found = stream_writers(passage, layer, groups) if ranks.first else []
        return [Writer(**writer) for writer in ranks.share([asdict(writer) for writer in found])]

    def turns(self, groups: list[list[str]]) -> list[list[list[str]]]:
        """Divide a batch of matrices into those that are fitted one after the other, some more than once."""
        if any(group[0] not in self._places or not self._adds(group[0]) for group in groups):
            return [groups]
        return [groups[first::TURNS] for first in range(min(TURNS, len(groups)))] * SWEEPS

    def collect(
        self, layer: WorkingLayer, groups: list[list[str]], step: Callable[[], object] = lambda: None
    ) -> list[Sums]:
        """Sum what is to be known of some groups' inputs over this process's windows of both models.

        Parameters
        ----------
        layer : WorkingLayer
            The layer as it is now.
        groups : list of lists of str
            Matrices that share an input. Of those that `turns` divides, the first turn has targets.
        step : callable
            Called after every window.
        """
        names = [group[0] for group in groups]
        first = [group[0] for group in self.turns(groups)[0]]
        sums = {name: self._sums(layer, name, name in first) for name in names}
        self._pass(layer, sums, first, step)
        return list(sums.values())

    @torch.no_grad()
    def collect_lost(
        self, layer: WorkingLayer, groups: list[list[str]], step: Callable[[], object] = lambda: None
    ) -> list[Sums]:
        """Sum lost products alone for a later turn; the arguments are those of `collect`."""
        names = [group[0] for group in groups]
        sums = {name: self._sums(layer, name, True, gram=False) for name in names}
        self._pass(layer, sums, names, step)
        return list(sums.values())

    def aim_again(self, layer: WorkingLayer, name: str, known: Statistics, lost: torch.Tensor) -> Statistics:
        """What is known of a matrix in a later turn, with what the stream lacks now.

        That is lost beyond the outputs of the weights as they are now.
        """
        now, own = (linears[name].weight.double() for linears in (layer.linears, self.layer.linears))
        return replace(known, lost=lost + (now - own) @ known.seen)

    @torch.no_grad()
    def advance(self) -> None:
        """Replace the hidden states of the original model by the original layer's outputs."""
        for i, states in enumerate(self.passage.originals):
            output = self._kept[i].output if self._kept else None
            if output is not None:
                states.copy_(output, non_blocking=True)
            else:
                self.passage.overwrite(states, self.layer, i)

    def _writer(self, name: str) -> str:
        """The matrix or mixture that would add the output of a matrix to the stream."""
        place = self._places.get(name)
        if place is None:
            return name
        return place.experts if place.part == DOWN else ""

    def _adds(self, name: str) -> bool:
        return self._writer(name) in self.writers

    def _sums(self, layer: WorkingLayer, name: str, lost: bool, gram: bool = True) -> Sums:
        linear = layer.linears[name]
        rows = linear.out_features if self._adds(name) else linear.in_features
        device = self.passage.compute.device
        return Sums(linear.in_features, rows if lost else 0, device, self._adds(name), gram)

    @torch.no_grad()
    def _pass(
        self, layer: WorkingLayer, sums: dict[str, Sums], aimed: list[str], step: Callable[[], object]
    ) -> None:
        """Add every window to the sums; those of the matrices `aimed` get what is lost too."""
        mixtures = list(dict.fromkeys(self._places[name].experts for name in sums if name in self._places))
        blocks = max((self.writers.get(self._writer(name), []) for name in sums), key=len)
        beside = [name for name in aimed if name not in self._places and not self._adds(name)]
        for i, states in enumerate(self.passage.hidden):
            here, there = (brought(s, self.passage.compute) for s in (states, self.passage.originals[i]))
            ours = watch(layer, here, i, Wanted(list(sums), mixtures, blocks))
            theirs = self._seen(i, there, Wanted(beside, mixtures, blocks))
            for name, rows in self._rows(layer, (here, ours), (there, theirs), list(sums), aimed):
                sums[name].add(rows)
            if self.passage.ends_shard(i):
                for total in sums.values():
                    total.end_shard()
            step()

    def _rows(
        self,
        layer: WorkingLayer,
        ours: tuple[torch.Tensor, Seen],
        theirs: tuple[torch.Tensor, Seen],
        names: list[str],
        aimed: list[str],
    ) -> Iterator[tuple[str, Rows]]:
        """What a window, as both models see it, adds to the sums of each matrix."""
        families: dict[tuple[str, str], dict[int, str]] = {}
        for name in names:
            if place := self._places.get(name):
                families.setdefault((place.experts, place.part), {})[place.number] = name
                continue
            x = rows_of(ours[1].inputs[name])
            if self._adds(name):
                yield name, Rows(x, *self._missing(name, ours, theirs))
            else:
                yield name, Rows(x, rows_of(theirs[1].inputs[name]).float() - x.float())
        for (mixture, part), members in families.items():
            routing = Routing(_experts(layer, mixture), ours[1].mixtures[mixture])
            read = theirs[1].mixtures[mixture][0]
            inputs = {number: ours[1].inputs[name] for number, name in members.items()}
            moving = {number for number, name in members.items() if name in aimed}
            weights: dict[int, torch.Tensor | None] = dict.fromkeys(members)
            if part != DOWN:
                lost = {n: read[routing.rows(n)].float() - inputs[n].float() for n in moving}
            elif mixture not in self.writers:
                inner = routing.inner(_experts(self.layer, mixture), read, moving)
                lost = {n: inner[n].float() - inputs[n].float() for n in moving}
                weights |= {n: routing.weights(n) for n in members}
            else:
                missing, root = self._missing(mixture, ours, theirs)
                lost = routing.shares(missing, moving)
                of_tokens = torch.ones_like(missing[:, :1]) if root is None else root
                weights |= {n: routing.weights(n) * of_tokens[routing.tokens(n)] for n in members}
            for number, name in members.items():
                yield name, Rows(inputs[number], lost.get(number), weights[number])

    def _missing(
        self, writer: str, ours: tuple[torch.Tensor, Seen], theirs: tuple[torch.Tensor, Seen]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the stream lacks after a writer, (tokens, width), and the roots of the tokens' weights."""
        blocks = self.writers[writer]
        (here, mine), (there, original) = ours, theirs
        true = original.stream(there, blocks)
        missing = true - mine.stream(here, blocks)
        if not self.targets.token_weights:
            return missing, None
        size = true.square().mean(dim=1, keepdim=True)
        return missing, torch.where(size > 0, size, torch.inf).rsqrt()

    def _seen(self, i: int, hidden: torch.Tensor, wanted: Wanted) -> Seen:
        """What the original layer reads and writes on a window; more than was asked for, if that is kept."""
        if self._kept is None:
            return watch(self.layer, hidden, i, wanted)
        if i == len(self._kept):
            self._kept.append(watch(self.layer, hidden, i, self._all, to_the_end=True))
        return self._kept[i]


def _experts(layer: WorkingLayer, name: str) -> Experts:
    return cast(Experts, layer.module.get_submodule(name))
