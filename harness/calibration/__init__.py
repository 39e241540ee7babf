"""Calibration: run text through the model and fit its matrices, one decoder layer after the other.

Read `layerwise`, the loop over the layers; it uses `capture` (inputs of the layers), `passage` (hidden states
between layers), `gram` (Gram matrices), `targets` (what the original model shows; with `stream`, what is
added to the residual stream, and `sums`), `experts` (mixtures), `methods` (PT²-LLM and the baselines) and
`grid_range` (matrices too small or too large for what stores them).
"""
