"""python -m harness.export: convert a checkpoint to the formats of other programs.

Read `source` (reads the matrices, and measures how far rounding moves them) with `fold` (orders of columns),
then `gguf` with `gguf_types` (bytes), `gguf_architectures`, `gguf_rope`, `gguf_tokenizer` and
`gguf_embedding`; `mlx` with `mlx_architectures`; or `hqq`. `features` names what a runtime may not compute.
"""
