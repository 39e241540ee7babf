"""These tests run on a CUDA device, or with NUMBA_ENABLE_CUDASIM=1 on NumPy in its place."""

from __future__ import annotations

import pytest


def pytest_sessionstart(session):
    try:
        import gpu
    except RuntimeError as error:
        pytest.exit(f"{error}; NUMBA_ENABLE_CUDASIM=1 runs these tests without one", returncode=2)
    print(f"device: {gpu.describe()}")


@pytest.fixture(scope="module")
def backend():
    from harness.backends import load_backend

    return load_backend("gpu")


@pytest.fixture(scope="module")
def device(backend):
    from harness.compute import compute_for

    return compute_for(backend).device
