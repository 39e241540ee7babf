"""Run a model from a prompt to its last token, and print the text as it is generated."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TextStreamer

from harness.errors import UserError
from harness.generate.stops import UntilStop, cut
from harness.models.classes import require_vocabulary
from harness.models.folder import GENERATION
from harness.models.original import Original, require_fits, summary
from harness.words import counted


def require_whole(original: Original) -> None:
    """Refuse a model that cannot write: a classifier, or one that is read layer by layer.

    Every new token needs all layers.
    """
    require_vocabulary(original.model, original.name, "cannot generate text")
    if original.read is not None:
        raise UserError(
            f"{original.name} is too large for the memory of this machine, and generation needs the whole "
            "model in memory; only harness.evaluate and harness.quantize run it layer by layer"
        )


@dataclass(frozen=True)
class Settings:
    """How to generate.

    Parameters
    ----------
    tokens : int
        Maximum number of new tokens; the model may stop earlier.
    temperature : float
        Sampling temperature; 0 for greedy decoding.
    stop : tuple of str
        Texts that end the generation. They are not printed.
    compiled : bool
        Use a static cache, for which transformers compiles the model on a CUDA GPU.
    """

    tokens: int
    temperature: float = 0.0
    stop: tuple[str, ...] = ()
    compiled: bool = False


@dataclass(frozen=True)
class Speed:
    """Tokens and seconds of the prefill (which yields the first token) and of decoding after it."""

    prompt: int
    written: int
    prompt_seconds: float
    writing_seconds: float

    def __str__(self) -> str:
        after = self.written - 1
        decoding = f" at {after / self.writing_seconds:.1f} tokens/s" if after > 0 else ""
        return (
            f"prompt of {counted(self.prompt, 'token')} in {self.prompt_seconds:.2f} s "
            f"({self.prompt / self.prompt_seconds:.1f} tokens/s); "
            f"generated {counted(self.written, 'token')}{decoding}"
        )


@dataclass(frozen=True)
class Generated:
    """What a run of the model gave.

    Parameters
    ----------
    text : str
        The new text, without special tokens and without the text that stopped it.
    ids : list of int
        Tokens of the prompt, then the new ones.
    unfinished : bool
        Whether only the limit of new tokens ended the run.
    speed : Speed
    cache : transformers.Cache or None
        Keys and values of all tokens but the last, if the model has such a cache.
    """

    text: str
    ids: list[int]
    unfinished: bool
    speed: Speed
    cache: Any


class Printer(TextStreamer):
    """Print text as it is generated, until a stop text; record when the first new token arrived."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.until_stop = UntilStop(stop)
        self.first: float | None = None
        self.calls = 0

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt (first call), then each new token."""
        self.calls += 1
        if self.calls == 2:
            self.first = time.perf_counter()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print, but hold back what may be the beginning of a stop text."""
        print(self.until_stop.take(text, stream_end), end="\n" if stream_end else "", flush=True)


def decode(
    original: Original,
    ids: list[int],
    settings: Settings,
    ends: set[int] | None = None,
    cache: Any = None,
    halt: threading.Event | None = None,
) -> Generated:
    """Generate, and print the new text.

    Parameters
    ----------
    original : Original
        Model and tokenizer.
    ids : list of int
        Tokens of the prompt.
    settings : Settings
    ends : set of int, optional
        Tokens that end the text. By default those of the model's generation settings.
    cache : transformers.Cache, optional
        Keys and values of the first tokens of `ids`, which are then not computed again.
    halt : threading.Event, optional
        Ends the generation after the current token when it is set.

    Raises
    ------
    UserError
        If the prompt is empty, longer than the model's context or has tokens that the model lacks; or if
        transformers rejects a generation setting.
    """
    model, tokenizer = original.model, original.tokenizer
    if not ids:
        raise UserError("the prompt is empty")
    prompt = torch.tensor([ids], device=model.device)
    require_fits(model, prompt, len(ids))
    printer = Printer(tokenizer, settings.stop)

    def text_of(tokens: torch.Tensor) -> str:
        return tokenizer.decode(tokens[0, len(ids) :], skip_special_tokens=True)

    def stopped(tokens: torch.Tensor, scores: Any, **rest: Any) -> torch.Tensor:
        value = bool(halt and halt.is_set()) or any(stop in text_of(tokens) for stop in settings.stop)
        return torch.full((1,), value, device=tokens.device)

    options: dict[str, Any] = {"do_sample": False}
    if settings.temperature > 0:
        options = {"do_sample": True, "temperature": settings.temperature}
    if settings.compiled:
        options["cache_implementation"] = "static"
    elif cache is not None:
        options["past_key_values"] = cache
    if ends:
        options["eos_token_id"] = list(ends)
    begin = time.perf_counter()
    try:
        with torch.no_grad():
            output = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=settings.tokens,
                streamer=printer,
                stopping_criteria=[stopped],
                tokenizer=tokenizer,  # for stop texts among the model's own settings
                pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
                return_dict_in_generate=True,
                **options,
            )
    except (TypeError, ValueError) as error:  # transformers checks some settings only when it uses them
        given = model.generation_config.to_diff_dict()
        given.pop("transformers_version", None)
        raise UserError(
            f"{original.name} cannot generate: {summary(error)}; check the settings in its "
            f"{GENERATION}: {given}"
        ) from None
    end = time.perf_counter()
    first = printer.first or end
    tokens = output.sequences
    new = tokens.shape[1] - len(ids)
    at_limit = new == settings.tokens and int(tokens[0, -1]) not in (ends or ())
    return Generated(
        cut(text_of(tokens), settings.stop),
        tokens[0].tolist(),
        at_limit and not stopped(tokens, None).item(),
        Speed(len(ids), new, first - begin, end - first),
        None if settings.compiled else output.past_key_values,
    )


def context_length(original: Original) -> int | None:
    """Number of positions of a model, if it has such a limit."""
    return getattr(original.model.config.get_text_config(), "max_position_embeddings", None)
