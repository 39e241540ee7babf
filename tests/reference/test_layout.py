"""The packed layout: everything is where the description says, and comes back bit for bit."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import layout
from reference.layout import join, lay_grid, lay_out, lay_words
from reference.packing import pack_base3
from reference.types import CodedGrid, TernaryMatrix

BLOCKS = (64, 128, 256, 512, 1024)
KINDS = ("float16", "int8", "float32", "float64")


def random_matrix(rows, columns, block_size, kind="float16", seed=0):
    """alpha and mu of any bits that are finite numbers, -0 and subnormal ones included."""
    rng = np.random.default_rng([rows, columns, block_size, seed])
    trits = rng.integers(-1, 2, size=(rows, columns)).astype(np.int8)
    shape = rows, -(-columns // block_size)
    if kind == "int8":
        row = rng.uniform(0.01, 2, size=(rows, 1)).astype(np.float16)
        scale, shift = (
            CodedGrid(
                rng.integers(-127, 128, size=shape).astype(np.int8),
                row,
                rng.uniform(0.001, 0.02, size=(1, shape[1])).astype(np.float16),
            )
            for _ in range(2)
        )
    else:
        bits = rng.integers(0, 2**16, size=(2, *shape)).astype(np.uint16)
        bits[bits & 0x7C00 == 0x7C00] &= 0x8000  # infinity and NaN become 0
        scale, shift = bits.view(np.float16).astype(kind)
    return TernaryMatrix(trits, scale, shift, rng.permutation(columns), block_size)


def laid_out(matrix):
    given = (pack_base3(matrix.trits), matrix.scale, matrix.shift, matrix.permutation)
    return lay_out(*given, matrix.block_size)


def assert_same(matrix, other):
    """All bits, for which 0 and -0 differ."""

    def same(a, b):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert a.tobytes() == b.tobytes()

    same(matrix.trits, other.trits)
    same(matrix.permutation, other.permutation)
    assert matrix.block_size == other.block_size
    for name in ("scale", "shift"):
        a, b = getattr(matrix, name), getattr(other, name)
        if isinstance(b, CodedGrid):
            for part in ("codes", "row", "block"):
                same(getattr(a, part), getattr(b, part))
        else:
            same(a.decode() if isinstance(a, CodedGrid) else a.astype(b.dtype), b)


@st.composite
def matrices(draw, columns=None, block_size=None, kind=None):
    rows = draw(st.integers(1, 70))
    columns = columns or draw(st.integers(1, 1100))
    block_size = block_size or draw(st.sampled_from((*BLOCKS, 1, 50, 96, 192)))
    kind = kind or draw(st.sampled_from(KINDS))
    return random_matrix(rows, columns, block_size, kind, draw(st.integers(0, 2**32 - 1)))


@given(matrix=matrices())
def test_a_matrix_comes_back_bit_for_bit(matrix):
    assert_same(matrix, laid_out(matrix).part(0))


@given(data=st.data())
@settings(max_examples=40)
def test_parts_come_back_bit_for_bit(data):
    columns, block_size = data.draw(st.integers(1, 700)), data.draw(st.sampled_from((*BLOCKS, 50)))
    kind = data.draw(st.sampled_from(KINDS))
    several = [data.draw(matrices(columns, block_size, kind)) for _ in range(data.draw(st.integers(1, 3)))]
    whole = join([laid_out(matrix) for matrix in several])
    begin, first = 0, 0
    for index, matrix in enumerate(several):
        rows = len(matrix.trits)
        assert whole.ends[index] == begin + rows
        assert whole.tiles_of_parts()[index] == (first, first + (rows + 31) // 32)
        begin, first = begin + rows, first + (rows + 31) // 32
        assert_same(matrix, whole.part(index))
    assert whole.shape == (begin, columns)
    assert len(whole.words) == first
    assert len(whole.ends) == len(several)


def test_parts_may_be_joined_in_any_grouping():
    layouts = [laid_out(random_matrix(rows, 300, 128, "int8")) for rows in (33, 1, 40)]
    flat, nested = join(layouts), join([layouts[0], join(layouts[1:])])
    assert flat.ends == nested.ends == (33, 34, 74)
    for name, value in vars(flat).items():
        np.testing.assert_array_equal(getattr(nested, name), value)


@given(matrix=matrices())
def test_every_trit_is_where_the_description_says(matrix):
    trits, words = matrix.trits, lay_words(matrix.trits)
    rows, columns = (-(-size // step) * step for size, step in zip(trits.shape, (32, 256), strict=True))
    assert words.dtype == np.uint32
    assert words.shape == (rows // 32, columns // 256, 32, 16)
    filled = np.zeros((rows, columns), np.int8)
    filled[: trits.shape[0], : trits.shape[1]] = trits
    i, j = np.indices(filled.shape)
    word = words[i // 32, j // 256, i % 32, 4 * (j // 16 % 4) + j % 256 // 64]
    np.testing.assert_array_equal((word >> (2 * (j % 16)).astype(np.uint32) & 3).astype(int), filled + 1)


def test_every_trit_is_at_its_byte():
    trits = random_matrix(33, 300, 64).trits
    memory = lay_words(trits).tobytes()
    assert len(memory) == 2 * 2 * 2048
    for i, j in np.ndindex(trits.shape):
        record, row, inside = 2048 * (2 * (i // 32) + j // 256), 64 * (i % 32), j % 256
        span, lane, in_word = inside // 64, inside % 64 // 16, inside % 16
        byte = memory[record + row + 16 * lane + 4 * span + in_word // 4]
        assert byte >> 2 * (in_word % 4) & 3 == trits[i, j] + 1


@pytest.mark.parametrize(("block_size", "pairs"), [(64, 4), (128, 2), (256, 1), (512, 1), (1024, 1)])
@pytest.mark.parametrize("kind", ["float16", "int8"])
@pytest.mark.parametrize("shape", [(1, 1), (33, 300), (5, 1100), (32, 2048)], ids=str)
def test_every_pair_is_where_the_description_says(shape, kind, block_size, pairs):
    (n, m), matrix = shape, random_matrix(*shape, block_size, kind)
    whole = laid_out(matrix)
    tiles, chunks = -(-n // 32), -(-m // 256)
    assert whole.grid.dtype == kind
    assert whole.grid.shape == (tiles, chunks, 32, pairs, 2)
    scale, shift = (g.codes if kind == "int8" else g for g in (matrix.scale, matrix.shift))
    expected = np.zeros_like(whole.grid)
    for i in range(n):
        for j in range(m):
            pair = scale[i, j // block_size], shift[i, j // block_size]
            expected[i // 32, j // 256, i % 32, j % 256 // block_size] = pair
    assert whole.grid.tobytes() == expected.tobytes()
    if kind == "float16":
        assert whole.row_factors is None
        assert whole.block_factors is None
        return
    assert whole.row_factors.dtype == whole.block_factors.dtype == np.float16
    assert whole.row_factors.tolist() == matrix.scale.row[:, 0].tolist() + [0] * (32 * tiles - n)
    factors = np.zeros((1, chunks, pairs, 2), np.float16)
    for j in range(m):
        block = matrix.scale.block[0, j // block_size], matrix.shift.block[0, j // block_size]
        factors[0, j // 256, j % 256 // block_size] = block
    np.testing.assert_array_equal(whole.block_factors, factors)


PLAIN = [
    ("float16", "float16", 96, np.float32),
    ("float16", "float32", 64, np.float32),
    ("float32", "float16", 64, np.float32),
    ("float32", "float32", 128, np.float32),
    ("float64", "float16", 64, np.float64),
    ("float32", "float64", 64, np.float64),
    ("int32", "int32", 64, np.float64),
    ("int8", "int8", 64, np.float64),
]


@pytest.mark.parametrize(("scale_kind", "shift_kind", "block_size", "kind"), PLAIN)
def test_other_blocks_and_types_have_a_plain_grid(scale_kind, shift_kind, block_size, kind):
    numbers = np.random.default_rng(0).integers(-100, 100, size=(2, 33, -(-300 // block_size)))
    scale, shift = numbers[0].astype(scale_kind), numbers[1].astype(shift_kind)
    matrix = replace(random_matrix(33, 300, block_size), scale=scale, shift=shift)
    grid = laid_out(matrix).grid
    assert grid.dtype == kind
    np.testing.assert_array_equal(grid[:33], np.moveaxis(numbers, 0, -1))
    assert grid.shape[0] == 64
    assert not grid[33:].any()


@pytest.mark.parametrize("block_size", [63, 65, 96, 192, 320, 32, 1])
def test_codes_in_other_blocks_are_decoded(block_size):
    matrix = random_matrix(3, 300, block_size, "int8")
    whole = laid_out(matrix)
    assert whole.grid.dtype == np.float32
    assert whole.row_factors is whole.block_factors is None
    np.testing.assert_array_equal(whole.grid[:3, :, 0], matrix.scale.decode())
    np.testing.assert_array_equal(whole.grid[:3, :, 1], matrix.shift.decode())


def test_codes_beside_numbers_are_decoded():
    coded, plain = random_matrix(3, 300, 64, "int8"), random_matrix(3, 300, 64)
    for matrix in (replace(coded, shift=plain.shift), replace(plain, shift=coded.shift)):
        back = laid_out(matrix).part(0)
        assert back.scale.dtype == back.shift.dtype == np.float32
        assert_same(matrix, back)


@pytest.mark.parametrize(
    ("columns", "kind"), [(2**8 + 1, np.uint16), (2**16, np.uint16), (2**16 + 1, np.uint32)]
)
def test_the_order_of_columns(columns, kind):
    matrix = random_matrix(1, columns, 1024)
    order = laid_out(matrix).permutation
    assert order.dtype == kind
    assert order.shape == (1, -(-columns // 256) * 256)
    assert order[0].tolist() == matrix.permutation.tolist() + [0] * (-columns % 256)
    assert_same(matrix, laid_out(matrix).part(0))


@pytest.mark.parametrize("kind", ["float16", "float64"])
@pytest.mark.parametrize(
    ("alpha", "mu", "fits"),
    [
        (65504, 0, True),
        (0, -65504, True),
        (-60000, 5504, True),
        (-60000, 5536, False),
        (60000, -5536, False),
        (-65504, -65504, False),
        (65504, 2**-24, False),
        (2**-24, 65504, False),
    ],
)
def test_weights_beyond_float16_are_known(alpha, mu, fits, kind):
    matrix = random_matrix(3, 70, 64, kind)
    matrix.scale[:], matrix.shift[:] = 1, -1
    assert laid_out(matrix).in_float16
    matrix.scale[1, 0], matrix.shift[1, 0] = alpha, mu
    assert laid_out(matrix).in_float16 is fits
    other = laid_out(random_matrix(3, 70, 64, kind))
    small = replace(other, in_float16=True)
    for parts in ([laid_out(matrix), small], [small, laid_out(matrix)]):
        assert join(parts).in_float16 is fits


def test_codes_beyond_float16_are_known():
    matrix = random_matrix(1, 64, 64, "int8")
    for block, fits in ((1, True), (2, False)):
        factors = np.full((1, 1), 256, np.float16), np.full((1, 1), block, np.float16)
        grids = [CodedGrid(np.full((1, 1), code, np.int8), *factors) for code in (-127, 127)]
        assert laid_out(replace(matrix, scale=grids[0], shift=grids[1])).in_float16 is fits


def test_arrays_are_contiguous():
    for kind in KINDS:
        whole = join([laid_out(random_matrix(33, 600, 128, kind)) for _ in range(2)])
        for array in (whole.words, whole.grid, whole.permutation, whole.row_factors, whole.block_factors):
            assert array is None or array.flags.c_contiguous


def test_lists_are_taken_as_arrays():
    matrix = random_matrix(2, 3, 2, "float64")
    grids = matrix.scale.tolist(), matrix.shift.tolist()
    whole = lay_out(pack_base3(matrix.trits), *grids, matrix.permutation.tolist(), 2)
    assert_same(matrix, whole.part(0))
    assert lay_words(matrix.trits.tolist()).tobytes() == whole.words.tobytes()


@pytest.mark.parametrize("value", [2, -2, 255, 257, 0.5, np.nan])
def test_what_is_no_trit_is_refused(value):
    trits = np.zeros((3, 20), type(value))
    trits[1, 2] = value
    with pytest.raises(ValueError, match="trits"):
        lay_words(trits)


@pytest.mark.parametrize("shape", [(), (5,), (0, 5), (5, 0), (2, 3, 4)])
def test_trits_that_are_no_matrix_are_refused(shape):
    with pytest.raises(ValueError, match="trits must be a non-empty matrix"):
        lay_words(np.zeros(shape, np.int8))


@pytest.mark.parametrize(
    ("shape", "kind", "columns", "block_size", "message"),
    [
        ((2, 3, 2), np.float32, 192, 64, "grid must be float16 or int8, got float32"),
        ((2, 3, 2), np.uint8, 192, 64, "grid must be float16 or int8, got uint8"),
        ((2, 3, 2), np.int8, 288, 96, "block_size must be 64 times a power of 2, got 96"),
        ((2, 3, 2), np.int8, 96, 32, "block_size must be 64 times a power of 2, got 32"),
        ((2, 3, 2), np.int8, 96, 0, "block_size must be 64 times a power of 2, got 0"),
        ((2, 3, 2), np.int8, 193, 64, "grid has shape"),
        ((2, 3, 2), np.int8, 128, 64, "grid has shape"),
        ((2, 3, 1), np.int8, 192, 64, "grid has shape"),
        ((3, 2), np.int8, 192, 64, "grid has shape"),
        ((1, 2, 3, 2), np.int8, 192, 64, "grid has shape"),
    ],
)
def test_a_grid_that_does_not_fit_is_refused(shape, kind, columns, block_size, message):
    with pytest.raises(ValueError, match=message):
        lay_grid(np.zeros(shape, kind), columns, block_size)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"packed": np.full((2, 14), 243, np.uint8)}, "byte 243"),
        ({"packed": np.full((2, 13), 121, np.uint8)}, "70 trits take 14 bytes a row"),
        ({"packed": np.full(14, 121, np.uint8)}, "trits must be a non-empty matrix"),
        ({"scale": np.ones((2, 1))}, "scale has shape"),
        ({"shift": np.ones((1, 2))}, "shift has shape"),
        ({"scale": np.array([[1, 2], [np.nan, 1]])}, r"scale\[1, 0\] is nan"),
        ({"shift": np.array([[1, 2], [1, np.inf]])}, r"shift\[1, 1\] is inf"),
        ({"permutation": np.zeros(70, int)}, "every index from 0 to 69 once"),
        ({"permutation": np.arange(70) + 1}, "every index from 0 to 69 once"),
        ({"permutation": np.arange(70)[None]}, "permutation must hold"),
        ({"permutation": np.arange(71)}, "71 trits take 15 bytes a row"),
        ({"permutation": []}, "every index from 0 to 0 once"),
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"block_size": -64}, "block_size must be at least 1, got -64"),
    ],
)
def test_a_matrix_that_does_not_fit_is_refused(change, message):
    matrix = random_matrix(2, 70, 64)
    arguments = {
        "packed": pack_base3(matrix.trits),
        "scale": matrix.scale,
        "shift": matrix.shift,
        "permutation": matrix.permutation,
        "block_size": 64,
    }
    with pytest.raises(ValueError, match=message):
        lay_out(**arguments | change)


@pytest.mark.parametrize("name", ["scale", "shift"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row": np.ones((1, 1), np.float16)}, "row has shape"),
        ({"row": np.ones((2, 1), np.float32)}, "row must be float16, got float32"),
        ({"row": np.array([[1], [3]], np.float16)}, "the same factors of rows"),
        ({"block": np.ones((1, 1), np.float16)}, "block has shape"),
        ({"block": np.ones((1, 2), np.float64)}, "block must be float16, got float64"),
        ({"codes": np.ones((2, 2), np.int16)}, "grid must be float16 or int8, got int16"),
    ],
)
def test_codes_that_do_not_fit_are_refused(change, message, name):
    matrix = random_matrix(2, 70, 64, "int8")
    changed = replace(matrix, **{name: replace(getattr(matrix, name), **change)})
    with pytest.raises(ValueError, match=message):
        laid_out(changed)


def test_matrices_that_do_not_fit_together_are_refused():
    first = laid_out(random_matrix(3, 70, 64))
    message = "1 to 3 matrices with the same columns, block size and type of grid can be joined, got {}"
    for other in (
        random_matrix(3, 71, 64),
        random_matrix(3, 70, 128),
        random_matrix(3, 70, 64, "int8"),
        random_matrix(3, 70, 64, "float32"),
    ):
        with pytest.raises(ValueError, match=message.format("2 with")):
            join([first, laid_out(other)])
    assert join([first] * 3).ends == (3, 6, 9)
    with pytest.raises(ValueError, match=message.format("4 with")):
        join([first] * 4)
    with pytest.raises(ValueError, match=message.format("4 with")):
        join([join([first] * 2)] * 2)
    with pytest.raises(ValueError, match=message.format("0 with")):
        join([])


def test_constants_are_those_of_the_description():
    assert (layout.WORD, layout.SPAN, layout.CHUNK, layout.WORDS) == (16, 64, 256, 16)
    assert (layout.TILE_ROWS, layout.PARTS, layout.LEAST_BLOCK) == (32, 3, 64)
