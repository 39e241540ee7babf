"""What the array modules do not share."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gpu
from gpu import device
from gpu.device import STANDIN, DeviceError, is_factor, stream, xp

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
    assert stream() == 0
    gpu.use_allocator(lambda size, device: 0, lambda address, device: None)
    with gpu.on_stream(5):
        assert stream() == 0


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


@pytest.mark.parametrize("given", [None, "1"])
def test_numba_neither_waits_nor_warns_unless_told_to(given):
    settings = ("CUDA_ARRAY_INTERFACE_SYNC", "CUDA_LOW_OCCUPANCY_WARNINGS")
    told = {f"NUMBA_{name}": given for name in settings}
    environment = {name: value for name, value in {**os.environ, **told}.items() if value is not None}
    code = "import gpu.device; from numba.cuda.core import config; "
    code += f"print(*(int(getattr(config, name)) for name in {settings}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "PYTHONPATH": str(Path(gpu.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == [given or "0"] * 2, done.stderr[-2000:]
