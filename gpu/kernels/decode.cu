// y = x (alpha T + mu)^T for 1 to 16 tokens. Time goes into reading words, so every word is read once, and
// x is arranged once by each CUDA block, of which a processor has one: it takes tiles of 32 rows and all
// tokens one after the other, while the words of the next ones are on their way. Its warps take 16 rows
// each, and every eighth chunk of columns. Which warp adds what, and in which order, depends on m alone, so
// a row of y does not depend on the other rows of x, nor on how many processors there are.

constexpr int ROW_GROUPS = TILE_ROWS / ROWS, COLUMN_GROUPS = 8, WARPS = ROW_GROUPS * COLUMN_GROUPS;
constexpr int THREADS = WARPS * WARP;

// Chunks of a warp that are on their way from memory, or in use.
constexpr int STAGES = 3;

// Of a warp and chunk: words of 16 rows, two for each lane, and pairs of alpha and mu, four a row at the most.
struct Stage {
    uint4 words[2][WARP];
    uint4 pairs[ROWS * SPANS * sizeof(unsigned) / sizeof(uint4)];
};

// x is (tokens, m) and is gathered here, all in one phase, or if `GATHER` is false what `arrange` of
// prefill.cu has made of it, part by part; `phase` chunks of it are in shared memory at a time. Shared
// memory: stages, sums of the warps, x as arranged, sums of spans, x as it came. Sums of tokens that are
// not there are left as they are: columns of D do not mix, and these are not written.
template <class T, class G, int TILES, bool GATHER>
__device__ inline void decode(const unsigned short *x, const float *span_sums,
                              const unsigned short *permutation, const uint4 *words,
                              const typename G::Pair *grid, const unsigned *block_factors,
                              const unsigned short *row_factors, unsigned short *y, int tokens, int m,
                              int pairs_shift, int phase, const int (&ends)[PARTS]) {
    extern __shared__ uint4 shared[];
    constexpr int TOKENS = TILES * TILE;
    const int chunks = (m + CHUNK - 1) / CHUNK, stride = phase * CHUNK + PADDING;
    float *partial = reinterpret_cast<float *>(shared + STAGES * WARPS * sizeof(Stage) / sizeof(uint4));
    unsigned short *staged = reinterpret_cast<unsigned short *>(partial + WARPS * ROWS * TOKENS);
    float *sums = reinterpret_cast<float *>(staged + tokens * stride);
    unsigned short *came = reinterpret_cast<unsigned short *>(sums + phase * SPANS * TOKENS);

    const int warp = threadIdx.x / WARP, row_group = warp / COLUMN_GROUPS, column_group = warp % COLUMN_GROUPS;
    int tiles = tiles_of(ends[0]);
#pragma unroll
    for (int part = 1; part < PARTS; part++) tiles += tiles_of(ends[part] - ends[part - 1]);
    const int first_tile = tiles * blockIdx.x / gridDim.x, last_tile = tiles * (blockIdx.x + 1) / gridDim.x;

    // Asks for one more chunk of this warp, until there is none. 16 rows have `step` units of pairs.
    Stage *stages = reinterpret_cast<Stage *>(shared) + STAGES * warp;
    const unsigned step = (ROWS * sizeof(typename G::Pair) << pairs_shift) / sizeof(uint4);
    int asked = 0, asked_tile = first_tile, asked_chunk = column_group;
    unsigned sixteen = (first_tile * chunks + column_group) * ROW_GROUPS + row_group;
    const auto ask = [&] {
        if (asked_tile < last_tile && asked_chunk < chunks) {
            const uint4 *from = words + static_cast<size_t>(sixteen) * 2 * WARP + lane_of();
            copy_async(&stages[asked].words[0][lane_of()], from);
            copy_async(&stages[asked].words[1][lane_of()], from + WARP);
            if (lane_of() < step)
                copy_async(&stages[asked].pairs[lane_of()],
                           reinterpret_cast<const uint4 *>(grid) + static_cast<size_t>(sixteen) * step + lane_of());
            asked_chunk += COLUMN_GROUPS, sixteen += COLUMN_GROUPS * ROW_GROUPS;
            if (asked_chunk >= chunks) {
                asked_chunk = column_group, asked_tile++;
                sixteen = (asked_tile * chunks + column_group) * ROW_GROUPS + row_group;
            }
        }
        close_group();
        asked = asked == STAGES - 1 ? 0 : asked + 1;
    };
    for (int i = 0; i < STAGES - 1; i++) ask();

    if (GATHER) copy_numbers<THREADS>(came, x, tokens * m);

    const unsigned units_of_two = units<T>(m);
    // What of x is in shared memory: chunks from `staged_first` on, for `staged_part`.
    int staged_part = PARTS, staged_first = 0, used = 0;
    for (int tile = first_tile; tile < last_tile; tile++) {
        const Tile place = find_tile(tile, ends);
        float total[1][TILES][4] = {};
        int chunk = column_group;
        for (int first = 0; first < chunks; first += phase) {
            const int present = min(phase, chunks - first);
            if (place.part != staged_part || first != staged_first) {
                staged_part = place.part, staged_first = first;
                const int row_words = present * WORDS, all_words = tokens * row_words;
                const unsigned short *order = permutation + place.part * chunks * CHUNK;
                Columns columns;  // on their way while others wait
                if (GATHER && threadIdx.x < all_words) columns = load_columns(order, threadIdx.x % row_words);
                __syncthreads();  // x has come, and all warps are done with what was staged before
                // Whole warps go around together, as span_sum needs all lanes.
                for (int i = threadIdx.x; i - lane_of() < all_words; i += THREADS) {
                    const int token = i / row_words, word = i % row_words;
                    const bool exists = i < all_words;
                    uint4 pairs[2];
                    float sum = 0;
                    if (GATHER) {
                        if (exists) sum = gather_word<T>(came + token * m, columns, m, word, pairs);
                        if (i + THREADS < all_words) columns = load_columns(order, (i + THREADS) % row_words);
                        sum = span_sum(sum);
                    } else if (exists) {
                        const size_t row = static_cast<size_t>(place.part) * tokens + token;
                        const size_t from = (row * chunks + first) * WORDS + word;
                        pairs[0] = reinterpret_cast<const uint4 *>(x)[2 * from];
                        pairs[1] = reinterpret_cast<const uint4 *>(x)[2 * from + 1];
                        sum = span_sums[from / 4];
                    }
                    if (exists) {
                        uint4 *to = reinterpret_cast<uint4 *>(staged + token * stride + word * WORD);
                        to[0] = pairs[0], to[1] = pairs[1];
                        if (word % 4 == 0) sums[word / 4 * TOKENS + token] = sum;
                    }
                }
                __syncthreads();
            }
            const uint4 *rows[TILES];
#pragma unroll
            for (int t = 0; t < TILES; t++) {
                const int token = min(t * TILE + lane_of() / 4, tokens - 1);
                rows[t] = reinterpret_cast<const uint4 *>(staged + token * stride + lane_of() % 4 * WORD);
            }
            for (; chunk < first + present; chunk += COLUMN_GROUPS) {
                await_groups<STAGES - 2>();
                __syncwarp();  // pairs come by other lanes, and those of the chunk before have been read by them
                Weights<G> weights[1];
#pragma unroll
                for (int half = 0; half < 2; half++) weights[0].words[half] = stages[used].words[half][lane_of()];
                read_pairs<G>(weights[0], reinterpret_cast<const typename G::Pair *>(stages[used].pairs),
                              pairs_shift);
                used = used == STAGES - 1 ? 0 : used + 1;
                ask();
                const uint4 *here[TILES];
#pragma unroll
                for (int t = 0; t < TILES; t++) here[t] = rows[t] + (chunk - first) * CHUNK / 8;
                add_chunk<T, G, 1, TILES>(weights, here, sums + (chunk - first) * SPANS * TOKENS,
                                          block_factors + (place.part * chunks + chunk << pairs_shift),
                                          pairs_shift, units_of_two, total);
            }
        }

        __syncthreads();  // the sums of the tile before have been read
#pragma unroll
        for (int t = 0; t < TILES; t++)
#pragma unroll
            for (int d = 0; d < 4; d++) {
                const int row = lane_of() / 4 + d / 2 * 8, token = t * TILE + lane_of() % 4 * 2 + d % 2;
                if (token < tokens) partial[(warp * ROWS + row) * TOKENS + token] = total[0][t][d];
            }
        __syncthreads();
        for (int i = threadIdx.x; i < TILE_ROWS * tokens; i += THREADS) {
            const int token = i / TILE_ROWS, row = i % TILE_ROWS;
            float sum = 0;
#pragma unroll
            for (int group = 0; group < COLUMN_GROUPS; group++)
                sum += partial[((row / ROWS * COLUMN_GROUPS + group) * ROWS + row % ROWS) * TOKENS + token];
            if (place.row + row < place.end)
                y[static_cast<size_t>(token) * ends[PARTS - 1] + place.row + row] =
                    narrow(T{}, G::scaled(sum, row_factors + tile * TILE_ROWS + row));
        }
    }
}

#define DECODE(NAME, T, G, TILES, GATHER)                                                                         \
    extern "C" __global__ void __launch_bounds__(THREADS, 1)                                                      \
        NAME(const unsigned short *x, const float *span_sums, const unsigned short *permutation,                  \
             const uint4 *words, const G::Pair *grid, const unsigned *block_factors,                              \
             const unsigned short *row_factors, unsigned short *y, int tokens, int m, int pairs_shift, int phase, \
             int end0, int end1, int end2) {                                                                      \
        const int ends[PARTS] = {end0, end1, end2};                                                               \
        decode<T, G, TILES, GATHER>(x, span_sums, permutation, words, grid, block_factors, row_factors, y,        \
                                    tokens, m, pairs_shift, phase, ends);                                         \
    }
