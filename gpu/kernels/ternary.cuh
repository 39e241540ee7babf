// What the kernels share: trits to 16-bit floats, x in the order of trits, one chunk of the product.
// y[token][row] = sum over blocks b of alpha[row][b] (T x)_b + mu[row][b] (sum of x)_b, where tensor cores sum
// (T x)_b: rows of T are the rows of A, tokens are the columns of B.
//
// The layout of T, byte by byte, is in reference/layout.py. This is how a warp reads it, with g = lane / 4 and
// t = lane % 4:
//
//   16 rows of a chunk of 256 columns are 1 KiB: two loads of 16 bytes by every lane.
//
//             lane 0            lane 1            lane 2            lane 3          lanes of a row: t = 0 ... 3
//           +-----------------+-----------------+-----------------+-----------------+
//   row g   | 0   4   8   12  | 1   5   9   13  | 2   6   10  14  | 3   7   11  15  |   words[0] of lane 4g + t
//   row g+8 | 0   4   8   12  | 1   5   9   13  | 2   6   10  14  | 3   7   11  15  |   words[1]
//           +-----------------+-----------------+-----------------+-----------------+
//             x   y   z   w     x ...                                                   of uint4
//
//   The words .x of the four lanes are words 0 to 3: span 0, columns 0 to 63, all of one block. The words .y
//   are span 1, and so on. Rows g and g + 8, a row pair, are what a lane holds of A for `mma`.
//
//   A word is 16 trits of 2 bits. Trits i and i + 8 lie 16 bits apart, so one shift and one mask serve both
//   (`trits`). x is arranged alike: elements i and i + 8 of 16 side by side (`gather_word`).
//
//   A tile of 32 rows is two such 1 KiB for every chunk. alpha and mu lie chunk by chunk as well, a pair
//   for every row and block: 2^pairs_shift pairs a row, for blocks of 64 (4), 128 (2) and 256, 512, ...
//   columns (1).
//
// Structs of parameters are passed by value all the way, and Matrix is copied: by reference, or as a
// __grid_constant__, NVRTC 13.5 spills registers of prefill.cu and serializes the wgmma of warpgroup.cu.
//
// Constants that are declared nowhere here come from Python: sources.py and the launcher beside each .cu.
// To compile a kernel alone, without a device:
//   NUMBA_ENABLE_CUDASIM=1 python -c "from gpu.kernels.decode import *; print(SOURCE.text())" > decode_whole.cu
//   nvcc -cubin -arch=sm_80 -std=c++17 -fmad=false -ftz=true decode_whole.cu

constexpr int SPANS = CHUNK / SPAN;
constexpr unsigned ALL_LANES = 0xffffffffu;

// A ternary matrix, or up to PARTS of them, parts, whose rows lie one below another and that multiply the same
// x. Every part begins with a tile of its own. Rows of part p end before ends[p]; with fewer parts, the last
// ends are equal.
struct Matrix {
    const uint4 *words;                 // (tiles, chunks, 2 groups of 16 rows, 2 halves, 32 lanes)
    const void *grid;                   // (tiles, chunks, 32, pairs) of G::Pair
    const unsigned *block_factors;      // (parts, chunks, pairs) of two float16; null unless Int8Grid
    const unsigned short *row_factors;  // (32 tiles,) of float16; null unless Int8Grid
    const unsigned short *permutation;  // (parts, 256 chunks)
    int m, pairs_shift;
    int ends[PARTS];  // rows of y; the last is n
};

template <class G>
__device__ inline const typename G::Pair *pairs_of(const Matrix &matrix) {
    return static_cast<const typename G::Pair *>(matrix.grid);
}

__device__ inline int chunks_of(int m) { return (m + CHUNK - 1) / CHUNK; }

// A tile of one part: 32 rows of y from `row` on, of which those before `end` exist.
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

// 2^MANTISSA twice, for `trits`. AND-OR in one instruction takes one constant, the mask, so this one must be in
// a register: the compiler must not know it. `size` is not negative, which the compiler does not know.
template <class T>
__device__ inline unsigned units(int size) {
    return both((T::MANTISSA + T::BIAS) << T::MANTISSA) + (static_cast<unsigned>(size) >> 31);
}

