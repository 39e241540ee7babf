"""Measure the perplexity of an original or a ternary model: python -m harness.evaluate MODEL."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from harness import text
from harness.calibration.capture import require_causal
from harness.cli import (
    HelpFormatter,
    add_trust_remote_code,
    add_verbose,
    model_name,
    positive,
    run,
    window_length,
)
from harness.compute import Compute, default_compute
from harness.divergence import divergence_on, require_comparable
from harness.errors import UserError
from harness.files import json_text
from harness.hf import open_model
from harness.models.decoder import locate_layers
from harness.models.gguf import GGUF_DTYPES
from harness.models.loading import MODEL_HELP, load_original
from harness.models.original import Original
from harness.perplexity import measure_on
from harness.windows import AUTO, BOS_CHOICES, tokenize

# Tokens to see on whether a model looks ahead.
CAUSAL_TOKENS = 16

DESCRIPTION = """\
Measure perplexity as the GPTQ family does: split the text into consecutive windows of --seqlen tokens
and take the exponential of the mean negative log-likelihood. The protocol is printed with the result,
because perplexities by different protocols are not comparable.

  python -m harness.evaluate smollm2-ternary --data wikitext2
  python -m harness.evaluate smollm2-ternary --original HuggingFaceTB/SmolLM2-135M-Instruct --data wikitext2
  python -m harness.evaluate --data wikitext2:wiki.test.raw --windows 8
"""


def parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.evaluate", description=DESCRIPTION, formatter_class=HelpFormatter
    )
    what = f"a ternary checkpoint; or {MODEL_HELP}"
    parser.add_argument("model", nargs="?", type=model_name, metavar="MODEL", help=what)
    parser.add_argument("--data", required=True, metavar="TEXT", help=text.SOURCES_HELP)
    parser.add_argument(
        "--text-column", metavar="NAME", help="field to read from .jsonl, .csv, .parquet and .arrow rows"
    )
    parser.add_argument("--seqlen", type=window_length, default=2048, help="tokens per window")
    parser.add_argument("--windows", type=positive, metavar="N", help="measure only the first N windows")
    parser.add_argument(
        "--bos",
        choices=BOS_CHOICES,
        default=AUTO,
        help="which windows begin with the BOS token in place of their first token: every-window, as "
        "llama.cpp does; as-tokenized: at most the first of a text, as the GPTQ family does; auto: "
        "every-window for Gemma models, which break down without it, else as-tokenized",
    )
    parser.add_argument(
        "--gguf-dtype", choices=GGUF_DTYPES, default="bfloat16", help="dtype to dequantize a GGUF file to"
    )
    parser.add_argument(
        "--packed",
        action="store_true",
        help="multiply by the packed weights of a ternary checkpoint, not by dense ones; saves memory",
    )
    parser.add_argument(
        "--original",
        type=model_name,
        metavar="MODEL",
        help="also compare predictions with those of this model: mean KL divergence, and how often both find "
        "the same token most likely; both models must fit in memory",
    )
    parser.add_argument("--cpu", action="store_true", help="run on the CPU even if torch has a CUDA GPU")
    add_trust_remote_code(parser)
    add_verbose(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def main() -> int:
    """Run the command line."""
    arguments = parser().parse_args()
    text.require_rows(arguments.text_column, arguments.data)
    stream = text.read_text(arguments.data, text.EVALUATION, arguments.text_column)
    compute = Compute() if arguments.cpu else default_compute()
    original = open_model(
        arguments.model,
        compute.device if arguments.packed else "cpu",
        dense=not arguments.packed,
        gguf_dtype=arguments.gguf_dtype,
        trust_remote_code=arguments.trust_remote_code,
    )
    _require_causal(original, stream)
    other = None
    if arguments.original is not None:
        other = load_original(arguments.original, arguments.gguf_dtype, arguments.trust_remote_code)
        require_comparable(other, original)
    result = measure_on(original, stream, arguments.seqlen, arguments.windows, compute, bos=arguments.bos)
    compared = None
    if other is not None:
        compared = divergence_on(
            other, original, stream, arguments.seqlen, arguments.windows, compute, bos=arguments.bos
        )
    if arguments.json:
        found = {}
        if other is not None and compared is not None:
            found = {"divergence": {"original": other.name, **asdict(compared)}}
        print(json_text({"model": original.name, **asdict(result), **found}))
        return 0
    print(f"perplexity {result.value:.4g}   {original.name}\n  {result.protocol}")
    if other is not None and compared is not None:
        print(
            f"KL divergence from {other.name}: mean {compared.mean:.4g}, 99th percentile "
            f"{compared.percentile_99:.4g}; the same most likely token for {compared.agreement:.1%} of "
            f"{compared.tokens} tokens"
        )
    return 0


def _require_causal(original: Original, stream: text.Text) -> None:
    """Refuse a model that sees the tokens it is to predict, if it has decoder layers to look at."""
    window = tokenize(stream, original.tokenizer)[:CAUSAL_TOKENS]
    try:
        decoder = locate_layers(original.model, original.read)
    except UserError:
        return
    # Ternary layers are of a model that was checked when it was quantized.
    if decoder.named_linears() and len(window) > 1:
        require_causal(original.model, decoder, window)


if __name__ == "__main__":
    run(main)
