// y = x (alpha T + mu)^T for 1 to 16 tokens, by `mma`: from sm_80 on.
//
// Replaces the kernel of product.py, one output for each CUDA block, which reads every word again for every
// token and leaves the tensor cores idle. Time goes into reading words here, so every word is read once, and
// is prefetched while others are in use. x is arranged once by each CUDA block, one per SM, which takes tiles
// of 32 rows one after another, with all tokens.
//
// Eight warps share the columns of 16 rows: a warp takes every eighth chunk. Which warp adds what, in which
// order, depends on m alone. So a row of y depends neither on the other rows of x nor on the number of SMs.
//
// To compile it alone: SOURCE of decode.py, see ternary.cuh.

struct DecodeParameters {
    const unsigned short *x;  // with GATHER (tokens, m), else (parts, tokens, 256 chunks) as arrange.cu arranges it
    const float *span_sums;   // with GATHER null, else (parts, tokens, 4 chunks)
    Matrix matrix;
    unsigned short *y;  // (tokens, n)
    int tokens;         // 1 to 8 TILES
    int phase;          // chunks of x in shared memory at a time; with GATHER all
};

constexpr int WARPS = ROW_GROUPS * COLUMN_GROUPS;

// What a warp has of a chunk: words of 16 rows, two for each lane, and pairs of alpha and mu, at most four a row.
struct Stage {
    uint4 words[2][WARP];
    uint4 pairs[ROWS * SPANS * sizeof(unsigned) / sizeof(uint4)];
};
static_assert(sizeof(Stage) == STAGE_BYTES, "the launcher asks for memory for stages");

