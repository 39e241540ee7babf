"""The CUDA C++ kernels on a CPU: compiled by g++, with `emulation.cpp` in place of the device."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

COMPILER = shutil.which("g++")
# Fortified, a jump to the stack of another thread is taken for an error.
OPTIONS = ("-std=c++17", "-O2", "-U_FORTIFY_SOURCE", "-w", "-fPIC")
DEVICE = Path(__file__).with_suffix(".cpp")


@cache
def _device():
    """The emulated device, compiled: once for all processes, as it takes longer than a kernel does."""
    texts = [path.read_bytes() for path in sorted(DEVICE.parent.glob("emulation*.[ch]pp"))]
    cached = DEVICE.parent / "__pycache__" / f"emulation.{hashlib.sha256(b''.join(texts)).hexdigest()[:16]}.o"
    if not cached.exists():
        cached.parent.mkdir(exist_ok=True)
        # Others may be at it as well.
        own = cached.with_suffix(f".{os.getpid()}.o")
        subprocess.run([COMPILER, *OPTIONS, "-c", "-o", own, DEVICE], check=True)
        own.replace(cached)
    return cached


@cache
def _compiled(folder, source, kernel, edit):
    """A library with one kernel, compiled alone as for a device; SyntaxError if that fails."""
    text = source.text([kernel], instructions="")
    if edit is not None:
        text = text.replace(*edit)
    parts = (
        f'#include "{DEVICE.with_suffix(".hpp")}"',
        text,
        f"void (*const BODY)() = [] {{ call({kernel}); }};\n",
    )
    code = "\n".join(parts).encode()
    # A library of a path that this process, or the one it was forked from, has loaded is not loaded again.
    file = Path(folder) / f"{kernel}.{hashlib.sha256(code).hexdigest()}.cpp"
    file.write_bytes(code)
    library = file.with_suffix(".so")
    if subprocess.run([COMPILER, *OPTIONS, "-shared", "-o", library, file, _device()]).returncode != 0:
        raise SyntaxError(f"{source.file} does not compile")
    found = ctypes.CDLL(str(library))
    found.guard.restype = ctypes.c_void_p
    found.emulate.restype = ctypes.c_char_p
    return found


class Emulator:
    """Launches kernels for the launchers of `gpu.kernels`: a `gpu.kernels.sources.Launch`.

    Attributes
    ----------
    folder : Path
        Where compiled kernels go.
    reverse : bool
        Whether blocks and threads run from the last to the first, and warps in turn.
    edit : tuple of str, optional
        A text of the sources, and what to put in its place: a fault that tests must see.
    launched : list of str
        Kernels that ran.
    """

    def __init__(self, folder, reverse=False, edit=None):
        self.folder, self.reverse, self.edit = folder, reverse, edit
        self.launched = []

    def __call__(self, source, kernel, grid, threads, shared, arguments):
        self.launched.append(kernel)
        # Which tests run which source, sound or not, is of interest to those who plant faults in it.
        sys.audit("emulation.launch", source.file, self.edit is None)
        library = _compiled(self.folder, source, kernel, self.edit)
        parameters = arguments.packed(
            lambda array: library.guard(ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes))
        )
        width, height = (*grid, 1)[:2]
        failure = library.emulate(
            width,
            height,
            threads,
            ctypes.c_size_t(shared),
            int(self.reverse),
            ctypes.c_void_p(parameters.ctypes.data),
        )
        assert not failure, f"{kernel}: {failure.decode()}"
