"""python -m harness.benchmark: measure speed, memory and quality; results name command, machine and date.

`options` has the command line. Read `methods` (compares quality), `quantization` (times whole runs at the
`shapes` of large models), and `products` and `generation` (compare packed with dense).
"""
