"""Generate text with a ternary or an original model: python -m harness.generate PATH --prompt TEXT."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from harness.cli import HelpFormatter, add_trust_remote_code, add_verbose, model_name, positive, run
from harness.compute import default_compute
from harness.errors import UserError
from harness.generate.chat import apply_template, converse, end_tokens
from harness.generate.decode import Settings, Speed, context_length, decode, require_whole
from harness.hf import open_model
from harness.models.loading import MODEL_HELP
from harness.models.original import Original
from harness.ternary.format import is_ternary
from harness.text import require_unicode
from harness.words import counted

# Dividing logits by a smaller temperature could overflow float32.
LEAST_TEMPERATURE = 1e-6
# Default numbers of new tokens: of a prompt, and of each answer in a conversation.
TOKENS, ANSWER_TOKENS = 64, 512

DESCRIPTION = """\
Continue a prompt with a ternary checkpoint, or with an original model for comparison. The text is
printed as it is generated. The last line gives the speed of prefill and decoding in tokens per second.

  python -m harness.generate smollm2-ternary --prompt "The capital of France is"
  python -m harness.generate smollm2-ternary --prompt "Tell me a joke." --chat --temperature 0.7
  python -m harness.generate smollm2-ternary --stop . < prompt.txt

With --chat and no prompt, at a terminal, it holds a conversation. Ctrl-C ends an answer, a second one the
program; an empty line, /exit or Ctrl-D ends the conversation.

  python -m harness.generate smollm2-ternary --chat
"""


def _parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.generate", description=DESCRIPTION, formatter_class=HelpFormatter
    )
    add = parser.add_argument
    what = f"a ternary checkpoint; or {MODEL_HELP}"
    add("model", nargs="?", type=model_name, metavar="PATH", help=what)
    add("--prompt", metavar="TEXT", help="text to continue; by default what is piped in")
    add(
        "--chat",
        action="store_true",
        help="pass the prompt as a user message, through the model's chat template; without a prompt, hold "
        "a conversation at the terminal",
    )
    add(
        "--tokens",
        type=positive,
        metavar="N",
        help=f"maximum number of new tokens (default: {TOKENS}; {ANSWER_TOKENS} for each answer in a "
        "conversation)",
    )
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text; may be repeated. The model's own end tokens, and with --chat the "
        "template's end of turn, always end the text",
    )
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
    return parser


def main() -> int:
    """Run the command line."""
    parser = _parser()
    arguments = parser.parse_args()
    if not (arguments.temperature == 0 or LEAST_TEMPERATURE <= arguments.temperature < float("inf")):
        parser.error(f"--temperature must be 0, or finite and at least {LEAST_TEMPERATURE}")
    if not -(2**63) <= arguments.seed < 2**64:
        parser.error("--seed must be a 64-bit integer")
    if not all(arguments.stop):
        parser.error("--stop must not be empty")
    prompt = _prompt(arguments.prompt, arguments.chat)

    device = torch.device("cpu") if arguments.cpu else default_compute().device
    if arguments.compile and device.type == "cpu":
        raise UserError("--compile is for a CUDA GPU, and this runs on the CPU; drop it")
    if arguments.dense and not (arguments.model and is_ternary(Path(arguments.model))):
        raise UserError(
            f"{arguments.model or 'the embedded model'} is not a ternary checkpoint: its weights are dense "
            "already; drop --dense"
        )
    original = open_model(
        arguments.model,
        device,
        dense=arguments.dense or None,
        trust_remote_code=arguments.trust_remote_code,
    )
    require_whole(original)
    original.model.to(device)
    torch.manual_seed(arguments.seed)
    settings = Settings(
        arguments.tokens or (TOKENS if prompt is not None else ANSWER_TOKENS),
        arguments.temperature,
        tuple(arguments.stop),
        arguments.compile,
    )
    if prompt is None:
        converse(original, settings)
    else:
        speed = _continue(original, prompt, settings, arguments.chat)
        print(f"{speed}, on {original.model.device}", file=sys.stderr)
    return 0


def _prompt(given: str | None, chat: bool) -> str | None:
    """Return the prompt of the command line or of a pipe; None to ask for messages at a terminal."""
    if given is not None:
        return given
    if sys.stdin is not None and not sys.stdin.isatty():
        try:
            text = sys.stdin.buffer.read().decode()
        except UnicodeDecodeError as error:
            raise UserError(
                f"the prompt on standard input is not UTF-8 text: {error.reason} at byte {error.start}"
            ) from None
        return text.removesuffix("\n").removesuffix("\r")
    if not chat or sys.stdin is None:
        raise UserError(
            "there is no prompt; pass --prompt TEXT, pipe it in, or talk to the model with --chat"
        )
    return None


def _continue(original: Original, prompt: str, settings: Settings, chat: bool) -> Speed:
    """Print the continuation of a prompt, or the answer to it."""
    require_unicode(prompt, "the prompt")
    if chat:
        ids = apply_template(original, [{"role": "user", "content": prompt}])
    else:
        ids = original.tokenizer(prompt)["input_ids"]
    positions = context_length(original)
    if positions and len(ids) + settings.tokens > positions:
        raise UserError(
            f"the prompt ({counted(len(ids), 'token')}) and --tokens {settings.tokens} make "
            f"{len(ids) + settings.tokens} tokens, more than the {positions} positions of {original.name}; "
            "shorten the prompt or lower --tokens"
        )
    return decode(original, ids, settings, end_tokens(original) if chat else None).speed


if __name__ == "__main__":
    run(main)
