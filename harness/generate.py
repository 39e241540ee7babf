"""Generate text with a ternary or an original model: python -m harness.generate PATH --prompt TEXT."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TextStreamer

from harness.cli import HelpFormatter, add_trust_remote_code, add_verbose, model_name, positive, run
from harness.compute import default_compute
from harness.errors import UserError
from harness.hf import open_model
from harness.models.folder import GENERATION
from harness.models.loading import MODEL_HELP
from harness.models.original import Original, require_fits
from harness.text import require_unicode

# Dividing logits by a smaller temperature could overflow float32.
LEAST_TEMPERATURE = 1e-6

DESCRIPTION = """\
Continue a prompt with a ternary checkpoint, or with an original model for comparison. The text is
printed as it is generated. The last line gives the speed of prefill and decoding in tokens per second.

  python -m harness.generate smollm2-ternary --prompt "The capital of France is"
  python -m harness.generate smollm2-ternary --prompt "Tell me a joke." --chat --temperature 0.7
"""


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
            f"prompt of {self.prompt} tokens in {self.prompt_seconds:.2f} s "
            f"({self.prompt / self.prompt_seconds:.1f} tokens/s); generated {self.written} tokens{decoding}"
        )


class _TimedStreamer(TextStreamer):
    """Print text as it is generated, and record when the first new token arrived."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.first: float | None = None
        self.calls = 0

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt (first call), then each new token."""
        self.calls += 1
        if self.calls == 2:
            self.first = time.perf_counter()
        super().put(value)


def generate(
    original: Original,
    prompt: str,
    tokens: int,
    temperature: float,
    seed: int,
    chat: bool = False,
    compiled: bool = False,
) -> Speed:
    """Print the continuation of a prompt.

    Parameters
    ----------
    original : Original
        Model and tokenizer.
    prompt : str
        Text to continue.
    tokens : int
        Maximum number of new tokens; the model may stop earlier.
    temperature : float
        Sampling temperature; 0 for greedy decoding.
    seed : int
        Seed for sampling.
    chat : bool
        Pass the prompt as a user message, through the model's chat template.
    compiled : bool
        Use a static cache, for which transformers compiles the model on a CUDA GPU.

    Returns
    -------
    Speed

    Raises
    ------
    UserError
        If the prompt is empty or not valid Unicode, if prompt and new tokens exceed the model's context,
        if the chat template is missing or fails, or if transformers rejects a generation setting.
    """
    require_unicode(prompt, "the prompt")
    model = original.model
    text = _apply_chat_template(original, prompt) if chat else prompt
    # The template adds the special tokens; the tokenizer must not add them again.
    inputs = original.tokenizer(text, return_tensors="pt", add_special_tokens=not chat)
    ids = inputs["input_ids"]
    if ids.numel() == 0:
        raise UserError("the prompt is empty")
    _require_room(original, ids.shape[1], tokens)
    require_fits(model, ids, ids.shape[1])
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    streamer = _TimedStreamer(original.tokenizer)
    torch.manual_seed(seed)
    begin = time.perf_counter()
    try:
        with torch.no_grad():
            output = model.generate(
                **inputs.to(model.device),
                max_new_tokens=tokens,
                streamer=streamer,
                pad_token_id=original.tokenizer.pad_token_id or original.tokenizer.eos_token_id,
                **({"cache_implementation": "static"} if compiled else {}),
                **sampling,
            )
    except (TypeError, ValueError) as error:  # transformers checks some settings only when it uses them
        settings = model.generation_config.to_diff_dict()
        settings.pop("transformers_version", None)
        raise UserError(
            f"{original.name} cannot generate: {_in_one_line(error)}; check the settings in its "
            f"{GENERATION}: {settings}"
        ) from None
    end = time.perf_counter()
    first = streamer.first or end
    return Speed(ids.shape[1], output.shape[1] - ids.shape[1], first - begin, end - first)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.generate", description=DESCRIPTION, formatter_class=HelpFormatter
    )
    add = parser.add_argument
    what = f"a ternary checkpoint; or {MODEL_HELP}"
    add("model", nargs="?", type=model_name, metavar="PATH", help=what)
    add("--prompt", required=True, metavar="TEXT", help="text to continue")
    add("--chat", action="store_true", help="pass the prompt as a user message, through the chat template")
    add("--tokens", type=positive, default=64, metavar="N", help="maximum number of new tokens")
    add(
        "--temperature",
        type=float,
        default=0.0,
        metavar="X",
        help="sampling temperature; 0 for greedy decoding",
    )
    add("--seed", type=int, default=0, metavar="N", help="seed for sampling, if the temperature is above 0")
    add(
        "--dense",
        action="store_true",
        help="multiply by dense weights made of the packed ones, as the original does; takes more memory",
    )
    add(
        "--compile",
        action="store_true",
        help="on a CUDA GPU, compile the model with CUDA graphs; starts slowly, then generates faster",
    )
    add("--cpu", action="store_true", help="run on the CPU even if torch has a CUDA GPU")
    add_trust_remote_code(parser)
    add_verbose(parser)
    arguments = parser.parse_args()
    if not (arguments.temperature == 0 or LEAST_TEMPERATURE <= arguments.temperature < float("inf")):
        parser.error(f"--temperature must be 0, or finite and at least {LEAST_TEMPERATURE}")
    if not -(2**63) <= arguments.seed < 2**64:
        parser.error("--seed must be a 64-bit integer")

    device = "cpu" if arguments.cpu else default_compute().device
    original = open_model(
        arguments.model,
        device,
        dense=arguments.dense or None,
        trust_remote_code=arguments.trust_remote_code,
    )
    if original.read is not None:
        raise UserError(
            f"{original.name} is too large for the memory of this machine, and generation needs the whole "
            "model in memory; only harness.evaluate and harness.quantize run it layer by layer"
        )
    original.model.to(device)
    speed = generate(
        original,
        arguments.prompt,
        arguments.tokens,
        arguments.temperature,
        arguments.seed,
        arguments.chat,
        arguments.compile,
    )
    print(f"{speed}, on {original.model.device}", file=sys.stderr)
    return 0


def _require_room(original: Original, read: int, written: int) -> None:
    """Refuse to generate beyond the model's context."""
    positions = getattr(original.model.config.get_text_config(), "max_position_embeddings", None)
    if positions and read + written > positions:
        raise UserError(
            f"the prompt ({read} tokens) and --tokens {written} make {read + written} tokens, more than the "
            f"{positions} positions of {original.name}; shorten the prompt or lower --tokens"
        )


def _apply_chat_template(original: Original, message: str) -> str:
    if not original.tokenizer.chat_template:
        raise UserError(f"{original.name} has no chat template; drop --chat")
    chat = [{"role": "user", "content": message}]
    try:
        return original.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program: it can raise anything
        raise UserError(
            f"the chat template of {original.name} failed; fix it, or drop --chat: {_in_one_line(error)}"
        ) from None


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


if __name__ == "__main__":
    run(main)
