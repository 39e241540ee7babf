"""Products in the type of their activations: rounding to bfloat16 against torch, and mixed grids."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import gpu
from gpu import matmul
from gpu.device import xp
from tests.gpu.ternary_cases import Case, assert_close, coded_case, lay_out, random_case

# Bits of float32: ties to even and odd, their neighbours, the largest, subnormals, infinities.
BITS = [
    *(upper << 16 | lower for upper in (0x3F80, 0x3F81, 0x0000, 0x0001, 0x7F7E, 0x7F7F) for lower in
      (0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF)),
    0x7F800000,
]  # fmt: skip


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_bfloat16_is_rounded_as_torch_does(sign):
    numbers = sign * np.array(BITS, np.uint32).view(np.float32).astype(np.float64)
    ours = gpu.to_host(matmul._narrowed(gpu.to_device(numbers), np.dtype(np.uint16)))
    theirs = torch.from_numpy(numbers).to(torch.float32).to(torch.bfloat16).view(torch.int16)
    np.testing.assert_array_equal(ours, theirs.numpy().view(np.uint16))


def test_a_product_is_rounded_once_more_to_bfloat16():
    alpha = np.array(BITS[:12], np.uint32).view(np.float32).astype(np.float64)[:, None]
    rows = len(alpha)
    case = Case(np.ones((rows, 1), np.int8), alpha, np.zeros((rows, 1)), np.array([0]), 9)
    one = gpu.to_device(np.full((1, 1), 0x3F80, np.uint16))
    y = gpu.to_host(matmul.multiply(one, lay_out(case)))
    theirs = torch.from_numpy(alpha[:, 0]).to(torch.float32).to(torch.bfloat16).view(torch.int16)
    np.testing.assert_array_equal(y[0], theirs.numpy().view(np.uint16))


@pytest.mark.parametrize("payload", [0, 1, (1 << 51) - 1])
@pytest.mark.parametrize("sign", [0, 1 << 63])
def test_no_nan_becomes_a_number(payload, sign):
    """A device converts every NaN to one of all ones, to which rounding must not add."""
    nan = np.array([0x7FF8 << 48 | payload | sign], np.uint64).view(np.float64)
    narrow = gpu.to_host(matmul._narrowed(gpu.to_device(nan), np.dtype(np.uint16)))
    assert torch.from_numpy(narrow.view(np.int16)).view(torch.bfloat16).isnan().all()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_types_are_rounded_by_the_library(dtype):
    numbers = np.random.default_rng(0).normal(size=100)
    narrow = matmul._narrowed(gpu.to_device(numbers), np.dtype(dtype))
    assert narrow.dtype == dtype
    np.testing.assert_array_equal(gpu.to_host(narrow), numbers.astype(dtype))


@pytest.mark.parametrize("coded", ["scale", "shift"])
def test_one_of_alpha_and_mu_may_be_codes(coded):
    case, codes = random_case(5, 150, 64), coded_case(5, 150, 64)
    setattr(case, coded, getattr(codes, coded))
    x = case.activations(3, "float32")
    assert_close(case, x, gpu.to_host(matmul.multiply(gpu.to_device(x), lay_out(case))))


def test_codes_of_blocks_that_no_fast_kernel_takes():
    case = coded_case(5, 150, 50)
    x = case.activations(3, "float32")
    layout = lay_out(case)
    assert layout.grid.dtype == xp.float32
    assert_close(case, x, gpu.to_host(matmul.multiply(gpu.to_device(x), layout)))
