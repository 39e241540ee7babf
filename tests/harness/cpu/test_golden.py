"""Every golden case by the backend for CPUs, with the tolerance table."""

import pytest

from golden.cases import load_cases
from harness.backends import load_backend
from harness.verify.cases import verify
from harness.verify.tolerances import TOLERANCES


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("operation", [name for name in TOLERANCES if not name.startswith("layout")])
def test_golden_cases(operation, precision):
    cases = [case for case in load_cases() if case.operation == operation]
    (outcome,) = verify(load_backend("cpu", precision), cases)
    assert outcome.misses == []
    assert outcome.worst
