"""Ternary matrices and activations for the tests of products, and how near an answer must be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import gpu
from gpu import layout as kernels
from gpu.kernels.choice import choose
from reference.matmul import matmul
from reference.packing import pack_base3
from reference.types import CodedGrid, TernaryMatrix

# Types of activations; uint16 holds bfloat16.
DTYPES = ["float16", "uint16", "float32", "float64"]

# Half a unit in the last place, and the smallest number and the largest.
UNITS = {"float16": 2**-11, "uint16": 2**-8, "float32": 2**-24, "float64": 2**-53}
SMALLEST = {"float16": 2**-24, "uint16": 2**-133, "float32": 2**-149, "float64": 2**-1074}
LARGEST = {
    "float16": 65504,
    "uint16": float.fromhex("0x1.fep127"),
    "float32": 3.4028235e38,
    "float64": 1.7e308,
}


@dataclass
class Case:
    """A matrix; columns of trits in quantization order."""

    trits: Any
    scale: Any
    shift: Any
    permutation: Any
    block_size: int

    @property
    def grid(self):
        grids = (g.decode() if isinstance(g, CodedGrid) else g for g in (self.scale, self.shift))
        return tuple(grid.astype(np.float64) for grid in grids)

    def rounded(self, dtype):
        """Dense weights in a 16-bit type, columns in the original order, as float64."""
        matrix = TernaryMatrix(self.trits, self.scale, self.shift, self.permutation, self.block_size)
        exact = torch.from_numpy(matrix.dequantize())
        return exact.to(torch.float16 if dtype == "float16" else torch.bfloat16).double().numpy()

    def activations(self, tokens, dtype):
        rng = np.random.default_rng([tokens, *self.trits.shape])
        return to_bits(rng.normal(size=(tokens, self.trits.shape[1])), dtype)


def random_case(rows, columns, block_size):
    rng = np.random.default_rng([rows, columns, block_size])
    trits = rng.integers(-1, 2, size=(rows, columns)).astype(np.int8)
    scale, shift = rng.normal(size=(2, rows, -(-columns // block_size))).astype(np.float16)
    return Case(trits, scale, shift, rng.permutation(columns), block_size)


def coded_case(rows, columns, block_size):
    """One whose alpha and mu are codes."""
    case = random_case(rows, columns, block_size)
    rng = np.random.default_rng([columns, rows, block_size])
    blocks = case.scale.shape[1]
    row = rng.uniform(0.01, 2, size=(rows, 1)).astype(np.float16)
    case.scale, case.shift = (
        CodedGrid(
            rng.integers(-127, 128, size=(rows, blocks)).astype(np.int8),
            row,
            rng.uniform(0.001, 0.02, size=(1, blocks)).astype(np.float16),
        )
        for _ in range(2)
    )
    return case


def hostile_cases():
    """By name: matrices and activations, which all 16-bit types hold nearly."""
    cases = {}
    for name, t in (("all zero", 0), ("all plus", 1), ("all minus", -1)):
        case = random_case(5, 130, 64)
        case.trits[:] = t
        cases[name] = case, np.random.default_rng(0).normal(size=(3, 130))
    for name, grid, size in (
        ("largest grid", 65504, 2.0**-10),
        ("largest grid and activations", 65504, 2.0**14),  # beyond float16, not beyond float32
        ("subnormal grid", 3 * 2.0**-24, 2.0**12),
        ("smallest grid and activations", 2.0**-24, 2.0**-24),
        ("zero grid", 0, 1),
        ("small activations", 1, 2.0**-20),
    ):
        case = random_case(5, 300, 128)
        signs = np.sign(case.scale.astype(np.float32))
        case.scale[:], case.shift[:] = grid * signs, -grid * signs  # half of the sums cancel
        cases[name] = case, np.random.default_rng(1).uniform(-1, 1, size=(18, 300)) * size
    return cases


def to_bits(x, dtype):
    """Numbers in a type of activations."""
    with np.errstate(over="ignore"):
        if dtype != "uint16":
            return x.astype(dtype)
        upper = np.ascontiguousarray(x, np.float32).view(np.uint32) >> np.uint32(16)
    return upper.astype(np.uint16)


def values(bits):
    """The float64 numbers that activations stand for."""
    if bits.dtype == np.uint16:
        bits = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.astype(np.float64)


def lay_out(*cases):
    """Matrices as the kernels read them, joined if there are several."""
    layouts = []
    for case in cases:
        arrays = (pack_base3(case.trits), case.scale, case.shift, case.permutation)
        layouts.append(kernels.lay_out(*map(_on_device, arrays), case.block_size))
    return layouts[0] if len(layouts) == 1 else kernels.join(layouts)


def multiply_on(device, x, layout, y, *launcher):
    """The product by the kernel that is chosen on a device of such limits."""
    choose(len(x), x.dtype, layout, device).multiply(x, layout, device, y, *launcher)


def _on_device(array):
    if isinstance(array, CodedGrid):
        return CodedGrid(*map(gpu.to_device, (array.codes, array.row, array.block)))
    return gpu.to_device(array)


def assert_close(case, x, y, rounded=False):
    """y is the product, but for the rounding of y and for sums in float32 of 16-bit activations.

    `rounded` says that weights are rounded to the type of x first, which the answer then is as well.

    A sum of terms whose magnitudes add up to s is off by at most 2⁻²³ s for every addition on its way,
    tensor cores rounding towards zero. There are at most 16 in a block of 256 (16 products each), two
    for every block, eight for the warps and 20 for the sum of x: 128 has room for blocks enough. In
    float64 it is 2⁻⁵³ and one addition a column.
    """
    kind = x.dtype.name
    exact_x = values(x)
    if rounded:
        weights = case.rounded(kind)
        expected, power = exact_x @ weights.T, abs(exact_x) @ abs(weights).T
    else:
        arguments = pack_base3(case.trits), *case.grid, case.permutation, case.block_size
        expected = matmul(exact_x, *arguments)
        alpha, mu = (
            np.repeat(abs(grid), case.block_size, axis=1)[:, : case.trits.shape[1]] for grid in case.grid
        )
        power = abs(exact_x[:, case.permutation]) @ (alpha * abs(case.trits) + mu).T
    summed = 2.0**-16 * power if x.dtype.itemsize == 2 else 2.0**-52 * case.trits.shape[1] * power
    limit = summed + UNITS[kind] * (abs(expected) + summed) + SMALLEST[kind]
    got = values(y)
    assert np.isfinite(got[abs(expected) + limit < LARGEST[kind]]).all(), "not finite"
    off = abs(got - expected)
    off[np.isinf(got) & (abs(expected) + limit >= LARGEST[kind]) & (np.sign(got) == np.sign(expected))] = 0
    assert (off <= limit).all(), f"{(off / limit).max():.3g} of what is allowed"
