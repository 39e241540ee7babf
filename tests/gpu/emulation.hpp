// What kernels see of CUDA on one CPU thread, in place of gpu/kernels/instructions.cuh; emulation.cpp does it.
// Few headers, as this is compiled with every kernel.
#include <cstddef>

#define __device__
#define __global__
#define __launch_bounds__(...)
#define __shared__

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct float2 {
    float x, y;
};
struct Index {
    unsigned x, y;
};
extern Index threadIdx, blockIdx, gridDim;

template <class A>
A max(A a, A b) {
    return a < b ? b : a;
}
template <class A>
A min(A a, A b) {
    return b < a ? b : a;
}
extern "C" float fmaf(float, float, float) noexcept;
inline unsigned bytes_of(unsigned low, unsigned high, unsigned selector) {
    const unsigned long long bytes = static_cast<unsigned long long>(high) << 32 | low;
    unsigned chosen = 0;
    for (int i = 0; i < 4; i++) chosen |= (bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
    return chosen;
}

void __syncthreads();
void __syncwarp();
float __shfl_xor_sync(unsigned mask, float value, int lane_mask);

void copy_async(uint4 *to, const uint4 *from);
void close_group();
void make_copies(size_t left);
template <int N>
void await_groups() {
    make_copies(N + 1);
}

struct Float16 {
    static constexpr int MANTISSA = 10, BIAS = 15;
};
struct BFloat16 {
    static constexpr int MANTISSA = 7, BIAS = 127;
};
template <class T>
float widen(T, unsigned short bits);
template <class T>
unsigned short narrow(T, double value);
template <class T>
unsigned fma2(T, unsigned a, unsigned b, unsigned c);
template <class T>
void mma(T, float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1);

constexpr int WARPGROUP_COLUMNS = 128;
template <class T>
void multiply_async(T, float (&d)[64], const unsigned (&a)[4], const uint4 *b);
void begin_products(unsigned (&a)[4][4]);
void close_products();
void finish_products(size_t left);
template <int N>
void await_products() {
    finish_products(N);
}
inline void settle(float (&)[64]) {}
void show_to_tensor_cores();

// ---- parameters, a struct that is passed by value
extern const void *parameters;
template <class P>
void call(void (*kernel)(P)) {
    kernel(*static_cast<const P *>(parameters));
}
extern void (*const BODY)();  // the kernel that is compiled with this
