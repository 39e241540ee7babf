"""Calibration: text goes in, fitted matrices come out, one decoder layer after the other.

Read `layerwise`, the loop over the layers; it uses `capture` (inputs of the layers), `gram` (their Gram
matrices) and `methods` (what fits a matrix).
"""
