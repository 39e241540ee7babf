"""python -m harness.export: convert a checkpoint to the formats of other programs.

Read `source` (reads the matrices, and measures how far rounding moves them), then `gguf` with
`gguf_tokenizer`, or `hqq`.
"""
