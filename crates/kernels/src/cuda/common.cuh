// What the kernels share. Sums are written with explicit rounding (__fmaf_rn and so on) wherever two kernels must give the same bits: the
// compiler then fuses nothing on its own.
#pragma once

#ifdef __CUDACC__
#include "ptx.cuh"
#else
#include "emulation.h"  // of the tests
#endif

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr float LARGEST_HALF = 65504.0f;

// What is not a number stays so: a broken activation never looks like a good one.
__device__ inline __half to_half(float x) {
    return __float2half_rn(isnan(x) ? x : fminf(fmaxf(x, -LARGEST_HALF), LARGEST_HALF));
}

// A block's sum of one value a thread, the same for every thread, in an order that depends on the block's size alone. `scratch` holds a
// value a warp and is free again when the next barrier has passed.
template <typename T>
__device__ inline T block_sum(T x, T* scratch) {
    for (int step = WARP / 2; step > 0; step /= 2) {
        x += __shfl_xor_sync(ALL_LANES, x, step);
    }
    if (threadIdx.x % WARP == 0) {
        scratch[threadIdx.x / WARP] = x;
    }
    __syncthreads();
    T sum = scratch[0];
    for (int warp = 1; warp < blockDim.x / WARP; ++warp) {
        sum += scratch[warp];
    }
    return sum;
}
