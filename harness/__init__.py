"""The programs people run: quantize, evaluate, verify and benchmark ternary language models."""
