"""python -m harness.export: a checkpoint in formats of other programs.

Read `source` (what is exported, and how far rounding moves it), then `gguf` with `gguf_tokenizer`, or `hqq`.
"""
