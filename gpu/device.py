"""Where arrays live: CuPy on a CUDA device, or NumPy standing in for it.

``xp`` is the array module. The stand-in is chosen by ``NUMBA_ENABLE_CUDASIM=1``, the switch of Numba's
own simulator, and never automatically: without it and without a device, importing this module raises
`DeviceError`. Array code that differs between the two is in this module.
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

# numba-cuda reads this name before its first compilation, but NumPy 2.5 removed it (numba-cuda issue 907).
vars(np).setdefault("row_stack", np.vstack)

STANDIN = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"

Array = Any

# Size in bytes of the largest array from CuPy's own pool: it serves arrays of one block of columns, thousands
# per matrix. Larger arrays are allocated by the other library directly, and returned to it when freed.
POOLED = 64 << 20

# The squared row norms of a Cholesky factor equal the matrix's diagonal to about m·ε, at most 1e-11.
FACTOR_TOLERANCE = 1e-6


class DeviceError(RuntimeError):
    """No usable CUDA device; the message says what is missing."""


def describe() -> str:
    """Name the device.

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
    except ImportError as error:  # a missing or incompatible shared library
        raise DeviceError(f"CuPy or Numba cannot be imported: {error}") from None
    try:
        properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.runtime.getDevice())
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise DeviceError(f"no CUDA device: {error}") from None
    return f"{properties['name'].decode()}, sm_{properties['major']}{properties['minor']}"


def identity() -> dict[str, str]:
    """Return device, driver and CUDA version, for the record of hardware verification.

    Raises
    ------
    DeviceError
        If there is no device; the stand-in is not hardware.
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
    """Find the CUDA toolkit by its nvcc on a search path; None if it lacks NVVM, which Numba needs."""
    nvcc = shutil.which("nvcc", path=search_path)
    folder = Path(nvcc).resolve().parent.parent if nvcc else None
    return str(folder) if folder and (folder / "nvvm").is_dir() else None


def _array_module() -> ModuleType:
    if STANDIN:
        return np
    # CuPy finds a toolkit by its nvcc. Numba searches for NVVM in NVIDIA's wheels, which may be missing, and
    # in the folder named by these variables, which it reads once per process.
    if not (os.environ.get("CUDA_PATH") or os.environ.get("CUDA_HOME")):
        found = toolkit(os.pathsep.join((os.environ.get("PATH", ""), "/usr/local/cuda/bin")))
        if found:
            os.environ["CUDA_HOME"] = found
    describe()
    import cupy

    return cupy


xp: Any = _array_module()


def to_device(array: Any) -> Array:
    """Copy a NumPy array to the device; take device arrays, also by DLPack, without a copy."""
    if isinstance(array, np.ndarray | xp.ndarray) or not hasattr(array, "__dlpack__"):
        return xp.asarray(array)
    return xp.from_dlpack(array)


def to_host(array: Any) -> Any:
    """Copy a device array to NumPy; return anything else unchanged."""
    return array if STANDIN or not isinstance(array, xp.ndarray) else xp.asnumpy(array)


@contextmanager
def on_stream(pointer: int) -> Iterator[None]:
    """Run the body of a ``with`` statement on another library's CUDA stream; 0 is the default stream."""
    if STANDIN:
        yield
        return
    own = xp.cuda.Stream
    with own.from_external(_ExternalStream(pointer)) if pointer else own.null:
        yield


@dataclass(frozen=True)
class _ExternalStream:
    """A stream that implements the protocol by which CUDA's Python libraries share streams."""

    pointer: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer  # version of the protocol, cudaStream_t


def use_allocator(allocate: Callable[[int, int], int], release: Callable[[int, int], None]) -> None:
    """Allocate device memory through another library, so that two pools do not compete for it.

    Parameters
    ----------
    allocate : callable
        Maps a size in bytes and a device number to an address.
    release : callable
        Takes an address and a device number.
    """
    if STANDIN:
        return
    direct = xp.cuda.PythonFunctionAllocator(allocate, release).malloc
    pooled = xp.cuda.MemoryPool(direct).malloc
    xp.cuda.set_allocator(lambda size: pooled(size) if size <= POOLED else direct(size))


def cholesky(A: Array) -> Array:
    """Lower Cholesky factor of a symmetric (m, m) float64 matrix, without waiting for the device.

    If the matrix has no Cholesky factor, the result is invalid; test it with `is_factor`.
    """
    if not STANDIN:
        return xp.linalg.cholesky(A)
    try:
        return np.linalg.cholesky(A)
    except np.linalg.LinAlgError:
        return np.full_like(A, np.nan)


def is_factor(L: Array, diagonal: Array) -> Array:
    """Whether L (..., m, m) can be Cholesky factors of matrices with these diagonals, as a device scalar.

    Reading cuSOLVER's status would make the host wait. Instead, compare the squared row norms with the
    diagonal; they do not match after a failed factorization.
    """
    lengths = xp.square(L).sum(axis=-1)
    close = abs(lengths - diagonal) <= FACTOR_TOLERANCE * diagonal
    return ((xp.diagonal(L, axis1=-2, axis2=-1) > 0) & close).all()  # comparisons with NaN are False


def solve_lower(L: Array, B: Array) -> Array:
    """Solve L X = B for a lower triangular L; overwrite B if it is in Fortran order.

    cuBLAS is column-major, so the transpose of a C-ordered L needs no copy.
    """
    if STANDIN:
        from scipy.linalg import solve_triangular
    else:
        from cupyx.scipy.linalg import solve_triangular
    return solve_triangular(L.T, B, trans="T", lower=False, overwrite_b=True, check_finite=False)


def solve_systems(A: Array, B: Array) -> Array:
    """Solve A_i x_i = b_i for positive definite A (r, k, k) and B (r, k), without waiting for the device.

    `cupy.linalg.solve` would factor systems larger than 256 one after the other.
    """
    if STANDIN:
        return np.linalg.solve(A, B[..., None])[..., 0]
    from cupyx.lapack import posv

    return posv(A, B)


def subtract_product(C: Array, A: Array, B: Array) -> None:
    """Compute ``C -= A @ B`` in place for C-ordered matrices of one dtype, without a temporary of C's size.

    `cupy.cublas.gemm` writes a C-ordered `out` as the transpose of a column-major matrix, and copies
    neither factor if both are contiguous, in either order.
    """
    if STANDIN:
        C -= A @ B
        return
    from cupy import cublas

    cublas.gemm("N", "N", A, B, out=C, alpha=-1.0, beta=1.0)
