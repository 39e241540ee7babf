"""Numbers as compiled loops read them."""

import numba
import numpy as np
import pytest
import torch

from harness.cpu.lanes import number


@pytest.fixture(params=[False, True], ids=["denormals", "no denormals"])
def _denormals(request):
    torch.set_flush_denormal(request.param)
    yield
    torch.set_flush_denormal(False)


@numba.njit
def _numbers(bits, values):
    for i in range(len(bits)):
        values[i] = number(bits[i])


@pytest.mark.usefixtures("_denormals")
def test_every_finite_float16_is_read_exactly_also_where_the_processor_flushes_subnormal_numbers():
    bits = np.arange(1 << 16, dtype=np.uint16)
    halves = bits.view(np.float16)
    bits, halves = bits[np.isfinite(halves)], halves[np.isfinite(halves)]
    values = np.empty(len(bits), np.float32)
    _numbers(bits, values)

    exponent, mantissa = (bits >> 10 & 31).astype(int), (bits & 1023).astype(int)
    integers = np.where(exponent == 0, mantissa, mantissa + 1024) << np.maximum(exponent - 1, 0)
    signs = np.where(bits >> 15 == 1, -1, 1)
    assert ((values.astype(np.float64) * 2**24).astype(np.int64) == signs * integers).all()
    assert (np.signbit(values) == (bits >> 15 == 1)).all()
