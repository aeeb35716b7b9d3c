// Batched adapters: y += scale * B (A x) for rows of many adapters in two launches (the idea of Punica's SGMV, Chen et al. 2023). A task
// is a few rows of one adapter, each adapter has its own rank, and rows without one are in no task. Every sum has an order that depends
// on the layer's shape alone.

#include "common.cuh"

// The tensors of one layer of an adapter; rank 0 where the adapter leaves the layer alone.
struct Layer {
    const __nv_bfloat16* a;  // [rank][in]
    const __nv_bfloat16* b;  // [out / 16][rank][16]
    uint32_t rank;
    float scale;
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

// A warp of shrink takes one rank, two inputs a lane.
constexpr int SHRINK_THREADS = 256;
constexpr int RANKS = SHRINK_THREADS / WARP;

// shrunk[i] = scale * A x[rows[i]], `stride` values apart. grid: (tasks, tiles of RANKS ranks). `inputs` is even.
extern "C" __global__ void __launch_bounds__(SHRINK_THREADS)
lora_shrink(const float* x, const Task* tasks, const uint32_t* rows, int site, int inputs, float* shrunk, int stride) {
    const Task task = tasks[blockIdx.x];
    const Layer layer = task.layer(site);
    const int rank = blockIdx.y * RANKS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (rank >= layer.rank) {
        return;
    }
    const __nv_bfloat162* a = reinterpret_cast<const __nv_bfloat162*>(layer.a + size_t(rank) * inputs);
    const float2* row[ROWS];
    float sum[ROWS];
#pragma unroll
    for (int j = 0; j < ROWS; ++j) {
        row[j] = reinterpret_cast<const float2*>(x + size_t(rows[task.first + min(uint32_t(j), task.count - 1)]) * inputs);
        sum[j] = 0.0f;
    }
    for (int k = lane; k < inputs / 2; k += WARP) {
        const float2 weight = __bfloat1622float2(a[k]);
#pragma unroll
        for (int j = 0; j < ROWS; ++j) {
            if (j < task.count) {
                const float2 value = row[j][k];
                sum[j] = __fmaf_rn(weight.y, value.y, __fmaf_rn(weight.x, value.x, sum[j]));
            }
        }
    }
#pragma unroll
    for (int j = 0; j < ROWS; ++j) {
        if (j < task.count) {
            for (int step = WARP / 2; step > 0; step /= 2) {
                sum[j] = __fadd_rn(sum[j], __shfl_xor_sync(ALL_LANES, sum[j], step));
            }
            if (lane == 0) {
                shrunk[size_t(task.first + j) * stride + rank] = __fmul_rn(layer.scale, sum[j]);
            }
        }
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
    const __nv_bfloat16* b = layer.b + size_t(out / OUT_TILE) * layer.rank * OUT_TILE + out % OUT_TILE;
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
