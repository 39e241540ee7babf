// A part of T as dense weights alpha t + mu, rounded to T's type, columns in their original order, for the
// product of a library.
//
// Faster than prefill.cu and warpgroup.cu from some 512 tokens on, by reasoning: writing the weights then costs
// little beside the product, and the library's product is the fastest there is. It replaces a scatter to
// memory, where every weight would cost a sector of 32 bytes: here weights are scattered to shared memory,
// and rows go to memory in one piece.
//
// To compile it alone: SOURCE of dense.py, see ternary.cuh.

struct DenseParameters {
    Matrix matrix;
    unsigned short *weights;  // (32 tiles of the part, width)
    int width;                // m rounded up to a multiple of 8
    int stride;               // 32-bit words of shared memory from one row pair to the next
    int row_pairs;            // of a CUDA block: 8, 4, 2 or 1
    int part, first_tile;
};

// A lane holds the words of a row pair: rows g and g + 8 of 16. A CUDA block takes some row pairs of 16 rows.
// A thread puts both weights of a column, 32 bits, where the column belongs.
// Grid: 16 tiles of the part / row_pairs. Shared memory: (row_pairs, stride) 32-bit words.
template <class T, class G>
__device__ inline void unpack(const DenseParameters p) {
    extern __shared__ uint4 shared[];
    unsigned *staged = reinterpret_cast<unsigned *>(shared);
    const Matrix matrix = p.matrix;
    const int m = matrix.m, pairs_shift = matrix.pairs_shift, row_pairs = p.row_pairs;
    const int chunks = chunks_of(m);
    const int sixteen = blockIdx.x * row_pairs / ROW_PAIRS, first_row = blockIdx.x * row_pairs % ROW_PAIRS;
    const int tile = p.first_tile + sixteen / (TILE_ROWS / ROWS), in_tile = sixteen % (TILE_ROWS / ROWS);

    for (int item = threadIdx.x; item < chunks * row_pairs * 4; item += THREADS) {
        const int t = item % 4, row_pair = item / 4 % row_pairs, chunk = item / 4 / row_pairs;
        const int row = first_row + row_pair;
        const size_t at = (static_cast<size_t>(tile) * chunks + chunk) * (TILE_ROWS / ROWS) + in_tile;
        const uint4 *words = matrix.words + at * 2 * WARP + row * 4 + t;
        const uint4 of_row[2] = {words[0], words[WARP]};
#pragma unroll
        for (int r = 0; r < SPANS; r++) {
            const int pair = pair_of(r, pairs_shift), word = chunk * WORDS + 4 * r + t;
            const unsigned *factors = matrix.block_factors + (p.part * chunks + chunk << pairs_shift) + pair;
            unsigned trits[2];
            Table tables[2];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int below = row + 8 * half;
                tables[half] = table<T, G>(pairs_of<G>(matrix)[(at * ROWS + below << pairs_shift) + pair], factors,
                                           matrix.row_factors + tile * TILE_ROWS + in_tile * ROWS + below);
                const uint4 &four = of_row[half];
                trits[half] = r == 0 ? four.x : r == 1 ? four.y : r == 2 ? four.z : four.w;
            }
            const Columns columns = load_columns(matrix.permutation + p.part * chunks * CHUNK, word);
            const auto put = [&](int count) {
#pragma unroll
                for (int i = 0; i < WORD; i += 2) {
                    unsigned two[2];  // columns, of one row
#pragma unroll
                    for (int half = 0; half < 2; half++)
                        two[half] = two_weights(tables[half], selectors(trits[half], i / 4) >> i % 4 * 8);
                    if (i < count) staged[row_pair * p.stride + column(columns, i)] = bytes_of(two[0], two[1], 0x5410);
                    if (i + 1 < count)
                        staged[row_pair * p.stride + column(columns, i + 1)] = bytes_of(two[0], two[1], 0x7632);
                }
            };
            // Called twice: with a constant, it needs no comparisons.
            if (m - word * WORD >= WORD)
                put(WORD);
            else
                put(m - word * WORD);
        }
    }
    __syncthreads();
    for (int row_pair = 0; row_pair < row_pairs; row_pair++) {
        const size_t row = static_cast<size_t>(sixteen) * ROWS + first_row + row_pair;
        uint2 *upper = reinterpret_cast<uint2 *>(p.weights + row * p.width);
        uint2 *lower = reinterpret_cast<uint2 *>(p.weights + (row + 8) * p.width);
        for (int four = threadIdx.x; four < (m + 3) / 4; four += THREADS) {
            const uint4 both = shared[row_pair * p.stride / 4 + four];
            upper[four] = {both.x & 0xffff | both.y << 16, both.z & 0xffff | both.w << 16};
            lower[four] = {both.x >> 16 | both.y & 0xffff0000, both.z >> 16 | both.w & 0xffff0000};
        }
    }
}

#define DENSE(NAME, T, G)                                                                                    \
    extern "C" __global__ void __launch_bounds__(THREADS) NAME(const DenseParameters p) {                    \
        unpack<T, G>(p);                                                                                     \
    }
