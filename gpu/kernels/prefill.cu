// y = x (alpha T + mu)^T for many tokens, where warpgroup.cu cannot. A gather inside the product would read
// every element of x as a sector of 32 bytes, once for each 128 rows of T; so `arrange` brings x into the order
// of trits first.

// One token a CUDA block, for one part after the other: (chunks, 256) elements of x as `gather_word` makes
// them, sums of its spans. Shared memory: the row of x, as gathers from there are not paid by the sector.
constexpr int ARRANGE_THREADS = 256;

template <class T>
__device__ inline void arrange(const unsigned short *x, const unsigned short *permutation, uint4 *arranged,
                               float *span_sums, int m, int parts) {
    extern __shared__ uint4 shared[];
    unsigned short *row = reinterpret_cast<unsigned short *>(shared);
    const size_t token = blockIdx.x, tokens = gridDim.x;
    copy_numbers<ARRANGE_THREADS>(row, x + token * m, m);
    __syncthreads();
    const int words = (m + CHUNK - 1) / CHUNK * WORDS;
    for (int part = 0; part < parts; part++)
        // Whole warps go around together, as span_sum needs all lanes.
        for (int word = threadIdx.x; word - lane_of() < words; word += ARRANGE_THREADS) {
            uint4 pairs[2];
            float sum = 0;
            if (word < words)
                sum = gather_word<T>(row, load_columns(permutation + part * words * WORD, word), m, word, pairs);
            sum = span_sum(sum);
            if (word >= words) continue;
            const size_t place = (part * tokens + token) * words + word;
            arranged[2 * place] = pairs[0];
            arranged[2 * place + 1] = pairs[1];
            if (word % 4 == 0) span_sums[place / 4] = sum;
        }
}

// A CUDA block takes four tiles of rows and 64 tokens, a warp a tile of them: a trit that has been unpacked
// serves 64 tokens, x that has been read from shared memory 32 rows. Tiles are those of one part, whose
// arranged x this is, from `first_tile` to before `last_tile`; `row` is the first of them in y, and rows end
// before `end`. Shared memory: a chunk of x, sums of its spans.
constexpr int WARPS = 4, ROW_TILES = TILE_ROWS / ROWS, TOKEN_TILES = 8, TOKENS = TOKEN_TILES * TILE;
constexpr int THREADS = WARPS * WARP;
constexpr int STRIDE = CHUNK + PADDING;

template <class T, class G>
__device__ inline void prefill(const uint4 *arranged, const float *span_sums, const uint4 *words,
                               const typename G::Pair *grid, const unsigned *block_factors,
                               const unsigned short *row_factors, unsigned short *y, int tokens, int n, int m,
                               int pairs_shift, int part, int first_tile, int last_tile, int row, int end) {
    extern __shared__ uint4 shared[];
    uint4 *staged = shared;
    float *sums = reinterpret_cast<float *>(staged + TOKENS * STRIDE / 8);
    const int chunks = (m + CHUNK - 1) / CHUNK;
    const int tile = first_tile + blockIdx.x * WARPS + threadIdx.x / WARP;
    const int first_token = blockIdx.y * TOKENS;
    const unsigned units_of_two = units<T>(m);
    float total[ROW_TILES][TOKEN_TILES][4] = {};

    for (int chunk = 0; chunk < chunks; chunk++) {
        // On their way while x is copied. Tiles that are not there read the last one, and are not written.
        Weights<G> weights[ROW_TILES];
        const size_t at = static_cast<size_t>(min(tile, last_tile - 1)) * chunks + chunk;
#pragma unroll
        for (int rows = 0; rows < ROW_TILES; rows++) {
            const size_t sixteen = at * ROW_TILES + rows;
            weights[rows].words[0] = words[sixteen * 2 * WARP + lane_of()];
            weights[rows].words[1] = words[(sixteen * 2 + 1) * WARP + lane_of()];
            read_pairs<G>(weights[rows], grid + (sixteen * ROWS << pairs_shift), pairs_shift);
        }
        if (chunk > 0) __syncthreads();  // all warps are done with the chunk before
        for (int i = threadIdx.x; i < TOKENS * CHUNK / 8; i += THREADS) {
            const int token = i / (CHUNK / 8), eight = i % (CHUNK / 8);
            const size_t from = (static_cast<size_t>(part) * tokens + first_token + token) * chunks + chunk;
            uint4 value = {0, 0, 0, 0};
            if (first_token + token < tokens) value = arranged[from * (CHUNK / 8) + eight];
            staged[token * (STRIDE / 8) + eight] = value;
        }
        for (int i = threadIdx.x; i < TOKENS * SPANS; i += THREADS) {
            const int token = i / SPANS, span = i % SPANS;
            const size_t from = (static_cast<size_t>(part) * tokens + first_token + token) * chunks + chunk;
            sums[span * TOKENS + token] = first_token + token < tokens ? span_sums[from * SPANS + span] : 0.0f;
        }
        __syncthreads();
        const uint4 *here[TOKEN_TILES];
#pragma unroll
        for (int t = 0; t < TOKEN_TILES; t++)
            here[t] = staged + (t * TILE + lane_of() / 4) * (STRIDE / 8) + lane_of() % 4 * (WORD / 8);
        add_chunk<T, G, ROW_TILES, TOKEN_TILES>(weights, here, sums,
                                                block_factors + (part * chunks + chunk << pairs_shift),
                                                pairs_shift, units_of_two, total);
    }

#pragma unroll
    for (int rows = 0; rows < ROW_TILES; rows++)
#pragma unroll
        for (int t = 0; t < TOKEN_TILES; t++)
#pragma unroll
            for (int d = 0; d < 4; d++) {
                const int in_tile = rows * ROWS + lane_of() / 4 + d / 2 * 8;
                const int to = row + (tile - first_tile) * TILE_ROWS + in_tile;
                const int token = first_token + t * TILE + lane_of() % 4 * 2 + d % 2;
                if (to < end && token < tokens)
                    y[static_cast<size_t>(token) * n + to] =
                        narrow(T{}, G::scaled(total[rows][t][d], row_factors + tile * TILE_ROWS + in_tile));
            }
}

#define ARRANGE(NAME, T)                                                                                          \
    extern "C" __global__ void __launch_bounds__(ARRANGE_THREADS)                                                 \
        NAME(const unsigned short *x, const unsigned short *permutation, uint4 *arranged, float *span_sums,       \
             int m, int parts) {                                                                                  \
        arrange<T>(x, permutation, arranged, span_sums, m, parts);                                                \
    }
#define PREFILL(NAME, T, G)                                                                                       \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                         \
        NAME(const uint4 *arranged, const float *span_sums, const uint4 *words, const G::Pair *grid,              \
             const unsigned *block_factors, const unsigned short *row_factors, unsigned short *y, int tokens,     \
             int n, int m, int pairs_shift, int part, int first_tile, int last_tile, int row, int end) {          \
        prefill<T, G>(arranged, span_sums, words, grid, block_factors, row_factors, y, tokens, n, m, pairs_shift, \
                      part, first_tile, last_tile, row, end);                                                     \
    }
