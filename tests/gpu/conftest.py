"""These tests run on a CUDA device, or with NUMBA_ENABLE_CUDASIM=1 on NumPy in its place."""

from __future__ import annotations

import numpy as np
import pytest


def pytest_sessionstart(session):
    try:
        import gpu
    except RuntimeError as error:
        pytest.exit(f"{error}; NUMBA_ENABLE_CUDASIM=1 runs these tests without one", returncode=2)
    print(f"device: {gpu.describe()}")


def pytest_collection_modifyitems(items):
    """With --dist loadgroup, tests of a file stay together, as they share what they compile."""
    for item in items:
        # Those of the compilers share nothing, and one takes as long as a whole file elsewhere.
        alone = item.path.stem == "test_compilation"
        item.add_marker(pytest.mark.xdist_group(item.name if alone else item.path.stem))


@pytest.fixture(scope="module")
def backend():
    from harness.backends import load_backend

    return load_backend("gpu")


@pytest.fixture(scope="module")
def device(backend):
    from harness.compute import compute_for

    return compute_for(backend).device


@pytest.fixture(scope="module")
def emulators(tmp_path_factory):
    """Of the CUDA C++ kernels, in both orders of threads."""
    from tests.gpu.emulation import Emulator

    folder = tmp_path_factory.mktemp("emulated")
    return Emulator(folder), Emulator(folder, reverse=True)


@pytest.fixture
def launch(emulators):
    """Runs a launcher of a CUDA C++ kernel; emulated, in both orders of threads."""
    from gpu.device import STANDIN

    def run(function, *arguments):
        if not STANDIN:
            return function(*arguments)
        first, second = (function(*arguments, emulator) for emulator in emulators)
        for one, other in zip(*(r if isinstance(r, tuple) else (r,) for r in (first, second)), strict=True):
            np.testing.assert_array_equal(one, other)
        return first

    return run


@pytest.fixture
def product_on(launch):
    """Multiplies by the kernels that a device of such limits takes: one case, or several that are joined."""
    import gpu
    from gpu.device import STANDIN, xp
    from gpu.kernels.sources import limits
    from tests.gpu.ternary_cases import lay_out, multiply_on

    def multiply(device, cases, x):
        if not STANDIN and device.shared > limits(0).shared:
            pytest.skip(f"this device has no {device.shared} bytes of shared memory for a block")
        layout = lay_out(*(cases if isinstance(cases, list) else [cases]))

        def product(*launcher):
            y = xp.empty((len(x), layout.shape[0]), x.dtype)
            multiply_on(device, gpu.to_device(x), layout, y, *launcher)
            return gpu.to_host(y)

        return launch(product)

    return multiply
