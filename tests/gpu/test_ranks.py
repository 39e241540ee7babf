"""Rivals are counted in portions: the last column decides, whichever portion it is in."""

import numpy as np
import pytest

import gpu
from gpu.device import STANDIN
from gpu.kernels.similarity import RIVALS, choose_columns


@pytest.mark.parametrize("simulate", [False, True] if STANDIN else [False])
@pytest.mark.parametrize("columns", [RIVALS, RIVALS + 1, 2 * RIVALS])
def test_the_last_column_is_a_rival_like_the_others(columns, simulate):
    similarity = -np.arange(columns, dtype=float)
    similarity[-1] = 1
    chosen = choose_columns(gpu.to_device(similarity), 3, simulate=simulate)
    assert gpu.to_host(chosen).tolist() == [0, 1, columns - 1]
