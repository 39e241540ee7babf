"""The CUDA C++ kernels on a CPU: compiled by g++ with `emulation.hpp` in place of the device."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import numpy as np

from gpu.kernels import tensor_cores

SOURCES = ("decode.cu", "prefill.cu")
COMPILER = shutil.which("g++")


def kernel_names(source):
    """What a source defines for launches, by its macros."""
    text = (Path(tensor_cores.__file__).parent / source).read_text(encoding="utf-8")
    names = re.findall(r"^DECODE\((\w+),", text, re.M)
    for kind in re.findall(r"^PREFILL\((\w+),", text, re.M):
        names += [f"arrange_{kind}", f"prefill_{kind}"]
    return names


class Emulator:
    """Launches kernels for `tensor_cores.multiply`.

    Attributes
    ----------
    folder : Path
        Where compiled kernels go.
    reverse : bool
        Whether threads run from the last to the first.
    edit : tuple of str, optional
        A text of the sources, and what to put in its place: a fault that tests must see.
    launched : list of str
        Kernels that ran.
    """

    def __init__(self, folder, reverse=False, edit=None):
        self.folder, self.reverse, self.edit = folder, reverse, edit
        self.launched = []
        self._library = cache(self._compile)

    def _compile(self, name):
        text = tensor_cores.source(name)
        if self.edit is not None:
            text = text.replace(*self.edit)
        _, ours = text.split('#line 1 "ternary.cuh"')
        table = "".join(f'{{"{kernel}", [] {{ call({kernel}); }}}},\n' for kernel in kernel_names(name))
        header = Path(__file__).with_name("emulation.hpp")
        file = Path(self.folder) / f"{name}.cpp"
        parts = (
            f'#include "{header}"',
            f'#line 1 "ternary.cuh"{ours}',
            f"const Kernel KERNELS[] = {{\n{table}{{}}}};",
        )
        file.write_text("\n".join(parts) + "\n", encoding="utf-8")
        library = file.with_suffix(".so")
        subprocess.run(
            [COMPILER, "-std=c++17", "-O2", "-w", "-shared", "-fPIC", "-o", library, file], check=True
        )
        emulate = ctypes.CDLL(str(library)).emulate
        emulate.restype = ctypes.c_char_p
        return emulate

    def __call__(self, source, kernel, grid, threads, shared, arguments):
        self.launched.append(kernel)
        arrays = [value for value in arguments if isinstance(value, np.ndarray)]
        assert all(array.flags.c_contiguous for array in arrays)
        numbers = [int(value) for value in arguments if not isinstance(value, np.ndarray)]
        width, height = (*grid, 1)[:2]
        failure = self._library(source)(
            kernel.encode(),
            width,
            height,
            threads,
            ctypes.c_size_t(shared),
            int(self.reverse),
            len(arrays),
            (ctypes.c_void_p * len(arrays))(*(array.ctypes.data for array in arrays)),
            (ctypes.c_size_t * len(arrays))(*(array.nbytes for array in arrays)),
            (ctypes.c_int * len(numbers))(*numbers),
        )
        assert not failure, f"{kernel}: {failure.decode()}"
