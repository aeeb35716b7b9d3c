// Batched adapters: y += scale * B (A x) for rows of many adapters in two launches (the idea of Punica's SGMV, Chen et al. 2023). A task
// is a few rows of one adapter, each adapter has its own rank, and rows without one are in no task. Every sum has an order that depends
// on the layer's shape alone.

#include "common.cuh"

// The tensors of one layer of an adapter; rank 0 where the adapter leaves the layer alone.
struct Layer {
    const __nv_bfloat16* a;  // [in][padded]
    const __nv_bfloat16* b;  // [out / 16][padded][16]
    uint32_t rank;
    uint32_t padded;  // a multiple of 8
    float scale;
    uint32_t unused;
};

// Rows `first..first + count` of the list of rows, count at most ROWS.
struct Task {
    uint32_t layers_low, layers_high;  // the address of the adapter's layers
    uint32_t first;
    uint32_t count;

    __device__ const Layer& layer(int site) const {
        return reinterpret_cast<const Layer*>(uint64_t(layers_high) << 32 | layers_low)[site];
    }
};

constexpr int ROWS = 8;
constexpr int OUT_TILE = 16;

// Ranks of a block of shrink, two a thread; the other threads take other inputs.
constexpr int RANKS = 16;
constexpr int SHRINK_THREADS = 256;
constexpr int GROUPS = SHRINK_THREADS / (RANKS / 2);

// shrunk[i] = scale * A x[rows[i]], `stride` values apart. grid: (tasks, tiles of 16 ranks).
extern "C" __global__ void __launch_bounds__(SHRINK_THREADS)
lora_shrink(const float* x, const Task* tasks, const uint32_t* rows, int site, int inputs, float* shrunk, int stride) {
    __shared__ float2 partial[SHRINK_THREADS / WARP][ROWS][RANKS / 2];
    const Task task = tasks[blockIdx.x];
    const Layer layer = task.layer(site);
    if (blockIdx.y * RANKS >= layer.padded) {
        return;
    }
    const int lane = threadIdx.x % (RANKS / 2), group = threadIdx.x / (RANKS / 2);
    const int rank = blockIdx.y * RANKS + 2 * lane;
    const bool held = rank < layer.padded && layer.rank > 0;
    const float* row[ROWS];
    float2 sum[ROWS];
#pragma unroll
    for (int j = 0; j < ROWS; ++j) {
        row[j] = x + size_t(rows[task.first + min(uint32_t(j), task.count - 1)]) * inputs;
        sum[j] = make_float2(0.0f, 0.0f);
    }
    for (int k = group; k < inputs && held; k += GROUPS) {
        const float2 a = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(layer.a + size_t(k) * layer.padded + rank));
#pragma unroll
        for (int j = 0; j < ROWS; ++j) {
            if (j < task.count) {
                sum[j].x = __fmaf_rn(a.x, row[j][k], sum[j].x);
                sum[j].y = __fmaf_rn(a.y, row[j][k], sum[j].y);
            }
        }
    }
#pragma unroll
    for (int j = 0; j < ROWS; ++j) {
        if (j < task.count) {
            for (int step = RANKS / 2; step < WARP; step *= 2) {
                sum[j].x = __fadd_rn(sum[j].x, __shfl_xor_sync(ALL_LANES, sum[j].x, step));
                sum[j].y = __fadd_rn(sum[j].y, __shfl_xor_sync(ALL_LANES, sum[j].y, step));
            }
            if (threadIdx.x % WARP < RANKS / 2) {
                partial[threadIdx.x / WARP][j][lane] = sum[j];
            }
        }
    }
    __syncthreads();
    const int j = threadIdx.x / RANKS, r = blockIdx.y * RANKS + threadIdx.x % RANKS;
    if (j < task.count && r < layer.rank) {
        float total = 0.0f;
        for (int warp = 0; warp < SHRINK_THREADS / WARP; ++warp) {
            total = __fadd_rn(total, reinterpret_cast<const float*>(partial[warp][j])[threadIdx.x % RANKS]);
        }
        shrunk[size_t(task.first + j) * stride + r] = __fmul_rn(layer.scale, total);
    }
}

constexpr int EXPAND_THREADS = 128;

// y[rows[i]] += B shrunk[i], two outputs a thread. grid: (tasks, tiles of 256 outputs).
extern "C" __global__ void __launch_bounds__(EXPAND_THREADS)
lora_expand(const float* shrunk, const Task* tasks, const uint32_t* rows, int site, int outputs, float* y, int stride) {
    DYNAMIC_SHARED(float, held);  // [ROWS][stride]
    const Task task = tasks[blockIdx.x];
    const Layer layer = task.layer(site);
    if (layer.rank == 0) {
        return;
    }
    for (int i = threadIdx.x; i < task.count * stride; i += EXPAND_THREADS) {
        held[i] = shrunk[size_t(task.first) * stride + i];
    }
    __syncthreads();
    const int out = (blockIdx.y * EXPAND_THREADS + threadIdx.x) * 2;
    if (out >= outputs) {
        return;
    }
    const __nv_bfloat16* b = layer.b + size_t(out / OUT_TILE) * layer.padded * OUT_TILE + out % OUT_TILE;
    float2 sum[ROWS];
#pragma unroll
    for (int j = 0; j < ROWS; ++j) {
        sum[j] = make_float2(0.0f, 0.0f);
    }
    for (int r = 0; r < layer.rank; ++r) {
        const float2 w = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(b + size_t(r) * OUT_TILE));
#pragma unroll
        for (int j = 0; j < ROWS; ++j) {
            if (j < task.count) {
                const float h = held[j * stride + r];
                sum[j].x = __fmaf_rn(w.x, h, sum[j].x);
                sum[j].y = __fmaf_rn(w.y, h, sum[j].y);
            }
        }
    }
#pragma unroll
    for (int j = 0; j < ROWS; ++j) {
        if (j < task.count) {
            float* to = y + size_t(rows[task.first + j]) * outputs + out;
            to[0] = __fadd_rn(to[0], sum[j].x);
            if (out + 1 < outputs) {
                to[1] = __fadd_rn(to[1], sum[j].y);
            }
        }
    }
}
