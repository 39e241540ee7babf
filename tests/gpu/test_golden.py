"""Every golden case, by the tolerance table."""

import pytest

from golden.cases import load_cases
from harness.backends import load_backend
from harness.verify.cases import verify
from harness.verify.tolerances import TOLERANCES


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("operation", TOLERANCES)
def test_golden_cases(operation, precision):
    backend = load_backend("gpu", precision)
    cases = [case for case in load_cases() if case.operation == operation]
    (outcome,) = verify(backend, cases)
    assert outcome.misses == []
    assert bool(outcome.worst) == (operation not in backend.refused)
