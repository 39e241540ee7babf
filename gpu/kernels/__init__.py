"""CUDA kernels, launched by the modules of `gpu` whose equations they compute.

Reading order
-------------
Quantization, in Numba: `lanes` (what 32 threads do together), `fitting` (Eqs. 8-10), `alignment` (Eq. 12),
`similarity` (column order), `feedforward` (rounding fed forward), `segments` (sums for the joint grid),
`descent` (trits of whole rows), `packing` (trits of a checkpoint), all launched by `launching`.

The product y = x (alpha T + mu)^T: `layout` (T in device memory; the bytes are in `reference.layout`),
`product` (the plain kernel, in Numba, for everything else), `choice` (the table that chooses), then the CUDA
C++: ternary.cuh (what the kernels share, with a picture of T), decode.cu, arrange.cu, prefill.cu,
warpgroup.cu, dense.cu, each beside its launcher; `parameters` (their arguments) and `sources` (their text and
compilation). instructions.cuh has all assembly. tests/gpu/emulation.cpp has the same functions for a CPU, so
that every kernel is tested without a GPU.

Glossary
--------
trit        t in {-1, 0, +1}, stored as the digit t + 1 in two bits
word        16 trits of a row, 32 bits
span        64 columns: a word of each of the four lanes that share a row
chunk       256 columns: four spans, 16 bytes a lane
tile        32 rows of T; for `mma` also 8 tokens, the columns of B
part        one of up to three matrices that are joined, because they multiply the same x
pair        alpha and mu of a row and block
row pair    rows g and g + 8 of 16, whose words one lane holds
fragment    what one lane holds of A, B or D of a tensor core instruction
stage       a buffer in shared memory for prefetched data; several make a pipeline
phase       as many chunks of x as fit into shared memory at a time
split       a share of the columns, where SMs share a row; the sums of all splits are added at the end
eight       8 elements of 16 bits: one access of 16 bytes

Techniques
----------
Reasons, not measurements: what has run on a GPU is in golden/gpu-verified.json alone.

- Words are read once, 16 bytes a lane, in the order of the lanes: decoding is bound by memory, and this is
  the least traffic there can be.
- A trit becomes a 16-bit float in the mantissa of a large power of two. One AND-OR and one FMA make two
  trits, most without a shift: unpacking must hide behind the tensor cores.
- Tensor cores multiply x by t, which is exact; alpha and mu are applied in float32, once for at most 128
  columns. mu needs the sum of x over the block, which is made once for all rows.
- x is permuted, not T, whose columns lie in quantization order: the permutation costs no time per row.
- decode.cu keeps all of x in shared memory, one CUDA block per SM, and walks over tiles: x is arranged once.
- Words are prefetched by asynchronous copies, three stages deep, past the registers.
- Which warp adds what, in which order, never depends on the tokens: with the same kernel, a row of y has the
  same bits in every batch.
- Gathers and scatters go through shared memory: in global memory each 2 bytes would cost a sector of 32. Rows
  of x are padded there by 16 bytes against bank conflicts.
- warpgroup.cu makes weights, not trits, in registers: one sum for all blocks, so wgmma never waits for alpha.
- Matrices that multiply the same x share a launch: a small matrix alone leaves SMs idle.
- Constants, structs and the choice of a kernel are stated once, in Python, and written into the text.
"""
