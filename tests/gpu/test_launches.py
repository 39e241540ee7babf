"""What is launched for a product, by hand: kernels, grids, threads, shared memory, and what they are told."""

from __future__ import annotations

import numpy as np
import pytest

from gpu.device import xp
from gpu.kernels import arrange, decode, dense, prefill, warpgroup
from gpu.kernels.sources import Limits
from gpu.layout import join
from tests.gpu.ternary_cases import coded_case, lay_out, multiply_on, random_case

AMPERE = Limits(80, 166912, 108)
HOPPER = Limits(90, 232448, 132)

# 2, 5 and 1 tiles of 32 rows; 300 columns are two chunks of 256.
ROWS, COLUMNS = (40, 130, 20), 300


# What kernels are told of that matrix.
MATRIX = {"m": COLUMNS, "pairs_shift": 1, "ends": (40, 170, 190)}


class Recorder:
    """Takes launches in the place of a device."""

    def __init__(self):
        self.seen = []

    def __call__(self, source, kernel, grid, threads, shared, arguments):
        self.arrays = {}
        numbers = self.read(arguments.values)
        self.seen.append((source.file, kernel, grid, threads, shared, numbers))

    def read(self, values):
        numbers = {}
        for name, value in values.items():
            if isinstance(value, dict):
                numbers |= self.read(value)
            elif isinstance(value, int | tuple):
                numbers[name] = value
            else:
                self.arrays[name] = value
        return numbers


@pytest.fixture
def layout():
    return join([lay_out(random_case(rows, COLUMNS, 128)) for rows in ROWS])


def launched(layout, tokens, device, dtype="float16"):
    record = Recorder()
    x = xp.zeros((tokens, layout.columns), dtype)
    multiply_on(device, x, layout, xp.zeros((tokens, layout.ends[-1]), dtype), record)
    return record.seen


@pytest.mark.parametrize(
    ("tokens", "dtype", "kernel", "shared"),
    [
        # Stages of 16 warps, their sums, padding; two chunks of x and its sums; x as it is given.
        (3, "float16", "decode8_gather_float16", 16 * (3840 + 512) + 48 + 2 * (1536 + 128) + 1800),
        (16, "uint16", "decode16_gather_bfloat16", 16 * (3840 + 1024) + 256 + 2 * (8192 + 256) + 9600),
    ],
)
def test_few_tokens_are_one_launch(tokens, dtype, kernel, shared, layout):
    expected = [("decode.cu", kernel, (8,), 512, shared, MATRIX | {"tokens": tokens, "phase": 2})]
    assert launched(layout, tokens, HOPPER, dtype) == expected
    few = HOPPER._replace(sms=5)
    assert [grid for _, _, grid, *_ in launched(layout, tokens, few, dtype)] == [(5,)]


