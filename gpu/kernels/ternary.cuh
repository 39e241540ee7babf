// What the kernels share: trits to 16-bit floats, x in the order of trits, one chunk of the product.
// y[token][row] = sum over blocks b of alpha[row][b] (T x)_b + mu[row][b] (sum of x)_b, where (T x)_b is
// summed by tensor cores: rows of T are the rows of A, tokens the columns of B.
//
// A word has 16 trits, a span 64 columns: a word of each of the four lanes that share a row of A. A chunk
// is four spans: 128 bits a lane. alpha and mu lie chunk by chunk as well: 2^pairs_shift of a row in each,
// for blocks of 64 (4), 128 (2), and 256, 512, ... columns (1). Rows come in tiles of 32.

constexpr int WORD = 16, SPAN = 64, CHUNK = 256, SPANS = CHUNK / SPAN, WORDS = CHUNK / WORD;
constexpr int ROWS = 16;  // of A
constexpr int TILE_ROWS = 2 * ROWS;
constexpr int TILE = 8;  // columns of B
constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

// 8 more elements after each row of x in shared memory: 16 bytes. The lanes of two tokens then read from
// other banks, the one's 16 bytes in the gaps of the other's.
constexpr int PADDING = 8;

// Matrices, at most, whose rows lie one below the other in one layout and that multiply the same x. Rows of
// the p-th end before ends[p]; where there are fewer, the last ends are equal. Each begins with a tile.
constexpr int PARTS = 3;

// 32 rows of one part: from `row` of y, those before `end`.
struct Tile {
    int part, row, end;
};

__device__ inline int tiles_of(int rows) { return (rows + TILE_ROWS - 1) / TILE_ROWS; }

__device__ inline Tile find_tile(int tile, const int (&ends)[PARTS]) {
    int begin = 0;
#pragma unroll
    for (int part = 0; part < PARTS - 1; part++) {
        const int tiles = tiles_of(ends[part] - begin);
        if (tile < tiles) return {part, begin + tile * TILE_ROWS, ends[part]};
        tile -= tiles, begin = ends[part];
    }
    return {PARTS - 1, begin + tile * TILE_ROWS, ends[PARTS - 1]};
}

__device__ inline int lane_of() { return threadIdx.x % WARP; }

__device__ constexpr unsigned both(unsigned half) { return half << 16 | half; }

// 2^MANTISSA twice, for `trits`. An instruction takes one constant, and with this one in a register it is
// the mask; so the compiler must not know it. `size` is not negative, which it does not know either.
template <class T>
__device__ inline unsigned units(int size) {
    return both((T::MANTISSA + T::BIAS) << T::MANTISSA) + (static_cast<unsigned>(size) >> 31);
}

// Trits i and i + 8 of a word, t = q - 1 as two T. The mantissa of 2^MANTISSA counts units, so with the
// digit q in its bits 2p and 2p + 1 (AND and OR are one instruction) it is 2^MANTISSA + q 4^p, and
// (2^MANTISSA + q 4^p) 4^-p - (2^MANTISSA 4^-p + 1) = q - 1 exactly. A mantissa has room for several
// p, so most digits need no shift. t rather than q: with 0, 1, 2 sums would be larger than the result.
template <class T>
__device__ inline unsigned trits(unsigned word, int i, unsigned units_of_two) {
    constexpr int POSITIONS = T::MANTISSA / 2;
    constexpr unsigned UNITS = (T::MANTISSA + T::BIAS) << T::MANTISSA;  // 2^MANTISSA
    constexpr unsigned ONE = T::BIAS << T::MANTISSA;
    constexpr unsigned NEGATIVE = 0x8000u;
    const int p = i % POSITIONS;
    const unsigned quarters = 2u * p << T::MANTISSA;  // what 4^p takes from an exponent
    const unsigned digits = ((word >> 2 * (i - p)) & both(3u << 2 * p)) | units_of_two;
    return fma2(T{}, digits, both(ONE - quarters), both((NEGATIVE | UNITS) - quarters + (1u << 2 * p)));
}

// alpha and mu of a row and block, as they are stored: alpha in the lower half of a pair, mu in the upper.
struct Grid {
    float alpha, mu;
};

struct Float16Grid {
    using Pair = unsigned;
    static __device__ Grid read(Pair pair, const unsigned *) {
        return {widen(Float16{}, pair & 0xffff), widen(Float16{}, pair >> 16)};
    }
    static __device__ Grid decoded(Pair pair, const unsigned *factors, const unsigned short *) {
        return read(pair, factors);
    }
    static __device__ float scaled(float sum, const unsigned short *) { return sum; }
};

