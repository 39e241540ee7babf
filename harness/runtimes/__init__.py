"""What llama.cpp and mlx_lm compute of a model, and what their formats hold.

`harness.quantize --for` asks before a run, `harness.export` after it. Read `containers` (types of tensors)
and `features` (what a runtime may not compute); then the tables `gguf_architectures` and `mlx_architectures`,
and `gguf_header` with `gguf_rope` and `gguf_tokenizer`.
"""
