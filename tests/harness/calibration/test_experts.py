"""Experts are fitted to the tokens routed to them, and to average ones where those are few."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from harness.calibration.capture import capture_inputs
from harness.calibration.experts import Routing, batches
from harness.calibration.owners import own_statistics
from harness.calibration.passage import Passage
from harness.calibration.sums import Rows, Sums
from harness.distributed.ranks import ALONE
from harness.models.decoder import find_decoder_layers
from harness.models.linearize import linearize
from reference.ternarize import ternarize
from reference.types import TernaryConfig
from tests.harness import tiny

WINDOWS = torch.randint(3, tiny.VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(0))


def passage_of(model: Any) -> Passage:
    linearize(model)
    return capture_inputs(model, find_decoder_layers(model), WINDOWS)


def routed(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs of the fused experts of the first layer, and the experts that the router chose for them."""
    states, chosen = [], []

    def note(module: Any, args: tuple[torch.Tensor, ...]) -> None:
        states.append(args[0])
        chosen.append(args[1])

    handle = model.model.layers[0].mlp.experts.register_forward_pre_hook(note)
    with torch.no_grad():
        for window in WINDOWS:
            model(window[None])
    handle.remove()
    return torch.cat(states).double(), torch.cat(chosen)


def test_each_expert_has_the_gram_matrix_of_its_own_tokens_from_one_pass() -> None:
    model = tiny.make_mixture("mixtral", torch.float32, ternary=False)
    states, chosen = routed(model)
    fused = model.model.layers[0].mlp.experts
    up, down = fused.gate_up_proj.detach().double(), fused.down_proj
    passage = passage_of(model)
    layer = passage.enter(0)
    groups = passage.input_groups(layer)
    assert [len(batch) for batch in batches(layer, groups)] == [1, 1, 4, 4]
    passes: list[None] = []
    found = passage.collect(layer, groups, lambda: passes.append(None))
    assert len(passes) == len(WINDOWS)
    sums = {group[0]: total for group, total in zip(groups, found, strict=True)}
    for number in range(len(down)):
        X = states[(chosen == number).any(dim=1)]
        gate, value = (X @ up[number].T).chunk(2, dim=1)
        for part, inputs in (("gate_up_proj", X), ("down_proj", torch.nn.functional.silu(gate) * value)):
            total = sums[f"mlp.experts.{number}.{part}"]
            assert total.gram.rows == len(X)
            torch.testing.assert_close(total.gram.finish(), inputs.T @ inputs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("k", [1, 2])
@torch.no_grad()
def test_experts_of_llama_4_count_the_tokens_routed_to_them_scaled_by_their_scores(k: int) -> None:
    """Against the router's formula: transformers multiplies by every expert, most of the rows being zeros."""
    model = tiny.make_mixture("llama4", torch.float32, ternary=False)
    block = model.model.layers[0].feed_forward
    block.router.top_k = k
    states: list[torch.Tensor] = []
    handle = block.register_forward_pre_hook(lambda _, args: states.append(args[0].flatten(0, 1)))
    for window in WINDOWS:
        model(window[None])
    handle.remove()
    h = torch.cat(states).double()
    logits = h @ block.router.weight.double().T
    chosen = logits >= logits.sort(dim=1, descending=True).values[:, k - 1 : k]
    up, down = (p.double() for p in (block.experts.gate_up_proj, block.experts.down_proj))
    passage = passage_of(model)
    layer = passage.enter(0)
    groups = passage.input_groups(layer)
    found = passage.collect(layer, groups)
    sums = {group[0]: total for group, total in zip(groups, found, strict=True)}
    counts = []
    for number in range(len(down)):
        own = chosen[:, number]
        X = h[own] / (1 + (-logits[own, number, None]).exp())
        gate, value = (X @ up[number]).chunk(2, dim=1)
        for part, inputs in (("gate_up_proj", X), ("down_proj", gate / (1 + (-gate).exp()) * value)):
            total = sums[f"feed_forward.experts.{number}.{part}"]
            assert total.gram.rows == len(X)
            torch.testing.assert_close(total.gram.finish(), inputs.T @ inputs, rtol=1e-4, atol=1e-5)
        counts.append(len(X))
    assert sum(counts) == k * WINDOWS.numel()


def test_rows_and_tokens_of_experts_that_read_scaled_tokens_are_told_apart() -> None:
    """Of Llama 4: two experts a token, so that a row is no token; the last token has one, the first none."""
    model = tiny.make_mixture("llama4", torch.float32, ternary=False)
    linearize(model)
    experts = model.model.layers[0].feed_forward.experts
    slots = torch.randn(4, 5, tiny.WIDTH)
    routed = torch.tensor([[0, 1, 0, 1, 0], [0, 1, 1, 0, 1], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0]])
    read = experts.reading((slots * routed[..., None]).flatten(0, 1))
    routing = Routing(experts, read)
    for number in range(4):
        tokens = routed[number].nonzero()[:, 0]
        assert torch.equal(routing.tokens(number), tokens)
        assert torch.equal(read[0][routing.rows(number)], slots[number, tokens])
        assert torch.equal(routing.weights(number), torch.ones(len(tokens), 1))
    missing = torch.randn(5, tiny.WIDTH)
    shares = routing.shares(missing, {0, 1})
    assert torch.equal(shares[0], missing[[1, 3]] / torch.tensor([[2], [1]]))
    assert torch.equal(shares[1], missing[[1, 2, 4]] / torch.tensor([[2], [1], [1]]))


