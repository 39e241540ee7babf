// y = x W^T for many tokens by the instructions of a whole warpgroup, which only Hopper (sm_90a) has: the rate
// of `mma` there is some 60 % of theirs. W = alpha T + mu, rounded to T's type, is made in registers
// from words of trits, so that there is one sum for all blocks. Rows of W are the rows of A, tokens the
// columns of B, in shared memory as `multiply_async` of instructions.cuh reads them.

constexpr int TOKENS = WARPGROUP_COLUMNS;
constexpr int EIGHTS = CHUNK / 8;  // of columns of x: 16 bytes

// x for all parts as (tiles of 128 tokens, chunks, 32 eights, 128 tokens, 8). A lane's four digits of a byte
// of trits are columns 2t, 2t + 1, 2t + 8 and 2t + 9 of A: the first two of all four lanes make an eight, the
// others the next. One token and part a CUDA block. Shared memory: the row of x.
constexpr int GATHER_THREADS = 1024;

__device__ inline void gather_token(const unsigned short *x, const unsigned short *permutation, uint4 *gathered,
                                    int tokens, int m) {
    extern __shared__ uint4 shared[];
    unsigned short *row = reinterpret_cast<unsigned short *>(shared);
    const int token = blockIdx.x, part = blockIdx.y;
    copy_numbers<GATHER_THREADS>(row, x + static_cast<size_t>(token) * m, m);
    __syncthreads();
    const int eights = (m + CHUNK - 1) / CHUNK * EIGHTS, token_tiles = (tokens + TOKENS - 1) / TOKENS;
    const size_t tile = static_cast<size_t>(part) * token_tiles + token / TOKENS;
    for (int eight = threadIdx.x; eight < eights; eight += GATHER_THREADS) {
        const int first = eight / 8 * SPAN + eight % 8 * 2;
        unsigned pairs[4];
#pragma unroll
        for (int t = 0; t < 4; t++) {
            const int place = first + t * WORD;
            const unsigned columns = *reinterpret_cast<const unsigned *>(permutation + part * eights * 8 + place);
            pairs[t] = place < m ? row[columns & 0xffff] : 0;
            if (place + 1 < m) pairs[t] |= row[columns >> 16] << 16;
        }
        gathered[(tile * eights + eight) * TOKENS + token % TOKENS] = {pairs[0], pairs[1], pairs[2], pairs[3]};
    }
}

// A CUDA block takes 128 rows of a part, 16 a warp, 128 tokens and a share of the chunks: all, or one of
// `splits`, whose sums go to `sums` (splits, tokens, n) for `combine`. Shared memory: STAGES chunks of x.
constexpr int WARPS = 8, THREADS = WARPS * WARP, BLOCK_ROWS = WARPS * ROWS;
constexpr int STAGES = 3, STAGE = EIGHTS * TOKENS;

template <class G>
__device__ inline Weights<G> load(const uint4 *words, const typename G::Pair *grid, size_t sixteen,
                                  int pairs_shift) {
    Weights<G> weights;
    weights.words[0] = words[sixteen * 2 * WARP + lane_of()];
    weights.words[1] = words[(sixteen * 2 + 1) * WARP + lane_of()];
    read_pairs<G>(weights, grid + (sixteen * ROWS << pairs_shift), pairs_shift);
    return weights;
}

