"""python -m harness.benchmark: speed, memory and quality, as files that name command, machine and date.

Read `methods` (quality side by side), `quantization` (whole runs at the `shapes` of large models), `products`
and `generation` (packed against dense).
"""
