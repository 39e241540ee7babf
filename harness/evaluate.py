"""Measure the perplexity of an original or a ternary model: python -m harness.evaluate MODEL."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from harness import perplexity, text
from harness.checkpoint import is_ternary, load_tokenizer
from harness.cli import HelpFormatter, add_trust_remote_code, json_text, positive, run, window_length
from harness.compute import HOST, Compute, default_compute
from harness.hf import load
from harness.layers import locate_layers
from harness.models import GGUF_DTYPES, MODEL_HELP, Original, load_original, require_fits

DESCRIPTION = """\
Measure perplexity as the GPTQ family does: windows of --seqlen tokens that do not overlap, from
the start of the text; the exponential of the mean negative log-likelihood. The protocol is printed
with the number, as numbers by different protocols cannot be compared.

  python -m harness.evaluate smollm2-ternary --data wikitext2
  python -m harness.evaluate --data wikitext2:wiki.test.raw --windows 8
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.evaluate", description=DESCRIPTION, formatter_class=HelpFormatter
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help=f"a ternary checkpoint; or {MODEL_HELP}")
    parser.add_argument("--data", required=True, metavar="TEXT", help=text.SOURCES_HELP)
    parser.add_argument("--text-column", metavar="NAME", help="field of .jsonl, .parquet and .arrow rows")
    parser.add_argument("--seqlen", type=window_length, default=2048, help="tokens in a window")
    parser.add_argument("--windows", type=positive, metavar="N", help="measure only the first N windows")
    parser.add_argument(
        "--gguf-dtype", choices=GGUF_DTYPES, default="bfloat16", help="what a GGUF is loaded in"
    )
    parser.add_argument(
        "--packed", action="store_true", help="keep no dense weights of a ternary checkpoint: slow, and small"
    )
    parser.add_argument("--cpu", action="store_true", help="do not use a CUDA device that torch has")
    add_trust_remote_code(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def measure_on(
    original: Original, stream: text.Text, seqlen: int, windows: int | None, compute: Compute
) -> perplexity.Perplexity:
    """Perplexity of a model on a text by the text's protocol, with a progress bar.

    A model that fits on the device is moved there and back; of one that does not, or that is not in
    memory, one decoder layer at a time is.

    Raises
    ------
    UserError
        If the text is shorter than one window, or a window is longer than the model allows.
    """
    model = original.model
    tokens = text.tokenize(stream, original.tokenizer)
    require_fits(model, tokens, seqlen)
    limit = min(filter(None, (windows, stream.windows)), default=None)
    chosen = text.evaluation_windows(tokens, seqlen, limit)
    arguments = (chosen, len(tokens), stream.protocol)
    if original.read is not None or not compute.holds(model, seqlen):
        decoder = locate_layers(model, original.read)
        with _bar(len(decoder.layers), "layer") as bar:
            return perplexity.measure_by_layers(model, decoder, *arguments, compute, bar.update)
    model.to(compute.device)
    try:
        with _bar(len(chosen), "window") as bar:
            return perplexity.measure(model, *arguments, bar.update)
    finally:
        model.to(HOST)


def _bar(total: int, unit: str) -> Any:
    return tqdm(total=total, desc="perplexity", unit=unit, disable=None, leave=False)


def main() -> int:
    """Run the command line."""
    arguments = parser().parse_args()
    stream = text.read_text(arguments.data, text.EVALUATION, arguments.text_column)
    path = Path(arguments.model) if arguments.model else None  # an empty name is refused as it is loaded
    if path is not None and is_ternary(path):
        dense, trusted = False if arguments.packed else None, arguments.trust_remote_code
        loaded = load(path, dense=dense, trust_remote_code=trusted)
        original = Original(loaded, load_tokenizer(path, trusted), str(path))
    else:
        original = load_original(arguments.model, arguments.gguf_dtype, arguments.trust_remote_code)
    compute = Compute() if arguments.cpu else default_compute()
    result = measure_on(original, stream, arguments.seqlen, arguments.windows, compute)
    if arguments.json:
        print(json_text({"model": original.name, **asdict(result)}))
    else:
        print(f"perplexity {result.value:.4g}   {original.name}\n  {result.protocol}")
    return 0


if __name__ == "__main__":
    run(main)
