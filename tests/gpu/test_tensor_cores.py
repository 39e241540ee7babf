"""The CUDA C++ kernels: on a device, or on a CPU by `emulation.cpp`, every one against the reference."""

import numpy as np
import pytest

import gpu
from gpu import matmul
from gpu.device import STANDIN, xp
from gpu.kernels import arrange, decode, dense, prefill, warpgroup
from gpu.kernels.sources import Limits
from tests.gpu.emulation import COMPILER, Emulator
from tests.gpu.ternary_cases import (
    assert_close,
    coded_case,
    hostile_cases,
    lay_out,
    multiply_on,
    random_case,
    to_bits,
    values,
)

pytestmark = pytest.mark.skipif(STANDIN and COMPILER is None, reason="needs a device, or g++ to emulate one")

SOURCES = [module.SOURCE for module in (arrange, decode, prefill, warpgroup, dense)]
TYPES = ["float16", "uint16"]
SHAPES = [(1, 1), (2, 127), (127, 2), (128, 129), (129, 577), (577, 128), (33, 2100), (33, 1024)]
TOKENS = [1, 3, 16, 17, 65]
LEAST_SHARED = 86 * 1024  # 16 tokens and a chunk; all devices have 99 KiB
MUCH_SHARED = 99 * 1024
MOST_SHARED = 227 * 1024
# Few SMs, so that one takes several tiles, and begins in the middle of a part.
SMS = 3


@pytest.fixture
def run(product_on):
    def multiply(cases, x, shared=MUCH_SHARED, sms=SMS):
        return product_on(Limits(90, shared, sms), cases, x)

    return multiply


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_product_is_that_of_the_reference(shape, tokens, dtype, run):
    for block_size in (64, 128, 256) if shape == (129, 577) else (128,):
        case = random_case(*shape, block_size)
        x = case.activations(tokens, dtype)
        y = run(case, x)
        assert y.dtype == x.dtype
        assert_close(case, x, y)


@pytest.mark.parametrize("tokens", [64, 128, 194])
def test_blocks_take_all_of_their_tokens(tokens, run):
    """Those of prefill.cu take 64, the last perhaps fewer."""
    case = random_case(40, 300, 128)
    x = case.activations(tokens, "float16")
    assert_close(case, x, run(case, x))


@pytest.mark.parametrize("block_size", [64, 128, 256, 512, 4096])
@pytest.mark.parametrize("tokens", [1, 16, 17])
def test_every_size_of_block(block_size, tokens, run):
    case = random_case(20, 1030, block_size)
    x = case.activations(tokens, "float16")
    assert_close(case, x, run(case, x))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", hostile_cases())
def test_hostile_numbers(name, dtype, run):
    case, x = hostile_cases()[name]
    for tokens in (1, len(x)):
        bits = to_bits(x[:tokens], dtype)
        assert_close(case, bits, run(case, bits))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("tokens", [5, 16, 20])
def test_what_is_not_finite_stays_in_its_row(tokens, bad, dtype, run):
    case = random_case(20, 300, 128)
    case.scale[2] = case.shift[2] = 0
    case.trits[3] = 0
    x = case.activations(tokens, np.float32)
    clean = run(case, to_bits(x, dtype))
    for column in (0, 299):
        dirty = x.copy()
        dirty[1, case.permutation[column]] = bad
        y = run(case, to_bits(dirty, dtype))
        assert not np.isfinite(values(y[1])).any()
        np.testing.assert_array_equal(np.delete(y, 1, axis=0), np.delete(clean, 1, axis=0))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("block_size", [64, 128, 256, 512])
def test_codes_of_alpha_and_mu(block_size, dtype, run):
    for shape in ((1, 1), (70, 577), (33, 1100)):
        case = coded_case(*shape, block_size)
        for tokens in (1, 9, 17):
            x = case.activations(tokens, dtype)
            assert_close(case, x, run(case, x))


@pytest.mark.parametrize("make", [random_case, coded_case])
@pytest.mark.parametrize("tokens", [1, 12, 20])
@pytest.mark.parametrize("shared", [LEAST_SHARED, MUCH_SHARED])
def test_parts_are_multiplied_as_they_are_alone(shared, tokens, make, run):
    cases = [make(rows, 1100, 128) for rows in (70, 1, 33)]
    x = cases[0].activations(tokens, "float16")
    alone = [run(case, x, shared) for case in cases]
    for count in (2, 3):
        np.testing.assert_array_equal(run(cases[:count], x, shared), np.hstack(alone[:count]))


def test_parts_of_any_size_are_multiplied(run):
    # The second has more tiles than the first, so that where it ends is not taken for where that one does.
    cases = [random_case(rows, 300, 128) for rows in (40, 100, 20)]
    x = cases[0].activations(3, "float16")
    np.testing.assert_array_equal(run(cases, x), np.hstack([run(case, x) for case in cases]))


