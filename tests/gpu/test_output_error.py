"""The error of outputs in panels of columns, in exact arithmetic."""

import numpy as np
import pytest

import gpu
from gpu import aga


@pytest.mark.parametrize("panel", [1, 3, 4, 7, 8, 100])
def test_panels_add_up_to_the_whole_form(panel, monkeypatch):
    monkeypatch.setattr(aga, "PANEL", panel)
    rng = np.random.default_rng(0)
    E = rng.integers(-9, 10, size=(5, 8))
    half = rng.integers(-9, 10, size=(8, 8))
    C = half + half.T
    expected = sum(
        int(E[row, i]) * int(C[i, j]) * int(E[row, j]) for row in range(5) for i in range(8) for j in range(8)
    )
    form = aga.quadratic_form(gpu.to_device(E.astype(float)), gpu.to_device(C.astype(float)))
    assert float(form) == expected
