// y = x W^T for many tokens by the instructions of a whole warpgroup, wgmma, which only Hopper (sm_90a) has.
// W = alpha T + mu, rounded to T's type.
//
// Replaces prefill.cu on Hopper, where `mma` reaches some 60 % of the rate of wgmma. Weights are made in
// registers from words of trits, so that all blocks share one sum. Rows of W are the rows of A; tokens are
// the columns of B, in shared memory as `multiply_async` of instructions.cuh reads them.
//
// To compile it alone: SOURCE of warpgroup.py, see ternary.cuh; -arch=sm_90a.

constexpr int EIGHTS = CHUNK / 8;  // of columns of x: 16 bytes each
static_assert(TOKENS == WARPGROUP_COLUMNS, "tokens are the columns of one instruction");

struct GatherParameters {
    const unsigned short *x;            // (tokens, m)
    const unsigned short *permutation;  // (parts, 256 chunks)
    uint4 *gathered;                    // (parts, tokens / 128, chunks, 32 eights, 128 tokens, 8)
    int tokens, m;
};

// A CUDA block takes one token and one part. A lane's four digits of a byte of trits are columns 2t, 2t + 1,
// 2t + 8 and 2t + 9 of A: the first two of all four lanes make an eight, the others the next eight.
// Grid: (tokens, parts). Shared memory: a row of x, (m,).
__device__ inline void gather_token(const GatherParameters p) {
    extern __shared__ uint4 shared[];
    unsigned short *row = reinterpret_cast<unsigned short *>(shared);
    const int token = blockIdx.x, part = blockIdx.y;
    copy_numbers<GATHER_THREADS>(row, p.x + static_cast<size_t>(token) * p.m, p.m);
    __syncthreads();
    const int eights = chunks_of(p.m) * EIGHTS, token_tiles = (p.tokens + TOKENS - 1) / TOKENS;
    const size_t tile = static_cast<size_t>(part) * token_tiles + token / TOKENS;
    for (int eight = threadIdx.x; eight < eights; eight += GATHER_THREADS) {
        const int first = eight / 8 * SPAN + eight % 8 * 2;
        unsigned pairs[4];
#pragma unroll
        for (int t = 0; t < 4; t++) {
            const int place = first + t * WORD;
            const unsigned columns = *reinterpret_cast<const unsigned *>(p.permutation + part * eights * 8 + place);
            pairs[t] = place < p.m ? row[columns & 0xffff] : 0;
            if (place + 1 < p.m) pairs[t] |= row[columns >> 16] << 16;
        }
        p.gathered[(tile * eights + eight) * TOKENS + token % TOKENS] = {pairs[0], pairs[1], pairs[2], pairs[3]};
    }
}

struct WarpgroupParameters {
    const uint4 *gathered;  // as in GatherParameters
    Matrix matrix;
    unsigned short *y;  // (tokens, n), if splits is 1
    float *sums;        // (splits, tokens, n), otherwise
    int tokens, splits;
};

constexpr int STAGE = EIGHTS * TOKENS;  // 16 bytes each: a chunk of x for all tokens

template <class G>
__device__ inline Weights<G> load(const Matrix &matrix, size_t sixteen) {
    Weights<G> weights;
    weights.words[0] = matrix.words[sixteen * 2 * WARP + lane_of()];
    weights.words[1] = matrix.words[(sixteen * 2 + 1) * WARP + lane_of()];
    read_pairs<G>(weights, pairs_of<G>(matrix) + (sixteen * ROWS << matrix.pairs_shift), matrix.pairs_shift);
    return weights;
}

