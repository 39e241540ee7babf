// A part of T as dense weights alpha t + mu, rounded to T's type, columns in their original order: a library's
// product takes them with x as it is. For so many tokens that writing the weights costs little beside it.

// A lane's words are those of rows g and g + 8 of 16: a couple. A CUDA block takes some couples of 16 rows.
// Each thread puts both weights of a column, 32 bits, where the column belongs in shared memory; from there
// rows go to memory side by side. Scattered to memory, every weight would cost a sector of 32 bytes.
constexpr int THREADS = 256, COUPLES = ROWS / 2;

// `weights` begins with the first tile, and has `width` columns, m and up to 7 more; a couple has `stride`
// words of shared memory.
template <class T, class G>
__device__ inline void unpack(const uint4 *words, const typename G::Pair *grid, const unsigned *block_factors,
                              const unsigned short *row_factors, const unsigned short *permutation,
                              unsigned short *weights, int m, int width, int stride, int couples,
                              int pairs_shift, int part, int first_tile) {
    extern __shared__ uint4 shared[];
    unsigned *staged = reinterpret_cast<unsigned *>(shared);
    const int chunks = (m + CHUNK - 1) / CHUNK;
    const int sixteen = blockIdx.x * couples / COUPLES, first_row = blockIdx.x * couples % COUPLES;
    const int tile = first_tile + sixteen / (TILE_ROWS / ROWS), in_tile = sixteen % (TILE_ROWS / ROWS);

    for (int item = threadIdx.x; item < chunks * couples * 4; item += THREADS) {
        const int t = item % 4, couple = item / 4 % couples, chunk = item / 4 / couples;
        const int row = first_row + couple;
        const size_t at = (static_cast<size_t>(tile) * chunks + chunk) * (TILE_ROWS / ROWS) + in_tile;
        const uint4 of_row[2] = {words[at * 2 * WARP + row * 4 + t], words[(at * 2 + 1) * WARP + row * 4 + t]};
#pragma unroll
        for (int r = 0; r < SPANS; r++) {
            const int pair = pair_of(r, pairs_shift), word = chunk * WORDS + 4 * r + t;
            const unsigned *factors = block_factors + (part * chunks + chunk << pairs_shift) + pair;
            unsigned trits[2];
            Table tables[2];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int below = row + 8 * half;
                tables[half] = table<T, G>(grid[(at * ROWS + below << pairs_shift) + pair], factors,
                                           row_factors + tile * TILE_ROWS + in_tile * ROWS + below);
                const uint4 &four = of_row[half];
                trits[half] = r == 0 ? four.x : r == 1 ? four.y : r == 2 ? four.z : four.w;
            }
            const Columns columns = load_columns(permutation + part * chunks * CHUNK, word);
            const auto put = [&](int count) {
#pragma unroll
                for (int i = 0; i < WORD; i += 2) {
                    unsigned two[2];  // columns, of one row
#pragma unroll
                    for (int half = 0; half < 2; half++)
                        two[half] = two_weights(tables[half], selectors(trits[half], i / 4) >> i % 4 * 8);
                    if (i < count) staged[couple * stride + column(columns, i)] = bytes_of(two[0], two[1], 0x5410);
                    if (i + 1 < count)
                        staged[couple * stride + column(columns, i + 1)] = bytes_of(two[0], two[1], 0x7632);
                }
            };
            // Twice, as it needs no comparisons where all columns are there.
            if (m - word * WORD >= WORD)
                put(WORD);
            else
                put(m - word * WORD);
        }
    }
    __syncthreads();
    for (int couple = 0; couple < couples; couple++) {
        const size_t row = static_cast<size_t>(sixteen) * ROWS + first_row + couple;
        uint2 *upper = reinterpret_cast<uint2 *>(weights + row * width);
        uint2 *lower = reinterpret_cast<uint2 *>(weights + (row + 8) * width);
        for (int four = threadIdx.x; four < (m + 3) / 4; four += THREADS) {
            const uint4 both = shared[couple * stride / 4 + four];
            upper[four] = {both.x & 0xffff | both.y << 16, both.z & 0xffff | both.w << 16};
            lower[four] = {both.x >> 16 | both.y & 0xffff0000, both.z >> 16 | both.w & 0xffff0000};
        }
    }
}

#define DENSE(NAME, T, G)                                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                     \
        NAME(const uint4 *words, const G::Pair *grid, const unsigned *block_factors,                          \
             const unsigned short *row_factors, const unsigned short *permutation, unsigned short *weights,   \
             int m, int width, int stride, int couples, int pairs_shift, int part, int first_tile) {          \
        unpack<T, G>(words, grid, block_factors, row_factors, permutation, weights, m, width, stride,         \
                     couples, pairs_shift, part, first_tile);                                                 \
    }