// Codes, with a pair of float16 factors for every block and one factor for every row, applied to its sum.
struct Int8Grid {
    using Pair = unsigned short;
    static __device__ Grid read(Pair pair, const unsigned *block_factors) {
        return {widen(Float16{}, *block_factors & 0xffff) * static_cast<signed char>(pair & 0xff),
                widen(Float16{}, *block_factors >> 16) * static_cast<signed char>(pair >> 8)};
    }
    // Products in the order of `reference.types.CodedGrid`, which rounds each.
    static __device__ Grid decoded(Pair pair, const unsigned *block_factors, const unsigned short *row_factor) {
        const float row = widen(Float16{}, *row_factor);
        return {row * widen(Float16{}, *block_factors & 0xffff) * static_cast<signed char>(pair & 0xff),
                row * widen(Float16{}, *block_factors >> 16) * static_cast<signed char>(pair >> 8)};
    }
    static __device__ float scaled(float sum, const unsigned short *row_factor) {
        return widen(Float16{}, *row_factor) * sum;
    }
};

// The weights alpha (q - 1) + mu of a block and row, rounded to T, for the digits q = 0, 1, 2: in 16 bits each.
struct Table {
    unsigned lower, upper;
};

template <class T, class G>
__device__ inline Table table(typename G::Pair pair, const unsigned *block_factors, const unsigned short *row_factor) {
    const Grid grid = G::decoded(pair, block_factors, row_factor);
    unsigned weights[3];
#pragma unroll
    for (int q = 0; q < 3; q++) weights[q] = narrow(T{}, grid.alpha * (q - 1) + grid.mu);
    return {weights[0] | weights[1] << 16, weights[2]};
}

// For the four digits of a byte of trits, which bytes of a table are theirs, 2q and 2q + 1: four bits each.
__device__ inline unsigned selectors(unsigned word, int byte) {
    unsigned digits = word >> 8 * byte & 0xff;
    digits = (digits | digits << 12) & 0x000f000f;
    digits = (digits | digits << 6) & 0x03030303;
    return digits * 0x22 + 0x10101010;
}

// The weights of the two digits whose selectors come first.
__device__ inline unsigned two_weights(const Table &table, unsigned selectors) {
    return bytes_of(table.lower, table.upper, selectors);
}

// Of x to shared memory by all threads of a CUDA block, eight numbers at a time if they lie so.
template <int THREADS>
__device__ inline void copy_numbers(unsigned short *to, const unsigned short *from, int count) {
    const int eights = reinterpret_cast<size_t>(from) % sizeof(uint4) ? 0 : count / 8;
    for (int i = threadIdx.x; i < eights; i += THREADS)
        reinterpret_cast<uint4 *>(to)[i] = reinterpret_cast<const uint4 *>(from)[i];
    for (int i = eights * 8 + threadIdx.x; i < count; i += THREADS) to[i] = from[i];
}

// The original columns of a word of trits, eight in 16 bytes. A permutation is filled up to a whole chunk.
struct Columns {
    uint4 eights[2];
};

__device__ inline Columns load_columns(const unsigned short *permutation, int word) {
    const uint4 *eights = reinterpret_cast<const uint4 *>(permutation + word * WORD);
    return {eights[0], eights[1]};
}

__device__ inline unsigned column(const Columns &of_word, int i) {
    const uint4 &eight = of_word.eights[i / 8];
    const int place = i % 8 / 2;
    const unsigned two = place == 0 ? eight.x : place == 1 ? eight.y : place == 2 ? eight.z : eight.w;
    return i % 2 ? two >> 16 : two & 0xffff;
}

// Columns 16 word ... 16 word + 15 of a row of x in the order of trits: as pairs (i, i + 8), in which
// `trits` gives them, and 0 beyond m. Returns their sum.
template <class T>
__device__ inline float gather_word(const unsigned short *row, const Columns &of_word, int m, int word,
                                    uint4 (&pairs)[2]) {
    unsigned values[WORD];
    float sum = 0;
#pragma unroll
    for (int i = 0; i < WORD; i++) {
        values[i] = word * WORD + i < m ? row[column(of_word, i)] : 0;
        sum += widen(T{}, values[i]);
    }
#pragma unroll
    for (int i = 0; i < 8; i++) values[i] |= values[i + 8] << 16;
    pairs[0] = {values[0], values[1], values[2], values[3]};
    pairs[1] = {values[4], values[5], values[6], values[7]};
    return sum;
}

