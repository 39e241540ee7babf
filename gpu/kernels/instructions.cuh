// The instructions that CUDA C++ has no words for without headers, for the two 16-bit types.
// tests/gpu/emulation.cpp has the same functions in plain C++, by the PTX manual, for a CPU.

// Bits of the mantissa and bias of the exponent are all that tells the two types apart.
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

// To the nearest, ties to even; beyond the range infinity.
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

// a b + c of two pairs.
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
// Volatile, as no compiler may move it to where some lanes do not go.
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

// 16 bytes from memory to shared memory, past the registers. Copies belong to the group that is closed
// next; a thread sees its own once all but the newest N of its groups are done.
__device__ inline void copy_async(uint4 *to, const uint4 *from) {
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
}

__device__ inline void close_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int N>
__device__ inline void await_groups() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
