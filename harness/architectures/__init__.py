"""python -m harness.architectures: try every architecture of transformers at a small size.

`configs` makes small configurations, `check` takes one model through quantization, saving and loading.
"""
