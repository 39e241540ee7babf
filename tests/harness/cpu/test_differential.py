"""The backend for CPUs against the reference: every setting, every kind of input, and every refusal."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from golden.cases import load_cases
from harness.backends import load_backend
from harness.verify.cases import arguments as arguments_of
from reference.types import (
    ALIGNMENTS,
    BEST,
    GRIDS,
    REFINEMENTS,
    REORDERINGS,
    SHIFTS,
    STARTS,
    TernaryConfig,
    TernaryMatrix,
)
from tests.reference.strategies import GRAM_KINDS, random_gram

CPU, REFERENCE = load_backend("cpu", "float64"), load_backend("reference")
ternarize = CPU.function("ternarize.ternarize")
# Operations that the backend computes itself.
OWN = [name for name, function in CPU.operations.items() if function is not REFERENCE.operations[name]]


def layer(rows: int, columns: int, seed: int, kind: str = "white") -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    W = rng.normal(size=(rows, columns)) + 0.3 * rng.normal(size=(rows, 1))
    C = random_gram(rng, columns, kind)
    alive = np.diag(C) > 0
    return W, C + 2 * columns * np.outer(alive, alive)


@st.composite
def configs(draw: Any) -> TernaryConfig:
    aga = draw(st.sampled_from(ALIGNMENTS))
    return TernaryConfig(
        block_size=draw(st.integers(1, 24)),
        shift="free" if aga == "printed" else draw(st.sampled_from(SHIFTS)),
        start=draw(st.sampled_from(STARTS)),
        reorder=draw(st.sampled_from(REORDERINGS)),
        itf=draw(st.booleans()),
        aga=aga,
        compensation=draw(st.booleans()),
        damping=draw(st.sampled_from([0.02, 0.1])),
        max_iterations=draw(st.sampled_from([1, 2, 100])),
        seed=draw(st.integers(0, 3)),
        grid=draw(st.sampled_from(GRIDS)),
        feed_forward=draw(st.booleans()),
        refinement=draw(st.sampled_from(REFINEMENTS)),
        rounds=draw(st.sampled_from([1, 4])),
    )


def same(got: TernaryMatrix, expected: TernaryMatrix) -> None:
    """Trits, order, and what is stored to the bit; figures to rounding."""
    assert np.array_equal(got.trits, expected.trits)
    assert np.array_equal(got.permutation, expected.permutation)
    assert got.trits.dtype == expected.trits.dtype
    assert np.array_equal(got.dequantize(), expected.dequantize())
    assert got.block_size == expected.block_size
    assert (got.shift is None) == (expected.shift is None)
    if isinstance(expected.scale, np.ndarray):
        assert got.scale.dtype == expected.scale.dtype
    figures, of_reference = asdict(got.report), asdict(expected.report)
    assert figures.keys() == of_reference.keys()
    for name, figure in figures.items():
        # Shares of sums of a few hundred squares.
        assert figure == pytest.approx(of_reference[name], rel=1e-9, abs=1e-12), name


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(configs(), st.sampled_from(GRAM_KINDS), st.integers(0, 2**16), st.integers(1, 5), st.integers(1, 24))
def test_every_setting_gives_what_the_reference_gives(config, kind, seed, rows, columns):
    W, C = layer(rows, columns, seed, kind)
    same(ternarize(W, C, config), REFERENCE.ternarize(W, C, config))


@pytest.mark.parametrize("reorder", REORDERINGS)
@pytest.mark.parametrize(
    "config", [TernaryConfig(), BEST, replace(BEST, grid="int8"), replace(BEST, shift="none")], ids=str
)
def test_wider_matrices_give_what_the_reference_gives(config, reorder):
    W, C = layer(12, 300, 5)
    config = replace(config, reorder=reorder)
    same(ternarize(W, C, config), REFERENCE.ternarize(W, C, config))


@pytest.mark.parametrize("config", [TernaryConfig(), BEST, replace(BEST, grid="int8")], ids=str)
def test_weights_in_float32_give_nearly_the_same_trits(config):
    W, C = layer(48, 400, 6)
    W = W.astype(np.float32)
    got, expected = ternarize(W, C, config), REFERENCE.ternarize(W, C, config)
    # Products in float32 are off by 1e-6 of a trit's step, so hardly a trit differs by itself. But a code
    # that rounds the other way moves the grid of 128 columns by up to 1/127, and some of their trits with it.
    assert (got.trits != expected.trits).mean() <= (2e-3 if config.grid == "int8" else 1e-4)
    assert got.report.relative_output_error == pytest.approx(expected.report.relative_output_error, rel=1e-3)
    if config.refinement == "none":
        same(got, expected)


def test_threads_do_not_disturb_each_other():
    layers = [layer(16, 96, seed) for seed in range(6)]
    config = replace(BEST, block_size=32)
    alone = [ternarize(W, C, config) for W, C in layers]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda given: ternarize(*given, config), layers * 2))
    for got, expected in zip(together, alone * 2, strict=True):
        assert np.array_equal(got.trits, expected.trits)
        assert np.array_equal(got.dequantize(), expected.dequantize())
        assert got.report == expected.report


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("reorder", REORDERINGS)
def test_input_is_left_alone(reorder, dtype):
    W, C = layer(4, 20, 7, "dead")
    W = W.astype(dtype)
    before = W.copy(), C.copy()
    ternarize(W, C, replace(BEST, block_size=8, reorder=reorder))
    assert np.array_equal(W, before[0])
    assert np.array_equal(C, before[1])


CASES = [case for case in load_cases() if case.operation in OWN]


@pytest.mark.parametrize("operation", OWN)
def test_arguments_of_every_operation_are_left_alone(operation):
    for case in CASES:
        if case.operation == operation and not case.raises and case.kind != "real":
            before = {name: value.copy() for name, value in case.inputs.items()}
            CPU.function(operation)(**arguments_of(CPU, case))
            assert all(np.array_equal(case.inputs[name], value) for name, value in before.items()), case.name


def broken(case, name):
    """The arguments of a case, with one array spoiled in every way."""
    array = case.inputs[name]
    spoiled = [array[:-1], array[:, :-1], array.ravel()]
    if array.dtype.kind == "f":
        nan, skew = array.copy(), array.copy()
        nan.flat[-1] = np.nan
        skew.flat[-1] = -1e9
        spoiled += [nan, skew]
        skew = array.copy()
        skew[0, -1] += 1e9
        spoiled.append(skew)
    else:
        spoiled.append(array + 2)
    for value in spoiled:
        yield {**arguments_of(CPU, case), name: value}


def outcome(function, arguments):
    try:
        function(**arguments)
    except (ValueError, np.linalg.LinAlgError) as error:
        return type(error), str(error)
    return None


@pytest.mark.parametrize("operation", OWN)
def test_refusals_are_those_of_the_reference(operation):
    own, of_reference = CPU.function(operation), REFERENCE.function(operation)
    refusals = 0
    for case in CASES:
        if case.operation != operation or case.kind == "real":
            continue
        every = [arguments_of(CPU, case)]
        if case.kind == "exact":
            every += [given for name in case.inputs for given in broken(case, name)]
        for arguments in every:
            expected = outcome(of_reference, arguments)
            refusals += expected is not None
            assert outcome(own, arguments) == expected, case.name
    assert refusals


def test_it_offers_every_operation():
    assert CPU.operations.keys() == REFERENCE.operations.keys()
    assert set(OWN) == {
        "descent.descend",
        "gptq.invert_damped",
        "joint.align_jointly",
        "refine.refine",
        "targets.shift_targets",
        "ternarize.ternarize",
    }
