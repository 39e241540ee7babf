"""Which layers share a launch: those that were seen to read one input, else those whose names say so."""

from __future__ import annotations

import torch
from torch import nn

from harness.ternary.kernels.launches import _guessed_groups, launches
from harness.ternary.linear import TernaryLinear


def layer(
    columns: int = 128, grid: str = "float16", block_size: int = 64, symmetric: bool = False
) -> TernaryLinear:
    return TernaryLinear(columns, 8, block_size, grid, False, False, torch.float32, symmetric)


def test_layers_of_a_group_share_a_launch_and_others_have_their_own() -> None:
    layers = {name: layer() for name in ("q", "k", "v", "o")}
    assert launches(layers, [["q", "k", "v"]]) == [["q", "k", "v"], ["o"]]
    assert launches(layers, []) == [["q"], ["k"], ["v"], ["o"]]


def test_a_launch_takes_three_layers_at_the_most() -> None:
    layers = {name: layer() for name in "abcde"}
    assert launches(layers, [list("abcde")]) == [["a", "b", "c"], ["d", "e"]]


def test_layers_of_different_kinds_do_not_share_a_launch() -> None:
    layers = {
        "a": layer(),
        "b": layer(grid="int8"),
        "c": layer(block_size=128),
        "d": layer(),
        "e": layer(256),
        "f": layer(symmetric=True),
    }
    assert launches(layers, [list("abcdef")]) == [["a", "d"], ["b"], ["c"], ["e"], ["f"]]


def test_a_group_may_name_layers_that_are_not_there() -> None:
    """Such as those of a checkpoint of which only the body was loaded."""
    assert launches({"q": layer()}, [["q", "k"]]) == [["q"]]


def test_without_groups_names_decide() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj, self.o_proj = (layer() for _ in range(4))

        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            raise AssertionError("only its signature is looked at")

    class Crossed(Attention):
        def forward(self, hidden_states: torch.Tensor, key_value_states: torch.Tensor) -> torch.Tensor:
            raise AssertionError("only its signature is looked at")

    names = [[f"0.{name}" for name in ("q_proj", "k_proj", "v_proj")]]
    assert _guessed_groups(nn.Sequential(Attention(), Crossed())) == names
    assert _guessed_groups(Attention()) == [["q_proj", "k_proj", "v_proj"]]
