"""Every golden case, by the tolerance table, without any function of the reference."""

import pytest

from golden.cases import load_cases
from harness.backends import load_backend
from harness.verify.cases import verify
from harness.verify.tolerances import TOLERANCES


@pytest.fixture
def no_reference(monkeypatch):
    """Lets every function of the reference fail, however it is reached."""

    def fail(*arguments, **named):
        raise AssertionError("a function of the reference was called")

    assert load_backend("gpu").operations  # importing the modules reads the reference
    for function in load_backend("reference").operations.values():
        monkeypatch.setattr(function, "__code__", fail.__code__)


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("operation", TOLERANCES)
def test_golden_cases(operation, precision, no_reference):
    backend = load_backend("gpu", precision)
    cases = [case for case in load_cases() if case.operation == operation]
    (outcome,) = verify(backend, cases)
    assert outcome.misses == []
    assert bool(outcome.worst) == (operation not in backend.refused)