// A CUDA block takes 128 rows of a part, 16 a warp, 128 tokens, and a share of the chunks: all of them, or
// one of `splits`, whose sums `combine` adds.
// Grid: (groups of 128 rows, tokens / 128 rounded up * splits).
// Shared memory: 3 chunks of x, (3, 32 eights, 128 tokens, 8).
template <class T, class G>
__device__ inline void multiply(const WarpgroupParameters p) {
    extern __shared__ uint4 shared[];
    const Matrix matrix = p.matrix;
    const int tokens = p.tokens, splits = p.splits, pairs_shift = matrix.pairs_shift;
    const int chunks = chunks_of(matrix.m), n = matrix.ends[PARTS - 1];
    const int split = blockIdx.y % splits, token_tile = blockIdx.y / splits;
    const int first = chunks * split / splits, last = chunks * (split + 1) / splits;
    int group = blockIdx.x, part = 0, part_row = 0, part_tile = 0, end = matrix.ends[0];
#pragma unroll
    for (int after = 1; after < PARTS; after++) {
        const int groups = (end - part_row + BLOCK_ROWS - 1) / BLOCK_ROWS;
        if (part + 1 < after || group < groups) continue;
        group -= groups, part_tile += tiles_of(end - part_row);
        part = after, part_row = end, end = matrix.ends[after];
    }
    const int warp = threadIdx.x / WARP, in_part = group * BLOCK_ROWS + warp * ROWS;
    // Warps beyond the last row read the last tile, and write nothing.
    const int tile = part_tile + min(in_part / TILE_ROWS, tiles_of(end - part_row) - 1);
    const int in_tile = warp % (TILE_ROWS / ROWS);
    const size_t sixteens = static_cast<size_t>(tile) * chunks * (TILE_ROWS / ROWS) + in_tile;
    const size_t x_tile = static_cast<size_t>(part) * ((tokens + TOKENS - 1) / TOKENS) + token_tile;

    const auto stage_of = [&](int chunk) { return shared + (chunk - first) % STAGES * STAGE; };
    const auto copy = [&](int chunk) {
        const uint4 *from = p.gathered + (x_tile * chunks + chunk) * STAGE;
#pragma unroll
        for (int i = 0; i < STAGE; i += THREADS)
            copy_async(stage_of(chunk) + threadIdx.x + i, from + threadIdx.x + i);
        close_group();
    };
    float total[TOKENS / 2] = {};
    copy(first);
    Weights<G> weights = load<G>(matrix, sixteens + first * (TILE_ROWS / ROWS));
    settle(total);  // the zeros come before the first fence
    for (int chunk = first; chunk < last; chunk++) {
        await_groups<0>();
        show_to_tensor_cores();
        // x of this chunk is here, and the products with the chunk before the last are done: the next chunk
        // takes its place. Products with the last chunk may be in flight.
        __syncthreads();
        Weights<G> next = weights;
        if (chunk + 1 < last) {
            copy(chunk + 1);
            next = load<G>(matrix, sixteens + (chunk + 1) * (TILE_ROWS / ROWS));
        }
        Table tables[2];
#pragma unroll
        for (int r = 0; r < SPANS; r++) {
            await_products<1>();  // frees the registers of the span before the last
            unsigned a[4][4];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                if (r % 2 == 0 || pairs_shift == 2) {
                    // The pair of a span is where its block ends.
                    const auto pair = pairs_shift == 2 ? weights.pairs[half][r] : weights.pairs[half][r | 1];
                    const unsigned *factors = matrix.block_factors + (part * chunks + chunk << pairs_shift);
                    const int row = tile * TILE_ROWS + in_tile * ROWS + lane_of() / 4 + 8 * half;
                    tables[half] = table<T, G>(pair, factors + pair_of(r, pairs_shift), matrix.row_factors + row);
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
            p.y[to] = narrow(T{}, total[i]);
        else
            p.sums[static_cast<size_t>(split) * tokens * n + to] = total[i];
    }
}

struct CombineParameters {
    const float *sums;  // (splits, tokens, n)
    unsigned short *y;  // (tokens, n)
    int n, splits;
};

// Adds the sums of all splits, in their order. A thread takes one row of W, for one token.
// Grid: (n / 256 rounded up, tokens).
template <class T>
__device__ inline void combine(const CombineParameters p) {
    const size_t token = blockIdx.y, tokens = gridDim.y;
    const int row = blockIdx.x * COMBINE_THREADS + threadIdx.x;
    if (row >= p.n) return;
    float total = 0;
    for (int split = 0; split < p.splits; split++) total += p.sums[(split * tokens + token) * p.n + row];
    p.y[token * p.n + row] = narrow(T{}, total);
}

#define GATHER(NAME)                                                                                         \
    extern "C" __global__ void __launch_bounds__(GATHER_THREADS) NAME(const GatherParameters p) {            \
        gather_token(p);                                                                                     \
    }
#define WARPGROUP(NAME, T, G)                                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS) NAME(const WarpgroupParameters p) {                \
        multiply<T, G>(p);                                                                                   \
    }
#define COMBINE(NAME, T)                                                                                     \
    extern "C" __global__ void __launch_bounds__(COMBINE_THREADS) NAME(const CombineParameters p) {          \
        combine<T>(p);                                                                                       \
    }
