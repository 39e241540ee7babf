"""Export a ternary checkpoint to another format: python -m harness.export CHECKPOINT."""

from __future__ import annotations

import argparse

from harness.cli import HelpFormatter, add_trust_remote_code, add_verbose, path, run
from harness.export.gguf import export_gguf
from harness.export.hqq import export_hqq

DESCRIPTION = """\
Export a ternary checkpoint to a format that other programs read.

  gguf  a GGUF file of type Q4_1, 5 bits per weight, for llama.cpp and for transformers (gguf_file=);
        for the architectures llama, mistral, qwen2 and qwen3
  hqq   a folder in HQQ's layout, 2 bits with a float zero point, 2.25 bits per weight in groups of 128;
        for any architecture

Both formats store alpha * t + mu as a scale and an offset. The offset is rounded to float16. Unless mu is
much larger than alpha, this moves the weights of a block by less than 1/1000 of its alpha; the actual
error is printed. Nothing else changes.

Both formats group neighbouring columns and hold float16 values, so the checkpoint must be quantized
without reordering (as the recipe best does), with alpha and mu in float16:

  python -m harness.quantize MODEL --grid float16 --out DIR
  python -m harness.export DIR --format gguf --out model.gguf
  python -m harness.evaluate model.gguf --data wikitext2
"""


def parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.export", description=DESCRIPTION, formatter_class=HelpFormatter
    )
    add = parser.add_argument
    add("checkpoint", type=path, metavar="CHECKPOINT", help="folder written by harness.quantize")
    add("--format", choices=("gguf", "hqq"), required=True, help="format to write")
    add("--out", type=path, required=True, metavar="PATH", help="GGUF file or HQQ folder to write")
    add("--force", action="store_true", help="overwrite PATH if it exists")
    add_trust_remote_code(parser)
    add_verbose(parser)
    return parser


def main() -> int:
    """Run the command line."""
    arguments = parser().parse_args()
    write, rounded = {
        "gguf": (export_gguf, "mu - alpha"),
        "hqq": (export_hqq, "1 - mu / alpha"),
    }[arguments.format]
    exported = write(arguments.checkpoint, arguments.out, arguments.force, arguments.trust_remote_code)
    print(exported.summary(rounded))
    return 0


if __name__ == "__main__":
    run(main)
