// All assembly: instructions for which CUDA C++ has no function, or none without headers.
// tests/gpu/emulation.cpp has the same functions in plain C++, after the PTX manual, for a CPU.

// The two 16-bit types differ in the bits of the mantissa and the bias of the exponent.
struct Float16 {
    static constexpr int MANTISSA = 10, BIAS = 15;
};
struct BFloat16 {
    static constexpr int MANTISSA = 7, BIAS = 127;
};

__device__ inline float widen(Float16, unsigned short bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

__device__ inline float widen(BFloat16, unsigned short bits) {
    return __uint_as_float(static_cast<unsigned>(bits) << 16);
}

// Rounds to the nearest, ties to even; infinity beyond the range.
__device__ inline unsigned short narrow(Float16, float value) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

__device__ inline unsigned short narrow(BFloat16, float value) {
    unsigned short bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

// Picks four of the bytes of `low` (0 to 3) and `high` (4 to 7), each by four bits of the selector.
__device__ inline unsigned bytes_of(unsigned low, unsigned high, unsigned selector) {
    unsigned bytes;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(low), "r"(high), "r"(selector));
    return bytes;
}

// a b + c in both halves.
__device__ inline unsigned fma2(Float16, unsigned a, unsigned b, unsigned c) {
    unsigned d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

__device__ inline unsigned fma2(BFloat16, unsigned a, unsigned b, unsigned c) {
    unsigned d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

// D += A B on tensor cores, 16x8 += 16x16 16x8, spread over the 32 lanes of a warp. With g = lane / 4 and
// t = lane % 4 a lane holds
//   a[0] A[g][2t, 2t+1]   a[1] A[g+8][2t, 2t+1]   a[2] A[g][2t+8, 2t+9]   a[3] A[g+8][2t+8, 2t+9]
//   b0 B[2t, 2t+1][g]     b1 B[2t+8, 2t+9][g]
//   d[0], d[1] D[g][2t, 2t+1]   d[2], d[3] D[g+8][2t, 2t+1]
// Volatile, because the compiler must not move it to where lanes have diverged.
__device__ inline void mma(Float16, float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline void mma(BFloat16, float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Copies 16 bytes from global to shared memory, past the registers. A copy belongs to the group that is closed
// next. After await_groups<N>() all but the newest N groups of this thread are done, and it sees their copies.
__device__ inline void copy_async(uint4 *to, const uint4 *from) {
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
}

__device__ inline void close_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int N>
__device__ inline void await_groups() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---- warpgroups: four warps, the first of which is a multiple of four. Only for sm_90a.

constexpr int WARPGROUP_COLUMNS = 128;

#define WARPGROUP_SUMS(d) \
    "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
    "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
    "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
    "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), \
    "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), \
    "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), \
    "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), \
    "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])

#define WARPGROUP_PRODUCT(TYPE) \
    asm volatile("{ .reg .pred add; setp.eq.u32 add, 0, 0; " \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {" \
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
        "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, " \
        "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, " \
        "%59, %60, %61, %62, %63 " \
        "}, {%64, %65, %66, %67}, %68, add, 1, 1, 0; }" \
        : WARPGROUP_SUMS(d) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(described(b)) : "memory")

// The matrix descriptor of B: its address; the distance from the first eight rows of a column to the other eight;
// the distance from eight columns to the next eight.
__device__ inline unsigned long long described(const uint4 *b) {
    const auto encoded = [](unsigned long long bytes) { return bytes / 16; };
    return encoded(__cvta_generic_to_shared(b)) | encoded(WARPGROUP_COLUMNS * 16) << 16 | encoded(8 * 16) << 32;
}

// Starts D += A B, 64x128 += 64x16 16x128. Every warp has 16 rows: A as for `mma`, and d[4j] to d[4j + 3] are D of
// `mma` for the j-th 8 columns. B lies in shared memory as (2, 128, 8): the first eight rows of all columns, then
// the other eight. A, B and D must not be touched before the product is done.
__device__ inline void multiply_async(Float16, float (&d)[64], const unsigned (&a)[4], const uint4 *b) {
    WARPGROUP_PRODUCT("f16");
}

__device__ inline void multiply_async(BFloat16, float (&d)[64], const unsigned (&a)[4], const uint4 *b) {
    WARPGROUP_PRODUCT("bf16");
}

// A fence between writing the registers of the next products, up to four, and starting them. The operands tell
// the compiler that the registers are written here.
__device__ inline void begin_products(unsigned (&a)[4][4]) {
    asm volatile("wgmma.fence.sync.aligned;"
        : "+r"(a[0][0]), "+r"(a[0][1]), "+r"(a[0][2]), "+r"(a[0][3]), "+r"(a[1][0]), "+r"(a[1][1]), "+r"(a[1][2]),
          "+r"(a[1][3]), "+r"(a[2][0]), "+r"(a[2][1]), "+r"(a[2][2]), "+r"(a[2][3]), "+r"(a[3][0]), "+r"(a[3][1]),
          "+r"(a[3][2]), "+r"(a[3][3])::"memory");
}

// A product belongs to the group that is closed next. After await_products<N>() all but the newest N groups are done.
__device__ inline void close_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int N>
__device__ inline void await_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Keeps the compiler from moving reads and writes of sums across this point.
__device__ inline void settle(float (&d)[64]) { asm volatile("" : WARPGROUP_SUMS(d)::"memory"); }

// Makes what this thread has written to shared memory visible to products that start after a barrier.
__device__ inline void show_to_tensor_cores() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
