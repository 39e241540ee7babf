"""Accuracy of a loaded model on zero-shot tasks, measured by lm-eval."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from harness.compute import HOST, Compute, dtype_name
from harness.errors import UserError
from harness.models.classes import require_vocabulary
from harness.models.original import Original
from harness.progress import Progress, Say, say_on_stderr
from harness.windows import AUTO, bos_of
from harness.words import counted
from harness.zeroshot.tasks import TASKS

# Tokens that a batch is taken to hold per prompt, to decide whether a model fits on a device.
PROMPT_TOKENS = 512


@dataclass(frozen=True)
class Accuracy:
    """A share of right answers and its standard error, as lm-eval reports them; nan if that is unknown."""

    value: float
    stderr: float


@dataclass(frozen=True)
class Accuracies:
    """What a model reaches.

    Attributes
    ----------
    model : str
        Name of the model.
    tasks : dict of str to dict of str to Accuracy
        By task and metric, "acc" and, where lm-eval has it, "acc_norm".
    average : Accuracy
        Mean of the paper's metric over the tasks, each of which counts the same.
    questions : dict of str to int
        Number of questions asked, by task.
    shortened : int
        Number of prompts with choice that lost their beginning, as they were longer than the model's context.
    protocol : str
        What has an influence on the numbers.
    """

    model: str
    tasks: dict[str, dict[str, Accuracy]]
    average: Accuracy
    questions: dict[str, int]
    shortened: int
    protocol: str

    def to_json(self) -> dict[str, Any]:
        """Return the object for a JSON report; accuracies are shares, not percent."""
        return {
            "average": vars(self.average),
            **{
                name: {
                    "questions": self.questions[name],
                    "paper_metric": TASKS[name].metric,
                    **{metric: vars(score) for metric, score in scores.items()},
                }
                for name, scores in self.tasks.items()
            },
            "shortened": self.shortened,
            "protocol": self.protocol,
        }


class _Model(HFLM):
    """A loaded model in lm-eval, which reports its progress."""

    def __init__(self, original: Original, batch_size: int, bos: bool, say: Say) -> None:
        super().__init__(
            pretrained=original.model,
            tokenizer=original.tokenizer,
            batch_size=batch_size,
            add_bos_token=True if bos else None,
            # By default lm-eval rounds log-likelihoods to the dtype of the model: in bfloat16, a sum near
            # -100 to a multiple of 0.5. Choices then tie, and the first one wins.
            softmax_dtype="float32",
        )
        self._name, self._say = original.name, say
        self._step: Callable[[int], object] = lambda rows: None
        self.shortened = 0

    def _loglikelihood_tokens(self, requests: list[Any], disable_tqdm: bool = True, **rest: Any) -> Any:
        # A row of the model serves all choices of one token after the same prompt.
        rows = {tuple(prompt + choice[:-1]) for _, prompt, choice in requests}
        self.shortened = sum(len(p) + len(c) > self.max_length + 1 for _, p, c in requests)
        with Progress(f"tasks of {self._name}", len(rows), "prompt", self._say) as self._step:
            return super()._loglikelihood_tokens(requests, disable_tqdm=True, **rest)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
        return super().loglikelihood(requests, disable_tqdm=True)

    def _model_call(self, inps: torch.Tensor, **rest: Any) -> torch.Tensor:
        logits = super()._model_call(inps, **rest)
        self._step(len(inps))
        return logits


def measure_tasks(
    original: Original,
    tasks: dict[str, Any],
    limit: int | None,
    compute: Compute,
    batch_size: int,
    bos: str = AUTO,
    say: Say = say_on_stderr,
) -> Accuracies:
    """Ask a model the questions of tasks, without examples.

    Parameters
    ----------
    original : Original
        The model, original or ternary. It is moved to the device and back.
    tasks : dict of str to lm_eval.api.task.Task
        As `harness.zeroshot.tasks.load_tasks` returns them.
    limit : int or None
        Ask only the first questions of each task.
    compute : Compute
        Device to run on.
    batch_size : int
        Number of prompts at a time.
    bos : {"auto", "every-window", "as-tokenized"}
        Which prompts begin with the BOS token: those of `harness.windows.bos_of`, or as the tokenizer has it.
    say : callable
        Prints a line, where there is no terminal for a bar.

    Raises
    ------
    UserError
        If the model is a classifier, or does not fit in memory.
    """
    model = original.model
    require_vocabulary(model, original.name, "cannot be asked the questions of tasks")
    if original.read is not None or not compute.holds(model, PROMPT_TOKENS * batch_size):
        raise UserError(
            f"{original.name} does not fit into the memory of "
            f"{'this machine' if compute.device == HOST else 'the GPU; try --cpu, or a smaller --batch-size'}"
        )
    first = bos_of(model, original.tokenizer, bos) is not None
    model.to(compute.device)
    try:
        asked = _Model(original, batch_size, first, say)
        for task in tasks.values():
            task.set_config(key="num_fewshot", value=0)
        found = evaluate(asked, {"tasks": tasks, "groups": {}}, limit=limit, log_samples=False)
    finally:
        model.to(HOST)
    scores = {name: _scores(found["results"][name]) for name in tasks}
    chosen = [scores[name][TASKS[name].metric] for name in tasks]
    return Accuracies(
        original.name,
        scores,
        Accuracy(
            sum(score.value for score in chosen) / len(chosen),
            math.sqrt(sum(score.stderr**2 for score in chosen)) / len(chosen),
        ),
        {name: found["n-samples"][name]["effective"] for name in tasks},
        asked.shortened,
        f"lm-eval {metadata.version('lm-eval')}, no examples, {_beginning(asked)}, "
        f"{counted(batch_size, 'prompt')} at a time, computed in {dtype_name(model.dtype)}",
    )


def _beginning(asked: _Model) -> str:
    bos = asked.tokenizer.bos_token
    begins = bos is not None and asked.tok_encode("a")[0] == asked.tokenizer.bos_token_id
    return f"every prompt begins with {bos}" if begins else "no BOS token"


def _scores(found: dict[str, Any]) -> dict[str, Accuracy]:
    return {
        # One question has no standard error: lm-eval says "N/A".
        metric: Accuracy(
            found[f"{metric},none"], float(str(found[f"{metric}_stderr,none"]).replace("N/A", "nan"))
        )
        for metric in ("acc", "acc_norm")
        if f"{metric},none" in found
    }


def table(results: list[Accuracies]) -> list[str]:
    """Format results side by side, in percent; the paper's metric is marked with an asterisk."""
    first = results[0]
    rows = [["task", "questions", "metric", *(result.model for result in results)]]
    for name, scores in first.tasks.items():
        for metric in scores:
            mark = "*" if metric == TASKS[name].metric else ""
            cells = [_percent(result.tasks[name][metric]) for result in results]
            rows.append([name, str(first.questions[name]), metric + mark, *cells])
    rows.append(["average", "", "*", *(_percent(result.average) for result in results)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    notes = ["* reported by the paper; percent ± standard error; acc_norm: log-likelihood per character"]
    for result in results:
        notes.append(f"{result.model}: {result.protocol}")
        if result.shortened:
            notes.append(
                f"{result.model}: {counted(result.shortened, 'prompt')} lost the beginning to fit its context"
            )
    return [*lines, *notes]


def _percent(score: Accuracy) -> str:
    return f"{100 * score.value:.2f} ± {100 * score.stderr:.2f}"
