"""PT²-LLM (arXiv 2510.03267) in float64 NumPy and SciPy: the specification every backend is held to.

Read in this order: `twn` (Eq. 1-3), `atq` (Eq. 4-10, Algorithm 1), `aga` (Eq. 11-13), `ssr`
(Eq. 14-16), `gptq` (block error compensation), `targets`, `feedforward`, `joint`, `descent` and `refine`
(beyond the paper), `ternarize` (one weight matrix, start to end), `grids`, `packing` and `matmul` (what a
checkpoint stores), `layout` (what kernels read), `baselines` (what people compare with).

Symbols, used throughout:

==========  ===========  ==================================================================
symbol      shape        meaning
==========  ===========  ==================================================================
``W``       (n, m)       weight matrix: n output rows, m input columns
``T``       (n, m)       trits in {-1, 0, +1}, int8
``alpha``   (n, 1)       scale of each row
``mu``      (n, 1)       shift of each row; the grid of row i is {mu-alpha, mu, mu+alpha}; 0 if symmetric
``W_hat``   (n, m)       dequantized weights, ``alpha * T + mu``
``X``       (tokens, m)  calibration inputs of the layer
``C``       (m, m)       Gram matrix of the inputs, XᵀX (what Eq. 13 calls S)
``H``       (m, m)       damped Gram matrix, C + damping · mean(diag C) · I
``B``, ``R``             columns of the block in hand, and the columns that remain after it
``k``                    columns in a block, 128 in the paper
==========  ===========  ==================================================================

Weights and Gram matrices of real layers carry no units; errors are squared Frobenius norms. Numbers whose
squares leave float64's range (above 1e150, or below 1e-150 and not 0) are not provided for.
"""
