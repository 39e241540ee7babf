"""The original model: find its files, load it, and find its decoder layers.

Read `folder` (files of a model folder), `decoder` (the layers to quantize), `original` and `loading`;
`gguf` and `streamed` are two ways to load a model, `tokenizer` loads its tokenizer; `identity` tells whether
it is the same as before.
"""