// The sum over the four lanes that have the words of a span. a + b is b + a, so all get the same bits.
__device__ inline float span_sum(float sum) {
    sum += __shfl_xor_sync(ALL_LANES, sum, 1);
    return sum + __shfl_xor_sync(ALL_LANES, sum, 2);
}

// What a lane multiplies with of 16 rows and a chunk: words, and pairs, of rows g and g + 8. Pairs are by
// spans, and only there where a block ends, but for two spans at the most: parts of a block may be added
// one by one.
template <class G>
struct Weights {
    uint4 words[2];
    typename G::Pair pairs[2][SPANS];
};

__device__ inline bool ends_block(int span, int pairs_shift) { return span % 2 == 1 || pairs_shift == 2; }

// Pair of a row of a chunk that a span takes.
__device__ inline int pair_of(int span, int pairs_shift) { return span >> (2 - pairs_shift); }

// `pairs` are those of 16 rows of a chunk.
template <class G>
__device__ inline void read_pairs(Weights<G> &weights, const typename G::Pair *pairs, int pairs_shift) {
#pragma unroll
    for (int r = 0; r < SPANS; r++) {
        if (!ends_block(r, pairs_shift)) continue;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = lane_of() / 4 + 8 * half;
            weights.pairs[half][r] = pairs[(row << pairs_shift) + pair_of(r, pairs_shift)];
        }
    }
}

// Adds a chunk to total[rows / 16][tokens / 8], laid out as D of `mma`. `x` is for every tile of tokens
// where this lane's words of this chunk begin, `sums` has the sums of its spans, TOKEN_TILES * TILE for each,
// `block_factors` the factors of its pairs.
template <class T, class G, int ROW_TILES, int TOKEN_TILES>
__device__ inline void add_chunk(const Weights<G> (&weights)[ROW_TILES], const uint4 *const (&x)[TOKEN_TILES],
                                 const float *sums, const unsigned *block_factors, int pairs_shift,
                                 unsigned units_of_two, float (&total)[ROW_TILES][TOKEN_TILES][4]) {
    float matched[ROW_TILES][TOKEN_TILES][4] = {};
#pragma unroll
    for (int r = 0; r < SPANS; r++) {
#pragma unroll
        for (int i = 0; i < 8; i += 4) {  // pairs i to i + 3, two products of 16 columns
            unsigned a[ROW_TILES][2][4];
#pragma unroll
            for (int rows = 0; rows < ROW_TILES; rows++)
#pragma unroll
                for (int k = 0; k < 2; k++)
#pragma unroll
                    for (int part = 0; part < 4; part++) {
                        const uint4 &four = weights[rows].words[part % 2];
                        const unsigned word = r == 0 ? four.x : r == 1 ? four.y : r == 2 ? four.z : four.w;
                        a[rows][k][part] = trits<T>(word, i + 2 * k + part / 2, units_of_two);
                    }
#pragma unroll
            for (int tile = 0; tile < TOKEN_TILES; tile++) {
                const uint4 b = x[tile][(r * SPAN + 2 * i) / 8];
#pragma unroll
                for (int rows = 0; rows < ROW_TILES; rows++) {
                    mma(T{}, matched[rows][tile], a[rows][0], b.x, b.y);
                    mma(T{}, matched[rows][tile], a[rows][1], b.z, b.w);
                }
            }
        }
        if (!ends_block(r, pairs_shift)) continue;
        Grid grids[ROW_TILES][2];
#pragma unroll
        for (int rows = 0; rows < ROW_TILES; rows++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                grids[rows][half] = G::read(weights[rows].pairs[half][r], block_factors + pair_of(r, pairs_shift));
#pragma unroll
        for (int tile = 0; tile < TOKEN_TILES; tile++) {
            const auto sum_of = [&](int span) {
                const int first = (span * TOKEN_TILES + tile) * TILE + lane_of() % 4 * 2;
                return *reinterpret_cast<const float2 *>(sums + first);
            };
            float2 everything = sum_of(r);
            if (r % 2 == 1 && pairs_shift < 2) {
                const float2 before = sum_of(r - 1);
                everything.x += before.x, everything.y += before.y;
            }
#pragma unroll
            for (int rows = 0; rows < ROW_TILES; rows++)
#pragma unroll
                for (int d = 0; d < 4; d++) {
                    float &sum = total[rows][tile][d];
                    sum = fmaf(grids[rows][d / 2].alpha, matched[rows][tile][d], sum);
                    sum = fmaf(grids[rows][d / 2].mu, d % 2 ? everything.y : everything.x, sum);
                    matched[rows][tile][d] = 0;
                }
        }
    }
}
