"""The paper's zero-shot tasks as lm-eval defines them, with questions from the hub or from local files."""

from __future__ import annotations

import importlib.util
import json
import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from harness.errors import UserError
from harness.models.original import is_verbose, summary
from harness.text import Text
from harness.text.rows import json_lines

Row = dict[str, Any]

TEST, VALIDATION = "test", "validation"
# How the files of a split are named.
SPLIT_NAMES = {TEST: ("test",), VALIDATION: ("validation", "val", "dev")}


def _as_published(row: Row) -> Row:
    return row


def _boolq(row: Row) -> Row:
    """A row of Google's file as SuperGLUE has it, which lm-eval reads."""
    if not isinstance(row["answer"], bool):
        raise ValueError(f"answer is {row['answer']!r}, not true or false")
    return {"question": row["question"], "passage": row["passage"], "label": int(row["answer"])}


@dataclass(frozen=True)
class ZeroShotTask:
    """One task.

    Attributes
    ----------
    yaml : str
        Its definition, below ``lm_eval/tasks``.
    metric : str
        What the paper reports: "acc", whose choice has the largest log-likelihood, or "acc_norm", for which
        that is divided by the length of the choice in characters.
    split : str
        Split that lm-eval measures.
    fields : tuple of str
        Fields of a row in a local file.
    convert : callable
        Turns such a row into a row of the hub's data set.
    """

    yaml: str
    metric: str
    split: str
    fields: tuple[str, ...]
    convert: Callable[[Row], Row] = _as_published


_ARC = ("question", "choices", "answerKey")

# In the order of the paper's Table 1, which does not name the metric. Its figures of LLaMA-7B in 16 bits are
# those that its lineage prints for acc (HellaSwag 56.9, OpenBookQA 34); by acc_norm they would be 76 and 44.
TASKS = {
    "piqa": ZeroShotTask("piqa/piqa.yaml", "acc", VALIDATION, ("goal", "sol1", "sol2", "label")),
    "arc_easy": ZeroShotTask("arc/arc_easy.yaml", "acc", TEST, _ARC),
    "arc_challenge": ZeroShotTask("arc/arc_challenge.yaml", "acc", TEST, _ARC),
    "hellaswag": ZeroShotTask(
        "hellaswag/hellaswag.yaml",
        "acc",
        VALIDATION,
        ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    ),
    "winogrande": ZeroShotTask(
        "winogrande/default.yaml", "acc", VALIDATION, ("sentence", "option1", "option2", "answer")
    ),
    "openbookqa": ZeroShotTask(
        "openbookqa/openbookqa.yaml", "acc", TEST, ("question_stem", "choices", "answerKey")
    ),
    "boolq": ZeroShotTask(
        "super_glue/boolq/default.yaml", "acc", VALIDATION, ("question", "passage", "answer"), _boolq
    ),
}


def load_tasks(names: Sequence[str], folder: Path | None = None, limit: int | None = None) -> dict[str, Any]:
    """Load tasks of lm-eval, and read all questions that will be asked.

    Parameters
    ----------
    names : sequence of str
        Names in `TASKS`.
    folder : Path, optional
        Folder with a file ``NAME_SPLIT.jsonl`` for each task, such as ``piqa_val.jsonl``; by default the
        questions are downloaded.
    limit : int, optional
        Number of questions of each task that will be asked; all by default.

    Returns
    -------
    dict of str to lm_eval.api.task.Task

    Raises
    ------
    UserError
        If lm-eval is not installed, a file is missing, ambiguous or damaged, or a download fails.
    """
    files = {} if folder is None else {name: _file_of(folder, name) for name in names}
    questions = {name: _rows(file, name) for name, file in files.items()}
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--tasks requires the package `lm-eval`; run pip install '.[lm-eval]' in the clone")
    import datasets
    import lm_eval.api.task
    from lm_eval.tasks import TaskManager

    if not is_verbose():
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        datasets.disable_progress_bars()
        # Its bar, over prompts that are filled in, has no switch; None shows it on a terminal only.
        lm_eval.api.task.tqdm = partial(tqdm, disable=None)
    definitions = Path(lm_eval.__file__).parent / "tasks"
    manager = TaskManager(include_defaults=False)  # its index of all tasks takes 16 seconds
    loaded = {}
    for name in names:
        source = definitions / TASKS[name].yaml
        if folder is None:
            loaded[name] = _loaded(manager, name, source)
            continue
        with tempfile.TemporaryDirectory() as temporary:
            local = _local_definition(Path(temporary), source, TASKS[name].split, questions[name])
            loaded[name] = _loaded(manager, name, local)
        _require_answers(loaded[name], files[name], limit)
    return loaded


