// x in the order of trits, for decode.cu and prefill.cu.
//
// Replaces a gather inside prefill.cu, which would read every element of x as a sector of 32 bytes, once for
// each 128 rows of T. Here every row of x is read once, whole, and gathered from shared memory, where there
// are no sectors. decode.cu gathers by itself where shared memory has room for it.
//
// To compile it alone: SOURCE of arrange.py, see ternary.cuh.

struct ArrangeParameters {
    const unsigned short *x;            // (tokens, m)
    const unsigned short *permutation;  // (parts, 256 chunks)
    uint4 *arranged;                    // (parts, tokens, 256 chunks) as `gather_word` arranges a word
    float *span_sums;                   // (parts, tokens, 4 chunks)
    int m, parts;
};

// A CUDA block takes one token, and one part after another.
// Grid: tokens. Shared memory: a row of x, (m,).
template <class T>
__device__ inline void arrange(const ArrangeParameters p) {
    extern __shared__ uint4 shared[];
    unsigned short *row = reinterpret_cast<unsigned short *>(shared);
    const size_t token = blockIdx.x, tokens = gridDim.x;
    copy_numbers<THREADS>(row, p.x + token * p.m, p.m);
    __syncthreads();
    const int words = chunks_of(p.m) * WORDS;
    for (int part = 0; part < p.parts; part++)
        // Whole warps go around together, as span_sum needs all lanes.
        for (int word = threadIdx.x; word - lane_of() < words; word += THREADS) {
            uint4 pairs[2];
            float sum = 0;
            if (word < words)
                sum = gather_word<T>(row, load_columns(p.permutation + part * words * WORD, word), p.m, word, pairs);
            sum = span_sum(sum);
            if (word >= words) continue;
            const size_t place = (part * tokens + token) * words + word;
            p.arranged[2 * place] = pairs[0];
            p.arranged[2 * place + 1] = pairs[1];
            if (word % 4 == 0) p.span_sums[place / 4] = sum;
        }
}

#define ARRANGE(NAME, T)                                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS) NAME(const ArrangeParameters p) {                  \
        arrange<T>(p);                                                                                       \
    }
