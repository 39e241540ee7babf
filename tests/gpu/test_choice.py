"""Which kernel is chosen, by hand: for every device, type of x, layout and number of tokens."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from gpu.kernels import sources
from gpu.kernels.choice import TABLE, choose
from gpu.kernels.sources import NO_DEVICE, Limits
from tests.gpu.ternary_cases import lay_out, random_case

AMPERE = Limits(80, 166912, 108)
HOPPER = Limits(90, 232448, 132)
BLACKWELL = Limits(100, 232448, 148)
SMALL_HOPPER = Limits(90, 3 * 256 * 128 * 2 - 1, 132)  # less than three chunks of 128 tokens
FITTING_HOPPER = Limits(90, 3 * 256 * 128 * 2, 132)
TURING = Limits(75, 65536, 40)
RTX = Limits(89, 99 * 1024, 128)


def fake(**changes):
    """A layout as far as the table looks at it."""
    kept = {"columns": 4096, "permutation": np.zeros(1, np.uint16), "tiled": True, "in_float16": True}
    return SimpleNamespace(**kept | changes)


def chosen(tokens, dtype, device, layout=None, library=False):
    return choose(tokens, np.dtype(dtype), layout or fake(), device, library).name


@pytest.mark.parametrize(
    ("tokens", "device", "expected"),
    [
        (0, HOPPER, "product"),
        (1, AMPERE, "decode"),
        (16, AMPERE, "decode"),
        (17, AMPERE, "prefill"),
        (5000, AMPERE, "prefill"),
        (1, HOPPER, "decode"),
        (16, HOPPER, "decode"),
        (17, HOPPER, "warpgroup"),
        (5000, HOPPER, "warpgroup"),
        (17, FITTING_HOPPER, "warpgroup"),
        (17, SMALL_HOPPER, "prefill"),
        (17, BLACKWELL, "prefill"),
        (17, RTX, "prefill"),
        (16, RTX, "decode"),
        (1, TURING, "product"),
        (1, TURING._replace(capability=79), "product"),
        (17, TURING, "product"),
        (1, NO_DEVICE, "product"),
        (17, NO_DEVICE, "product"),
    ],
)
def test_tokens_and_device(tokens, device, expected):
    for dtype in ("float16", "uint16", "int16"):
        assert chosen(tokens, dtype, device) == expected


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_other_types_of_activations_take_the_plain_kernel(dtype):
    for tokens in (1, 17, 600):
        assert chosen(tokens, dtype, HOPPER, library=True) == "product"


def test_a_library_is_used_from_512_tokens_on():
    for device, before in ((AMPERE, "prefill"), (HOPPER, "warpgroup")):
        assert chosen(511, "float16", device, library=True) == before
        assert chosen(512, "float16", device, library=True) == "dense"
        assert chosen(512, "float16", device) == before
    assert chosen(512, "float16", NO_DEVICE, library=True) == "product"


def test_weights_beyond_float16_are_rounded_to_bfloat16_only():
    layout = fake(in_float16=False)
    for tokens, rounded in ((17, "warpgroup"), (512, "dense")):
        assert chosen(tokens, "uint16", HOPPER, layout, library=True) == rounded
        assert chosen(tokens, "float16", HOPPER, layout, library=True) == "prefill"
    assert chosen(16, "float16", HOPPER, layout) == "decode"


def test_the_widest_matrix():
    wide = fake(columns=50000)
    assert chosen(1, "float16", Limits(80, 100000, 108), wide) == "decode"
    assert chosen(1, "float16", Limits(80, 99999, 108), wide) == "product"
    # A row pair of 28672 columns does not fit into 99 KiB, a row of x does.
    wide = fake(columns=28672)
    assert chosen(512, "float16", RTX, wide, library=True) == "prefill"
    assert chosen(512, "float16", HOPPER, wide, library=True) == "dense"


def test_layouts_without_fast_kernels():
    for change in ({"permutation": np.zeros(1, np.uint32)}, {"tiled": False}):
        for tokens in (1, 17, 512):
            assert chosen(tokens, "float16", HOPPER, fake(**change), library=True) == "product"
    for block_size in (1, 32, 96, 192):
        assert chosen(1, "float16", HOPPER, lay_out(random_case(3, 300, block_size))) == "product"
    for block_size in (64, 128, 256, 512):
        assert chosen(1, "float16", HOPPER, lay_out(random_case(3, 300, block_size))) == "decode"


def test_numbers_of_tokens():
    most = sys.maxsize
    assert {kernel.name: (kernel.least, kernel.most) for kernel in TABLE} == {
        "dense": (512, most),
        "decode": (1, 16),
        "warpgroup": (17, most),
        "prefill": (17, most),
        "product": (0, most),
    }


def test_every_kernel_but_two_has_a_launcher():
    assert {kernel.name for kernel in TABLE if kernel.multiply is None} == {"dense", "product"}
    for kernel in TABLE:
        if kernel.multiply is not None:
            assert kernel.multiply.__module__ == f"gpu.kernels.{kernel.name}"
            assert (sources.FOLDER / f"{kernel.name}.cu").exists()
