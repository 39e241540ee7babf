"""The CUDA C++ kernels on a CPU: compiled by g++ with `emulation.hpp` in place of the device."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from functools import cache
from pathlib import Path

import numpy as np

from gpu.kernels import tensor_cores

SOURCES = ("decode.cu", "prefill.cu", "dense.cu")
COMPILER = shutil.which("g++")


class Emulator:
    """Launches kernels for the functions of `tensor_cores`.

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

    def _compile(self, name, kernel):
        """One kernel, as a device compiles it; emulators that share a folder compile it once."""
        library = Path(self.folder) / f"{kernel}.so"
        if not library.exists():
            text = tensor_cores.source(name, [kernel])
            if self.edit is not None:
                text = text.replace(*self.edit)
            _, ours = text.split('#line 1 "ternary.cuh"')
            header = Path(__file__).with_name("emulation.hpp")
            file = library.with_suffix(".cpp")
            parts = (
                f'#include "{header}"',
                f'#line 1 "ternary.cuh"{ours}',
                f"void (*const BODY)() = [] {{ call({kernel}); }};",
            )
            file.write_text("\n".join(parts) + "\n", encoding="utf-8")
            command = [COMPILER, "-std=c++17", "-O2", "-w", "-shared", "-fPIC", "-o", library, file]
            subprocess.run(command, check=True)
        emulate = ctypes.CDLL(str(library)).emulate
        emulate.restype = ctypes.c_char_p
        return emulate

    def __call__(self, source, kernel, grid, threads, shared, arguments):
        self.launched.append(kernel)
        arrays = [value for value in arguments if isinstance(value, np.ndarray)]
        assert all(array.flags.c_contiguous for array in arrays)
        numbers = [int(value) for value in arguments if not isinstance(value, np.ndarray)]
        width, height = (*grid, 1)[:2]
        failure = self._library(source, kernel)(
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
