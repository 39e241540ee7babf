"""What the launcher says of the kernels' sizes, and what their sources say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gpu.kernels import tensor_cores
from tests.gpu.ternary_cases import lay_out, random_case

FOLDER = Path(tensor_cores.__file__).parent


def constants(source):
    """Those of a source and what it includes, by name."""
    found = {}
    text = "".join((FOLDER / file).read_text() for file in ("ternary.cuh", "instructions.cuh", source))
    for declaration in re.findall(r"^constexpr int ([^;]*);", text, re.MULTILINE):
        for name, value in re.findall(r"(\w+) = ([^,]+)", declaration):
            found[name] = eval(value.replace("/", "//"), {}, found)
    return found


# Names in the launcher, and in the source, or how that has them.
SIZES = {
    "decode.cu": {
        "SPAN": "SPAN",
        "TILE": "TILE",
        "PADDING": "PADDING",
        "CHUNK": "CHUNK",
        "TILE_ROWS": "TILE_ROWS",
        "PARTS": "PARTS",
        "MOST_DECODED": "2 * TILE",
        "DECODE_THREADS": "THREADS",
        "DECODE_STAGES": "STAGES",
        # Words of 16 rows of a chunk, and up to four pairs of float16 for each.
        "STAGE_BYTES": "ROWS * WORDS * 4 + ROWS * SPANS * 4",
    },
    "prefill.cu": {
        "ARRANGE_THREADS": "ARRANGE_THREADS",
        "PREFILL_TILES": "WARPS",
        "PREFILL_TOKENS": "TOKENS",
        "PREFILL_THREADS": "THREADS",
    },
    "dense.cu": {"DENSE_THREADS": "THREADS", "COUPLES": "COUPLES"},
    "warpgroup.cu": {
        "WARPGROUP_THREADS": "THREADS",
        "WARPGROUP_ROWS": "BLOCK_ROWS",
        "WARPGROUP_TOKENS": "TOKENS",
        "WARPGROUP_STAGES": "STAGES",
        "GATHER_THREADS": "GATHER_THREADS",
        "COMBINE_THREADS": "COMBINE_THREADS",
    },
}


@pytest.mark.parametrize("source", SIZES)
def test_sizes_are_those_of_the_source(source):
    known = constants(source)
    for name, expression in SIZES[source].items():
        assert getattr(tensor_cores, name) == eval(expression, {}, known), name


@pytest.mark.parametrize(
    ("capability", "fast"), [(75, False), (79, False), (80, True), (89, True), (90, True), (120, True)]
)
def test_what_is_older_than_ampere_has_no_fast_kernel(capability, fast):
    layout = lay_out(random_case(3, 300, 128))
    assert tensor_cores.takes(layout, tensor_cores.Limits(capability, 99 * 1024, 100)) == fast


@pytest.mark.parametrize(("capability", "groups"), [(89, False), (90, True), (91, False), (100, False)])
def test_only_hopper_has_warp_groups(capability, groups):
    case = random_case(3, 300, 128)
    device = tensor_cores.Limits(capability, 228 * 1024, 132)
    assert tensor_cores.takes_warpgroups(case.activations(17, "float16"), lay_out(case), device) == groups
    assert tensor_cores.HOPPER_TARGET == "sm_90a"
