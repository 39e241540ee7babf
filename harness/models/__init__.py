"""An original model: where its files are, how it is loaded, and its decoder layers.

Read `folder` (files of a model folder), `decoder` (the layers to quantize), `original` and `loading`;
`gguf` and `streamed` are two of the ways to load one.
"""
