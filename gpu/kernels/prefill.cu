// y = x (alpha T + mu)^T for many tokens. Here a gather inside the product would read every element of x as
// a sector of 32 bytes, once for each 128 rows of T; so `arrange` brings x into the order of trits first.

// One token a CUDA block: (chunks, 256) elements of x as `gather_word` makes them, sums of its spans.
// Shared memory: the row of x, as gathers from there are not paid by the sector.
constexpr int ARRANGE_THREADS = 256;

template <class T>
__device__ inline void arrange(const unsigned short *x, const unsigned *permutation, uint4 *arranged,
                               float *span_sums, int m) {
    extern __shared__ uint4 shared[];
    unsigned short *row = reinterpret_cast<unsigned short *>(shared);
    const size_t token = blockIdx.x;
    for (int i = threadIdx.x; i < m; i += ARRANGE_THREADS) row[i] = x[token * m + i];
    __syncthreads();
    const int words = (m + CHUNK - 1) / CHUNK * WORDS;
    // Whole warps go around together, as span_sum needs all lanes.
    for (int word = threadIdx.x; word - lane_of() < words; word += ARRANGE_THREADS) {
        uint4 pairs[2];
        const float sum = span_sum(word < words ? gather_word<T>(row, permutation, m, word, pairs) : 0.0f);
        if (word >= words) continue;
        const size_t place = token * words + word;
        arranged[2 * place] = pairs[0];
        arranged[2 * place + 1] = pairs[1];
        if (word % 4 == 0) span_sums[place / 4] = sum;
    }
}

// A CUDA block takes 128 rows and 64 tokens, a warp 32 rows of them: a trit that has been unpacked serves
// 64 tokens, x that has been read from shared memory 32 rows. Shared memory: a chunk of x, sums of its spans.
constexpr int WARPS = 4, ROW_TILES = 2, TOKEN_TILES = 8, TOKENS = TOKEN_TILES * TILE, THREADS = WARPS * WARP;
constexpr int STRIDE = CHUNK + PADDING;

template <class T>
__device__ inline void prefill(const uint4 *arranged, const float *span_sums, const unsigned *words,
                               const unsigned *grid, unsigned short *y, int tokens, int n, int m,
                               int block_shift) {
    extern __shared__ uint4 shared[];
    uint4 *staged = shared;
    float *sums = reinterpret_cast<float *>(staged + TOKENS * STRIDE / 8);
    const int chunks = (m + CHUNK - 1) / CHUNK, blocks = (m + (SPAN << block_shift) - 1) / (SPAN << block_shift);
    const int first_row = (blockIdx.x * WARPS + threadIdx.x / WARP) * ROW_TILES * ROWS;
    const int first_token = blockIdx.y * TOKENS;
    float total[ROW_TILES][TOKEN_TILES][4] = {};

    for (int chunk = 0; chunk < chunks; chunk++) {
        Weights weights[ROW_TILES];  // on their way while x is copied
#pragma unroll
        for (int rows = 0; rows < ROW_TILES; rows++)
            weights[rows] =
                load_weights(words, grid, first_row + rows * ROWS, n, chunk, chunks, blocks, block_shift);
        if (chunk > 0) __syncthreads();  // all warps are done with the chunk before
        for (int i = threadIdx.x; i < TOKENS * CHUNK / 8; i += THREADS) {
            const int token = i / (CHUNK / 8), eight = i % (CHUNK / 8);
            const size_t row = static_cast<size_t>(first_token + token) * chunks + chunk;
            uint4 value = {0, 0, 0, 0};
            if (first_token + token < tokens) value = arranged[row * (CHUNK / 8) + eight];
            staged[token * (STRIDE / 8) + eight] = value;
        }
        for (int i = threadIdx.x; i < TOKENS * SPANS; i += THREADS) {
            const int token = i / SPANS, span = i % SPANS;
            const size_t row = static_cast<size_t>(first_token + token) * chunks + chunk;
            sums[span * TOKENS + token] = first_token + token < tokens ? span_sums[row * SPANS + span] : 0.0f;
        }
        __syncthreads();
        add_chunk<T, ROW_TILES, TOKEN_TILES>(weights, reinterpret_cast<const unsigned short *>(staged), STRIDE,
                                             sums, TOKENS, chunk, block_shift, total);
    }

#pragma unroll
    for (int rows = 0; rows < ROW_TILES; rows++)
#pragma unroll
        for (int tile = 0; tile < TOKEN_TILES; tile++)
#pragma unroll
            for (int d = 0; d < 4; d++) {
                const int row = first_row + rows * ROWS + lane_of() / 4 + d / 2 * 8;
                const int token = first_token + tile * TILE + lane_of() % 4 * 2 + d % 2;
                if (row < n && token < tokens)
                    y[static_cast<size_t>(token) * n + row] = narrow(T{}, total[rows][tile][d]);
            }
}

#define PREFILL(TYPE, T)                                                                                           \
    extern "C" __global__ void __launch_bounds__(ARRANGE_THREADS)                                                  \
        arrange_##TYPE(const unsigned short *x, const unsigned *permutation, uint4 *arranged, float *span_sums,    \
                       int m) {                                                                                    \
        arrange<T>(x, permutation, arranged, span_sums, m);                                                        \
    }                                                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                          \
        prefill_##TYPE(const uint4 *arranged, const float *span_sums, const unsigned *words, const unsigned *grid, \
                       unsigned short *y, int tokens, int n, int m, int block_shift) {                             \
        prefill<T>(arranged, span_sums, words, grid, y, tokens, n, m, block_shift);                                \
    }
PREFILL(float16, Float16)
PREFILL(bfloat16, BFloat16)
