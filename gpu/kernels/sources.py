"""The CUDA C++ kernels: the text of a source, its compilation, and its launch.

The text consists of instructions.cuh, the constants, ternary.cuh, one .cu file, assertions about its structs,
and a macro for every wanted kernel. Constants that both Python and CUDA need are stated in Python and written
into the text: those of the layout in `reference.layout`, those of one kernel in the launcher beside it, the
others here. The text is one piece, because CuPy's cache of compiled kernels does not look into headers. Every
kernel is compiled alone, so that the first product waits for no other kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from gpu.device import xp
from gpu.kernels.layout import Layout
from gpu.kernels.parameters import MATRIX, TYPES, Arguments, Struct
from reference.layout import CHUNK, PARTS, SPAN, TILE_ROWS, WORD, WORDS

# Threads of a warp.
WARP = 32
# Of the tensor core instruction `mma`: rows of A, columns of B.
ROWS, TILE = 16, 8
# Elements after each row of x in shared memory, 16 bytes. Lanes of neighbouring tokens then read from
# different banks.
PADDING = 8

SHARED_BY_ALL = {
    "WORD": WORD,
    "SPAN": SPAN,
    "CHUNK": CHUNK,
    "WORDS": WORDS,
    "TILE_ROWS": TILE_ROWS,
    "PARTS": PARTS,
    "WARP": WARP,
    "ROWS": ROWS,
    "TILE": TILE,
    "PADDING": PADDING,
}

# Products that must be rounded before they are added are not contracted; the others are written as fmaf.
OPTIONS = ("--std=c++17", "--fmad=false")

FOLDER = Path(__file__).parent
INSTRUCTIONS = "instructions.cuh"


@dataclass(frozen=True, eq=False)
class Source:
    """A .cu file with what Python writes into it.

    Attributes
    ----------
    file : str
        Its name.
    constants : dict of str to int
        Those of its launcher, beside `SHARED_BY_ALL`.
    structs : sequence of Struct
        Parameters of its kernels.
    kernels : dict of str to str
        Every kernel by its name, with the macro that defines it.
    target : str, optional
        The only architecture it compiles for, as in ``sm_90a``; the device's own if left out.
    """

    file: str
    constants: Mapping[str, int]
    structs: Sequence[Struct]
    kernels: Mapping[str, str]
    target: str | None = None

    def text(self, wanted: Sequence[str] | None = None, instructions: str | None = None) -> str:
        """The complete source of some kernels, or of all; compiler messages name the files.

        Parameters
        ----------
        wanted : sequence of str, optional
            Names of kernels.
        instructions : str, optional
            C++ in place of instructions.cuh, for another machine than a GPU.
        """
        constants = SHARED_BY_ALL | dict(self.constants)
        assertions = (line for struct in (MATRIX, *self.structs) for line in struct.assertions())
        parts = (
            _text_of(INSTRUCTIONS) if instructions is None else instructions,
            '#line 1 "constants"',
            *(f"constexpr int {name} = {value};" for name, value in constants.items()),
            _text_of("ternary.cuh"),
            _text_of(self.file),
            '#line 1 "structs"',
            *assertions,
            '#line 1 "kernels"',
            *(self.kernels[kernel] for kernel in (self.kernels if wanted is None else wanted)),
        )
        return "\n".join(parts) + "\n"


def _text_of(file: str) -> str:
    return f'#line 1 "{file}"\n{(FOLDER / file).read_text(encoding="utf-8")}'


# For every type of x and of grid, by the end of a kernel's name: arguments of its template.
VARIANTS = {
    "float16": "Float16, Float16Grid",
    "float16_int8": "Float16, Int8Grid",
    "bfloat16": "BFloat16, Float16Grid",
    "bfloat16_int8": "BFloat16, Int8Grid",
}


def variant(dtype: Any, layout: Layout) -> str:
    """The key of `VARIANTS` for a type of x and a layout."""
    return TYPES[dtype.name] + ("" if layout.row_factors is None else "_int8")


class Limits(NamedTuple):
    """Limits of a device: compute capability (90 for 9.0), bytes of shared memory per block, SMs."""

    capability: int
    shared: int
    sms: int


# NumPy in place of a device.
NO_DEVICE = Limits(0, 0, 0)


@cache
def limits(number: int) -> Limits:
    """The limits of a device."""
    device = xp.cuda.Device(number)
    attributes = device.attributes
    return Limits(
        int(device.compute_capability),
        attributes["MaxSharedMemoryPerBlockOptin"],
        attributes["MultiProcessorCount"],
    )


# Runs a kernel: source, kernel, grid, threads, bytes of dynamic shared memory, arguments.
Launch = Callable[[Source, str, tuple[int, ...], int, int, Arguments], None]


def launch(
    source: Source, kernel: str, grid: tuple[int, ...], threads: int, shared: int, arguments: Arguments
) -> None:
    """Run a kernel on the current device and stream, without waiting for it; a `Launch`."""
    function = _function(source, kernel, xp.cuda.runtime.getDevice())
    struct = arguments.packed(lambda array: array.data.ptr)
    function(grid, (threads,), (struct,), shared_mem=shared)


@cache
def _function(source: Source, kernel: str, device: int) -> Any:
    code = source.text([kernel])
    if source.target is None:
        function = xp.RawModule(code=code, options=OPTIONS).get_function(kernel)
        # Without this a launch may take no more than 48 KiB. The launch itself says how much it takes.
        function.max_dynamic_shared_size_bytes = limits(device).shared
        return function
    # RawModule compiles for the device's own target, as in sm_90, which lacks what sm_90a has.
    nvrtc, driver = xp.cuda.nvrtc, xp.cuda.driver
    program = nvrtc.createProgram(code, source.file, (), ())
    try:
        nvrtc.compileProgram(program, (*OPTIONS, f"-arch={source.target}", "-ftz=true"))
        module = xp.cuda.function.Module()
        module.load(nvrtc.getCUBIN(program))
    except nvrtc.NVRTCError as error:
        raise RuntimeError(f"{source.file} does not compile: {nvrtc.getProgramLog(program)}") from error
    finally:
        nvrtc.destroyProgram(program)
    function = module.get_function(kernel)
    attribute = driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    driver.funcSetAttribute(function.ptr, attribute, limits(device).shared)
    return function