// Grid: up to one CUDA block per SM.
// Shared memory: stages, (16 warps, 3 stages); sums of the warps, (16 warps, 16 rows, 8 TILES) floats; x as
// arranged, (tokens, 256 phase + 8); sums of spans, (4 phase, 8 TILES) floats; with GATHER x as given, (tokens, m).
// Sums of tokens beyond the last one stay undefined: columns of D do not mix, and these are not written.
template <class T, class G, int TILES, bool GATHER>
__device__ inline void decode(const DecodeParameters p) {
    extern __shared__ uint4 shared[];
    constexpr int TOKENS = TILES * TILE;
    const Matrix matrix = p.matrix;
    const int tokens = p.tokens, phase = p.phase, pairs_shift = matrix.pairs_shift;
    const int chunks = chunks_of(matrix.m), stride = phase * CHUNK + PADDING;
    float *partial = reinterpret_cast<float *>(shared + STAGES * WARPS * sizeof(Stage) / sizeof(uint4));
    unsigned short *staged = reinterpret_cast<unsigned short *>(partial + WARPS * ROWS * TOKENS);
    float *sums = reinterpret_cast<float *>(staged + tokens * stride);
    unsigned short *given = reinterpret_cast<unsigned short *>(sums + phase * SPANS * TOKENS);

    const int warp = threadIdx.x / WARP, row_group = warp / COLUMN_GROUPS, column_group = warp % COLUMN_GROUPS;
    int tiles = tiles_of(matrix.ends[0]);
#pragma unroll
    for (int part = 1; part < PARTS; part++) tiles += tiles_of(matrix.ends[part] - matrix.ends[part - 1]);
    const int first_tile = tiles * blockIdx.x / gridDim.x, last_tile = tiles * (blockIdx.x + 1) / gridDim.x;

    // Prefetches one more chunk of this warp, until there is none. 16 rows have `step` times 16 bytes of pairs.
    Stage *stages = reinterpret_cast<Stage *>(shared) + STAGES * warp;
    const unsigned step = (ROWS * sizeof(typename G::Pair) << pairs_shift) / sizeof(uint4);
    int asked = 0, asked_tile = first_tile, asked_chunk = column_group;
    unsigned sixteen = (first_tile * chunks + column_group) * ROW_GROUPS + row_group;
    const auto prefetch = [&] {
        if (asked_tile < last_tile && asked_chunk < chunks) {
            const uint4 *from = matrix.words + static_cast<size_t>(sixteen) * 2 * WARP + lane_of();
            copy_async(&stages[asked].words[0][lane_of()], from);
            copy_async(&stages[asked].words[1][lane_of()], from + WARP);
            if (lane_of() < step)
                copy_async(&stages[asked].pairs[lane_of()],
                           static_cast<const uint4 *>(matrix.grid) + static_cast<size_t>(sixteen) * step + lane_of());
            asked_chunk += COLUMN_GROUPS, sixteen += COLUMN_GROUPS * ROW_GROUPS;
            if (asked_chunk >= chunks) {
                asked_chunk = column_group, asked_tile++;
                sixteen = (asked_tile * chunks + column_group) * ROW_GROUPS + row_group;
            }
        }
        close_group();
        asked = asked == STAGES - 1 ? 0 : asked + 1;
    };
    for (int i = 0; i < STAGES - 1; i++) prefetch();

    if (GATHER) copy_numbers<THREADS>(given, p.x, tokens * matrix.m);

    const unsigned units_of_two = units<T>(matrix.m);
    // What of x is in shared memory: chunks from `staged_first` on, in the order of `staged_part`.
    int staged_part = PARTS, staged_first = 0, used = 0;
    for (int tile = first_tile; tile < last_tile; tile++) {
        const Tile place = find_tile(tile, matrix.ends);
        float total[1][TILES][4] = {};
        int chunk = column_group;
        for (int first = 0; first < chunks; first += phase) {
            const int present = min(phase, chunks - first);
            if (place.part != staged_part || first != staged_first) {
                staged_part = place.part, staged_first = first;
                const int row_words = present * WORDS, all_words = tokens * row_words;
                const unsigned short *order = matrix.permutation + place.part * chunks * CHUNK;
                Columns columns;  // prefetched while others wait
                if (GATHER && threadIdx.x < all_words) columns = load_columns(order, threadIdx.x % row_words);
                __syncthreads();  // x is here, and all warps are done with what was staged before
                // Whole warps go around together, as span_sum needs all lanes.
                for (int i = threadIdx.x; i - lane_of() < all_words; i += THREADS) {
                    const int token = i / row_words, word = i % row_words;
                    const bool exists = i < all_words;
                    uint4 pairs[2];
                    float sum = 0;
                    if (GATHER) {
                        if (exists) sum = gather_word<T>(given + token * matrix.m, columns, matrix.m, word, pairs);
                        if (i + THREADS < all_words) columns = load_columns(order, (i + THREADS) % row_words);
                        sum = span_sum(sum);
                    } else if (exists) {
                        const size_t row = static_cast<size_t>(place.part) * tokens + token;
                        const size_t from = (row * chunks + first) * WORDS + word;
                        pairs[0] = reinterpret_cast<const uint4 *>(p.x)[2 * from];
                        pairs[1] = reinterpret_cast<const uint4 *>(p.x)[2 * from + 1];
                        sum = p.span_sums[from / 4];
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
                __syncwarp();  // other lanes copied the pairs, and have read those of the chunk before
                Weights<G> weights[1];
#pragma unroll
                for (int half = 0; half < 2; half++) weights[0].words[half] = stages[used].words[half][lane_of()];
                read_pairs<G>(weights[0], reinterpret_cast<const typename G::Pair *>(stages[used].pairs),
                              pairs_shift);
                used = used == STAGES - 1 ? 0 : used + 1;
                prefetch();
                const uint4 *here[TILES];
#pragma unroll
                for (int t = 0; t < TILES; t++) here[t] = rows[t] + (chunk - first) * CHUNK / 8;
                add_chunk<T, G, 1, TILES>(weights, here, sums + (chunk - first) * SPANS * TOKENS,
                                          matrix.block_factors + (place.part * chunks + chunk << pairs_shift),
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
                p.y[static_cast<size_t>(token) * matrix.ends[PARTS - 1] + place.row + row] =
                    narrow(T{}, G::scaled(sum, matrix.row_factors + tile * TILE_ROWS + row));
        }
    }
}

#define DECODE(NAME, T, G, TILES, GATHER)                                                                    \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) NAME(const DecodeParameters p) {                \
        decode<T, G, TILES, GATHER>(p);                                                                      \
    }