def test_an_expert_with_fewer_tokens_than_columns_gets_average_ones() -> None:
    passage = passage_of(tiny.make_mixture("mixtral", ternary=False))
    layer = passage.enter(0)
    names = ["self_attn.o_proj", *(f"mlp.experts.{number}.down_proj" for number in range(4))]
    # Inputs of three columns; the first matrix belongs to no expert.
    inputs = [[10.0], [], [2.0, 2.0], [1.0, 2.0, 2.0], [2.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0]]
    sums = [Sums(3) for _ in names]
    for total, tokens in zip(sums, inputs, strict=True):
        total.add(Rows(torch.tensor(tokens)[:, None].expand(-1, 3)))
    groups = [[name] for name in names]
    known = own_statistics(layer, groups, sums, dict.fromkeys(names, 0), ALONE)
    average = (0 + 8 + 9 + 19) / (0 + 2 + 3 + 7)
    assert [float(known[name].gram[0, 0]) for name in names] == [100, 3 * average, 8 + average, 9, 19]
    assert [known[name].tokens for name in names] == [1, 0, 2, 3, 7]


@pytest.mark.parametrize("tokens", [8, 32, 64])
def test_average_tokens_lower_the_error_on_tokens_that_were_not_seen(tokens: int) -> None:
    """Experts read tokens of one layer, whose directions are alike, each with some of its own."""
    rng = np.random.default_rng(tokens)
    columns, experts = 96, 4
    shared = rng.standard_normal((columns, columns)) * np.geomspace(1, 0.02, columns)[:, None]
    own = [rng.standard_normal((12, columns)) * 0.5 for _ in range(experts)]

    def draw(expert: int, count: int) -> np.ndarray:
        return rng.standard_normal((count, columns)) @ shared + rng.standard_normal((count, 12)) @ own[expert]

    seen = [draw(expert, tokens if expert == 0 else 200) for expert in range(experts)]
    grams = [X.T @ X for X in seen]
    average = sum(grams) / sum(map(len, seen))
    W, unseen = rng.standard_normal((64, columns)), draw(0, 1000)
    errors = []
    for C in (grams[0], grams[0] + (columns - tokens) * average):
        fitted = ternarize(W, C, TernaryConfig(block_size=32)).dequantize()
        errors.append(np.square(unseen @ (W - fitted).T).sum())
    assert errors[1] < errors[0]
