"""Every golden case by the reference, with the tolerance table."""

import pytest

from golden.cases import load_cases
from harness.backends import load_backend
from harness.verify.cases import verify
from harness.verify.tolerances import TOLERANCES


@pytest.mark.parametrize("operation", TOLERANCES)
def test_golden_cases(operation):
    cases = [case for case in load_cases() if case.operation == operation]
    (outcome,) = verify(load_backend("reference"), cases)
    assert outcome.misses == []
    assert outcome.worst
