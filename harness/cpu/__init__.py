"""The backend for CPUs: what takes time in `reference`, with compiled loops and few large products.

Weights may be float32: then the products of the refinement are too, and everything else is float64. Read
`ternarize`, which uses `rows` (loops over the rows of a block), `gptq` (factors of H) and `refine` (`joint`,
`descent`).
"""

# What else there is, such as packing, takes no time worth compiling.
REST = "reference"
# Types of weights; the first is preferred.
PRECISIONS = ("float32", "float64")
