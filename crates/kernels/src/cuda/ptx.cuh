// The instructions that CUDA C++ has no name for, and memory whose size the launch says. tests/kernels/emulation.h has the same for the CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cstdint>

// Declares `name` as the block's memory whose size the launch says.
#define DYNAMIC_SHARED(type, name) extern __shared__ __align__(16) type name[]

// Starts to copy 16 bytes to shared memory, or 16 zeros.
__device__ inline void copy_16_bytes(void* to, const void* from, bool real) {
    const unsigned shared = static_cast<unsigned>(__cvta_generic_to_shared(to));
    const int bytes = real ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(from), "r"(bytes));
}

__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;"); }

// Waits for all copies but the last PENDING groups.
template <int PENDING>
__device__ inline void await_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING));
}

// Four 8x8 matrices of halves; lane i gives the address of row i % 8 of matrix i / 8, and gets two values of row i / 4 of each.
__device__ inline void load_matrices(uint32_t (&to)[4], const __half* row) {
    const unsigned shared = static_cast<unsigned>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(shared));
}

// As above, two values of column i / 4 of each.
__device__ inline void load_matrices_transposed(uint32_t (&to)[4], const __half* row) {
    const unsigned shared = static_cast<unsigned>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(shared));
}

// c += a b, with a 16x16, b 16x8 of halves.
__device__ inline void multiply_halves(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c += a b, with a 16x8, b 8x8 of tf32.
__device__ inline void multiply_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// x, rounded to nearest as a tf32.
__device__ inline uint32_t to_tf32(float x) {
    uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return bits;
}
