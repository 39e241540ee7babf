"""The paper's values are copied rightly: its tables agree with each other and with their own averages."""

from __future__ import annotations

import pytest

from harness.reproduce import paper
from harness.reproduce.settings import Settings
from harness.reproduce.tables import TABLES
from harness.zeroshot.tasks import TASKS

MODELS = list(paper.contents()["models"])

# Averages that are not those of their rows in the paper itself: they would be 34.52 and 64.17.
MISPRINTED = {("LLaMA-3-8B", "Slim-LLM"), ("Qwen3-14B-Base", "FP16")}


@pytest.mark.parametrize("model", MODELS)
def test_averages_of_the_seven_tasks_are_those_of_the_row(model: str) -> None:
    for method, values in paper.rows_of("table1", model).items():
        accuracies = [values[task] for task in TASKS]
        if None in accuracies:
            assert accuracies == [None] * 7
            continue
        mean = sum(accuracies) / 7
        agrees = abs(mean - values["average"]) < 0.011
        assert agrees is ((model, method) not in MISPRINTED), (method, mean, values["average"])


@pytest.mark.parametrize("model", ["LLaMA-2-7B", "LLaMA-3-8B"])
@pytest.mark.parametrize(
    ("table", "row"),
    [("table2a", "ITF + AGA"), ("table2b", "SSR"), ("table2c", "128"), ("table2d", "wikitext2")],
)
def test_the_whole_method_has_one_value_in_all_tables(table: str, row: str, model: str) -> None:
    whole = paper.rows_of("table1", model)["PT²-LLM"]
    assert paper.rows_of(table, model)[row] == {name: whole[name] for name in ("wikitext2", "c4", "average")}


def test_sizes_and_reductions_agree() -> None:
    rows = paper.rows_of("table3", "LLaMA-7B")
    for name, row in rows.items():
        if name != "FP16":
            assert 13.48 / row["gigabytes"] == pytest.approx(row["reduction"], abs=0.02)


@pytest.mark.parametrize(
    ("source", "model"),
    [
        ("meta-llama/Llama-2-7b-hf", "LLaMA-2-7B"),
        ("meta-llama/Meta-Llama-3-8B", "LLaMA-3-8B"),
        ("models/huggyllama/llama-7b", "LLaMA-7B"),
        ("Qwen/Qwen3-14B-Base", "Qwen3-14B-Base"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", None),
        ("HuggingFaceTB/SmolLM2-135M", None),
        (None, None),
    ],
)
def test_the_papers_models_are_known_by_name(source: str | None, model: str | None) -> None:
    assert paper.model_of(source) == model


@pytest.mark.parametrize("name", [name for name in TABLES if name in paper.contents()])
def test_every_row_of_the_papers_ablations_is_measured(name: str) -> None:
    """Of other people's methods, only the values are shown."""
    measured = {row.paper for row in TABLES[name].rows(Settings())}
    others = {"AWQ", "QuIP", "Slim-LLM", "PB-LLM", "BiLLM", "ARB-LLM_X"}
    for model in MODELS:
        assert set(paper.rows_of(name, model)) <= measured | others
