"""python -m harness.export: convert a checkpoint to the formats of other programs.

Read `source` (reads the matrices, and measures how far rounding moves them) with `fold` (orders of columns)
and `tensors` (experts become one tensor); then `gguf` with `gguf_types` (bytes) and `gguf_embedding`; `mlx`;
or `hqq`. What the other programs compute of a model is in `harness.runtimes`.
"""
