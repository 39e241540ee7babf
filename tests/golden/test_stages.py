"""On slices of a real model the stages do what Fig. 3 shows: errors fall where they must."""

from __future__ import annotations

import itertools

import pytest

from golden.cases import FOLDER, Case, load_cases
from reference.ternarize import ternarize
from reference.types import TernaryConfig

SLICES = {
    case.name: case
    for case in load_cases(FOLDER)
    if case.operation == "ternarize.ternarize" and case.kind == "real"
}


@pytest.mark.parametrize("case", SLICES.values(), ids=SLICES)
def test_weight_error_never_rises_in_itf_nor_output_error_at_aga(case: Case) -> None:
    report = ternarize(case.inputs["W"], case.inputs["C"], TernaryConfig()).report
    assert report is not None
    assert all(after <= before for before, after in itertools.pairwise(report.weight_errors))
    assert report.output_errors["aga"] < report.output_errors["itf"]
