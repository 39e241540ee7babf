"""Rounds over whole rows against the reference."""

import numpy as np
import pytest

import gpu
from gpu.descent import descend
from gpu.joint import align_jointly
from gpu.refine import refine
from reference.refine import refine as reference
from tests.gpu.whole_rows import random_rows
from tests.reference.strategies import GRAM_KINDS


def refined(case, **options):
    *results, errors = refine(*map(gpu.to_device, case[:5]), case.block_size, **options)
    return [np.asarray(gpu.to_host(result)) for result in results], errors


@pytest.mark.parametrize(
    "options", [{}, {"rounds": 1}, {"rounds": 30}, {"descent": False}, {"symmetric": True}], ids=str
)
@pytest.mark.parametrize("kind", GRAM_KINDS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 23, 6), (60, 151, 50)], ids=str)
def test_rounds_are_those_of_the_reference(shape, kind, options):
    case = random_rows(*shape, kind)
    case.alpha[0] = 0
    (alpha, mu, T), errors = refined(case, **options)
    alpha_reference, mu_reference, T_reference, errors_reference = reference(*case, **options)
    np.testing.assert_array_equal(T, T_reference)
    for got, expected in ((alpha, alpha_reference), (mu, mu_reference)):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-8 * np.abs(expected).max())
    assert len(errors) == len(errors_reference)
    np.testing.assert_allclose(errors, errors_reference, rtol=1e-9, atol=1e-11 * errors_reference[0])
    assert all(type(error) is float for error in errors)


def test_float32_weights_are_refined_in_float64():
    case = random_rows(20, 60, 16, dtype="float32")
    (alpha, mu, T), errors = refined(case)
    expected = reference(*case)
    assert {alpha.dtype, mu.dtype} == {np.dtype(np.float64)}
    np.testing.assert_array_equal(T, expected[2])
    np.testing.assert_allclose(errors, expected[3], rtol=1e-10)


def test_no_round_is_refused():
    case = random_rows(1, 3, 2)
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        refine(*map(gpu.to_device, case[:5]), case.block_size, rounds=0)


@pytest.mark.parametrize("function", [refine, descend, align_jointly])
@pytest.mark.parametrize("name", ["W", "T", "alpha", "mu", "H"])
def test_arguments_that_do_not_fit_are_named(function, name):
    case = random_rows(3, 7, 4)
    short = getattr(case, name)[:-1]
    with pytest.raises(ValueError, match=rf"\b{'T' if name == 'W' else name} has shape"):
        function(*map(gpu.to_device, case._replace(**{name: short})[:5]), case.block_size)
    with pytest.raises(ValueError, match=r"\balpha has shape"):
        function(*map(gpu.to_device, case[:5]), case.block_size + 3)
    for block_size in (0, -1):
        with pytest.raises(ValueError, match=f"block_size must be at least 1, got {block_size}"):
            function(*map(gpu.to_device, case[:5]), block_size)
    broken = getattr(case, name).astype(float)
    broken[0, 0] = np.nan
    with pytest.raises(ValueError, match=rf"\b{name}(\[0, 0\] is nan| must hold only)"):
        function(*map(gpu.to_device, case._replace(**{name: broken})[:5]), case.block_size)
