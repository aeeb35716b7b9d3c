// What most requests need of a row of logits, so that only this leaves the device: the best id and its log-probability.

#include "common.cuh"

constexpr int THREADS = 512;

struct Best {
    uint32_t id;  // the lowest among the largest; NONE where a logit is not a number or the largest is not finite
    float logprob;
};
constexpr uint32_t NONE = 0xffffffffu;

// One block a row. The exponentials are summed in double precision: by thread, then as in block_sum.
extern "C" __global__ void __launch_bounds__(THREADS) best(const float* logits, int vocab, Best* out) {
    __shared__ float tops[THREADS / WARP];
    __shared__ uint32_t ids[THREADS / WARP];
    __shared__ double sums[THREADS / WARP];
    const float* row = logits + size_t(blockIdx.x) * vocab;
    float top = -INFINITY;
    uint32_t id = NONE;
    bool broken = false;
    for (int i = threadIdx.x; i < vocab; i += THREADS) {
        broken |= isnan(row[i]);
        if (row[i] > top) {
            top = row[i];
            id = i;
        }
    }
    const auto take = [&](float other, uint32_t other_id) {
        if (other > top || (other == top && other_id < id)) {
            top = other;
            id = other_id;
        }
    };
    for (int step = WARP / 2; step > 0; step /= 2) {
        const float other = __shfl_xor_sync(ALL_LANES, top, step);
        take(other, __shfl_xor_sync(ALL_LANES, id, step));
    }
    if (threadIdx.x % WARP == 0) {
        tops[threadIdx.x / WARP] = top;
        ids[threadIdx.x / WARP] = id;
    }
    broken = __syncthreads_or(broken);
    for (int warp = 0; warp < THREADS / WARP; ++warp) {
        take(tops[warp], ids[warp]);
    }
    if (broken || !isfinite(top)) {
        if (threadIdx.x == 0) {
            out[blockIdx.x] = {NONE, NAN};
        }
        return;
    }
    double sum = 0.0;
    for (int i = threadIdx.x; i < vocab; i += THREADS) {
        sum += double(expf(row[i] - top));
    }
    sum = block_sum(sum, sums);
    if (threadIdx.x == 0) {
        out[blockIdx.x] = {id, float(-log(sum))};
    }
}
