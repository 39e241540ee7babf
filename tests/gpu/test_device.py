"""What the array modules do not share."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

import gpu
from gpu import device
from gpu.device import STANDIN, DeviceError, is_factor, xp

standin = pytest.mark.skipif(not STANDIN, reason="of the stand-in")


class Foreign:
    """An array of another library: it can be handed over, and is no sequence of numbers."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def test_arrays_are_taken_as_they_lie():
    array = xp.arange(3.0)
    assert gpu.to_device(array) is array
    taken = gpu.to_device(Foreign(array))
    assert isinstance(taken, xp.ndarray)
    assert taken.dtype == np.float64
    array[1] = 7
    assert gpu.to_host(taken).tolist() == [0.0, 7.0, 2.0]


@pytest.mark.parametrize("value", [[1, 2], np.arange(1, 3), 1.5, np.float32(0.5)])
def test_what_is_no_array_of_another_library_is_copied(value):
    taken = gpu.to_device(value)
    assert isinstance(taken, xp.ndarray)
    assert gpu.to_host(taken).tolist() == np.asarray(value).tolist()


@pytest.mark.parametrize("value", [None, 3, [1, 2], np.arange(2)])
def test_what_is_on_the_host_stays_as_it_is(value):
    assert gpu.to_host(value) is value


@standin
def test_the_stand_in_is_no_device():
    assert gpu.describe() == "NumPy standing in for a CUDA device"
    with pytest.raises(DeviceError, match="NumPy stands in for the device"):
        gpu.identity()
    gpu.use_allocator(lambda size, device: 0, lambda address, device: None)
    with gpu.on_stream(5):
        pass


@pytest.mark.parametrize("exponent", [-60, 0, 60])
def test_a_factor_is_told_by_its_shape_and_not_by_its_size(exponent):
    X = np.random.default_rng(0).normal(size=(20, 40)) * 2.0**exponent
    A = X @ X.T
    L, diagonal = np.linalg.cholesky(A), gpu.to_device(np.diag(A).copy())
    assert is_factor(gpu.to_device(L), diagonal)
    for row in (0, 7, 19):
        for error in (1e-3, -1e-3):
            wrong = L.copy()
            wrong[row] *= np.sqrt(1 + error)
            assert not is_factor(gpu.to_device(wrong), diagonal)


def test_the_toolkit_of_a_compiler_is_found_if_numba_can_use_it(tmp_path):
    program = tmp_path / "cuda-13.0" / "bin" / "nvcc"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    (tmp_path / "cuda").symlink_to(tmp_path / "cuda-13.0")
    search_path = f"{tmp_path}:{tmp_path / 'cuda' / 'bin'}"
    assert device.toolkit(search_path) is None
    (tmp_path / "cuda-13.0" / "nvvm").mkdir()
    assert device.toolkit(search_path) == str(tmp_path / "cuda-13.0")
    assert device.toolkit(str(tmp_path)) is None


@standin
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("import no_such_module", "no_such_module is not installed: pip install"),
        ("raise ImportError('libcublas.so.13 is missing')", "cannot be imported: libcublas.so.13 is missing"),
    ],
)
def test_what_keeps_the_device_from_being_used_is_said(line, message, monkeypatch, tmp_path):
    (tmp_path / "cupy.py").write_text(line)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(device, "STANDIN", False)
    with pytest.raises(DeviceError, match=message):
        device.describe()


