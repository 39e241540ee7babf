"""What is launched for a product, by hand: kernels, grids, threads, shared memory, and what they are told."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from gpu.device import xp
from gpu.kernels import tensor_cores
from gpu.layout import join
from tests.gpu.ternary_cases import coded_case, lay_out, random_case

AMPERE = tensor_cores.Limits(80, 166912, 108)
HOPPER = tensor_cores.Limits(90, 232448, 132)

# 2, 5 and 1 tiles of 32 rows; 300 columns are two chunks of 256.
ROWS, COLUMNS = (40, 130, 20), 300


class Recorder:
    """Takes launches in the place of a device."""

    def __init__(self):
        self.seen = []

    def __call__(self, name, kernel, grid, threads, shared, arguments):
        numbers = tuple(int(a) for a in arguments if isinstance(a, np.int32))
        self.seen.append((name, kernel, grid, threads, shared, numbers))
        self.arrays = [a for a in arguments if not isinstance(a, np.int32)]


@pytest.fixture
def layout():
    return join([lay_out(random_case(rows, COLUMNS, 128)) for rows in ROWS])


def launched(layout, tokens, device, dtype="float16"):
    record = Recorder()
    x = xp.zeros((tokens, layout.columns), dtype)
    tensor_cores.multiply(x, layout, device, xp.zeros((tokens, layout.ends[-1]), dtype), record)
    return record.seen


@pytest.mark.parametrize(
    ("tokens", "dtype", "kernel", "shared"),
    [
        # Stages of 16 warps, their sums, padding; two chunks of x and its sums; x as it comes.
        (3, "float16", "decode8_gather_float16", 16 * (3840 + 512) + 48 + 2 * (1536 + 128) + 1800),
        (16, "uint16", "decode16_gather_bfloat16", 16 * (3840 + 1024) + 256 + 2 * (8192 + 256) + 9600),
    ],
)
def test_few_tokens_are_one_launch(tokens, dtype, kernel, shared, layout):
    expected = [("decode.cu", kernel, (8,), 512, shared, (tokens, 300, 1, 2, 40, 170, 190))]
    assert launched(layout, tokens, HOPPER, dtype) == expected
    few = HOPPER._replace(processors=5)
    assert [grid for _, _, grid, *_ in launched(layout, tokens, few, dtype)] == [(5,)]


def test_many_tokens_are_arranged_once_and_multiplied_part_by_part(layout):
    arrange = ("prefill.cu", "arrange_float16", (70,), 256, 600, (300, 3))
    same = ("prefill.cu", "prefill_float16")
    size = (128, 64 * (264 * 2 + 4 * 4))
    assert launched(layout, 70, AMPERE) == [
        arrange,
        (*same, (1, 2), *size, (70, 190, 300, 1, 0, 0, 2, 0, 40)),
        (*same, (2, 2), *size, (70, 190, 300, 1, 1, 2, 7, 40, 170)),
        (*same, (1, 2), *size, (70, 190, 300, 1, 2, 7, 8, 170, 190)),
    ]


def test_warp_groups_take_512_tokens_at_a_time_and_share_out_columns(layout):
    def portion(tokens, tiles):
        return [
            ("warpgroup.cu", "gather", (tokens, 3), 1024, 600, (tokens, 300)),
            (
                "warpgroup.cu",
                "warpgroup_float16",
                (1 + 2 + 1, 2 * tiles),
                256,
                3 * 256 * 128 * 2,
                (tokens, 300, 1, 2, 40, 170, 190),
            ),
            ("warpgroup.cu", "combine_float16", (1, tokens), 256, 0, (190, 2)),
        ]

    assert launched(layout, 600, HOPPER) == portion(512, 4) + portion(88, 1)
    assert launched(layout, 512, HOPPER) == portion(512, 4)
    assert launched(layout, 17, HOPPER) == portion(17, 1)
    together = [launch for launch in portion(88, 1) if not launch[1].startswith("combine")]
    kernel, grid = together[1], (4, 1)
    together[1] = (*kernel[:2], grid, *kernel[3:5], (88, 300, 1, 1, 40, 170, 190))
    assert launched(layout, 88, HOPPER._replace(processors=7)) == together


def test_columns_are_shared_out_among_four_at_the_most():
    layout = lay_out(random_case(33, 2560, 256))
    splits = {
        processors: launched(layout, 20, HOPPER._replace(processors=processors))[1][5][3]
        for processors in (1, 2, 3, 4, 5, 132)
    }
    assert splits == {1: 1, 2: 2, 3: 3, 4: 4, 5: 4, 132: 4}


def test_room_for_gathered_activations_and_sums(layout):
    record = Recorder()
    x = xp.zeros((130, COLUMNS), np.float16)
    tensor_cores.multiply(x, layout, HOPPER._replace(processors=1), xp.zeros((130, 190), np.float16), record)
    assert record.arrays[0].shape == (3, 2, 2 * 256 // 8, 128, 8)
    assert record.arrays[-1].shape == (1,)
    arranged, span_sums = tensor_cores.arrange(x, layout, record)
    assert (arranged.shape, arranged.dtype) == ((3, 130, 512), np.float16)
    assert (span_sums.shape, span_sums.dtype) == ((3, 130, 8), np.float32)


@pytest.mark.parametrize(
    ("shared", "couples"), [(166912, 8), (3 * 8 * 1232, 8), (3 * 8 * 1232 - 1, 4), (1232, 1)]
)
def test_weights_are_unpacked_by_couples_of_rows(shared, couples, layout):
    record = Recorder()
    weights = tensor_cores.unpack(layout, 1, np.uint16, AMPERE._replace(shared=shared), record)
    assert weights.shape == (130, 300)
    assert weights.strides == (304 * 2, 2)
    numbers = (300, 304, 308, couples, 1, 1, 2)
    expected = ("dense.cu", "dense_bfloat16", (5 * 16 // couples,), 256, couples * 308 * 4, numbers)
    assert record.seen == [expected]
    assert tensor_cores.couples_at_once(300, 1231) == 0


def test_kernels_of_codes_have_names_of_their_own():
    layout = lay_out(coded_case(40, COLUMNS, 64))
    assert [kernel for _, kernel, *_ in launched(layout, 3, AMPERE, "uint16")] == [
        "decode8_gather_bfloat16_int8"
    ]
    assert launched(layout, 20, AMPERE)[1][1] == "prefill_float16_int8"


def test_the_kernels_of_every_source():
    types, kinds = ("float16", "bfloat16"), ("", "_int8")
    every = [f"{dtype}{kind}" for dtype in types for kind in kinds]
    decoded = {f"decode{n}{gather}_{kind}" for n in (8, 16) for gather in ("", "_gather") for kind in every}
    assert tensor_cores.kernels("decode.cu").keys() == decoded
    arrange = {f"arrange_{dtype}" for dtype in types}
    assert tensor_cores.kernels("prefill.cu").keys() == {f"prefill_{kind}" for kind in every} | arrange
    assert tensor_cores.kernels("dense.cu").keys() == {f"dense_{kind}" for kind in every}
    groups = {"gather"} | {f"combine_{dtype}" for dtype in types} | {f"warpgroup_{kind}" for kind in every}
    assert tensor_cores.kernels("warpgroup.cu").keys() == groups


def test_the_widest_matrix_that_is_taken():
    wide = SimpleNamespace(columns=50000, permutation=np.zeros(1, np.uint16), tiled=True)
    for shared, taken in ((100000, True), (99999, False)):
        assert tensor_cores.takes(wide, AMPERE._replace(shared=shared)) == taken
    for change in ({"permutation": np.zeros(1, np.uint32)}, {"tiled": False}):
        assert not tensor_cores.takes(SimpleNamespace(**{**vars(wide), **change}), AMPERE)


def test_activations_that_do_not_fit_twice_are_arranged_before():
    layout = lay_out(random_case(40, 4096, 128))
    # 16 chunks of 16 tokens; their gather would take 128 KiB more.
    shared = 16 * (3840 + 1024) + 256 + 16 * (8192 + 256)
    assert launched(layout, 16, HOPPER) == [
        ("prefill.cu", "arrange_float16", (16,), 256, 8192, (4096, 1)),
        ("decode.cu", "decode16_float16", (2,), 512, shared, (16, 4096, 1, 16, 40, 40, 40)),
    ]
    assert launched(layout, 16, HOPPER._replace(shared=shared))[1][4] == shared


def test_a_single_chunk_is_gathered_by_the_product_itself():
    layout = lay_out(random_case(33, 200, 64))
    assert [kernel for _, kernel, *_ in launched(layout, 3, HOPPER)] == ["decode8_gather_float16"]


def test_no_more_room_is_made_than_is_written(layout):
    record = Recorder()
    x = xp.zeros((20, COLUMNS), np.float16)
    tensor_cores.multiply(x, layout, HOPPER, xp.zeros((20, 190), np.float16), record)
    sums = record.arrays[0]
    assert (sums.shape, sums.dtype) == ((2, 20, 190), np.float32)
    tensor_cores.unpack(layout, 1, np.float16, AMPERE, record)
    assert record.arrays[-1].shape == (5 * 32, 304)


def test_the_last_token_of_many_is_not_left_out(layout):
    seen = launched(layout, 513, HOPPER)
    assert [numbers[0] for _, kernel, *_, numbers in seen if kernel == "gather"] == [512, 1]


def test_as_many_chunks_as_fit_where_not_all_do():
    layout = lay_out(random_case(33, 64 * 256, 256))
    name, _, _, _, shared, numbers = launched(layout, 16, HOPPER)[-1]
    assert (name, numbers[3]) == ("decode.cu", 18)
    assert shared == 16 * (3840 + 1024) + 256 + 18 * (8192 + 256)
