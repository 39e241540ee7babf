// y = x (alpha T + mu)^T for 1 to 16 tokens. Time goes into reading words, so every word is read once: a
// CUDA block takes 32 rows and all tokens. Its warps take 16 rows each, and every eighth chunk of columns.
// Which warp adds what, and in which order, depends on m alone, so a row of y does not depend on the
// other rows of x.

constexpr int ROW_GROUPS = 2, COLUMN_GROUPS = 8, THREADS = ROW_GROUPS * COLUMN_GROUPS * WARP;

// x is (tokens, m) and is gathered here, all in one phase, or if `GATHER` is false what `arrange` of
// prefill.cu has made of it; `phase` chunks of it are in shared memory at a time, a multiple of
// COLUMN_GROUPS if it is not all. Shared memory: x as arranged, sums of spans, rows of x as they came. Sums of
// tokens that are not there are left as they are: columns of D do not mix, and these are not written.
template <class T, int TILES, bool GATHER>
__device__ inline void decode(const unsigned short *x, const float *span_sums, const unsigned *permutation,
                              const unsigned *words, const unsigned *grid, unsigned short *y, int tokens, int n,
                              int m, int block_shift, int phase) {
    extern __shared__ uint4 shared[];
    constexpr int TOKENS = TILES * TILE;
    const int chunks = (m + CHUNK - 1) / CHUNK, blocks = (m + (SPAN << block_shift) - 1) / (SPAN << block_shift);
    const int stride = phase * CHUNK + PADDING;
    unsigned short *staged = reinterpret_cast<unsigned short *>(shared);
    float *sums = reinterpret_cast<float *>(staged + tokens * stride);
    unsigned short *came = reinterpret_cast<unsigned short *>(sums + phase * SPANS * TOKENS);

    const int warp = threadIdx.x / WARP, row_group = warp / COLUMN_GROUPS, column_group = warp % COLUMN_GROUPS;
    const int first_row = (blockIdx.x * ROW_GROUPS + row_group) * ROWS;
    float total[1][TILES][4] = {};

    // The next words are under way while x is arranged, and while the last ones are multiplied.
    Weights next[1];
    if (column_group < chunks)
        next[0] = load_weights(words, grid, first_row, n, column_group, chunks, blocks, block_shift);
    if (GATHER) {
        for (int i = threadIdx.x; i < tokens * m; i += THREADS) came[i] = x[i];
        __syncthreads();
    }
    for (int first = 0; first < chunks; first += phase) {
        const int present = min(phase, chunks - first);
        if (first > 0) __syncthreads();  // all warps are done with the phase before
        const int row_words = present * WORDS, all_words = tokens * row_words;
        // Whole warps go around together, as span_sum needs all lanes.
        for (int i = threadIdx.x; i - lane_of() < all_words; i += THREADS) {
            const int token = i / row_words, word = i % row_words;
            const bool exists = i < all_words;
            uint4 pairs[2];
            float sum = 0;
            if (GATHER) {
                if (exists) sum = gather_word<T>(came + token * m, permutation, m, word, pairs);
                sum = span_sum(sum);
            } else if (exists) {
                const size_t place = (static_cast<size_t>(token) * chunks + first) * WORDS + word;
                pairs[0] = reinterpret_cast<const uint4 *>(x)[2 * place];
                pairs[1] = reinterpret_cast<const uint4 *>(x)[2 * place + 1];
                sum = span_sums[place / 4];
            }
            if (exists) {
                uint4 *place = reinterpret_cast<uint4 *>(staged + token * stride + word * WORD);
                place[0] = pairs[0], place[1] = pairs[1];
                if (word % 4 == 0) sums[word / 4 * TOKENS + token] = sum;
            }
        }
        __syncthreads();
        for (int chunk = first + column_group; chunk < first + present; chunk += COLUMN_GROUPS) {
            const Weights weights[1] = {next[0]};
            if (chunk + COLUMN_GROUPS < chunks)
                next[0] =
                    load_weights(words, grid, first_row, n, chunk + COLUMN_GROUPS, chunks, blocks, block_shift);
            add_chunk<T, 1, TILES>(weights, staged + (chunk - first) * CHUNK, stride,
                                   sums + (chunk - first) * SPANS * TOKENS, tokens, chunk, block_shift, total);
        }
    }

    __syncthreads();  // x is no longer needed; the sums of the warps take its place
    float *partial = reinterpret_cast<float *>(shared);
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int d = 0; d < 4; d++) {
            const int row = lane_of() / 4 + d / 2 * 8, token = tile * TILE + lane_of() % 4 * 2 + d % 2;
            partial[(warp * ROWS + row) * TOKENS + token] = total[0][tile][d];
        }
    __syncthreads();
    for (int i = threadIdx.x; i < ROW_GROUPS * ROWS * tokens; i += THREADS) {
        const int token = i / (ROW_GROUPS * ROWS), row = i % (ROW_GROUPS * ROWS);
        float sum = 0;
        for (int group = 0; group < COLUMN_GROUPS; group++)
            sum += partial[((row / ROWS * COLUMN_GROUPS + group) * ROWS + row % ROWS) * TOKENS + token];
        const size_t place = blockIdx.x * ROW_GROUPS * ROWS + row;
        if (place < n) y[token * static_cast<size_t>(n) + place] = narrow(T{}, sum);
    }
}

#define DECODE(NAME, T, TILES, GATHER)                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                          \
        NAME(const unsigned short *x, const float *span_sums, const unsigned *permutation, const unsigned *words,  \
             const unsigned *grid, unsigned short *y, int tokens, int n, int m, int block_shift, int phase) {      \
        decode<T, TILES, GATHER>(x, span_sums, permutation, words, grid, y, tokens, n, m, block_shift, phase);     \
    }
DECODE(decode8_gather_float16, Float16, 1, true)
DECODE(decode16_gather_float16, Float16, 2, true)
DECODE(decode8_float16, Float16, 1, false)
DECODE(decode16_float16, Float16, 2, false)
DECODE(decode8_gather_bfloat16, BFloat16, 1, true)
DECODE(decode16_gather_bfloat16, BFloat16, 2, true)
DECODE(decode8_bfloat16, BFloat16, 1, false)
DECODE(decode16_bfloat16, BFloat16, 2, false)
