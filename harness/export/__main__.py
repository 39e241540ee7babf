"""Write a ternary checkpoint in another format: python -m harness.export CHECKPOINT."""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.cli import HelpFormatter, add_trust_remote_code, run
from harness.export.gguf import export_gguf
from harness.export.hqq import export_hqq

DESCRIPTION = """\
Write a ternary checkpoint in a format that other programs read.

  gguf  a file of type Q4_1, 5 bits a weight, for llama.cpp and for transformers (gguf_file=); models of
        the architectures llama, mistral, qwen2 and qwen3
  hqq   a folder in the layout of HQQ at 2 bits with a float zero, 2.25 bits a weight in groups of 128;
        models of any architecture

Both store alpha * t + mu as a scale and an offset. The offset is rounded to float16, which moves the
weights of a block by less than a thousandth of its alpha unless mu is much larger than alpha; what it
came to is printed. Nothing else changes.

Both have groups of neighbouring columns, so the checkpoint must have been made without reordering,
which costs accuracy:

  python -m harness.quantize MODEL --reorder none --out DIR
  python -m harness.export DIR --format gguf --out model.gguf
  python -m harness.evaluate model.gguf --data wikitext2
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.export", description=DESCRIPTION, formatter_class=HelpFormatter
    )
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="folder that harness.quantize wrote")
    add("--format", choices=("gguf", "hqq"), required=True, help="what to write")
    add("--out", type=Path, required=True, metavar="PATH", help="the GGUF file or the HQQ folder to write")
    add("--force", action="store_true", help="overwrite PATH if it exists")
    add_trust_remote_code(parser)
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
