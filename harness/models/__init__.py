"""The original model: find its files, load it, and find its decoder layers.

Read `folder` (files of a model folder), `decoder` (the layers to quantize), `original` and `loading`. `gguf`
and `streamed` are two ways to load a model, `tokenizer` loads its tokenizer, `tables` computes what no file
holds, and `identity` tells whether a model is the same as before. A GGUF file goes through `gguf_file` (its
bytes), `gguf_keys`, `gguf_rope` and `gguf_config` (what its settings say), `gguf_weights` (its tensors), and
`gguf_tokenizer` with the rules in `word_splits`.
"""
