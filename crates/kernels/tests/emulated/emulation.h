// Runs the CUDA kernels on a CPU: every thread of a block is a fibre, and threads meet at barriers and exchange values as they do on a
// GPU. What is checked so is which thread computes what from where, not the hardware, its speed, or races between barriers. The order of
// values in the matrices' registers is that of NVIDIA's PTX manual.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

using std::isfinite, std::isnan, std::max, std::min;

#define __device__
#define __global__
#define __launch_bounds__(...)
#define __shared__ static
#define DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(emulation::dynamic_shared)

struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct __half { _Float16 value; };
struct __half2 { __half low, high; };
inline __half __float2half_rn(float x) { return {_Float16(x)}; }
inline float __half2float(__half x) { return float(x.value); }
inline __half2 __halves2half2(__half low, __half high) { return {low, high}; }

struct __nv_bfloat16 {
    uint16_t bits;
    operator float() const {
        const uint32_t wide = uint32_t(bits) << 16;
        float x;
        std::memcpy(&x, &wide, 4);
        return x;
    }
};
struct __nv_bfloat162 { __nv_bfloat16 low, high; };
inline float2 __bfloat1622float2(__nv_bfloat162 x) { return {x.low, x.high}; }

inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }

namespace emulation {

constexpr int LANES = 32, MOST_THREADS = 1024, SHARED_BYTES = 128 << 10;

struct Index { int x = 1, y = 1, z = 1; };

inline int thread;  // that runs
inline Index block_index, block_size;
alignas(16) inline char dynamic_shared[SHARED_BYTES];
// What the lanes of each warp show each other.
alignas(16) inline char shown[MOST_THREADS / LANES][LANES][32];

// Where threads wait for each other; those that have ended are not waited for.
struct Barrier {
    int alive = 0, arrived = 0, passed = 0;
    void open_if_full() {
        if (arrived >= alive) {
            arrived = 0;
            ++passed;
        }
    }
};
inline Barrier warps[MOST_THREADS / LANES], block;
inline std::vector<ucontext_t> fibres;
inline std::vector<std::vector<char>> stacks;
inline std::vector<bool> ended;
inline ucontext_t scheduler;
inline std::function<void()> kernel;

inline void wait(Barrier& barrier) {
    const int passed = barrier.passed;
    ++barrier.arrived;
    barrier.open_if_full();
    while (barrier.passed == passed) {
        swapcontext(&fibres[thread], &scheduler);
    }
}

inline Barrier& warp() { return warps[thread / LANES]; }

inline void run_thread() {
    kernel();
    ended[thread] = true;
    for (Barrier* barrier : {&warp(), &block}) {
        --barrier->alive;
        barrier->open_if_full();
    }
    setcontext(&scheduler);
}

inline void run_block(int threads) {
    std::memset(dynamic_shared, 0x7f, sizeof dynamic_shared);  // no number that would look right
    std::fill(std::begin(warps), std::end(warps), Barrier{});
    block = {threads};
    fibres.assign(threads, {});
    stacks.resize(threads, std::vector<char>(64 << 10));
    ended.assign(threads, false);
    for (int i = 0; i < threads; ++i) {
        ++warps[i / LANES].alive;
        getcontext(&fibres[i]);
        fibres[i].uc_stack = {.ss_sp = stacks[i].data(), .ss_flags = 0, .ss_size = stacks[i].size()};
        makecontext(&fibres[i], run_thread, 0);
    }
    while (std::find(ended.begin(), ended.end(), false) != ended.end()) {
        for (int i = 0; i < threads; ++i) {
            if (!ended[i]) {
                thread = i;
                swapcontext(&scheduler, &fibres[i]);
            }
        }
    }
}

inline void launch(Index grid, int threads, std::function<void()> run) {
    kernel = std::move(run);
    block_size = {threads};
    for (int z = 0; z < grid.z; ++z) {
        for (int y = 0; y < grid.y; ++y) {
            for (int x = 0; x < grid.x; ++x) {
                block_index = {x, y, z};
                run_block(threads);
            }
        }
    }
}

// Shows `mine` to the warp, and gives what `read` makes of the others' (a function from a lane to its value).
template <typename T, typename Read>
auto exchange(const T& mine, Read read) {
    static_assert(sizeof(T) <= sizeof shown[0][0]);
    auto& values = shown[thread / LANES];
    std::memcpy(values[thread % LANES], &mine, sizeof mine);
    wait(warp());
    const auto result = read([&](int lane) {
        T value;
        std::memcpy(&value, values[lane], sizeof value);
        return value;
    });
    wait(warp());
    return result;
}

struct Four { uint32_t of[4]; };
struct Sums { float of[4]; };
struct Operands { uint32_t a[4], b[2]; };

inline Four load(const __half* row, bool transposed) {
    const int lane = thread % LANES;
    return exchange(row, [&](auto of) {
        Four loaded;
        for (int i = 0; i < 4; ++i) {
            __half pair[2];
            for (int j = 0; j < 2; ++j) {
                const int r = transposed ? 2 * (lane % 4) + j : lane / 4, c = transposed ? lane / 4 : 2 * (lane % 4) + j;
                const __half* from = of(8 * i + r);
                if (reinterpret_cast<uintptr_t>(from) % 16 != 0) {
                    std::abort();
                }
                pair[j] = from[c];
            }
            std::memcpy(&loaded.of[i], pair, 4);
        }
        return loaded;
    });
}

inline float half_of(uint32_t pair, int i) {
    __half halves[2];
    std::memcpy(halves, &pair, 4);
    return __half2float(halves[i]);
}

inline float tf32_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

// c += a b with 16 x K x 8, a register holding PACKED values; `value(register, i)` reads one.
template <int K, int PACKED, typename Value>
void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Value value) {
    const int lane = thread % LANES;
    const Operands mine{{a[0], a[1], a[2], a[3]}, {b0, b1}};
    const Sums sums = exchange(mine, [&](auto of) {
        Sums sums{{c[0], c[1], c[2], c[3]}};
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
            for (int k = 0; k < K; ++k) {
                const int place = k % (K / 2) / PACKED, half = k / (K / 2);
                const uint32_t left = of(row % 8 * 4 + place).a[row / 8 + 2 * half], right = of(column * 4 + place).b[half];
                sums.of[i] += value(left, k % PACKED) * value(right, k % PACKED);
            }
        }
        return sums;
    });
    std::copy_n(sums.of, 4, c);
}

}  // namespace emulation

