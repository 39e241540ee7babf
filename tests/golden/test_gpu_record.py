"""The record of verification on hardware, and what has changed since it was written."""

import hashlib
import json
import warnings
from pathlib import Path
from types import ModuleType

import pytest

from golden.cases import FOLDER
from harness.backends import Backend
from harness.errors import UserError
from harness.verify.record import RecordError, add_to_record, changed_since

RECORD = FOLDER / "gpu-verified.json"
PACKAGE = Path(__file__).parents[2] / "gpu"


@pytest.fixture
def package(tmp_path):
    """Makes a backend of two files that says it ran on a device."""
    folder = tmp_path / "device_backend"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "kernel.cu").write_text("one")
    module = ModuleType("device_backend")
    module.__file__ = str(folder / "__init__.py")
    module.identity = lambda: {"device": "a device", "driver": "1", "cuda": "2"}
    return folder, Backend("device_backend", module)


def test_what_no_device_has_seen_is_reported():
    changed = changed_since(RECORD, PACKAGE)
    if changed:
        warnings.warn(f"not verified on a GPU as they are: {', '.join(changed)}", stacklevel=1)


def test_without_a_record_nothing_is_verified(tmp_path, package):
    folder, _ = package
    assert changed_since(tmp_path / "none.json", folder) == ["__init__.py", "kernel.cu"]


def test_changed_new_and_lost_files_are_named(tmp_path, package):
    folder, backend = package
    file = tmp_path / "record.json"
    operations = {"a.b": {"outputs": {"x": {"worst_error": 1e-9}}}}
    add_to_record(file, backend, "golden", {"float64": operations})
    add_to_record(file, backend, "real_model", {"float64": {"passed": True}})
    record = json.loads(file.read_text())
    assert record["device"] == "a device"
    assert record["passed"]["golden"]["float64"] == {"a.b": {"x": 1e-9}}
    assert record["passed"]["real_model"]["float64"] == {"passed": True}
    assert record["files"]["kernel.cu"] == hashlib.sha256(b"one").hexdigest()
    assert changed_since(file, folder) == []
    (folder / "kernel.cu").write_text("two")
    (folder / "more.py").write_text("")
    (folder / "__init__.py").unlink()
    assert changed_since(file, folder) == ["__init__.py", "kernel.cu", "more.py"]


def test_what_was_seen_of_other_files_is_dropped(tmp_path, package):
    folder, backend = package
    file = tmp_path / "record.json"
    add_to_record(file, backend, "real_model", {"float64": {}})
    (folder / "kernel.cu").write_text("two")
    add_to_record(file, backend, "golden", {"float64": {}})
    assert json.loads(file.read_text())["passed"].keys() == {"golden"}
    assert changed_since(file, folder) == []


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format_version": 2, "files": {}}', '{"files": 3}'])
def test_a_malformed_record_is_an_error(tmp_path, package, content):
    file = tmp_path / "record.json"
    file.write_text(content)
    with pytest.raises(RecordError, match=r"record\.json"):
        changed_since(file, package[0])


def test_a_backend_without_a_device_records_nothing(tmp_path, package):
    _, backend = package

    def no_device():
        raise RuntimeError("NumPy stands in")

    backend.package.identity = no_device
    with pytest.raises(UserError, match="did not run on a CUDA GPU: NumPy stands in"):
        add_to_record(tmp_path / "record.json", backend, "golden", {})
    assert not (tmp_path / "record.json").exists()
