"""The packed layout: how kernels read ternary matrices from the memory of a device.

It is made from a checkpoint's tensors (`reference.packing`) once, when a model is loaded. A matrix has n
rows and m columns, the columns in quantization order. Rows are cut into tiles of 32, columns into chunks of
256, and the last ones are filled up. Below, i is a row and j a column of T; all numbers are little-endian.

::

                   chunk 0        chunk 1
               columns 0 ... 255  256 ... 511    ...
                    +--------------+--------------+--
     0 ... 31       | record 0     | record 1     |       tile 0
    rows            +--------------+--------------+--
    32 ... 63       | chunks       | chunks + 1   |       tile 1
                    +--------------+--------------+--

``words``  (tiles, chunks, 32, 16) uint32: the trits. A row of a chunk is 16 words, 64 bytes; a tile's rows
follow each other, so a record is 2 KiB. Word w holds the columns 16w to 16w + 15 of its chunk. Four lanes of
a warp share a row, and lane t loads 16 bytes at once, so word w = 4r + t is stored at the place 4t + r::

    byte     0   4   8  12   16  20  24  28   32  36  40  44   48  52  56  60
           +---------------+---------------+---------------+---------------+
    word   | 0   4   8  12 | 1   5   9  13 | 2   6  10  14 | 3   7  11  15 |
           +---------------+---------------+---------------+---------------+
    lane           0               1               2               3

The r-th words of the four lanes are a span: the columns 64r to 64r + 63 of the chunk, all of one block.
Within a word trit i has the digit t + 1, in {0, 1, 2}, in its bits 2i and 2i + 1::

    bit    31 30   29 28          7 6     5 4     3 2     1 0
           trit 15 trit 14  ...  trit 3  trit 2  trit 1  trit 0

So the digit of T[i, j] has the value 4^(j % 16) in
``words[i // 32, j // 256, i % 32, 4 * (j // 16 % 4) + j % 256 // 64]``. Rows and columns that fill up have
t = 0, the digit 1.

``grid``  (tiles, chunks, 32, pairs, 2) float16, or int8 codes of a `reference.types.CodedGrid`: alpha and
mu, in this order, for blocks of k = 64, 128, 256, 512, ... columns. A row of a chunk has 4, 2, 1, 1, ...
pairs: one for each block that begins in the chunk, or that of the block which the chunk is a part of::

    columns of the chunk    0 ... 63     64 ... 127   128 ... 191  192 ... 255
    k = 64                | alpha, mu  | alpha, mu  | alpha, mu  | alpha, mu  |   16 bytes, or 8 of codes
    k = 128               | alpha, mu               | alpha, mu               |    8           4
    k = 256, 512, ...     | alpha, mu                                         |    4           2

The pair of T[i, j] is ``grid[i // 32, j // 256, i % 32, j % 256 // k]`` (0 in the last place where k > 256).
What fills up is 0. Other blocks, and alpha and mu of other types, are for kernels that are not fast. Their
grid is plain: (32 tiles, ceil(m / k), 2) float32 or float64.

``permutation``  (parts, 256 chunks) uint16, or uint32 if m > 65536: the original column of every column of T,
filled up with 0.

``row_factors``  (32 tiles,) float16 and ``block_factors`` (parts, chunks, pairs, 2) float16, only beside
codes: the factors of rows, and those of blocks for alpha and for mu, placed like the pairs of a row. What
fills up is 0.

Matrices that multiply the same x can be joined: up to three parts, whose tiles follow each other. Each part
begins with a tile of its own, and has its own rows of ``permutation`` and ``block_factors``.
"""

from __future__ import annotations

# Columns of a word, of a span (a word of each of the four lanes that share a row), and of a chunk.
WORD = 16
SPAN = 4 * WORD
CHUNK = 4 * SPAN

# Words of a row of a chunk.
WORDS = CHUNK // WORD

# Rows of a tile.
TILE_ROWS = 32

# Most matrices that can be joined.
PARTS = 3

# Smallest block whose alpha and mu can be stored chunk by chunk: a span must lie in one block.
LEAST_BLOCK = SPAN
