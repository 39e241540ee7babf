// What decode.cu and prefill.cu share: trits to 16-bit floats, x in the order of trits, one chunk of the
// product. y[token][row] = sum over blocks b of alpha[row][b] (T x)_b + mu[row][b] (sum of x)_b, where
// (T x)_b is summed by tensor cores: rows of T are the rows of A, tokens the columns of B.
//
// A word has 16 trits, a span 64 columns: a word of each of the four lanes that share a row of A. A chunk
// is four spans: 128 bits a lane. Blocks of 64, 128, 256, ... columns are 2^block_shift whole spans.

constexpr int WORD = 16, SPAN = 64, CHUNK = 256, SPANS = CHUNK / SPAN, WORDS = CHUNK / WORD;
constexpr int ROWS = 16;  // of A
constexpr int TILE = 8;   // columns of B
constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

// 8 more elements after each row of x in shared memory: 16 bytes. The lanes of two tokens then read from
// other banks, the one's 16 bytes in the gaps of the other's.
constexpr int PADDING = 8;

__device__ inline int lane_of() { return threadIdx.x % WARP; }

__device__ constexpr unsigned both(unsigned half) { return half << 16 | half; }

// Trits i and i + 8 of a word, t = q - 1 as two T. The mantissa of 2^MANTISSA counts units, so with the
// digit q in its bits 2p and 2p + 1 (AND and OR are one instruction) it is 2^MANTISSA + q 4^p, and
// (2^MANTISSA + q 4^p) 4^-p - (2^MANTISSA 4^-p + 1) = q - 1 exactly. A mantissa has room for several
// p, so most digits need no shift. t rather than q: with 0, 1, 2 sums would be larger than the result.
template <class T>
__device__ inline unsigned trits(unsigned word, int i) {
    constexpr int POSITIONS = T::MANTISSA / 2;
    constexpr unsigned UNITS = (T::MANTISSA + T::BIAS) << T::MANTISSA;  // 2^MANTISSA
    constexpr unsigned ONE = T::BIAS << T::MANTISSA;
    constexpr unsigned NEGATIVE = 0x8000u;
    const int p = i % POSITIONS;
    const unsigned quarters = 2u * p << T::MANTISSA;  // what 4^p takes from an exponent
    const unsigned digits = ((word >> 2 * (i - p)) & both(3u << 2 * p)) | both(UNITS);
    return fma2(T{}, digits, both(ONE - quarters), both((NEGATIVE | UNITS) - quarters + (1u << 2 * p)));
}

// Columns 16 word ... 16 word + 15 of a row of x in the order of trits: as pairs (i, i + 8), in which
// `trits` gives them, and 0 beyond m. Returns their sum.
template <class T>
__device__ inline float gather_word(const unsigned short *row, const unsigned *permutation, int m, int word,
                                    uint4 (&pairs)[2]) {
    unsigned columns[WORD], values[WORD];
    const int first = word * WORD;
    if (first + WORD <= m) {
#pragma unroll
        for (int i = 0; i < WORD; i += 4) {
            const uint4 four = *reinterpret_cast<const uint4 *>(permutation + first + i);
            columns[i] = four.x, columns[i + 1] = four.y, columns[i + 2] = four.z, columns[i + 3] = four.w;
        }
    } else {
#pragma unroll
        for (int i = 0; i < WORD; i++) columns[i] = first + i < m ? permutation[first + i] : 0;
    }
    float sum = 0;
#pragma unroll
    for (int i = 0; i < WORD; i++) {
        values[i] = first + i < m ? row[columns[i]] : 0;
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

// What a lane needs of 16 rows and a chunk: the words and grids of rows g and g + 8, span by span.
struct Weights {
    unsigned words[2][SPANS];
    unsigned grids[2][SPANS];  // alpha in the lower half, mu in the upper
};

__device__ inline Weights load_weights(const unsigned *words, const unsigned *grid, int first_row, int n,
                                       int chunk, int chunks, int blocks, int block_shift) {
    Weights weights;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        // Rows beyond n read the last one, and are not written.
        const size_t row = min(first_row + lane_of() / 4 + 8 * half, n - 1);
        const uint4 four =
            reinterpret_cast<const uint4 *>(words)[(row * chunks + chunk) * 4 + lane_of() % 4];
        weights.words[half][0] = four.x, weights.words[half][1] = four.y;
        weights.words[half][2] = four.z, weights.words[half][3] = four.w;
#pragma unroll
        for (int r = 0; r < SPANS; r++) {
            // Spans beyond m lie in no block; x is 0 there, and any alpha and mu will do.
            const int block = min((chunk * SPANS + r) >> block_shift, blocks - 1);
            weights.grids[half][r] = grid[row * blocks + block];
        }
    }
    return weights;
}

// Adds a chunk to total[rows / 16][tokens / 8], laid out as D of `mma`. `staged` is x of this chunk, rows
// `stride` apart, `sums` the sums of its spans, TOKEN_TILES * TILE for each; rows of `staged` from `tokens` on
// are not there, and not read.
template <class T, int ROW_TILES, int TOKEN_TILES>
__device__ inline void add_chunk(const Weights (&weights)[ROW_TILES], const unsigned short *staged, int stride,
                                 const float *sums, int tokens, int chunk, int block_shift,
                                 float (&total)[ROW_TILES][TOKEN_TILES][4]) {
    const int g = lane_of() / 4, t = lane_of() % 4;
    float matched[ROW_TILES][TOKEN_TILES][4] = {};
    int begin = 0;  // first span of the block in this chunk
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
                    for (int part = 0; part < 4; part++)
                        a[rows][k][part] = trits<T>(weights[rows].words[part % 2][r], i + 2 * k + part / 2);
#pragma unroll
            for (int tile = 0; tile < TOKEN_TILES; tile++) {
                const int token = tile * TILE + g;
                uint4 b = {0, 0, 0, 0};
                if (token < tokens)
                    b = *reinterpret_cast<const uint4 *>(staged + token * stride + r * SPAN + t * WORD + 2 * i);
#pragma unroll
                for (int rows = 0; rows < ROW_TILES; rows++) {
                    mma(T{}, matched[rows][tile], a[rows][0], b.x, b.y);
                    mma(T{}, matched[rows][tile], a[rows][1], b.z, b.w);
                }
            }
        }
        // The end of a block, or of the chunk: parts of a block may be added one by one.
        if (r + 1 < SPANS && ((r + 1) & ((1 << block_shift) - 1))) continue;
#pragma unroll
        for (int tile = 0; tile < TOKEN_TILES; tile++) {
            float everything[2] = {};
            for (int span = begin; span <= r; span++)
#pragma unroll
                for (int d = 0; d < 2; d++)
                    everything[d] += sums[(span * TOKEN_TILES + tile) * TILE + 2 * t + d];
#pragma unroll
            for (int rows = 0; rows < ROW_TILES; rows++)
#pragma unroll
                for (int d = 0; d < 4; d++) {
                    const unsigned grid = weights[rows].grids[d / 2][r];
                    float &sum = total[rows][tile][d];
                    sum = fmaf(widen(Float16{}, grid & 0xffff), matched[rows][tile][d], sum);
                    sum = fmaf(widen(Float16{}, grid >> 16), everything[d % 2], sum);
                    matched[rows][tile][d] = 0;
                }
        }
        begin = r + 1;
    }
}