struct ThreadIndex {
    struct { operator int() const { return emulation::thread; } } x;
};
inline const ThreadIndex threadIdx;
inline const emulation::Index &blockIdx = emulation::block_index, &blockDim = emulation::block_size;

template <typename T>
T __shfl_xor_sync(unsigned, T x, int mask) {
    return emulation::exchange(x, [&](auto of) { return of(emulation::thread % emulation::LANES ^ mask); });
}
template <typename T>
T __shfl_sync(unsigned, T x, int lane) {
    return emulation::exchange(x, [&](auto of) { return of(lane % emulation::LANES); });
}
inline void __syncthreads() { emulation::wait(emulation::block); }
inline bool __syncthreads_or(bool x) {
    static bool any;
    any = false;
    __syncthreads();
    any |= x;
    __syncthreads();
    return any;
}

inline void copy_16_bytes(void* to, const void* from, bool real) {
    if (real) {
        std::memcpy(to, from, 16);
    } else {
        std::memset(to, 0, 16);
    }
}
inline void commit_copies() {}
template <int PENDING>
void await_copies() {}
inline void load_matrices(uint32_t (&to)[4], const __half* row) { std::copy_n(emulation::load(row, false).of, 4, to); }
inline void load_matrices_transposed(uint32_t (&to)[4], const __half* row) { std::copy_n(emulation::load(row, true).of, 4, to); }
inline void multiply_halves(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emulation::multiply<16, 2>(c, a, b0, b1, emulation::half_of);
}
inline void multiply_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emulation::multiply<8, 1>(c, a, b0, b1, [](uint32_t bits, int) { return emulation::tf32_of(bits); });
}
inline uint32_t to_tf32(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return isfinite(x) ? (bits + 0x1000) & ~0x1fffu : bits;
}