@pytest.mark.parametrize(("shared", "tokens"), [(LEAST_SHARED, 16), (MUCH_SHARED, 9), (MOST_SHARED, 9)])
def test_an_sm_takes_several_tiles_of_many_chunks(shared, tokens, run):
    # 10 chunks, so that two of the eight groups of warps have one more than the others; all of x is in shared
    # memory, or a chunk at a time.
    case = random_case(150, 2500, 128)
    x = case.activations(tokens, "float16")
    assert_close(case, x, run(case, x, shared))


def test_the_number_of_sms_changes_nothing(run):
    case = random_case(150, 700, 128)
    x = case.activations(5, "float16")
    for sms in (1, 2, 4, 132):
        np.testing.assert_array_equal(run(case, x, MUCH_SHARED, sms), run(case, x))


def shifted(x):
    """The same on the device, beginning where no wide access may."""
    array = xp.empty(x.size + 1, x.dtype)[1:].reshape(x.shape)
    array[:] = gpu.to_device(x)
    return array


def test_activations_may_begin_anywhere(run):
    case = random_case(5, 301, 64)
    x = case.activations(3, "float16")
    np.testing.assert_array_equal(run(case, shifted(x)), run(case, x))


@pytest.mark.skipif(not STANDIN, reason="sources are changed for the emulator only")
def test_a_wide_access_where_none_may_be_is_seen(tmp_path):
    case = random_case(5, 301, 64)
    x = shifted(case.activations(3, "float16"))
    faulty = Emulator(tmp_path, edit=("reinterpret_cast<size_t>(from) % sizeof(uint4) ? 0 : ", ""))
    with pytest.raises(AssertionError, match="access outside"):
        multiply_on(Limits(90, MOST_SHARED, 1), x, lay_out(case), np.empty((3, 5), x.dtype), faulty)


