"""Zero-shot tasks: prompts, scoring and files, against log-likelihoods that are computed here."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import evaluate
from harness.cli import EXIT_USAGE
from harness.compute import Compute
from harness.errors import UserError
from harness.models.original import Original
from harness.zeroshot.tasks import TASKS, load_tasks
from tests.harness import tiny

Row = dict[str, Any]
Run = Callable[..., int]

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install '.[lm-eval]'"
)


def words(seed: int, count: int = 4) -> str:
    return tiny.words(count, seed)


def arc(seed: int) -> Row:
    choices = {"text": [words(seed + i, 1 + i) for i in range(4)], "label": list("ABCD")}
    return {"id": str(seed), "question": words(seed), "choices": choices, "answerKey": "ABCD"[seed % 4]}


# Rows as the data sets were published.
QUESTIONS: dict[str, Callable[[int], Row]] = {
    "piqa": lambda i: {"goal": words(i), "sol1": words(i + 50, 2), "sol2": words(i + 70, 5), "label": i % 2},
    "arc_easy": arc,
    "arc_challenge": arc,
    "hellaswag": lambda i: {
        "activity_label": words(i, 2),
        "ctx_a": words(i + 10),
        "ctx_b": words(i + 20, 1),
        "endings": [words(i + j, 2 + j) + " [title] w9  [step] w7" for j in range(4)],
        "label": i % 4,
    },
    "winogrande": lambda i: {
        "sentence": f"{words(i)} _ {words(i + 9)}",
        "option1": "w11",
        "option2": "w12 w13",
        "answer": str(1 + i % 2),
    },
    "openbookqa": lambda i: {
        "question_stem": words(i),
        "choices": arc(i)["choices"],
        "answerKey": "DCBA"[i % 4],
    },
    "boolq": lambda i: {"question": words(i), "passage": words(i + 30, 12), "answer": i % 3 == 0},
}
COUNT = 12


def cleaned(text: str) -> str:
    """HellaSwag's text without the marks of WikiHow."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def asked(name: str, row: Row) -> tuple[list[tuple[str, str]], list[str], int]:
    """Prompt and continuation of every choice; the choices; the right one. As the tasks are described."""
    if name == "piqa":
        prompt, choices, right = f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], row["label"]
    elif name.startswith("arc"):
        prompt, choices = f"Question: {row['question']}\nAnswer:", row["choices"]["text"]
        right = "ABCD".index(row["answerKey"])
    elif name == "hellaswag":
        prompt = cleaned(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
        choices, right = [cleaned(ending) for ending in row["endings"]], row["label"]
    elif name == "winogrande":
        before, after = row["sentence"].split("_")
        choices = [before + row["option1"], before + row["option2"]]
        return [(choice, f" {after.strip()}") for choice in choices], choices, int(row["answer"]) - 1
    elif name == "openbookqa":
        prompt, choices = row["question_stem"], row["choices"]["text"]
        right = "ABCD".index(row["answerKey"])
    else:
        prompt = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
        choices, right = ["no", "yes"], int(row["answer"])
    return [(prompt, f" {choice}") for choice in choices], choices, right


def log_likelihood(original: Original, prompt: str, continuation: str) -> float:
    start = len(original.tokenizer.encode(prompt))
    ids = torch.tensor([original.tokenizer.encode(prompt + continuation)])
    with torch.no_grad():
        logits = original.model(ids).logits[0].double()
    predicted = logits.log_softmax(-1)[start - 1 : -1]
    return sum(row[token].item() for row, token in zip(predicted, ids[0, start:], strict=True))


def expected(original: Original, name: str, rows: list[Row]) -> dict[str, list[float]]:
    """Whether each question is answered right, by metric."""
    hits: dict[str, list[float]] = {"acc": [], "acc_norm": []}
    for row in rows:
        pairs, choices, right = asked(name, row)
        scores = [log_likelihood(original, *pair) for pair in pairs]
        lengths = [len(choice) for choice in choices]
        hits["acc"].append(float(scores.index(max(scores)) == right))
        normalized = [score / length for score, length in zip(scores, lengths, strict=True)]
        hits["acc_norm"].append(float(normalized.index(max(normalized)) == right))
    return hits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of questions for each task, named as people name them."""
    out = tmp_path_factory.mktemp("questions")
    for name, task in TASKS.items():
        split = "test" if task.split == "test" else "val"
        rows = [QUESTIONS[name](i) for i in range(COUNT)]
        (out / f"{name}_{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return out


@needs_lm_eval
def test_accuracies_equal_those_of_plain_log_likelihoods(folder: Path) -> None:
    from harness.zeroshot.measure import measure_tasks

    # Weights drawn wide, so that no two choices are equally likely.
    model = tiny.make_model("llama", torch.float32, ternary=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    original = Original(model, tiny.make_tokenizer(), "tiny")
    found = measure_tasks(original, load_tasks(list(TASKS), folder), None, Compute(), batch_size=3)
    reported = []
    for name in TASKS:
        hits = expected(original, name, [QUESTIONS[name](i) for i in range(COUNT)])
        for metric, score in found.tasks[name].items():
            assert score.value == pytest.approx(statistics.mean(hits[metric])), (name, metric)
            assert score.stderr == pytest.approx(statistics.stdev(hits[metric]) / math.sqrt(COUNT))
        reported.append(found.tasks[name]["acc"])
    assert found.average.value == pytest.approx(statistics.mean(score.value for score in reported))
    assert found.average.stderr == pytest.approx(math.hypot(*(score.stderr for score in reported)) / 7)
    assert found.questions == dict.fromkeys(TASKS, COUNT)
    assert {name for name in TASKS if "acc_norm" in found.tasks[name]} == set(TASKS) - {"winogrande", "boolq"}


@needs_lm_eval
def test_questions_are_those_of_the_split_that_lm_eval_measures() -> None:
    from lm_eval import tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    for name, task in TASKS.items():
        definition = load_yaml(Path(tasks.__file__).parent / task.yaml)
        assert definition["task"] == name
        assert definition.get("test_split") == (task.split if task.split == "test" else None)
        assert definition["validation_split"] == "validation"


@needs_lm_eval
def test_models_are_shown_side_by_side(
    llama: Path, quantized: Path, folder: Path, run_main: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--tasks", "winogrande,arc_easy", "--tasks-dir", folder, "--limit", 6, "--cpu")
    assert run_main(evaluate.main, llama, quantized, *arguments, "--json") == 0
    first, second = json.loads(capsys.readouterr().out)
    assert (first["model"], second["model"]) == (str(llama), str(quantized))
    assert first["tasks"] == second["tasks"]  # weights on the grid: the same model
    assert first["tasks"]["arc_easy"]["questions"] == 6
    assert run_main(evaluate.main, quantized, *arguments, "--packed") == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["task", "questions", "metric", str(quantized)]
    for line, name, metric in zip(
        printed[1:], ["winogrande", "arc_easy", "arc_easy"], ["acc", "acc", "acc_norm"], strict=False
    ):
        score = second["tasks"][name][metric]
        shown = f"{100 * score['value']:.2f} ± {100 * score['stderr']:.2f}"
        assert line.split() == [name, "6", metric + "*" * (metric == "acc"), *shown.split()]


@needs_lm_eval
def test_one_question_has_no_standard_error(
    llama: Path, folder: Path, run_main: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--tasks", "piqa", "--tasks-dir", folder, "--limit", 1, "--cpu", "--json")
    assert run_main(evaluate.main, llama, *arguments) == 0
    assert json.loads(capsys.readouterr().out)["tasks"]["piqa"]["acc"]["stderr"] == "nan"


@needs_lm_eval
def test_prompts_that_lose_their_beginning_are_counted(folder: Path) -> None:
    from harness.zeroshot.measure import measure_tasks, table

    original = Original(tiny.make_model("llama", torch.float32), tiny.make_tokenizer(), "tiny")
    original.model.config.max_position_embeddings = 7
    found = measure_tasks(original, load_tasks(["piqa"], folder), None, Compute(), batch_size=3)
    pairs = [pair for i in range(COUNT) for pair in asked("piqa", QUESTIONS["piqa"](i))[0]]
    longer = sum(len((prompt + continuation).split()) > 8 for prompt, continuation in pairs)
    assert 0 < longer < len(pairs)
    assert found.shortened == longer
    assert f"tiny: {longer} prompts lost the beginning to fit its context" in table([found])


def changed(row: Row, **fields: Any) -> str:
    return json.dumps({**row, **fields}) + "\n"


BOOLQ, PIQA = QUESTIONS["boolq"](0), QUESTIONS["piqa"](0)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"has no piqa_validation.jsonl or piqa_val.jsonl or piqa_dev.jsonl"),
        ({"piqa_test.jsonl": changed(PIQA)}, r"has no piqa_val.*measures piqa on its validation split"),
        (
            {"piqa_val.jsonl": changed(PIQA), "piqa_dev.jsonl": changed(PIQA)},
            "piqa_val.jsonl and piqa_dev.jsonl",
        ),
        ({"piqa_val.jsonl": ""}, r"piqa_val.jsonl contains no questions"),
        ({"piqa_val.jsonl": changed(PIQA) + "{"}, r"piqa_val.jsonl, line 2 is not JSON"),
        ({"piqa_val.jsonl": changed(PIQA) + '{"goal": "w3"}'}, r"line 2 .* it lacks sol1, sol2, label"),
        ({"piqa_val.jsonl": "[1]"}, r"line 1 .* it lacks goal, sol1"),
        ({"boolq_dev.jsonl": changed(BOOLQ, answer="yes")}, r"line 1 .* answer is 'yes', not true or false"),
        ({"boolq_dev.jsonl": b"\xff"}, r"boolq_dev.jsonl is not UTF-8"),
    ],
)
def test_files_without_questions_are_refused_by_name(
    files: dict[str, str | bytes], message: str, tmp_path: Path
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    name = next(iter(files), "piqa").split("_")[0]
    with pytest.raises(UserError, match=message):
        load_tasks([name], tmp_path)


@needs_lm_eval
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("piqa", {"label": 2}, "question 3 has the answer 2, but 2 choices"),
        ("arc_easy", {"answerKey": "E"}, "question 3 cannot be asked: ValueError: 'E' is not in list"),
        ("winogrande", {"sentence": "w3 w4"}, "question 3 cannot be asked: ValueError"),
    ],
)
def test_questions_without_an_answer_are_refused(
    name: str, change: Row, message: str, tmp_path: Path
) -> None:
    rows = [QUESTIONS[name](i) for i in range(3)]
    rows[2] |= change
    file = tmp_path / f"{name}_{TASKS[name].split}.jsonl"
    file.write_text("".join(map(changed, rows)))
    with pytest.raises(UserError, match=message):
        load_tasks([name], tmp_path)
    assert load_tasks([name], tmp_path, limit=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to measure; pass --data for perplexity, --tasks for accuracy"),
        (("--tasks", "piqa,hella"), "'hella' is not a task; choose from all, piqa"),
        (("--tasks", "piqa", "--tasks-dir", "no-such-folder"), "no-such-folder is not a folder"),
        (("--tasks", "piqa", "--original", "a"), "pass --data as well"),
    ],
)
def test_options_that_do_not_belong_together_are_refused(
    arguments: tuple[str, ...], message: str, run_main: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(evaluate.main, *arguments) == EXIT_USAGE
    assert message in capsys.readouterr().err


def test_a_missing_lm_eval_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"requires the package `lm-eval`; run pip install"):
        load_tasks(["piqa"], folder)
