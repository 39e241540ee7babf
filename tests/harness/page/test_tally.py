"""What is counted and averaged of a record, against figures worked out by hand."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import pytest

from harness.page import tally
from harness.page.kinds import kind_of, short_names
from tests.harness.page.records import record_of


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.3.mlp.down_proj", "mlp.down_proj"),
        ("model.layers.3.mlp.experts.17.down_proj", "mlp.experts.*.down_proj"),
        ("transformer.h.10.attn.c_attn", "attn.c_attn"),
        ("language_model.model.layers.0.block.1.experts.2.w1", "block.*.experts.*.w1"),
        ("head", "head"),
    ],
)
def test_a_kind_is_the_name_inside_the_layer(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_short_names_still_tell_kinds_apart() -> None:
    kinds = ["self_attn.q_proj", "mlp.down_proj", "mlp.experts.*.down_proj", "shared.down_proj", "down_proj"]
    names = short_names(kinds)
    assert list(names) == kinds
    assert list(names.values()) == ["q_proj", "mlp.down_proj", "*.down_proj", "shared.down_proj", "down_proj"]


@pytest.mark.parametrize(
    ("change", "reasons"),
    [
        ({}, []),
        ({"tokens": 255}, ["few tokens: 255 for 256 columns"]),
        ({"tokens": 256}, []),
        ({"tokens": 0}, ["no tokens: fitted to average ones"]),
        ({"dead_inputs": 3}, ["dead inputs: 3 of 256 are always 0"]),
        ({"damping": 0.1}, ["damping raised to 0.1"]),
        ({"damping": 0.0}, []),  # none was needed
        ({"lost_blocks": 0.01}, []),
        ({"lost_blocks": 0.25}, ["lost blocks: alpha of 25% is too small to be stored"]),
        (
            {"tokens": 9, "dead_inputs": 1, "damping": 1.0, "lost_blocks": 1.0},
            [
                "few tokens: 9 for 256 columns",
                "dead inputs: 1 of 256 are always 0",
                "damping raised to 1",
                "lost blocks: alpha of 100% is too small to be stored",
            ],
        ),
    ],
)
def test_reasons_say_what_is_unusual(change: dict[str, Any], reasons: list[str]) -> None:
    record = record_of(layers=1)
    row = record["layers"][0]["matrices"][4] | change
    assert tally.reasons(row, record) == reasons


def test_a_sequence_that_ended_counts_with_its_last_value() -> None:
    found = tally.spread([[4.0, 2.0], [6.0], ["8", "6", "2"], []])
    assert found is not None
    assert found.middle.tolist() == [6, 6, 2]
    assert found.low.tolist() == pytest.approx(np.percentile([[4, 2, 2], [6, 6, 6], [8, 6, 2]], 10, axis=0))
    assert tally.spread([[], []]) is None


def test_trits_and_histograms_add_up_over_layers_and_experts() -> None:
    record = record_of(layers=2, experts=3)
    downs = [m for layer in record["layers"] for m in layer["matrices"] if m["name"].endswith(".down_proj")]
    assert len(downs) == 6
    found = tally.trits(record)["mlp.experts.*.down_proj"]
    assert found == [sum(m["trits"][place] for m in downs) for place in range(3)]

    grids = [layer["grid"]["self_attn.q_proj"]["alpha"] for layer in record["layers"]]
    grids[0].update(first=-3, counts=[5, 0, 7])
    grids[1].update(first=-2, counts=[1, 1, 1])
    assert dict(tally.histograms(record, "alpha")["self_attn.q_proj"]) == {-3: 5, -2: 1, -1: 8, 0: 1}


def test_variances_are_geometric_means_over_layers() -> None:
    record = record_of(layers=2)
    first, second = (layer["matrices"][0] for layer in record["layers"])
    first.update(variance_before=1.0, variance_after=0.5)
    second.update(variance_before=4.0, variance_after=2.0)
    assert tally.variances(record)["self_attn.q_proj"] == pytest.approx((2, 1))


def test_records_without_figures_of_a_fit_give_none() -> None:
    record = deepcopy(record_of(layers=1))
    for matrix in record["layers"][0]["matrices"]:
        for name in ("trits", "variance_before"):
            del matrix[name]
    del record["layers"][0]["grid"]
    assert tally.trits(record) == tally.variances(record) == tally.histograms(record, "mu") == {}
