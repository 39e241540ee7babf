"""python -m harness.quantize on mixtures of experts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import harness
from harness.models.experts import Experts
from harness.models.folder import REPORT
from harness.quantize.__main__ import main as quantize_main
from harness.ternary.linear import TernaryLinear
from harness.ternary.reading import tensors_of
from reference.types import TernaryConfig
from tests.harness import tiny
from tests.harness.conftest import SMALL
from tests.harness.quantize.stopping import files_of, stopped_after
from tests.harness.quantize.test_quantize import run_workflow

Run = Callable[..., int]
TOKENS = torch.randint(3, tiny.VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["mixtral", "nemotron_h", "llama4"])
def test_experts_on_a_ternary_grid_come_back_as_they_were(
    kind: str, words_file: Path, tmp_path: Path
) -> None:
    model = tiny.make_mixture(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run_workflow(model, tmp_path / "out", words_file, TernaryConfig(block_size=tiny.BLOCK))
    stored = {name for name, _ in tensors_of(tmp_path / "out")}
    assert any(name.endswith("experts.3.down_proj.trits") for name in stored)
    loaded = harness.load(tmp_path / "out", dense=True)
    logits = loaded(TOKENS).logits
    assert torch.equal(logits, model(TOKENS).logits)
    plain = loaded.dequantize()
    assert not any(isinstance(module, Experts | TernaryLinear) for module in plain.modules())
    after = plain.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        # Of thousands of rows with random trits, one may be too lopsided for the fit to find its grid.
        same = after[name] == tensor
        same = same.mT if kind in tiny.TRANSPOSED and "experts" in name else same
        rows = same.reshape(-1, same.shape[-1]).all(dim=1)
        assert rows.float().mean() >= (0.99 if "experts" in name else 1), name
    plain.save_pretrained(tmp_path / "plain")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype="auto")
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in after.items())


def test_a_mixture_that_was_stopped_goes_on_to_the_same_bytes(
    words_file: Path, tmp_path: Path, run_main: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the experts with the most code of their own."""
    source = tiny.save(tiny.make_mixture("llama4", ternary=False), tmp_path / "original")
    command: list[Any] = [source, "--calibration", words_file, *SMALL, "--recipe", "best", "--backend", "cpu"]
    stopped_after(1, run_main, *command, "--out", tmp_path / "out")
    assert run_main(quantize_main, *command, "--out", tmp_path / "out", "--resume") == 0
    assert run_main(quantize_main, *command, "--out", tmp_path / "whole") == 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert "experts: 8 matrices, fewest tokens" in capsys.readouterr().out

    loaded = harness.load(tmp_path / "out")
    loaded.save_pretrained(tmp_path / "again")
    stored, again = (dict(tensors_of(tmp_path / folder)) for folder in ("out", "again"))
    assert stored.keys() == again.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in stored.items())
    assert torch.equal(harness.load(tmp_path / "again")(TOKENS).logits, loaded(TOKENS).logits)


def test_tokens_of_every_expert_are_reported_and_one_without_is_fitted_too(
    words_file: Path, tmp_path: Path, run_main: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny.make_mixture("gpt_oss")
    with torch.no_grad():
        model.model.layers[0].mlp.router.bias[3] = -1e4
    before = model.model.layers[0].mlp.experts.down_proj[3].T.clone()
    source, out = tiny.save(model, tmp_path / "original"), tmp_path / "out"
    text = ("--calibration", words_file, "--block-size", tiny.BLOCK)
    assert run_main(quantize_main, source, "--out", out, *text, *SMALL) == 0
    printed = capsys.readouterr().out
    assert "2 without tokens to those alone" in printed
    report = json.loads((out / REPORT).read_text())["layers"][0]
    assert report["experts"]["without_tokens"] == 2
    assert report["experts"]["fewest_tokens"] == 0
    tokens = {
        row["name"].split(".", 4)[4]: row["tokens"] for row in report["matrices"] if "experts" in row["name"]
    }
    assert tokens["experts.3.gate_up_proj"] == tokens["experts.3.down_proj"] == 0
    assert sum(tokens.values()) == 2 * 2 * 8 * 24  # two matrices, two experts a token
    weight = harness.load(out).get_submodule("model.layers.0.mlp.experts.3.down_proj").weight
    assert torch.equal(weight, before)

    lines = [line for line in printed.splitlines() if line.startswith("model.layers.0.mlp.experts")]
    assert len(lines) == 2  # one a kind
    name, *figures = lines[1].split()
    rows = [row for row in report["matrices"] if row.get("family") == name]
    assert [row["name"] for row in rows] == [name.replace("*", str(number)) for number in range(4)]
    errors = [row["relative_output_error"] for row in rows]
    assert float(figures[8]) == pytest.approx(np.median(errors), abs=6e-6)
    worst, fewest, most = f"{max(errors):.5f}", *(f(tokens.values()) for f in (min, max))
    assert lines[1].endswith(f"  4 experts, worst {worst}, tokens {fewest}-{most}")