def test_many_tokens_are_arranged_once_and_multiplied_part_by_part(layout):
    def part(number, tiles, rows):
        (first_tile, last_tile), (row, end) = tiles, rows
        grid = -(-(last_tile - first_tile) // 4), 2
        places = {"first_tile": first_tile, "last_tile": last_tile, "row": row, "end": end}
        numbers = MATRIX | {"tokens": 70, "part": number} | places
        return ("prefill.cu", "prefill_float16", grid, 128, 64 * (264 * 2 + 4 * 4), numbers)

    assert launched(layout, 70, AMPERE) == [
        ("arrange.cu", "arrange_float16", (70,), 256, 600, {"m": 300, "parts": 3}),
        part(0, (0, 2), (0, 40)),
        part(1, (2, 7), (40, 170)),
        part(2, (7, 8), (170, 190)),
    ]


def test_warp_groups_take_512_tokens_at_a_time_and_share_out_columns(layout):
    def portion(tokens, tiles, splits=2):
        gather = {"tokens": tokens, "m": 300}
        product = MATRIX | {"tokens": tokens, "splits": splits}
        grid = 1 + 2 + 1, splits * tiles
        return [
            ("warpgroup.cu", "gather", (tokens, 3), 1024, 600, gather),
            ("warpgroup.cu", "warpgroup_float16", grid, 256, 3 * 256 * 128 * 2, product),
            ("warpgroup.cu", "combine_float16", (1, tokens), 256, 0, {"n": 190, "splits": 2}),
        ]

    assert launched(layout, 600, HOPPER) == portion(512, 4) + portion(88, 1)
    assert launched(layout, 512, HOPPER) == portion(512, 4)
    assert launched(layout, 17, HOPPER) == portion(17, 1)
    assert launched(layout, 88, HOPPER._replace(sms=7)) == portion(88, 1, splits=1)[:2]


def test_columns_are_shared_out_among_four_at_the_most():
    layout = lay_out(random_case(33, 2560, 256))
    splits = {
        sms: launched(layout, 20, HOPPER._replace(sms=sms))[1][5]["splits"] for sms in (1, 2, 3, 4, 5, 132)
    }
    assert splits == {1: 1, 2: 2, 3: 3, 4: 4, 5: 4, 132: 4}


def test_room_for_gathered_activations_and_sums(layout):
    record = Recorder()
    x = xp.zeros((130, COLUMNS), np.float16)
    multiply_on(HOPPER._replace(sms=1), x, layout, xp.zeros((130, 190), np.float16), record)
    assert record.arrays["gathered"].shape == (3, 2, 2 * 256 // 8, 128, 8)
    assert record.arrays["sums"].shape == (1,)
    arranged, span_sums = arrange.arrange(x, layout, record)
    assert (arranged.shape, arranged.dtype) == ((3, 130, 512), np.float16)
    assert (span_sums.shape, span_sums.dtype) == ((3, 130, 8), np.float32)


@pytest.mark.parametrize(
    ("shared", "row_pairs"), [(166912, 8), (3 * 8 * 1232, 8), (3 * 8 * 1232 - 1, 4), (1232, 1)]
)
def test_weights_are_unpacked_by_row_pairs(shared, row_pairs, layout):
    record = Recorder()
    weights = dense.unpack(layout, 1, np.uint16, AMPERE._replace(shared=shared), record)
    assert weights.shape == (130, 300)
    assert weights.strides == (304 * 2, 2)
    sizes = {"width": 304, "stride": 308, "row_pairs": row_pairs, "part": 1, "first_tile": 2}
    grid = (5 * 16 // row_pairs,)
    expected = ("dense.cu", "dense_bfloat16", grid, 256, row_pairs * 308 * 4, MATRIX | sizes)
    assert record.seen == [expected]
    assert dense.row_pairs_at_once(300, 1231) == 0


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
    assert decode.SOURCE.kernels.keys() == decoded
    assert arrange.SOURCE.kernels.keys() == {f"arrange_{dtype}" for dtype in types}
    assert prefill.SOURCE.kernels.keys() == {f"prefill_{kind}" for kind in every}
    assert dense.SOURCE.kernels.keys() == {f"dense_{kind}" for kind in every}
    groups = {"gather"} | {f"combine_{dtype}" for dtype in types} | {f"warpgroup_{kind}" for kind in every}
    assert warpgroup.SOURCE.kernels.keys() == groups
    assert warpgroup.SOURCE.target == "sm_90a"


def test_activations_that_do_not_fit_twice_are_arranged_before():
    layout = lay_out(random_case(40, 4096, 128))
    # 16 chunks of 16 tokens; their gather would take 128 KiB more.
    shared = 16 * (3840 + 1024) + 256 + 16 * (8192 + 256)
    numbers = {"m": 4096, "pairs_shift": 1, "ends": (40, 40, 40), "tokens": 16, "phase": 16}
    assert launched(layout, 16, HOPPER) == [
        ("arrange.cu", "arrange_float16", (16,), 256, 8192, {"m": 4096, "parts": 1}),
        ("decode.cu", "decode16_float16", (2,), 512, shared, numbers),
    ]
    assert launched(layout, 16, HOPPER._replace(shared=shared))[1][4] == shared


def test_a_single_chunk_is_gathered_by_the_product_itself():
    layout = lay_out(random_case(33, 200, 64))
    assert [kernel for _, kernel, *_ in launched(layout, 3, HOPPER)] == ["decode8_gather_float16"]


def test_no_more_room_is_made_than_is_written(layout):
    record = Recorder()
    x = xp.zeros((20, COLUMNS), np.float16)
    multiply_on(HOPPER, x, layout, xp.zeros((20, 190), np.float16), record)
    sums = record.arrays["sums"]
    assert (sums.shape, sums.dtype) == ((2, 20, 190), np.float32)
    dense.unpack(layout, 1, np.float16, AMPERE, record)
    assert record.arrays["weights"].shape == (5 * 32, 304)


def test_the_last_token_of_many_is_not_left_out(layout):
    seen = launched(layout, 513, HOPPER)
    assert [numbers["tokens"] for _, kernel, *_, numbers in seen if kernel == "gather"] == [512, 1]


def test_as_many_chunks_as_fit_where_not_all_do():
    layout = lay_out(random_case(33, 64 * 256, 256))
    name, _, _, _, shared, numbers = launched(layout, 16, HOPPER)[-1]
    assert (name, numbers["phase"]) == ("decode.cu", 18)
    assert shared == 16 * (3840 + 1024) + 256 + 18 * (8192 + 256)


@pytest.mark.parametrize(
    ("shared", "expected"), [(227, [16]), (160, [8, 8]), (125, [6, 6, 4]), (86, [16])], ids=str
)
def test_fewer_tokens_at_once_where_x_of_all_does_not_fit(shared, expected):
    """17 chunks of 16 tokens take 217 KiB of shared memory, of 8 tokens 139 KiB, of 6 tokens 122 KiB."""
    layout = lay_out(random_case(40, 4200, 128))
    record = Recorder()
    y = xp.zeros((16, 40), np.float16)
    multiply_on(Limits(90, shared * 1024, 3), xp.zeros((16, 4200), np.float16), layout, y, record)
    launches = [numbers for name, *_, numbers in record.seen if name == "decode.cu"]
    assert [numbers["tokens"] for numbers in launches] == expected
    assert record.arrays["y"].shape == (expected[-1], 40)