def test_what_is_singular_has_no_factor():
    # Rows of the right lengths, and a 0 on the diagonal; or a column with the other sign.
    for L in ([[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [1.0, -2.0]], [[-1.0, 0.0], [1.0, 2.0]]):
        diagonal = np.square(L).sum(axis=1)
        assert not is_factor(gpu.to_device(np.array(L)), gpu.to_device(diagonal))


def printed(code, environment=os.environ):
    """What a process of its own prints: modules are imported once in each."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "PYTHONPATH": str(Path(gpu.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()


def test_numba_finds_the_name_that_numpy_has_no_more():
    code = "import numpy as np; vars(np).pop('row_stack', None); import gpu.device; "
    assert printed(code + "print(np.row_stack([[1, 2], [3, 4]]).tolist() == [[1, 2], [3, 4]])") == ["True"]


class DeviceArray:
    """An array of `FakeCuPy`: another type than NumPy's, which its functions take apart again."""

    def __init__(self, on_host):
        self.on_host = np.asarray(on_host)

    def __dlpack__(self, **options):
        raise AssertionError("handed over to the library that it is of")


class NoDevice(Exception):
    """What CUDA says without a device."""


class FakeCuPy(ModuleType):
    """The part of CuPy that `gpu.device` calls, by its documentation, with arrays on the host."""

    ndarray = DeviceArray
    present = True

    def __init__(self):
        super().__init__("cupy")
        self.streams = []
        self.allocator = None
        self.cuda = SimpleNamespace(
            Stream=SimpleNamespace(null=self.entered(0), from_external=self.from_external),
            PythonFunctionAllocator=lambda *functions: SimpleNamespace(
                malloc=lambda size: (*functions, size)
            ),
            MemoryPool=lambda malloc: SimpleNamespace(malloc=lambda size: ("pool", *malloc(size))),
            set_allocator=lambda malloc: setattr(self, "allocator", malloc),
            runtime=SimpleNamespace(
                CUDARuntimeError=NoDevice,
                getDevice=self.get_device,
                getDeviceProperties=lambda number: {"name": b"NVIDIA Any", "major": 9, "minor": number},
                driverGetVersion=lambda: 13010,
                runtimeGetVersion=lambda: 13000,
            ),
        )
        self.linalg = SimpleNamespace(cholesky=lambda A: DeviceArray(np.linalg.cholesky(A.on_host)))
        self.cublas = SimpleNamespace(gemm=self.gemm)

    @contextlib.contextmanager
    def entered(self, pointer):
        self.streams.append(pointer)
        yield
        self.streams.pop()

    def from_external(self, stream):
        version, pointer = stream.__cuda_stream__()
        assert version == 0
        return self.entered(pointer)

    def get_device(self):
        if not self.present:
            raise NoDevice("cudaErrorNoDevice")
        return 0

    def gemm(self, transa, transb, a, b, out, alpha, beta):
        assert (transa, transb) == ("N", "N")
        out.on_host[:] = alpha * (a.on_host @ b.on_host) + beta * out.on_host

    def asarray(self, array):
        return array if isinstance(array, DeviceArray) else DeviceArray(array)

    def from_dlpack(self, array):
        assert not isinstance(array, np.ndarray)  # which is not on a device
        return DeviceArray(np.from_dlpack(array))

    def asnumpy(self, array):
        return array.on_host


@pytest.fixture
def cupy(monkeypatch):
    monkeypatch.setenv("CUDA_PATH", "given")  # where a toolkit would be looked for
    monkeypatch.delenv("CUDA_HOME", raising=False)
    fake = FakeCuPy()
    monkeypatch.setattr(device, "STANDIN", False)
    monkeypatch.setattr(device, "xp", fake)
    monkeypatch.setitem(sys.modules, "cupy", fake)
    return fake


def test_the_device_is_named(cupy):
    assert gpu.describe() == "NVIDIA Any, sm_90"
    assert gpu.identity() == {"device": "NVIDIA Any, sm_90", "driver": "13010", "cuda": "13000"}
    assert device._array_module() is cupy


def test_without_a_device_there_are_no_arrays(cupy):
    cupy.present = False
    with pytest.raises(DeviceError, match="no CUDA device: cudaErrorNoDevice"):
        device._array_module()


@pytest.mark.parametrize("given", [None, "CUDA_PATH", "CUDA_HOME"])
def test_numba_is_told_of_the_toolkit_unless_one_is_given(given, cupy, monkeypatch, tmp_path):
    (tmp_path / "nvvm").mkdir()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'none'}{os.pathsep}{tmp_path / 'bin'}")
    for name in ("CUDA_PATH", "CUDA_HOME"):
        monkeypatch.setenv(name, "given")
        if name != given:
            monkeypatch.delenv(name)
    device._array_module()
    assert os.environ.get("CUDA_HOME") == {None: str(tmp_path), "CUDA_HOME": "given"}.get(given)


def test_without_a_toolkit_numba_is_told_of_none(cupy, monkeypatch):
    monkeypatch.delenv("CUDA_PATH")
    monkeypatch.setattr(device, "toolkit", lambda search_path: None)
    assert device._array_module() is cupy
    assert "CUDA_HOME" not in os.environ


def test_arrays_go_to_the_device_and_back(cupy):
    own = DeviceArray([1.0, 2.0])
    assert gpu.to_device(own) is own
    assert gpu.to_host(own) is own.on_host
    for value in (np.arange(2), Foreign(np.arange(2)), [0, 1]):
        taken = gpu.to_device(value)
        assert isinstance(taken, DeviceArray)
        assert taken.on_host.tolist() == [0, 1]
        assert gpu.to_host(value) is value


def test_work_is_queued_on_the_stream_of_another_library(cupy):
    with gpu.on_stream(7):
        assert cupy.streams == [7]
        with gpu.on_stream(0):
            assert cupy.streams == [7, 0]
    assert cupy.streams == []


def test_memory_is_taken_from_another_library(cupy):
    def allocate(size, number):
        return 0

    def release(address, number):
        pass

    gpu.use_allocator(allocate, release)
    block = 4096 * 128 * 8  # of the rows of a Llama-7B matrix
    for size in (block, device.POOLED):
        assert cupy.allocator(size) == ("pool", allocate, release, size)
    assert cupy.allocator(device.POOLED + 1) == (allocate, release, device.POOLED + 1)


def test_factors_and_products_are_those_of_the_libraries_on_the_device(cupy, monkeypatch):
    factor = device.cholesky(DeviceArray([[4.0, 2.0], [2.0, 5.0]]))
    assert factor.on_host.tolist() == [[2.0, 0.0], [1.0, 2.0]]

    solver = ModuleType("cupyx.scipy.linalg")
    solver.solve_triangular = lambda A, B, trans, lower, **options: (A, B, trans, lower)
    for name in ("cupyx", "cupyx.scipy"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, solver.__name__, solver)
    L, B = np.array([[1.0, 0.0], [2.0, 3.0]]), np.array([[4.0], [5.0]])
    A, right, trans, lower = device.solve_lower(L, B)
    # The transpose of an upper triangle is the lower one.
    assert A.tolist() == [[1.0, 2.0], [0.0, 3.0]]
    assert (right is B, trans, lower) == (True, "T", False)

    C = DeviceArray([[1000.0, 2000.0]])
    device.subtract_product(C, DeviceArray([[1.0, 10.0]]), DeviceArray([[2.0, 3.0], [4.0, 5.0]]))
    assert C.on_host.tolist() == [[1000.0 - 42.0, 2000.0 - 53.0]]
