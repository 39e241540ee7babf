"""Every type of GGUF against gguf's own decoder; Q2_0, which gguf cannot decode, against its definition."""

from __future__ import annotations

from dataclasses import replace

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from harness.errors import UserError
from harness.export.gguf_embedding import round_rows
from harness.export.gguf_types import TERNARY, pack
from harness.export.source import Rounding
from harness.runtimes.containers import GGUF_TYPES, smallest
from reference.types import TernaryMatrix

ROWS, COLUMNS = 24, 768


def matrix(block_size: int, symmetric: bool, seed: int = 0) -> TernaryMatrix:
    """Random trits; negative, subnormal and zero alpha; blocks of one trit only."""
    rng = np.random.default_rng(seed)
    blocks = -(-COLUMNS // block_size)
    trits = rng.integers(-1, 2, (ROWS, COLUMNS), dtype=np.int8)
    trits[3], trits[4, :block_size], trits[5] = 0, -1, 1
    scale = rng.normal(size=(ROWS, blocks)).astype(np.float16)
    shift = (rng.normal(size=(ROWS, blocks)) * (not symmetric)).astype(np.float16)
    scale[1], scale[2, 0] = 0, 2.0**-24
    return TernaryMatrix(trits, scale, shift, np.arange(COLUMNS), block_size)


def exact(held: TernaryMatrix) -> np.ndarray:
    """alpha * t + mu, each column with the grid of its block, in float64."""
    block = np.arange(COLUMNS) // held.block_size
    return held.scale.astype(float)[:, block] * held.trits + held.shift.astype(float)[:, block]


def decoded(packed: np.ndarray, kind: str) -> np.ndarray:
    if kind != "Q2_0":
        return gguf.quants.dequantize(packed, Type[kind])
    groups = packed.reshape(ROWS, -1, 18)  # float16 d, then column j in bits 2 (j % 4) of byte j // 4
    d = groups[..., :2].copy().view("<f2").astype(np.float64)
    j = np.arange(64)
    q = groups[..., 2 + j // 4] >> 2 * (j % 4) & 3
    return (d * (q.astype(int) - 1)).reshape(ROWS, -1)


@pytest.mark.parametrize(
    ("kind", "block_size"),
    [("TQ1_0", 256), ("TQ1_0", 768), ("TQ2_0", 256), ("TQ2_0", 512), ("Q2_0", 64), ("Q2_0", 192)],
)
def test_a_grid_without_shift_is_held_exactly(kind: str, block_size: int) -> None:
    held, rounding = matrix(block_size, symmetric=True), Rounding()
    assert np.array_equal(decoded(pack(held, kind, "m", rounding), kind), exact(held))
    assert rounding.largest == 0


@pytest.mark.parametrize(("kind", "block_size"), [("Q2_K", 256), ("Q2_K", 1000), ("Q4_1", 32), ("Q4_1", 96)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_grid_with_shift_is_held_but_for_one_rounding(kind: str, block_size: int, symmetric: bool) -> None:
    held, rounding = matrix(block_size, symmetric), Rounding()
    got = decoded(pack(held, kind, "m", rounding), kind)
    # float32(alpha) q + float32(m), m being mu - alpha in float16.
    offset = (held.shift.astype(float) - held.scale.astype(float)).astype(np.float16)
    once = exact(replace(held, trits=held.trits + 1, shift=offset)).astype(np.float32)
    assert np.array_equal(got, once)
    error = np.abs(got - exact(held)).max()
    assert error == 0 if symmetric else 0 < error < 2.0**-8  # half a unit of offsets up to 16
    assert (rounding.largest == 0) == symmetric


def test_sizes_and_numbers_are_gguf_s() -> None:
    assert [held.bits for held in GGUF_TYPES] == [1.6875, 2.0625, 2.25, 2.625, 5.0]
    for kind in TERNARY.values():
        if kind.name in Type.__members__:
            assert (kind.columns, kind.size) == gguf.GGML_QUANT_SIZES[Type[kind.name]]
            assert kind.number == Type[kind.name]
            assert kind.file_type == gguf.LlamaFileType[f"MOSTLY_{kind.name}"]


@pytest.mark.parametrize(
    ("columns", "block_size", "symmetric", "chosen"),
    [
        (768, 256, True, "TQ1_0"),
        (768, 1000, True, "TQ1_0"),
        (768, 128, True, "Q2_0"),
        (576, 256, True, "Q2_0"),
        (160, 32, True, "Q4_1"),
        (768, 512, False, "Q2_K"),
        (768, 128, False, "Q4_1"),
        (576, 256, False, "Q4_1"),
        (576, 48, False, None),
        (176, 64, False, None),
    ],
)
def test_the_smallest_type_that_holds_a_matrix_is_found(
    columns: int, block_size: int, symmetric: bool, chosen: str | None
) -> None:
    found, lacking = smallest(GGUF_TYPES, columns, block_size, symmetric)
    assert (found and found.name) == chosen
    assert len(lacking) == (GGUF_TYPES.index(found) if found else len(GGUF_TYPES))


def test_an_offset_beyond_float16_is_refused() -> None:
    held = matrix(256, symmetric=False)
    held.scale[2], held.shift[2] = -6e4, 6e4
    for kind in ("Q2_K", "Q4_1"):
        with pytest.raises(UserError, match=f"mu - alpha of a block overflows float16, in which {kind}"):
            pack(held, kind, "m", Rounding())


# Root mean square of the error, in shares of that of the values: those of a uniform step are 2^-8 / sqrt(12)
# of 8 sigma or less, and ggml's own quantizer reaches 0.0070 with Q6_K.
@pytest.mark.parametrize(("kind", "allowed"), [("F16", 3e-4), ("Q8_0", 6e-3), ("Q6_K", 2e-2)])
def test_an_embedding_is_rounded_as_finely_as_its_type_allows(kind: str, allowed: float) -> None:
    rng = np.random.default_rng(1)
    values = (rng.normal(size=(1100, 512)) * np.exp(rng.normal(size=(1100, 1)))).astype(np.float32)
    values[5], values[6, 16:32], values[7] = 0, 0, -3
    packed = round_rows(values, kind)
    got = gguf.quants.dequantize(packed, Type[kind])
    assert got.shape == values.shape
    assert np.sqrt(np.mean((got - values) ** 2) / np.mean(values**2)) < allowed
    assert not got[5].any()
    assert not got[6, 16:32].any()
    assert got[7] == pytest.approx(-3, rel=5e-3)


def test_q6_k_is_nearer_than_rounding_to_the_largest_magnitude() -> None:
    values = np.random.default_rng(2).normal(size=(64, 256)).astype(np.float32)
    got = gguf.quants.dequantize(round_rows(values, "Q6_K"), Type.Q6_K)
    groups = values.reshape(-1, 16)
    step = np.abs(groups).max(axis=1, keepdims=True) / 31
    naive = (np.rint(groups / step) * step).reshape(values.shape)
    assert np.mean((got - values) ** 2) < np.mean((naive - values) ** 2)