@pytest.mark.parametrize("dtype", TYPES)
def test_activations_are_arranged_as_trits_lie(dtype, launch):
    """They say which column is where, in two digits."""
    cases = [random_case(rows, 700, 128) for rows in (40, 3)]
    names = np.arange(1, 701)
    x = to_bits(np.stack([names % 128, names // 128]), dtype)
    arranged, span_sums = map(gpu.to_host, launch(arrange.arrange, gpu.to_device(x), lay_out(*cases)))
    for part, case in enumerate(cases):
        low, high = values(arranged[part])
        columns = (low + 128 * high).astype(int) - 1  # -1 beyond the last
        words = np.pad(case.permutation, (0, 68), constant_values=-1).reshape(-1, 2, 8)
        np.testing.assert_array_equal(columns, words.transpose(0, 2, 1).ravel())
        spans = values(arranged[part]).reshape(2, -1, 64).sum(axis=2)
        np.testing.assert_array_equal(span_sums[part], spans)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("make", [random_case, coded_case])
@pytest.mark.parametrize("block_size", [64, 128, 256, 512])
def test_unpacked_weights_are_those_of_the_reference(block_size, make, dtype, launch):
    # The last are whole chunks, of more items than a block has threads.
    for columns, row_pairs in ((700, 8), (701, 4), (703, 2), (1030, 1), (1, 8), (2304, 8)):
        cases = [make(rows, columns, block_size) for rows in (150, 3)]
        shared = next(
            size for size in range(0, MOST_SHARED, 64) if dense.row_pairs_at_once(columns, size) == row_pairs
        )
        device = Limits(90, shared, SMS)
        layout = lay_out(*cases)
        for part, case in enumerate(cases):
            weights = launch(dense.unpack, layout, part, np.dtype(dtype), device)
            np.testing.assert_array_equal(values(gpu.to_host(weights)), case.rounded(dtype))


@pytest.mark.parametrize(
    ("shared", "m", "row_pairs"),
    [
        (MOST_SHARED, 576, 8),
        (MOST_SHARED, 4096, 4),  # of 16 KiB
        (MOST_SHARED, 8192, 2),
        (MOST_SHARED, 11008, 1),
        (MOST_SHARED, 28672, 1),  # and no room for another block
        (MUCH_SHARED, 4096, 2),
        (MUCH_SHARED, 28672, 0),
    ],
)
def test_row_pairs_share_a_block_as_far_as_they_fit(shared, m, row_pairs):
    assert dense.row_pairs_at_once(m, shared) == row_pairs


@pytest.mark.parametrize("dtype", TYPES)
def test_a_row_does_not_depend_on_its_batch(dtype, run):
    case = random_case(40, 4200, 128)  # several phases for 16 tokens, one for few
    x = case.activations(16, dtype)
    y = run(case, x, LEAST_SHARED)
    assert_close(case, x, y)
    for part in (slice(0, 1), slice(15, 16), slice(3, 6), slice(7, 16)):
        np.testing.assert_array_equal(run(case, x[part], MUCH_SHARED), y[part])
    case = random_case(40, 600, 128)
    x = case.activations(65, dtype)
    y = run(case, x)
    np.testing.assert_array_equal(run(case, x[40:57]), y[40:57])
    np.testing.assert_array_equal(run(case, x[::-1].copy()), y[::-1])


def test_sums_do_not_overflow_before_the_result_does(run):
    case = random_case(16, 256, 256)
    case.trits[:], case.scale[:], case.shift[:] = 1, 2.0**-24, 0
    x = np.full((2, 256), 2.0**100)
    bits = to_bits(x, "uint16")
    np.testing.assert_array_equal(values(run(case, bits)), 2.0**84)
    case.scale[:] = 32768
    np.testing.assert_array_equal(values(run(case, to_bits(x * 2.0**4, "uint16"))), 2.0**127)


@pytest.mark.skipif(not STANDIN, reason="the emulator counts the kernels")
def test_every_kernel_was_launched(run, launch, emulators):
    emulators[0].launched.clear()
    for make in (random_case, coded_case):
        case = make(4, 2500, 128)
        for dtype in TYPES:
            for tokens in (1, 12, 16, 17):
                for shared in (LEAST_SHARED, MOST_SHARED):
                    run(case, case.activations(tokens, dtype), shared)
            run(case, case.activations(65, dtype), MOST_SHARED)
            run(make(4, 9000, 64), make(4, 9000, 64).activations(8, dtype))
            device = Limits(90, MUCH_SHARED, SMS)
            launch(dense.unpack, lay_out(case), 0, np.dtype(dtype), device)
    assert set(emulators[0].launched) == {name for source in SOURCES for name in source.kernels}


@pytest.mark.skipif(not STANDIN, reason="sources are changed for the emulator only")
@pytest.mark.parametrize(
    ("tokens", "shared", "right", "wrong"),
    [
        (16, LEAST_SHARED, "(word >> 2 * (i - p))", "(word >> (i - p))"),
        (16, LEAST_SHARED, "first = (span * TOKEN_TILES", "first = ((span ^ 1) * TOKEN_TILES"),
        (16, LEAST_SHARED, "words[part % 2];", "words[part / 2];"),
        (16, LEAST_SHARED, "__syncthreads();  // x is here", "// x is here"),
        (8, MOST_SHARED, "__syncthreads();  // the sums of the tile", "// the sums of the tile"),
        (16, LEAST_SHARED, "await_groups<STAGES - 2>();", "await_groups<STAGES - 1>();"),
        (16, LEAST_SHARED, "__syncwarp();  // other lanes", "// other lanes"),
        (17, LEAST_SHARED, "if (chunk > 0) __syncthreads();", ""),
        (17, LEAST_SHARED, "x + token * p.m, p.m);\n    __syncthreads();", "x + token * p.m, p.m);"),
    ],
    ids=[
        "shift",
        "sums of another span",
        "fragments",
        "phase barrier",
        "tile barrier",
        "copies in flight",
        "warp barrier",
        "chunk barrier",
        "gather barrier",
    ],
)
def test_a_fault_is_seen(tokens, shared, right, wrong, tmp_path):
    case = random_case(100, 4200, 64)
    x = case.activations(tokens, "float16")
    y = np.empty((tokens, 100), np.float16)
    assert any(right in source.text([]) for source in SOURCES)
    faulty = Emulator(tmp_path, edit=(right, wrong))
    device = Limits(90, shared, SMS)

    def both_orders():
        for faulty.reverse in (False, True):
            multiply_on(device, x, lay_out(case), y, faulty)
            assert_close(case, x, y)

    with pytest.raises(AssertionError, match=r"of what is allowed|not finite|meets"):
        both_orders()


def test_unpacked_factors_are_of_activations_that_fit():
    with pytest.raises(ValueError, match=r"x has shape \(2, 290\), expected \(2, 300\)"):
        next(matmul.unpacked(xp.zeros((2, 290), np.float16), lay_out(random_case(3, 300, 128))))


def test_words_are_read_a_few_times_where_x_of_fewer_tokens_fits(run, emulators):
    case = random_case(40, 4200, 128)
    x = case.activations(16, "float16")
    expected = run(case, x, MOST_SHARED)
    for shared, launches in ((MOST_SHARED, 1), (160 * 1024, 2), (125 * 1024, 3), (LEAST_SHARED, 1)):
        emulators[0].launched.clear()
        np.testing.assert_array_equal(run(case, x, shared), expected)
        if STANDIN:
            assert sum(name.startswith("decode") for name in emulators[0].launched) == launches


def test_a_chunk_of_16_tokens_fits_into_shared_memory():
    for tokens in range(1, 17):
        for m in (1, 4096, 28672, 50000):
            phase, needed = decode.chunks_at_once(tokens, m, False, LEAST_SHARED)
            assert 0 < phase
            assert needed <= LEAST_SHARED
