"""The program that gates backends: it passes the reference and catches what is planted in others."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from golden.cases import FOLDER
from harness import backends
from harness.backends import MissingOperation, load_backend
from harness.errors import UserError
from harness.verify.__main__ import main as verify_main
from harness.verify.tolerances import _FLOAT32, SCALES, TOLERANCES

MODULES = sorted({operation.partition(".")[0] for operation in TOLERANCES})


@pytest.fixture
def backend(tmp_path, monkeypatch, request):
    """Makes a package that passes everything on to the reference but for the given code."""

    def make(name, module="", code="", package=""):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "__init__.py").write_text(package)
        for other in MODULES:
            extra = code if other == module else ""
            (folder / f"{other}.py").write_text(f"from reference.{other} import *\n{extra}")
        monkeypatch.syspath_prepend(tmp_path)
        return name

    return make


# Names of the fault: the module it lies in, and the code that replaces a function there.
FAULTS = {
    "wrong_tie": (
        "atq",
        """
import numpy as np
def flexible_round(W, alpha, mu):
    with np.errstate(all="ignore"):
        Z = (W - mu) / np.where(alpha == 0, np.inf, alpha)
    return (np.sign(Z) * (np.abs(Z) >= 0.5)).astype(np.int8)
""",
    ),
    "scale_off": (
        "atq",
        """
from reference import atq
def build_optimal_grid(W, T):
    alpha, mu = atq.build_optimal_grid(W, T)
    return alpha * (1 + 1e-6), mu
""",
    ),
    "eq13_for_eq12": ("aga", "align_grid = align_grid_printed\n"),
    "cosine_without_sign": (
        "ssr",
        """
import numpy as np
def select_block(W, k):
    if k < 1:
        raise ValueError
    norms = np.linalg.norm(W, axis=0)
    cosines = np.abs(W.T @ W.mean(axis=1)) / np.where(norms == 0, 1, norms)
    cosines[norms == 0] = -1
    return np.sort(np.argsort(-cosines, kind="stable")[:k])
""",
    ),
    "compensation_by_diagonal": (
        "gptq",
        """
import numpy as np
def compensate(W_R, E, Hinv_BB, Hinv_BR):
    return W_R - E / np.diag(Hinv_BB) @ Hinv_BR
""",
    ),
    "bytes_not_checked": (
        "packing",
        """
import numpy as np
def unpack_base3(packed, count):
    digits = packed[..., None] // 3 ** np.arange(5) % 3
    return (digits.reshape(*packed.shape[:-1], -1)[..., :count] - 1).astype(np.int8)
""",
    ),
    "words_not_interleaved": (
        "layout",
        """
from reference import layout
def lay_words(trits):
    words = layout.lay_words(trits)
    return words.reshape(*words.shape[:3], 4, 4).swapaxes(3, 4).reshape(words.shape)
""",
    ),
    "parts_in_another_order": (
        "layout",
        """
from dataclasses import replace
from reference import layout
def join(layouts):
    return replace(layout.join(layouts), permutation=layout.join(layouts[::-1]).permutation)
""",
    ),
    "other_damping": (
        "ternarize",
        """
from dataclasses import replace
from reference import ternarize as original
def ternarize(W, C, config):
    return original.ternarize(W, C, replace(config, damping=config.damping * 1.01))
""",
    ),
    "not_a_number": ("ssr", "def block_variance(W, block_size):\n    return float('nan')\n"),
    "other_type": (
        "twn",
        """
from reference import twn
def symmetric_ternarize(W):
    alpha, T = twn.symmetric_ternarize(W)
    return alpha, T.astype(float)
""",
    ),
    "too_few_results": ("twn", "def symmetric_ternarize(W):\n    return W\n"),
    "function_missing": ("gptq", "del damp\n"),
}


def test_reference_passes_everything(capsys):
    assert verify_main(["--backend", "reference"]) == 0
    out = capsys.readouterr().out
    assert "PASS: backend reference" in out
    assert "MISS" not in out
    for operation, rows in TOLERANCES.items():
        assert operation in out
        assert all(row.reasons["float64"] in out for row in rows.values())


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_caught(backend, capsys, fault):
    module, code = FAULTS[fault]
    assert verify_main(["--backend", backend(fault, module, code), "--operation", module]) == 1
    out = capsys.readouterr().out
    assert "FAIL" in out
    assert "MISS" in out


def test_a_refused_operation_is_no_miss(backend, capsys):
    name = backend("refusing", "aga", "del align_grid_printed\n", 'REFUSED = {"aga.align_grid_printed"}\n')
    assert verify_main(["--backend", name, "--operation", "aga"]) == 0
    assert "aga.align_grid_printed: 14 cases, refused" in capsys.readouterr().out


def test_arrays_go_to_the_device_and_back(backend, capsys):
    package = """
class OnDevice:
    def __init__(self, array):
        self.array = array
def to_device(array):
    return OnDevice(array)
def to_host(value):
    return value.array
"""
    code = """
from reference import twn
def symmetric_ternarize(W):
    alpha, T = twn.symmetric_ternarize(W.array)
    return type(W)(alpha), type(W)(T)
"""
    assert verify_main(["--backend", backend("device_like", "twn", code, package), "--operation", "twn"]) == 0
    capsys.readouterr()


def test_a_whole_matrix_comes_back_from_the_device(backend, capsys):
    package = """
class OnDevice:
    def __init__(self, array):
        self.array = array
def to_host(value):
    return value.array
"""
    code = """
from dataclasses import replace
from reference import ternarize as original
import whole_on_device
def ternarize(W, C, config):
    result = original.ternarize(W, C, config)
    moved = ("trits", "scale", "shift", "permutation")
    return replace(result, **{name: whole_on_device.OnDevice(getattr(result, name)) for name in moved})
