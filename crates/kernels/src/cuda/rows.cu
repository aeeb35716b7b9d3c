// Row-wise arithmetic in float32: norm, gated activations, the choice of rows; and rotation with the write into the KV cache.

#include "common.cuh"

constexpr int NORM_THREADS = 256;

// out = x / rms(x) * weight. One block a row.
extern "C" __global__ void __launch_bounds__(NORM_THREADS)
rms_norm(const float* x, const float* weight, float* out, int width, float eps) {
    __shared__ float scratch[NORM_THREADS / WARP];
    const float* row = x + size_t(blockIdx.x) * width;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < width; i += NORM_THREADS) {
        sum = __fmaf_rn(row[i], row[i], sum);
    }
    const float scale = 1.0f / sqrtf(block_sum(sum, scratch) / width + eps);
    for (int i = threadIdx.x; i < width; i += NORM_THREADS) {
        out[size_t(blockIdx.x) * width + i] = row[i] * scale * weight[i];
    }
}

// gate = activation(gate) * up, four values a thread.
template <typename Activation>
__device__ inline void gated(float4* gate, const float4* up, unsigned quads, Activation activation) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= quads) {
        return;
    }
    const float4 g = gate[i], u = up[i];
    gate[i] = make_float4(activation(g.x) * u.x, activation(g.y) * u.y, activation(g.z) * u.z, activation(g.w) * u.w);
}

// gate = silu(gate) * up.
extern "C" __global__ void swiglu(float4* gate, const float4* up, unsigned quads) {
    gated(gate, up, quads, [](float x) { return x / (1.0f + expf(-x)); });
}

// gate = gelu(gate) * up, by the approximation with tanh: (1 + tanh(u)) / 2 is the sigmoid of 2 u.
extern "C" __global__ void geglu(float4* gate, const float4* up, unsigned quads) {
    gated(gate, up, quads, [](float x) { return x / (1.0f + expf(-1.5957692f * x * (1.0f + 0.044715f * x * x))); });
}

// x += y, four values a thread.
extern "C" __global__ void add(float4* x, const float4* y, unsigned quads) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= quads) {
        return;
    }
    const float4 a = x[i], b = y[i];
    x[i] = make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// out[i] = x[rows[i]]. One block a row.
extern "C" __global__ void gather(const float* x, const uint32_t* rows, float* out, int width) {
    const float* row = x + size_t(rows[blockIdx.x]) * width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        out[size_t(blockIdx.x) * width + i] = row[i];
    }
}

// Rotates q in its place, scales it by its position's factor, and writes rotated keys and values in half precision to the rows' slots.
// One block a row; `half` is half of what turns of a head of `dim` values: value i turns with value i + half (Hugging Face's order), the
// rest stay. Nothing turns where `half` is 0, and nothing is scaled where `factors` is null.
extern "C" __global__ void rotate_and_store(
    float* q, const float* k, const float* v, __half* keys, __half* values, const float* cos, const float* sin, const float* factors,
    const uint32_t* positions, const uint32_t* slots, int heads, int kv_heads, int dim, int half
) {
    const size_t row = blockIdx.x, slot = slots[row];
    const int kv_width = kv_heads * dim;
    const float factor = factors ? factors[positions[row]] : 1.0f;
    cos += size_t(positions[row]) * half;
    sin += size_t(positions[row]) * half;
    q += row * heads * dim;
    k += row * kv_width;
    v += row * kv_width;
    keys += slot * kv_width;
    values += slot * kv_width;
    for (int i = threadIdx.x; i < (heads + kv_heads) * half; i += blockDim.x) {
        const bool is_key = i >= heads * half;
        const int pair = is_key ? i - heads * half : i;
        const int low = pair / half * dim + pair % half, high = low + half;
        const float c = cos[pair % half], s = sin[pair % half];
        const float* from = is_key ? k : q;
        const float a = from[low], b = from[high];
        const float turned_low = a * c - b * s, turned_high = b * c + a * s;
        if (is_key) {
            keys[low] = to_half(turned_low);
            keys[high] = to_half(turned_high);
        } else {
            q[low] = turned_low * factor;
            q[high] = turned_high * factor;
        }
    }
    const int still = dim - 2 * half;
    for (int i = threadIdx.x; i < (heads + kv_heads) * still; i += blockDim.x) {
        const bool is_key = i >= heads * still;
        const int value = is_key ? i - heads * still : i;
        const int place = value / still * dim + 2 * half + value % still;
        if (is_key) {
            keys[place] = to_half(k[place]);
        } else {
            q[place] *= factor;
        }
    }
    for (int i = threadIdx.x; i < kv_width; i += blockDim.x) {
        values[i] = to_half(v[i]);
    }
}
