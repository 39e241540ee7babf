"""Where arrays live: CuPy on a CUDA device, or NumPy standing in for it.

``xp`` is the array module. The stand-in is chosen by ``NUMBA_ENABLE_CUDASIM=1``, the switch of Numba's
own simulator, and never by itself: without it and without a device, importing this module fails with
`DeviceError`. What the two modules do not share is below; nothing else in `gpu` asks which it is.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

# numba-cuda names this before it compiles anything, and NumPy 2.5 has it no more (numba-cuda issue 907).
vars(np).setdefault("row_stack", np.vstack)

STANDIN = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"

Array = Any

# Bytes up to which arrays come from a pool of CuPy's own: those of a block of columns, of which a matrix
# takes thousands. What a whole matrix needs goes back at once to the library it was taken from.
POOLED = 64 << 20

# Rows of a Cholesky factor have the length of the matrix's diagonal to about m·ε, 1e-11 at most.
FACTOR_TOLERANCE = 1e-6


class DeviceError(RuntimeError):
    """No usable CUDA device; the message says what is missing."""


def describe() -> str:
    """The device in words.

    Raises
    ------
    DeviceError
        If there is none, or a package is missing.
    """
    if STANDIN:
        return "NumPy standing in for a CUDA device"
    try:
        import cupy
        import numba.cuda  # noqa: F401
    except ModuleNotFoundError as error:
        raise DeviceError(
            f"{error.name} is not installed: pip install '.[cuda13]' (or cuda12) in the clone"
        ) from None
    except ImportError as error:  # of a library that is missing, or of a version that does not fit
        raise DeviceError(f"CuPy or Numba cannot be imported: {error}") from None
    try:
        properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.runtime.getDevice())
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise DeviceError(f"no CUDA device: {error}") from None
    return f"{properties['name'].decode()}, sm_{properties['major']}{properties['minor']}"


def identity() -> dict[str, str]:
    """Device, driver and CUDA version, for the record of what was verified where.

    Raises
    ------
    DeviceError
        If there is no device: nothing is verified on hardware by its stand-in.
    """
    if STANDIN:
        raise DeviceError("NumPy stands in for the device (NUMBA_ENABLE_CUDASIM=1)")
    runtime = xp.cuda.runtime
    return {
        "device": describe(),
        "driver": str(runtime.driverGetVersion()),
        "cuda": str(runtime.runtimeGetVersion()),
    }


def toolkit(search_path: str) -> str | None:
    """Folder of the CUDA toolkit whose nvcc is on a search path, if it has the compiler of Numba."""
    nvcc = shutil.which("nvcc", path=search_path)
    folder = Path(nvcc).resolve().parent.parent if nvcc else None
    return str(folder) if folder and (folder / "nvvm").is_dir() else None


def _array_module() -> ModuleType:
    if STANDIN:
        return np
    # CuPy finds a toolkit by its nvcc. Numba looks for NVVM in NVIDIA's wheels, which need not be there,
    # and where these variables say, which is asked once in a process.
    if not (os.environ.get("CUDA_PATH") or os.environ.get("CUDA_HOME")):
        found = toolkit(os.pathsep.join((os.environ.get("PATH", ""), "/usr/local/cuda/bin")))
        if found:
            os.environ["CUDA_HOME"] = found
    describe()
    import cupy

    return cupy


xp: Any = _array_module()


def to_device(array: Any) -> Array:
    """A NumPy array on the device; a device array, also of another library by DLPack, as it lies."""
    if isinstance(array, np.ndarray | xp.ndarray) or not hasattr(array, "__dlpack__"):
        return xp.asarray(array)
    return xp.from_dlpack(array)


def to_host(array: Any) -> Any:
    """A device array as NumPy's; anything else as it is."""
    return array if STANDIN or not isinstance(array, xp.ndarray) else xp.asnumpy(array)


@contextmanager
def on_stream(pointer: int) -> Iterator[None]:
    """Queue what is inside on another library's CUDA stream; 0 is the default stream."""
    if STANDIN:
        yield
        return
    own = xp.cuda.Stream
    with own.from_external(_ExternalStream(pointer)) if pointer else own.null:
        yield


@dataclass(frozen=True)
class _ExternalStream:
    """A stream as CUDA's Python libraries hand it to each other."""

    pointer: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer  # version of the protocol, cudaStream_t


def use_allocator(allocate: Callable[[int, int], int], release: Callable[[int, int], None]) -> None:
    """Take device memory from another library, so that two pools do not compete for it.

    Parameters
    ----------
    allocate : callable
        Maps bytes and number of the device to an address.
    release : callable
        Takes an address and the number of the device.
    """
    if STANDIN:
        return
    direct = xp.cuda.PythonFunctionAllocator(allocate, release).malloc
    pooled = xp.cuda.MemoryPool(direct).malloc
    xp.cuda.set_allocator(lambda size: pooled(size) if size <= POOLED else direct(size))


def cholesky(A: Array) -> Array:
    """Lower factor of a symmetric (m, m) float64 matrix, without waiting for the device.

    Where there is none the result is not a factor, and `is_factor` says so.
    """
    if not STANDIN:
        return xp.linalg.cholesky(A)
    try:
        return np.linalg.cholesky(A)
    except np.linalg.LinAlgError:
        return np.full_like(A, np.nan)


def is_factor(L: Array, diagonal: Array) -> Array:
    """Whether L (..., m, m) can be Cholesky factors of matrices with these diagonals, as a device scalar.

    The status that cuSOLVER returns is not read, which would stop the host. A failed factorization
    leaves a matrix whose rows do not have the lengths that the diagonal gives them.
    """
    lengths = xp.square(L).sum(axis=-1)
    close = abs(lengths - diagonal) <= FACTOR_TOLERANCE * diagonal
    return ((xp.diagonal(L, axis1=-2, axis2=-1) > 0) & close).all()  # comparisons with NaN are False


def solve_lower(L: Array, B: Array) -> Array:
    """X with L X = B for a lower triangular L; a B in Fortran's order is overwritten by it.

    cuBLAS counts by columns: the transpose of L, which is C-ordered, is taken as it lies, without a copy.
    """
    if STANDIN:
        from scipy.linalg import solve_triangular
    else:
        from cupyx.scipy.linalg import solve_triangular
    return solve_triangular(L.T, B, trans="T", lower=False, overwrite_b=True, check_finite=False)


def subtract_product(C: Array, A: Array, B: Array) -> None:
    """``C -= A @ B`` in place for C-ordered matrices of one dtype; CuPy needs no temporary of C's size.

    Of `cupy.cublas.gemm`: a C-ordered `out` is taken as the transpose of what cuBLAS counts by columns,
    and where both factors are contiguous, in either order, nothing is copied.
    """
    if STANDIN:
        C -= A @ B
        return
    from cupy import cublas

    cublas.gemm("N", "N", A, B, out=C, alpha=-1.0, beta=1.0)
