"""A ternary model on disk, and as torch modules.

Read `format` (contents of config.json and the shards), `linear` (the module that holds trits), `writing` and
`reading`; `embedding` stores embedding and head in 8 bits, `kernels/` multiplies by packed trits.
"""