"""
    name = backend("whole_on_device", "ternarize", code, package)
    assert verify_main(["--backend", name, "--operation", "ternarize", "--kind", "exact"]) == 0
    capsys.readouterr()


@pytest.fixture
def no_device(monkeypatch):
    """Lets no GPU backend be found, on whatever machine this is."""
    package = backends._package

    def find(name):
        if name == "gpu":
            raise UserError("backend gpu cannot run here: no CUDA device")
        return package(name)

    monkeypatch.setattr(backends, "_package", find)


@pytest.mark.parametrize("broken", [False, True])
def test_json_is_all_that_is_printed(backend, no_device, capsys, broken):
    name = backend("in_json", *FAULTS["not_a_number"]) if broken else "auto"
    code = verify_main(["--backend", name, "--operation", "ssr", "--json"])
    report = json.loads(
        capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON")
    )
    assert report["passed"] is not broken
    assert code == broken
    assert report["backend"] == (name if broken else "cpu")
    variance = report["golden"]["float64"]["ssr.block_variance"]
    assert (
        variance["outputs"]["variance"]["tolerance"]
        == TOLERANCES["ssr.block_variance"]["variance"].limits["float64"]
    )
    assert bool(variance["misses"]) is broken


def test_auto_says_what_it_is(no_device, capsys):
    assert verify_main(["--operation", "twn.symmetric_ternarize", "--kind", "exact"]) == 0
    captured = capsys.readouterr()
    assert "auto" in captured.err
    assert "backend auto: cpu" in captured.err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing_of_that_name", "unknown backend"),
        ("../reference", "unknown backend"),
        ("json", "is not a backend"),
    ],
)
def test_unusable_backends_are_named(name, message):
    with pytest.raises(UserError, match=message):
        load_backend(name)


def test_a_backend_that_cannot_run_says_why(backend):
    name = backend("deviceless", package="raise RuntimeError('no CUDA device')\n")
    with pytest.raises(UserError, match="backend deviceless cannot run here: no CUDA device"):
        load_backend(name)


def test_backend_finds_functions_by_operation():
    from reference.ternarize import ternarize

    assert load_backend("reference").function("ternarize.ternarize") is ternarize
    with pytest.raises(MissingOperation, match=r"no function atq\.nothing"):
        load_backend("reference").function("atq.nothing")
    with pytest.raises(MissingOperation, match=r"no function nothing\.nothing"):
        load_backend("reference").function("nothing.nothing")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--operation", "nothing"],
        ["--kind", "nothing"],
        ["--record", "nothing.json", "--precision", "float64"],
    ],
)
def test_bad_usage_is_exit_code_2(capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        verify_main(arguments)
    assert ended.value.code == 2
    assert re.search("nothing|record", capsys.readouterr().err)


def test_a_precision_that_the_backend_lacks_is_refused():
    with pytest.raises(UserError, match="backend reference computes in float64, not in float32"):
        verify_main(["--backend", "reference", "--precision", "float32"])


def test_what_does_not_run_on_a_device_is_not_recorded(backend, tmp_path, monkeypatch):
    """It is said before any case is run, which takes minutes."""
    monkeypatch.setattr("harness.verify.__main__.load_cases", lambda folder: pytest.fail("read"))
    for name in ("reference", backend("standing_in", package="STANDIN = True\n")):
        for model in ([], ["--model"]):
            with pytest.raises(UserError, match=f"backend {name} does not run on one here; drop --record"):
                verify_main(["--backend", name, "--record", str(tmp_path / "record.json"), *model])
    assert not (tmp_path / "record.json").exists()


def test_rows_for_float32_are_rows_of_the_table():
    known = {(operation, output) for operation, rows in TOLERANCES.items() for output in rows}
    assert known >= {(operation, output) for operation, rows in _FLOAT32.items() for output in rows}


def test_a_changed_golden_file_is_refused(tmp_path, capsys):
    for path in [*FOLDER.glob("*.safetensors"), FOLDER / "manifest.json"]:
        shutil.copy(path, tmp_path)
    file = tmp_path / "exact.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert verify_main(["--golden", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert "exact.safetensors has changed" in captured.err
    assert captured.out == ""


def test_every_row_of_the_table_is_used_and_has_a_reason(capsys):
    assert verify_main(["--json"]) == 0
    operations = json.loads(capsys.readouterr().out)["golden"]["float64"]
    assert operations.keys() == TOLERANCES.keys()
    for operation, rows in TOLERANCES.items():
        assert operations[operation]["outputs"].keys() == rows.keys()
        for row in rows.values():
            assert all(len(reason) > 10 for reason in row.reasons.values())
            assert row.limits["float32"] >= row.limits["float64"]
            assert row.measure in ("equal", "trits", *SCALES)


def test_cases_cannot_be_chosen_of_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        verify_main(["--model", "--operation", "atq"])
    assert "--model runs no golden cases; drop --operation" in capsys.readouterr().err


def test_a_record_is_of_the_package_s_own_golden_files(tmp_path, capsys):
    for switches in (["--record", "record.json"], ["--model"]):
        with pytest.raises(SystemExit):
            verify_main(["--golden", str(tmp_path), *switches])
        assert "--golden" in capsys.readouterr().err


def test_a_backend_without_8_bit_grids_is_missed(backend, capsys):
    code = """
from dataclasses import replace
from reference import ternarize as original
def ternarize(W, C, config):
    return original.ternarize(W, C, replace(config, grid="float16"))
"""
    name = backend("without_8_bits", "ternarize", code)
    assert verify_main(["--backend", name, "--operation", "ternarize", "--kind", "exact"]) == 1
    assert "ternarize.ternarize:int8" in capsys.readouterr().out
