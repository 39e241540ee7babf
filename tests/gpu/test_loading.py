"""How compiled kernels get onto a device, on a library that stands in for CuPy."""

from types import SimpleNamespace

import numpy as np
import pytest

from gpu.kernels import decode, launching, parameters, sources, warpgroup
from gpu.kernels.packing import pack_rows_kernel


class NVRTCError(Exception):
    pass


class FakeCuPy:
    """What loads kernels, and a log of it."""

    ndarray = np.ndarray

    def __init__(self, broken=False):
        self.log = []
        self.broken = broken
        self.RawModule = self.compile_here
        self.cuda = SimpleNamespace(
            Device=lambda number: SimpleNamespace(
                compute_capability="90",
                attributes={"MaxSharedMemoryPerBlockOptin": 232448, "MultiProcessorCount": 100 + number},
            ),
            runtime=SimpleNamespace(getDevice=lambda: 3),
            function=SimpleNamespace(Module=lambda: self),
            nvrtc=self,
            driver=SimpleNamespace(
                CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8,
                funcSetAttribute=lambda *set_to: self.log.append(("attribute", *set_to)),
            ),
        )

    NVRTCError = NVRTCError

    def compile_here(self, code, options):
        self.log.append(("raw", code, options))
        return self

    def createProgram(self, code, name, headers, names):
        self.log.append(("create", code, name))
        return "program"

    def compileProgram(self, program, options):
        self.log.append(("compile", program, options))
        if self.broken:
            raise NVRTCError

    def getProgramLog(self, program):
        return f"the log of the {program}"

    def getCUBIN(self, program):
        return f"the code of the {program}"

    def destroyProgram(self, program):
        self.log.append(("destroy", program))

    def load(self, code):
        self.log.append(("load", code))

    def get_function(self, name):
        self.log.append(("function", name))
        return Function(self, name)


class Function:
    """A kernel of `FakeCuPy`; a launch shows what has been set before."""

    max_dynamic_shared_size_bytes = None
    ptr = 4096

    def __init__(self, library, name):
        self.library, self.name = library, name

    def __call__(self, grid, threads, arguments, **options):
        most = self.max_dynamic_shared_size_bytes
        self.library.log.append(("launch", self.name, grid, threads, arguments, options, most))


@pytest.fixture
def cupy(monkeypatch):
    fake = FakeCuPy()
    for module in (sources, parameters, launching):
        monkeypatch.setattr(module, "xp", fake)
    # What is kept for the device of this process is not to be these.
    for module, name in ((sources, "_function"), (sources, "limits"), (launching, "_function")):
        monkeypatch.setattr(module, name, getattr(module, name).__wrapped__)
    return fake


def test_limits_are_those_of_the_device(cupy):
    assert sources.limits(3) == (90, 232448, 103)


@pytest.fixture
def arguments():
    """Those of a kernel, with arrays that say where they lie as CuPy's do."""
    x, permutation, gathered = (np.zeros(16, np.uint16).view(WithAddress) for _ in range(3))
    return warpgroup.GATHER.of(x=x, permutation=permutation, gathered=gathered, tokens=1, m=7)


def launched(cupy):
    """The last launch, and the one argument of its kernel."""
    *launch, (argument,), options, most = cupy.log[-1]
    assert argument.size == 1  # an array that CuPy passes by value
    assert argument.tolist() == (640, 640, 640, 1, 7)
    return *launch, options, most


def test_a_source_is_compiled_by_the_library_and_may_take_all_shared_memory(cupy, arguments):
    sources.launch(decode.SOURCE, "decode8_float16", (5, 2), 512, 70000, arguments)
    code = decode.SOURCE.text(["decode8_float16"])
    assert cupy.log[:-1] == [
        ("raw", code, ("--std=c++17", "--fmad=false")),
        ("function", "decode8_float16"),
    ]
    expected = ("launch", "decode8_float16", (5, 2), (512,), {"shared_mem": 70000}, 232448)
    assert launched(cupy) == expected


def test_the_source_for_hopper_alone_is_compiled_for_its_own_target(cupy, arguments):
    sources.launch(warpgroup.SOURCE, "gather", (1,), 1024, 600, arguments)
    options = ("--std=c++17", "--fmad=false", "-arch=sm_90a", "-ftz=true")
    assert cupy.log[:-1] == [
        ("create", warpgroup.SOURCE.text(["gather"]), "warpgroup.cu"),
        ("compile", "program", options),
        ("load", "the code of the program"),
        ("destroy", "program"),
        ("function", "gather"),
        ("attribute", 4096, 8, 232448),
    ]
    assert launched(cupy) == ("launch", "gather", (1,), (1024,), {"shared_mem": 600}, None)


def test_what_does_not_compile_is_an_error_with_the_log(cupy, arguments):
    cupy.broken = True
    with pytest.raises(RuntimeError, match=r"warpgroup\.cu does not compile: the log of the program"):
        sources.launch(warpgroup.SOURCE, "gather", (1,), 1024, 600, arguments)
    assert cupy.log[-1] == ("destroy", "program")


def test_a_kernel_of_numba_is_compiled_for_the_device_and_loaded(cupy, monkeypatch):
    made = []
    monkeypatch.setattr(launching, "STANDIN", False)
    monkeypatch.setattr(launching, "compiled", lambda *what: made.append(what) or ("name", "PTX"))
    monkeypatch.setattr(launching, "assembled", lambda ptx, capability: f"{ptx} for {capability}")
    trits = np.zeros((2, 4), np.int8)
    launching.launch(pack_rows_kernel, 2, trits.view(WithAddress), 4)
    kinds = ((np.dtype(np.int8), 2), int)
    assert made == [(pack_rows_kernel, kinds, "90")]
    assert cupy.log == [
        ("load", "PTX for 90"),
        ("function", "name"),
        ("launch", "name", (2,), (32,), (0, 0, 8, 1, 640, 2, 4, 4, 1, 4), {}, None),
    ]


class WithAddress(np.ndarray):
    """An array that says where it lies as CuPy's do."""

    data = SimpleNamespace(ptr=640)
