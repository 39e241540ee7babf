"""The kernel for a warpgroup of Hopper: on such a device, or on a CPU by `emulation.cpp`."""

import numpy as np
import pytest

from gpu.device import STANDIN, xp
from gpu.kernels.choice import choose
from gpu.kernels.sources import Limits
from gpu.kernels.warpgroup import SOURCE
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

TYPES = ["float16", "uint16"]
SHARED = 227 * 1024
HOPPER = Limits(90, SHARED, 132)
FEW = Limits(90, SHARED, 1)  # SMs, which leave all columns to one


def takes(x, layout, device):
    return choose(len(x), x.dtype, layout, device).name == "warpgroup"


def _runs_here():
    return COMPILER is not None if STANDIN else xp.cuda.Device().compute_capability == "90"


needs_hopper = pytest.mark.skipif(not _runs_here(), reason="needs an H100 or H200, or g++ to emulate one")


@pytest.fixture
def run(product_on):
    def multiply(cases, x, device=HOPPER):
        for case in cases if isinstance(cases, list) else [cases]:
            assert takes(x, lay_out(case), device)
        return product_on(device, cases, x)

    return multiply


@needs_hopper
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("device", [HOPPER, FEW], ids=["columns shared out", "columns together"])
# The last are whole chunks, and more than a block of the gather has threads for.
@pytest.mark.parametrize("shape", [(1, 1), (2, 127), (130, 577), (33, 2100), (3, 8448)], ids=str)
def test_product_is_that_of_rounded_weights(shape, device, dtype, run):
    for tokens in (17, 128, 130) if shape == (2, 127) else (65,):
        case = random_case(*shape, 128)
        x = case.activations(tokens, dtype)
        y = run(case, x, device)
        assert y.dtype == x.dtype
        assert_close(case, x, y, rounded=True)


@needs_hopper
@pytest.mark.parametrize("make", [random_case, coded_case])
@pytest.mark.parametrize("block_size", [64, 128, 256, 512])
def test_every_size_of_block(block_size, make, run):
    case = make(20, 1030, block_size)
    for dtype in TYPES:
        x = case.activations(66, dtype)
        assert_close(case, x, run(case, x), rounded=True)


@needs_hopper
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", hostile_cases())
def test_hostile_numbers(name, dtype, run):
    case, x = hostile_cases()[name]
    bits = to_bits(np.resize(x, (70, x.shape[1])), dtype)
    if takes(bits, lay_out(case), HOPPER):
        assert_close(case, bits, run(case, bits), rounded=True)
    else:  # a weight is beyond float16
        assert dtype == "float16"
        assert np.isinf(case.rounded(dtype).astype(dtype)).any()


@needs_hopper
@pytest.mark.parametrize(
    ("splits", "tokens", "make"), [(1, 130, random_case), (3, 67, coded_case), (2, 128, random_case)]
)
def test_parts_are_multiplied_as_they_are_alone(splits, tokens, make, run):
    cases = [make(rows, 768, 128) for rows in (150, 1, 260)]
    x = cases[0].activations(tokens, "float16")

    def product(some):
        # As many SMs for every group of rows, so that columns are shared out alike.
        groups = sum(-(-len(case.trits) // 128) for case in some)
        return run(some, x, HOPPER._replace(sms=splits * groups))

    alone = [product([case]) for case in cases]
    for case, y in zip(cases, alone, strict=True):
        assert_close(case, x, y, rounded=True)
    for count in (2, 3):
        np.testing.assert_array_equal(product(cases[:count]), np.hstack(alone[:count]))


@needs_hopper
def test_a_row_does_not_depend_on_its_batch(run):
    case = random_case(40, 1100, 128)
    x = case.activations(200, "uint16")
    y = run(case, x)
    np.testing.assert_array_equal(run(case, x[70:140]), y[70:140])
    np.testing.assert_array_equal(run(case, x[::-1].copy()), y[::-1])


@needs_hopper
def test_many_tokens_are_taken_some_at_a_time(run, emulators):
    case = random_case(3, 60, 64)
    x = case.activations(513, "float16")
    emulators[0].launched.clear()
    y = run(case, x)
    assert_close(case, x, y, rounded=True)
    if STANDIN:
        assert [name for name in emulators[0].launched if name.startswith("warpgroup")] == 2 * [
            "warpgroup_float16"
        ]


@needs_hopper
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_row(bad, run):
    case = random_case(20, 300, 128)
    case.scale[2] = case.shift[2] = 0
    case.trits[3] = 0
    x = case.activations(70, np.float32)
    clean = run(case, to_bits(x, "float16"))
    for column in (0, 299):
        dirty = x.copy()
        dirty[1, case.permutation[column]] = bad
        y = run(case, to_bits(dirty, "float16"))
        assert not np.isfinite(values(y[1])).any()
        np.testing.assert_array_equal(np.delete(y, 1, axis=0), np.delete(clean, 1, axis=0))


def test_what_it_takes():
    case = random_case(3, 300, 128)
    layout, x = lay_out(case), np.zeros((17, 300), np.float16)
    fits = HOPPER._replace(shared=3 * 256 * 128 * 2)  # three chunks of 128 tokens
    assert takes(x, layout, fits)
    assert not takes(x[:16], layout, HOPPER)
    for other in (
        HOPPER._replace(capability=80),
        HOPPER._replace(capability=100),
        fits._replace(shared=fits.shared - 1),
    ):
        assert not takes(x, layout, other)
    case.scale[0, 0], case.shift[0, 0] = 60000, 60000
    assert not takes(x, lay_out(case), HOPPER)
    assert takes(x.view(np.uint16), lay_out(case), HOPPER)


@pytest.mark.skipif(not STANDIN or COMPILER is None, reason="sources are changed for the emulator only")
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("* p.m, p.m);\n    __syncthreads();", "* p.m, p.m);"),
        ("await_groups<0>();", ""),
        ("show_to_tensor_cores();", ""),
        ("        __syncthreads();\n        Weights<G> next", "        Weights<G> next"),
        ("STAGES = 3", "STAGES = 2"),
        ("begin_products(a);", ""),
        ("await_products<0>();", ""),
        ("+ (r * 8 + byte * 2) * TOKENS", "+ (r * 8 + byte) * TOKENS"),
        ("a[byte][2 + half] =", "a[byte][half] ="),
    ],
    ids=[
        "gather barrier",
        "copies in flight",
        "hidden from tensor cores",
        "chunk barrier",
        "a place too few",
        "registers",
        "sums in flight",
        "columns",
        "fragments",
    ],
)
def test_a_fault_is_seen(right, wrong, tmp_path):
    case = random_case(30, 1500, 128)
    x = case.activations(65, "float16")
    y = np.empty((65, 30), np.float16)
    assert right in SOURCE.text([])
    faulty = Emulator(tmp_path, edit=(right, wrong))

    def both_orders():
        for faulty.reverse in (False, True):
            multiply_on(FEW, x, lay_out(case), y, faulty)
            assert_close(case, x, y, rounded=True)

    with pytest.raises(AssertionError, match=r"of what is allowed|not finite|begun|may not see"):
        both_orders()


@needs_hopper
def test_parts_of_whole_groups_of_rows_and_a_tile_of_one_token(run):
    cases = [random_case(rows, 200, 64) for rows in (128, 20, 256)]
    x = cases[0].activations(129, "uint16")
    for case, y in zip(cases, np.split(run(cases, x), [128, 148], axis=1), strict=True):
        assert_close(case, x, y, rounded=True)