// Trits i and i + 8 of a word, t = q - 1, as two T. The last bit of 2^MANTISSA counts ones. So the digit q in bits
// 2p and 2p + 1 of its mantissa (AND and OR are one instruction) makes it 2^MANTISSA + q 4^p, and an FMA gives
// (2^MANTISSA + q 4^p) 4^-p - (2^MANTISSA 4^-p + 1) = q - 1 exactly. A mantissa has room for several p,
// so most digits need no shift. Why t and not q: sums of 0, 1, 2 would be larger than the result.
template <class T>
__device__ inline unsigned trits(unsigned word, int i, unsigned units_of_two) {
    constexpr int POSITIONS = T::MANTISSA / 2;
    constexpr unsigned UNITS = (T::MANTISSA + T::BIAS) << T::MANTISSA;  // 2^MANTISSA
    constexpr unsigned ONE = T::BIAS << T::MANTISSA;
    constexpr unsigned NEGATIVE = 0x8000u;
    const int p = i % POSITIONS;
    const unsigned quarters = 2u * p << T::MANTISSA;  // 4^p in an exponent
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

// Codes of 8 bits, with two float16 factors for every block and one for every row, which is applied to its sum.
struct Int8Grid {
    using Pair = unsigned short;
    static __device__ Grid read(Pair pair, const unsigned *block_factors) {
        return {widen(Float16{}, *block_factors & 0xffff) * static_cast<signed char>(pair & 0xff),
                widen(Float16{}, *block_factors >> 16) * static_cast<signed char>(pair >> 8)};
    }
    // The products are in the order of `reference.types.CodedGrid`, which rounds each.
    static __device__ Grid decoded(Pair pair, const unsigned *block_factors, const unsigned short *row_factor) {
        const float row = widen(Float16{}, *row_factor);
        return {row * widen(Float16{}, *block_factors & 0xffff) * static_cast<signed char>(pair & 0xff),
                row * widen(Float16{}, *block_factors >> 16) * static_cast<signed char>(pair >> 8)};
    }
    static __device__ float scaled(float sum, const unsigned short *row_factor) {
        return widen(Float16{}, *row_factor) * sum;
    }
};

// The three weights of a block and row, alpha (q - 1) + mu for q = 0, 1, 2, rounded to T: 16 bits each.
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

// Selectors for `bytes_of`: for each of the four digits q in a byte of trits, bytes 2q and 2q + 1 of a table.
__device__ inline unsigned selectors(unsigned word, int byte) {
    unsigned digits = word >> 8 * byte & 0xff;
    digits = (digits | digits << 12) & 0x000f000f;
    digits = (digits | digits << 6) & 0x03030303;
    return digits * 0x22 + 0x10101010;
}

// The weights of the first two digits of `selectors`.
__device__ inline unsigned two_weights(const Table &table, unsigned selectors) {
    return bytes_of(table.lower, table.upper, selectors);
}

// Copies numbers of x to shared memory with all threads of a CUDA block, eight at a time if aligned to 16 bytes.
template <int THREADS>
__device__ inline void copy_numbers(unsigned short *to, const unsigned short *from, int count) {
    const int eights = reinterpret_cast<size_t>(from) % sizeof(uint4) ? 0 : count / 8;
    for (int i = threadIdx.x; i < eights; i += THREADS)
        reinterpret_cast<uint4 *>(to)[i] = reinterpret_cast<const uint4 *>(from)[i];
    for (int i = eights * 8 + threadIdx.x; i < count; i += THREADS) to[i] = from[i];
}

// The original columns of a word of trits. A permutation is filled up to a whole chunk.
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

// Gathers the 16 columns of a word from a row of x, in the pairs (i, i + 8) that `trits` gives; columns beyond m
// are 0. Returns their sum.
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

// The sum over the four lanes of a span. Addition commutes, so all four get the same bits.
__device__ inline float span_sum(float sum) {
    sum += __shfl_xor_sync(ALL_LANES, sum, 1);
    return sum + __shfl_xor_sync(ALL_LANES, sum, 2);
}

// A lane's fragment of 16 rows of a chunk: words and pairs of rows g and g + 8. A span has a pair if its block
// ends there. A block of more than two spans is added up two spans at a time, so every second span has a pair.
template <class G>
struct Weights {
    uint4 words[2];
    typename G::Pair pairs[2][SPANS];
};

__device__ inline bool ends_block(int span, int pairs_shift) { return span % 2 == 1 || pairs_shift == 2; }

// Which pair of a row of a chunk belongs to a span.
__device__ inline int pair_of(int span, int pairs_shift) { return span >> (2 - pairs_shift); }

// `pairs` begins with the pairs of 16 rows of a chunk.
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

// Adds a chunk to total[rows / 16][tokens / 8], fragments of D of `mma`.
// x[tile of tokens] points to this lane's columns of this chunk in shared memory; sums is (spans, tokens);
// block_factors begins with the factors of this chunk.
template <class T, class G, int ROW_TILES, int TOKEN_TILES>
__device__ inline void add_chunk(const Weights<G> (&weights)[ROW_TILES], const uint4 *const (&x)[TOKEN_TILES],
                                 const float *sums, const unsigned *block_factors, int pairs_shift,
                                 unsigned units_of_two, float (&total)[ROW_TILES][TOKEN_TILES][4]) {
    float matched[ROW_TILES][TOKEN_TILES][4] = {};
#pragma unroll
    for (int r = 0; r < SPANS; r++) {
#pragma unroll
        for (int i = 0; i < 8; i += 4) {  // trits i to i + 3 and i + 8 to i + 11: two `mma` of 16 columns
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
