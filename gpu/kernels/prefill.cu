// y = x (alpha T + mu)^T for many tokens, by `mma`: from sm_80 on, where warpgroup.cu does not serve.
//
// Faster than decode.cu for 17 tokens and more: decode.cu keeps all of x in shared memory and unpacks every
// trit for at most 16 tokens. Here a trit that has been unpacked serves 64 tokens, and x that has been read
// from shared memory serves 32 rows. decode.cu in turn needs no copy of x, and reads words at full bandwidth.
//
// To compile it alone: SOURCE of prefill.py, see ternary.cuh.

struct PrefillParameters {
    const uint4 *arranged;   // (parts, tokens, 256 chunks), x as arrange.cu arranges it
    const float *span_sums;  // (parts, tokens, 4 chunks)
    Matrix matrix;
    unsigned short *y;  // (tokens, n)
    int tokens;
    int part, first_tile, last_tile;  // tiles of one part, from first_tile to before last_tile
    int row, end;                     // rows of y of this part, from row to before end
};

constexpr int ROW_TILES = TILE_ROWS / ROWS, TOKEN_TILES = TOKENS / TILE;

// A CUDA block takes four tiles of rows of one part, one a warp, and 64 tokens.
// Grid: (tiles of the part / 4, tokens / 64), rounded up.
// Shared memory: a chunk of x, (64, 264) elements; sums of its spans, (4, 64) floats.
template <class T, class G>
__device__ inline void prefill(const PrefillParameters p) {
    extern __shared__ uint4 shared[];
    uint4 *staged = shared;
    float *sums = reinterpret_cast<float *>(staged + TOKENS * STRIDE / 8);
    const Matrix matrix = p.matrix;
    const int chunks = chunks_of(matrix.m), pairs_shift = matrix.pairs_shift;
    const int tile = p.first_tile + blockIdx.x * WARPS + threadIdx.x / WARP;
    const int first_token = blockIdx.y * TOKENS;
    const unsigned units_of_two = units<T>(matrix.m);
    float total[ROW_TILES][TOKEN_TILES][4] = {};

    for (int chunk = 0; chunk < chunks; chunk++) {
        // Prefetched while x is copied. Warps beyond the last tile read the last one, and write nothing.
        Weights<G> weights[ROW_TILES];
        const size_t at = static_cast<size_t>(min(tile, p.last_tile - 1)) * chunks + chunk;
#pragma unroll
        for (int rows = 0; rows < ROW_TILES; rows++) {
            const size_t sixteen = at * ROW_TILES + rows;
            weights[rows].words[0] = matrix.words[sixteen * 2 * WARP + lane_of()];
            weights[rows].words[1] = matrix.words[(sixteen * 2 + 1) * WARP + lane_of()];
            read_pairs<G>(weights[rows], pairs_of<G>(matrix) + (sixteen * ROWS << pairs_shift), pairs_shift);
        }
        if (chunk > 0) __syncthreads();  // all warps are done with the chunk before
        for (int i = threadIdx.x; i < TOKENS * CHUNK / 8; i += THREADS) {
            const int token = i / (CHUNK / 8), eight = i % (CHUNK / 8);
            const size_t from = (static_cast<size_t>(p.part) * p.tokens + first_token + token) * chunks + chunk;
            uint4 value = {0, 0, 0, 0};
            if (first_token + token < p.tokens) value = p.arranged[from * (CHUNK / 8) + eight];
            staged[token * (STRIDE / 8) + eight] = value;
        }
        for (int i = threadIdx.x; i < TOKENS * SPANS; i += THREADS) {
            const int token = i / SPANS, span = i % SPANS;
            const size_t from = (static_cast<size_t>(p.part) * p.tokens + first_token + token) * chunks + chunk;
            sums[span * TOKENS + token] = first_token + token < p.tokens ? p.span_sums[from * SPANS + span] : 0.0f;
        }
        __syncthreads();
        const uint4 *here[TOKEN_TILES];
#pragma unroll
        for (int t = 0; t < TOKEN_TILES; t++)
            here[t] = staged + (t * TILE + lane_of() / 4) * (STRIDE / 8) + lane_of() % 4 * (WORD / 8);
        add_chunk<T, G, ROW_TILES, TOKEN_TILES>(weights, here, sums,
                                                matrix.block_factors + (p.part * chunks + chunk << pairs_shift),
                                                pairs_shift, units_of_two, total);
    }

#pragma unroll
    for (int rows = 0; rows < ROW_TILES; rows++)
#pragma unroll
        for (int t = 0; t < TOKEN_TILES; t++)
#pragma unroll
            for (int d = 0; d < 4; d++) {
                const int in_tile = rows * ROWS + lane_of() / 4 + d / 2 * 8;
                const int to = p.row + (tile - p.first_tile) * TILE_ROWS + in_tile;
                const int token = first_token + t * TILE + lane_of() % 4 * 2 + d % 2;
                if (to < p.end && token < p.tokens)
                    p.y[static_cast<size_t>(token) * matrix.ends[PARTS - 1] + to] =
                        narrow(T{}, G::scaled(total[rows][t][d], matrix.row_factors + tile * TILE_ROWS + in_tile));
            }
}

#define PREFILL(NAME, T, G)                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS) NAME(const PrefillParameters p) {                  \
        prefill<T, G>(p);                                                                                    \
    }
