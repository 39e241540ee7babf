"""The CUDA C++ kernels: on a device, or on a CPU by `emulation.hpp`, every one against the reference."""

import numpy as np
import pytest

import gpu
from gpu import matmul
from gpu.device import STANDIN
from gpu.kernels import tensor_cores
from reference.packing import pack_base3
from tests.gpu.emulation import COMPILER, SOURCES, Emulator, kernel_names
from tests.gpu.ternary_cases import assert_close, hostile_cases, random_case, to_bits, values

pytestmark = pytest.mark.skipif(STANDIN and COMPILER is None, reason="needs a device, or g++ to emulate one")

TYPES = ["float16", "uint16"]
SHAPES = [(1, 1), (2, 127), (127, 2), (128, 129), (129, 577), (577, 128), (33, 2100)]
TOKENS = [1, 3, 16, 17, 65]
LEAST_SHARED = 68 * 1024  # 16 tokens and a round of eight chunks; all devices have 99 KiB
MUCH_SHARED = 99 * 1024


@pytest.fixture(scope="module")
def emulators(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emulated")
    return Emulator(folder), Emulator(folder, reverse=True)


@pytest.fixture
def run(emulators):
    """Multiplies by the fast kernels; emulated, in both orders of threads."""

    def multiply(case, x, shared=MUCH_SHARED):
        arrays = (pack_base3(case.trits), case.scale, case.shift, case.permutation)
        layout = matmul.lay_out(*(gpu.to_device(array) for array in arrays), case.block_size)
        arguments = (gpu.to_device(x), layout.words, layout.grid, layout.permutation, case.block_size, shared)
        if not STANDIN:
            return gpu.to_host(tensor_cores.multiply(*arguments))
        first, second = (tensor_cores.multiply(*arguments, emulator) for emulator in emulators)
        np.testing.assert_array_equal(first, second)
        return first

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
def test_a_row_does_not_depend_on_its_batch(dtype, run):
    case = random_case(40, 4200, 128)  # three phases for 16 tokens, one for few
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
def test_every_kernel_was_launched(run, emulators):
    emulators[0].launched.clear()
    case = random_case(4, 2500, 128)
    for dtype in TYPES:
        for tokens in (1, 12, 16, 17):
            for shared in (LEAST_SHARED, MUCH_SHARED):
                run(case, case.activations(tokens, dtype), shared)
        run(random_case(4, 9000, 64), random_case(4, 9000, 64).activations(8, dtype))
        run(random_case(4, 300, 64), random_case(4, 300, 64).activations(16, dtype))
    assert set(emulators[0].launched) == {name for source in SOURCES for name in kernel_names(source)}


@pytest.mark.skipif(not STANDIN, reason="sources are changed for the emulator only")
@pytest.mark.parametrize(
    ("tokens", "right", "wrong"),
    [
        (16, "(word >> 2 * (i - p))", "(word >> (i - p))"),
        (16, "sums[(span * TOKEN_TILES", "sums[((span ^ 1) * TOKEN_TILES"),
        (16, "words[part % 2][r], i + 2 * k + part / 2", "words[part / 2][r], i + 2 * k + part % 2"),
        (16, "if (first > 0) __syncthreads();", ""),
        (17, "if (chunk > 0) __syncthreads();", ""),
        (17, "row[i] = x[token * m + i];\n    __syncthreads();", "row[i] = x[token * m + i];"),
    ],
    ids=["shift", "sums of another block", "fragments", "phase barrier", "chunk barrier", "gather barrier"],
)
def test_a_fault_is_seen(tokens, right, wrong, tmp_path):
    case = random_case(40, 4200, 64)
    layout = matmul.lay_out(pack_base3(case.trits), case.scale, case.shift, case.permutation, case.block_size)
    x = case.activations(tokens, "float16")
    arguments = (x, layout.words, layout.grid, layout.permutation, case.block_size, LEAST_SHARED)
    faulty = Emulator(tmp_path, edit=(right, wrong))
    with pytest.raises(AssertionError, match=r"of what is allowed|not finite"):
        assert_close(case, x, tensor_cores.multiply(*arguments, faulty))


def test_what_the_kernels_take():
    assert tensor_cores.takes(4096, 128, 80, MUCH_SHARED)
    assert not tensor_cores.takes(4096, 128, 75, MUCH_SHARED)
    assert not tensor_cores.takes(60000, 128, 90, MUCH_SHARED)
    for block_size in (1, 32, 96, 192):
        assert not tensor_cores.takes(4096, block_size, 90, MUCH_SHARED)
    for tokens in range(1, 17):
        for m in (1, 4096, 28672, 50000):
            assert tensor_cores.decode_phase(tokens, m, False, LEAST_SHARED)[1] <= LEAST_SHARED
