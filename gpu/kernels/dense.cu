// A part of T as dense weights alpha t + mu, rounded to T's type, for a library's product with what `arrange`
// of prefill.cu has made of x: rows of chunks of 256 columns, words in the order of trits, each as pairs
// (i, i + 8). For so many tokens that writing the weights costs little beside the product.

constexpr int WARPS = 4, THREADS = WARPS * WARP;

// alpha * t + mu of a pair of digits, lower and upper half.
__device__ inline unsigned chosen(unsigned digits, const unsigned short (&values)[3]) {
    const auto value = [&](unsigned q) -> unsigned { return q == 0 ? values[0] : q == 1 ? values[1] : values[2]; };
    return value(digits & 3) | value(digits >> 16 & 3) << 16;
}

// A warp takes 16 rows and a chunk. `weights` begins with the first tile.
template <class T, class G>
__device__ inline void unpack(const uint4 *words, const typename G::Pair *grid, const unsigned *block_factors,
                              const unsigned short *row_factors, uint4 *weights, int chunks, int pairs_shift,
                              int part, int first_tile, int last_tile) {
    const int sixteens = (last_tile - first_tile) * (TILE_ROWS / ROWS);
    const int chunk = blockIdx.y;
    const int sixteen = blockIdx.x * WARPS + threadIdx.x / WARP;
    if (sixteen >= sixteens) return;
    const int tile = first_tile + sixteen / (TILE_ROWS / ROWS), in_tile = sixteen % (TILE_ROWS / ROWS);
    const size_t at = (static_cast<size_t>(tile) * chunks + chunk) * (TILE_ROWS / ROWS) + in_tile;
    Weights<G> own;
    read_pairs<G>(own, grid + (at * ROWS << pairs_shift), pairs_shift);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const uint4 four = words[(at * 2 + half) * WARP + lane_of()];
        const int row = lane_of() / 4 + 8 * half;
        const unsigned short *row_factor = row_factors + tile * TILE_ROWS + in_tile * ROWS + row;
        uint4 *to = weights + ((static_cast<size_t>(sixteen) * ROWS + row) * chunks + chunk) * (CHUNK / 8);
        unsigned short values[3];
#pragma unroll
        for (int r = 0; r < SPANS; r++) {
            // The pair of a span is where its block ends.
            const auto pair = pairs_shift == 2 ? own.pairs[half][r] : own.pairs[half][r | 1];
            const unsigned *factors = block_factors + (part * chunks + chunk << pairs_shift) + pair_of(r, pairs_shift);
            const Grid grid_here = G::decoded(pair, factors, row_factor);
#pragma unroll
            for (int q = 0; q < 3; q++) values[q] = narrow(T{}, grid_here.alpha * (q - 1) + grid_here.mu);
            const unsigned word = r == 0 ? four.x : r == 1 ? four.y : r == 2 ? four.z : four.w;
#pragma unroll
            for (int i = 0; i < 8; i += 4)
                to[(r * SPAN + lane_of() % 4 * WORD + 2 * i) / 8] = {
                    chosen(word >> 2 * i, values), chosen(word >> 2 * i + 2, values),
                    chosen(word >> 2 * i + 4, values), chosen(word >> 2 * i + 6, values)};
        }
    }
}

#define DENSE(NAME, T, G)                                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                     \
        NAME(const uint4 *words, const G::Pair *grid, const unsigned *block_factors,                          \
             const unsigned short *row_factors, uint4 *weights, int chunks, int pairs_shift, int part,        \
             int first_tile, int last_tile) {                                                                 \
        unpack<T, G>(words, grid, block_factors, row_factors, weights, chunks, pairs_shift, part, first_tile, \
                     last_tile);                                                                              \
    }
