"""Export a ternary checkpoint to another format: python -m harness.export CHECKPOINT."""

from __future__ import annotations

import argparse

from harness.cli import HelpFormatter, add_trust_remote_code, add_verbose, path, run
from harness.errors import UserError
from harness.export.gguf import export_gguf
from harness.export.gguf_types import EMBEDDING, TERNARY
from harness.export.hqq import export_hqq
from harness.export.mlx import EIGHT_BITS, export_mlx
from harness.export.source import AS_IT_IS, Exported

GGUF, MLX, HQQ = "gguf", "mlx", "hqq"
# What embedding and head can be rounded to, by format.
EMBEDDINGS = {GGUF: tuple(EMBEDDING), MLX: (EIGHT_BITS,), HQQ: ()}

DESCRIPTION = """\
Export a ternary checkpoint to a format that other programs read.

  gguf  a GGUF file for llama.cpp. Each matrix gets the smallest type that holds it: TQ1_0, TQ2_0 or Q2_0
        if mu is 0, else Q2_K with blocks of 256, or Q4_1
  mlx   a folder for mlx_lm, 2 bits in affine groups of 32, 64 or 128
  hqq   a folder in HQQ's layout, 2 bits with a float zero point; for any architecture

Where mu is not 0, all of them store alpha * t + mu as a scale and an offset, which is rounded to float16.
Unless mu is much larger than alpha, this moves the weights of a block by less than 1/1000 of its alpha; the
actual error is printed. Nothing else changes, unless --embedding asks for it.

All formats group neighbouring columns and hold float16 values, so the checkpoint must be quantized without
reordering (or with --foldable), with alpha and mu in float16, which is not the default; --for chooses
such settings:

  python -m harness.quantize MODEL --for gguf --out DIR
  python -m harness.export DIR --format gguf --out model.gguf
"""


def parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.export", description=DESCRIPTION, formatter_class=HelpFormatter
    )
    add = parser.add_argument
    add("checkpoint", type=path, metavar="CHECKPOINT", help="folder written by harness.quantize")
    add("--format", choices=(GGUF, MLX, HQQ), required=True, help="format to write")
    add("--out", type=path, required=True, metavar="PATH", help="file (gguf) or folder to write")
    add(
        "--type",
        choices=(*TERNARY, "F32"),
        help="GGUF type of all matrices, by default the smallest that holds each; F32 writes dense weights",
    )
    add(
        "--embedding",
        choices=(AS_IT_IS, *(kind for kinds in EMBEDDINGS.values() for kind in kinds)),
        default=AS_IT_IS,
        help="type of embedding and head: "
        + "; ".join(f"{name}: {', '.join(kinds)}" for name, kinds in EMBEDDINGS.items() if kinds),
    )
    add("--force", action="store_true", help="overwrite PATH if it exists")
    add_trust_remote_code(parser)
    add_verbose(parser)
    return parser


def main() -> int:
    """Run the command line."""
    arguments = parser().parse_args()
    format_, embedding = arguments.format, arguments.embedding
    if arguments.type is not None and format_ != GGUF:
        raise UserError("--type is a type of GGUF; drop it, or pass --format gguf")
    if embedding not in (AS_IT_IS, *EMBEDDINGS[format_]):
        known = ", ".join((AS_IT_IS, *EMBEDDINGS[format_]))
        raise UserError(f"--format {format_} cannot store an embedding as {embedding}; choose from {known}")
    print(_export(arguments).summary("1 - mu / alpha" if format_ == HQQ else "mu - alpha"))
    return 0


def _export(arguments: argparse.Namespace) -> Exported:
    common = (arguments.checkpoint, arguments.out, arguments.force, arguments.trust_remote_code)
    if arguments.format == GGUF:
        return export_gguf(*common, kind=arguments.type, embedding=arguments.embedding)
    if arguments.format == MLX:
        return export_mlx(*common, embedding=arguments.embedding)
    return export_hqq(*common)


if __name__ == "__main__":
    run(main)
