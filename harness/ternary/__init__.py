"""A ternary model: on disk, and as modules of torch.

Read `format` (what config.json and the shards hold), `linear` (the module that keeps trits), `writing` and
`reading`; `embedding` stores embedding and head in 8 bits, `kernels/` multiplies by packed trits.
"""
