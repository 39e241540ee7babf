"""Ternarize a language model: python -m harness.quantize MODEL --out DIR."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import replace

from harness.cli import HelpFormatter, add_verbose, run
from harness.distributed.launch import joined
from harness.quantize.options import add_options, from_arguments
from harness.quantize.run import quantize

DESCRIPTION = """\
Ternarize the linear layers of a language model with PT²-LLM and write a packed checkpoint.

Layer by layer, calibration text runs through the layers ternarized so far, and each weight matrix is
fitted to the inputs it really gets. Embeddings, norms and lm_head stay as they are, unless
--embedding says otherwise. The result is a Hugging Face folder with a report: report.html to look at,
report.json with all figures. Read the model back with harness.load(DIR).

  python -m harness.quantize --out smollm2-ternary
  python -m harness.quantize meta-llama/Llama-2-7b-hf --out llama2-ternary
  python -m harness.quantize MODEL --calibration wikitext2:wiki.train.raw \\
      --eval wikitext2:wiki.test.raw --out DIR
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.quantize", description=DESCRIPTION, formatter_class=HelpFormatter
    )
    add_options(parser)
    add_verbose(parser)
    return parser


def main() -> int:
    """Run the command line."""
    with joined():
        options = from_arguments(parser().parse_args())
        command = shlex.join(["python", "-m", "harness.quantize", *sys.argv[1:]])
        quantize(replace(options, command=command))
    return 0


if __name__ == "__main__":
    run(main, shared=True)
