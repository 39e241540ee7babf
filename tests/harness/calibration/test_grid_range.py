"""Matrices whose alpha and mu are too small or too large for what stores them are named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.backends import load_backend
from harness.calibration.grid_range import lost_share
from harness.calibration.methods import FitError
from harness.cli import EXIT_USAGE
from harness.models.folder import REPORT
from harness.quantize.__main__ import main as quantize_main
from harness.ternary.embedding import decode, encode
from reference.types import SHIFTS, TernaryConfig
from tests.harness import tiny
from tests.harness.conftest import SMALL

Run = Callable[..., int]
Capture = pytest.CaptureFixture[str]

NAME = "model.layers.1.self_attn.q_proj"


@pytest.fixture
def quantize(words_file: Path, tmp_path: Path, run_main: Run) -> Callable[..., int]:
    """Quantize a Qwen3, whose norms of q and k make their size harmless, with one matrix of another size."""

    def call(size: float, *arguments: object) -> int:
        model = tiny.make_model("qwen3", ternary=False)
        with torch.no_grad():
            model.get_submodule(NAME).weight.normal_().mul_(size)
        folder = tiny.save(model, tmp_path / "model")
        command = [folder, "--out", tmp_path / "out", "--calibration", words_file, *SMALL, *arguments]
        return run_main(quantize_main, *command)

    return call


@pytest.mark.parametrize(
    ("size", "grid", "warned"),
    [
        (1e-6, "float16", False),
        (1e-7, "float16", True),
        (3e-8, "float16", True),
        (1e-7, "int8", False),
        (3e-8, "int8", True),
        (3e4, "float16", False),
        (3e4, "int8", False),
    ],
)
def test_a_matrix_that_loses_some_of_its_blocks_is_named(
    size: float, grid: str, warned: bool, quantize: Callable[..., int], tmp_path: Path, capsys: Capture
) -> None:
    assert quantize(size, "--grid", grid) == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning:" in line]
    assert [f"{NAME}: alpha of" in line for line in warnings] == [True] * warned
    assert all(f"is too small for {grid}" in line for line in warnings)
    assert all(("--grid int8 stores smaller ones" in line) == (grid == "float16") for line in warnings)
    rows = json.loads((tmp_path / "out" / REPORT).read_text())["layers"][1]["matrices"]
    assert [row["lost_blocks"] > 0.01 for row in rows] == [warned and row["name"] == NAME for row in rows]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("grid", ["float16", "int8"])
@pytest.mark.parametrize("size", [1e-8, 1e-20])
def test_a_matrix_of_which_nothing_is_left_is_refused(
    size: float,
    grid: str,
    streamed: bool,
    quantize: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    """Before the first layer is fitted, if the model is in memory."""
    if streamed:
        monkeypatch.setattr("harness.models.streamed.MEMORY_SHARE", 0.0)
    assert quantize(size, "--grid", grid) == EXIT_USAGE
    printed = capsys.readouterr()
    assert f"error: {NAME}: its weights, up to " in printed.err
    assert "so small that alpha and mu all round to 0" in printed.err
    assert "scale this matrix in the original" in printed.err
    assert ("layer   1/3" in printed.out) == streamed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("grid", ["float16", "int8"])
def test_a_matrix_that_overflows_is_refused_before_the_first_layer(
    grid: str, quantize: Callable[..., int], tmp_path: Path, capsys: Capture
) -> None:
    assert quantize(1e5, "--grid", grid) == EXIT_USAGE
    printed = capsys.readouterr()
    assert f"error: {NAME}: its weights, up to " in printed.err
    assert "are too large for alpha and mu in float16" in printed.err
    assert "layer   1/3" not in printed.out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("reorder", ["none", "ssr"])
@pytest.mark.parametrize("grid", ["float16", "int8"])
@pytest.mark.parametrize("columns", [96, 100, 129])
@pytest.mark.parametrize("shift", SHIFTS)
def test_the_share_of_lost_blocks_is_that_of_counting_them(
    columns: int, grid: str, reorder: str, shift: str
) -> None:
    """Rows from 1e-9 to 1, of zeros and of equal weights, a dead input, a narrow last block."""
    rng = np.random.default_rng(0)
    W = rng.normal(size=(24, columns)) * np.logspace(-9, 0, 24)[:, None]
    W[3], W[20], W[21], W[22, 32:64] = 0, 0.25, 1e-9, 0
    X = rng.normal(size=(300, columns))
    X[:, 5] = 0
    C = X.T @ X
    config = TernaryConfig(block_size=32, grid=grid, reorder=reorder, compensation=False, shift=shift)
    matrix = load_backend("reference").ternarize(W, C, config)
    W[:, 5] = 0
    ordered = W[:, matrix.permutation]
    alpha = matrix.scale.decode() if grid == "int8" else matrix.scale
    mu = np.zeros_like(alpha)
    if matrix.shift is not None:
        mu = matrix.shift.decode() if grid == "int8" else matrix.shift
    lost = 0
    for row in range(24):
        for block in range(alpha.shape[1]):
            weights = set(ordered[row, 32 * block : 32 * block + 32].tolist())
            a, m = float(abs(alpha[row, block])), float(mu[row, block])
            if len(weights) > 1 or (shift == "none" and weights != {0.0}):
                lost += a == 0 or (grid == "float16" and a < 4 * 2**-24)
            else:
                lost += weights != {0.0} and a == 0 and m == 0
    share = lost_share("m", torch.from_numpy(W), torch.from_numpy(C), matrix)
    assert 0 < lost < alpha.size
    assert share == pytest.approx(lost / alpha.size)


def test_a_matrix_of_zeros_loses_nothing() -> None:
    W, C = np.zeros((4, 8)), np.eye(8)
    matrix = load_backend("reference").ternarize(W, C, TernaryConfig(block_size=4))
    assert lost_share("m", torch.from_numpy(W), torch.from_numpy(C), matrix) == 0
    W[:, 3], C[3, 3] = 1, 0  # of an input that is always 0
    matrix = load_backend("reference").ternarize(W, C, TernaryConfig(block_size=4))
    assert lost_share("m", torch.from_numpy(W), torch.from_numpy(C), matrix) == 0
    C[3, 3], W[:, 3] = 1, 1e-9
    matrix = load_backend("reference").ternarize(W, C, TernaryConfig(block_size=4))
    with pytest.raises(FitError, match="m: its weights, up to 1e-09, are so small"):
        lost_share("m", torch.from_numpy(W), torch.from_numpy(C), matrix)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_no_row_of_an_8_bit_embedding_is_too_small_or_too_large(dtype: torch.dtype) -> None:
    """Their factors are float32, so that rows of any size come back within half a step of their codes."""
    limits = torch.finfo(dtype)
    sizes = np.geomspace(max(limits.tiny, 1e-36), min(limits.max, 1e38), 40)
    rows = torch.rand(40, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    weight = (rows * torch.from_numpy(sizes)[:, None]).to(dtype)
    back = decode(**encode(weight), dtype=dtype).double().numpy()
    wanted = weight.double().numpy()
    largest = np.abs(wanted).max(axis=1, keepdims=True)
    # Half a step, and the rounding to the dtype.
    assert (np.abs(back - wanted) <= largest / 254 * 1.001 + np.abs(wanted) * limits.eps).all()