def example_of(tasks: dict[str, Any]) -> Text:
    """Return the first prompt of the first task."""
    name, task = next(iter(tasks.items()))
    doc = task.eval_docs[0]
    prompt = task.doc_to_text(doc)
    return Text(prompt if isinstance(prompt, str) else task.doc_to_choice(doc)[0], f"first prompt of {name}")


def _loaded(manager: Any, name: str, definition: Path) -> Any:
    try:
        return manager.load([str(definition)])["tasks"][name]
    except Exception as error:  # errors of the hub share no base class
        raise UserError(
            f"the questions of {name} could not be loaded ({summary(error)}); "
            "without access to the Hugging Face Hub, pass --tasks-dir"
        ) from None


def _local_definition(folder: Path, source: Path, split: str, rows: list[Row]) -> Path:
    """Write a definition that differs from lm-eval's in its data set only; return its path."""
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    local = folder / "local.yaml"
    definition = {
        "include": str(source),
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {split: str(data)},
            "cache_dir": str(folder / "cache"),
            "keep_in_memory": True,
        },
        **dict.fromkeys(("training_split", "validation_split", "test_split")),
        f"{split}_split": split,
    }
    local.write_text(json.dumps(definition), encoding="utf-8")  # JSON is YAML
    return local


def _file_of(folder: Path, name: str) -> Path:
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; --tasks-dir takes the folder of the tasks' files")
    files = [folder / f"{name}_{split}.jsonl" for split in SPLIT_NAMES[TASKS[name].split]]
    found = [file for file in files if file.is_file()]
    if not found:
        raise UserError(
            f"{folder} has no {' or '.join(file.name for file in files)}; lm-eval measures {name} on its "
            f"{TASKS[name].split} split"
        )
    if len(found) > 1:
        raise UserError(
            f"{folder} has {' and '.join(file.name for file in found)}; nothing says which to use: keep one"
        )
    return found[0]


def _rows(file: Path, name: str) -> list[Row]:
    task, rows = TASKS[name], []
    for number, row in json_lines(file):
        missing = (
            [field for field in task.fields if field not in row] if isinstance(row, dict) else task.fields
        )
        if missing:
            raise UserError(
                f"{file}, line {number} is not a question of {name}: it lacks {', '.join(missing)}"
            )
        try:
            rows.append(task.convert({field: row[field] for field in task.fields}))
        except ValueError as error:
            raise UserError(f"{file}, line {number} is not a question of {name}: {error}") from None
    if not rows:
        raise UserError(f"{file} contains no questions")
    return rows


def _require_answers(task: Any, file: Path, limit: int | None) -> None:
    """Refuse a question that lm-eval finds no answer to; it would only warn, and count it as wrong."""
    for number, doc in enumerate(list(task.eval_docs)[:limit], 1):
        try:
            text, choices = task.doc_to_text(doc), task.doc_to_choice(doc)
            # WinoGrande's choices are beginnings of a sentence, and its text is the number of the right one.
            answer = text if isinstance(text, int) else task.doc_to_target(doc)
        except Exception as error:  # whatever a template or a function of lm-eval raises
            raise UserError(f"{file}, question {number} cannot be asked: {summary(error)}") from None
        if not (isinstance(answer, int) and 0 <= answer < len(choices)):
            raise UserError(
                f"{file}, question {number} has the answer {answer!r}, but {len(choices)} choices"
            )