template <class T, class G>
__device__ inline void multiply(const uint4 *gathered, const uint4 *words, const typename G::Pair *grid,
                                const unsigned *block_factors, const unsigned short *row_factors,
                                unsigned short *y, float *sums, int tokens, int m, int pairs_shift, int splits,
                                const int (&ends)[PARTS]) {
    extern __shared__ uint4 shared[];
    const int chunks = (m + CHUNK - 1) / CHUNK, n = ends[PARTS - 1];
    const int split = blockIdx.y % splits, token_tile = blockIdx.y / splits;
    const int first = chunks * split / splits, last = chunks * (split + 1) / splits;
    int group = blockIdx.x, part = 0, part_row = 0, part_tile = 0, end = ends[0];
#pragma unroll
    for (int after = 1; after < PARTS; after++) {
        const int groups = (end - part_row + BLOCK_ROWS - 1) / BLOCK_ROWS;
        if (part + 1 < after || group < groups) continue;
        group -= groups, part_tile += tiles_of(end - part_row);
        part = after, part_row = end, end = ends[after];
    }
    const int warp = threadIdx.x / WARP, in_part = group * BLOCK_ROWS + warp * ROWS;
    // Rows that are not there read the last tile, and are not written.
    const int tile = part_tile + min(in_part / TILE_ROWS, tiles_of(end - part_row) - 1);
    const int in_tile = warp % (TILE_ROWS / ROWS);
    const size_t sixteens = static_cast<size_t>(tile) * chunks * (TILE_ROWS / ROWS) + in_tile;
    const size_t x_tile = static_cast<size_t>(part) * ((tokens + TOKENS - 1) / TOKENS) + token_tile;

    const auto stage_of = [&](int chunk) { return shared + (chunk - first) % STAGES * STAGE; };
    const auto copy = [&](int chunk) {
        const uint4 *from = gathered + (x_tile * chunks + chunk) * STAGE;
#pragma unroll
        for (int i = 0; i < STAGE; i += THREADS)
            copy_async(stage_of(chunk) + threadIdx.x + i, from + threadIdx.x + i);
        close_group();
    };
    float total[TOKENS / 2] = {};
    copy(first);
    Weights<G> weights = load<G>(words, grid, sixteens + first * (TILE_ROWS / ROWS), pairs_shift);
    settle(total);  // the zeros come before the first fence
    for (int chunk = first; chunk < last; chunk++) {
        await_groups<0>();
        show_to_tensor_cores();
        // x of this chunk has come, and products with the chunk before the last are done, whose place the
        // next one takes. Those with the last may be on their way.
        __syncthreads();
        Weights<G> next = weights;
        if (chunk + 1 < last) {
            copy(chunk + 1);
            next = load<G>(words, grid, sixteens + (chunk + 1) * (TILE_ROWS / ROWS), pairs_shift);
        }
        Table tables[2];
#pragma unroll
        for (int r = 0; r < SPANS; r++) {
            await_products<1>();  // those of the span before the last, whose registers are free then
            unsigned a[4][4];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                if (r % 2 == 0 || pairs_shift == 2) {
                    // The pair of a span is where its block ends.
                    const auto pair = pairs_shift == 2 ? weights.pairs[half][r] : weights.pairs[half][r | 1];
                    const unsigned *factors = block_factors + (part * chunks + chunk << pairs_shift);
                    const int row = tile * TILE_ROWS + in_tile * ROWS + lane_of() / 4 + 8 * half;
                    tables[half] = table<T, G>(pair, factors + pair_of(r, pairs_shift), row_factors + row);
                }
                const uint4 &four = weights.words[half];
                unsigned word = r == 0 ? four.x : r == 1 ? four.y : r == 2 ? four.z : four.w;
#pragma unroll
                for (int byte = 0; byte < 4; byte++) {
                    const unsigned chosen = selectors(word, byte);
                    a[byte][half] = two_weights(tables[half], chosen);
                    a[byte][2 + half] = two_weights(tables[half], chosen >> 16);
                }
            }
            begin_products(a);
#pragma unroll
            for (int byte = 0; byte < 4; byte++)
                multiply_async(T{}, total, a[byte], stage_of(chunk) + (r * 8 + byte * 2) * TOKENS);
            close_products();
        }
        weights = next;
    }
    await_products<0>();
    settle(total);

#pragma unroll
    for (int i = 0; i < TOKENS / 2; i++) {
        const int token = token_tile * TOKENS + i / 4 * TILE + lane_of() % 4 * 2 + i % 2;
        const int row = part_row + in_part + lane_of() / 4 + i % 4 / 2 * 8;
        if (row >= end || token >= tokens) continue;
        const size_t to = static_cast<size_t>(token) * n + row;
        if (splits == 1)
            y[to] = narrow(T{}, total[i]);
        else
            sums[static_cast<size_t>(split) * tokens * n + to] = total[i];
    }
}

// The sums of all splits, in their order. A thread has a row, for one token.
constexpr int COMBINE_THREADS = 256;

template <class T>
__device__ inline void combine(const float *sums, unsigned short *y, int n, int splits) {
    const size_t token = blockIdx.y, tokens = gridDim.y;
    const int row = blockIdx.x * COMBINE_THREADS + threadIdx.x;
    if (row >= n) return;
    float total = 0;
    for (int split = 0; split < splits; split++) total += sums[(split * tokens + token) * n + row];
    y[token * n + row] = narrow(T{}, total);
}

#define GATHER(NAME)                                                                                              \
    extern "C" __global__ void __launch_bounds__(GATHER_THREADS)                                                  \
        NAME(const unsigned short *x, const unsigned short *permutation, uint4 *gathered, int tokens, int m) {    \
        gather_token(x, permutation, gathered, tokens, m);                                                        \
    }
#define WARPGROUP(NAME, T, G)                                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                         \
        NAME(const uint4 *gathered, const uint4 *words, const G::Pair *grid, const unsigned *block_factors,       \
             const unsigned short *row_factors, unsigned short *y, float *sums, int tokens, int m,                \
             int pairs_shift, int splits, int end0, int end1, int end2) {                                         \
        multiply<T, G>(gathered, words, grid, block_factors, row_factors, y, sums, tokens, m, pairs_shift,        \
                       splits, {end0, end1, end2});                                                               \
    }
#define COMBINE(NAME, T)                                                                                          \
    extern "C" __global__ void __launch_bounds__(COMBINE_THREADS)                                                 \
        NAME(const float *sums, unsigned short *y, int n, int splits) {                                           \
        combine<T>(sums, y, n, splits);                                                                           \
    }
