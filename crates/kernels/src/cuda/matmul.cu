// The frozen matrices: y = x W^T, and the exact values of some rows.
//
// y = x W^T for a matrix in its file's block format, on the tensor cores in tf32: neither weights nor activations are rounded to
// fewer than 11 bits, and a row's bits depend on that row alone. A block takes some outputs and rows; its warps take every fourth block of
// 32 inputs each, in order, and their sums are added in the warps' order, whatever the number of rows.

#include "common.cuh"

constexpr int WARPS = 4;
constexpr int INPUTS = 32;  // of a block of weights

__device__ inline float half_at(const uint8_t* block, int at) {
    return __half2float(*reinterpret_cast<const __half*>(block + at));
}

// The eight bytes at `from`, which lies at an even address.
__device__ inline void load_bytes(const uint8_t* from, uint8_t (&to)[8]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint16_t pair = reinterpret_cast<const uint16_t*>(from)[i];
        to[2 * i] = pair & 255;
        to[2 * i + 1] = pair >> 8;
    }
}

// The formats: BYTES of a block, and its values 8 * part to 8 * part + 7.
struct Q4_0 {
    static constexpr int BYTES = 18;
    __device__ static void values(const uint8_t* block, int part, float (&to)[8]) {
        uint8_t bytes[8];
        load_bytes(block + 2 + part % 2 * 8, bytes);
        const float d = half_at(block, 0);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            to[i] = d * (float(bytes[i] >> part / 2 * 4 & 15) - 8.0f);
        }
    }
};

struct Q4_1 {
    static constexpr int BYTES = 20;
    __device__ static void values(const uint8_t* block, int part, float (&to)[8]) {
        uint8_t bytes[8];
        load_bytes(block + 4 + part % 2 * 8, bytes);
        const float d = half_at(block, 0), m = half_at(block, 2);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            to[i] = __fmaf_rn(d, float(bytes[i] >> part / 2 * 4 & 15), m);
        }
    }
};

struct Q8_0 {
    static constexpr int BYTES = 34;
    __device__ static void values(const uint8_t* block, int part, float (&to)[8]) {
        uint8_t bytes[8];
        load_bytes(block + 2 + part * 8, bytes);
        const float d = half_at(block, 0);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            to[i] = d * float(int8_t(bytes[i]));
        }
    }
};

// grid: (tiles of 16 * OUT_TILES outputs, tiles of 8 * ROW_TILES rows). Of a block of 32 inputs, lane i % 4 holds the eight from
// 8 * (i % 4) on: a sum does not mind in which order the tensor cores are told of its terms.
template <typename Format, int OUT_TILES, int ROW_TILES>
__device__ void matmul(const uint8_t* weights, const float* x, float* y, int rows, int outputs, int inputs) {
    __shared__ float sums[WARPS][ROW_TILES * 8][OUT_TILES * 16 + 4];  // the padding spreads a column over the banks
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, part = lane % 4;
    const int first_out = blockIdx.x * OUT_TILES * 16, first_row = blockIdx.y * ROW_TILES * 8;
    const int blocks = inputs / INPUTS;
    float sum[OUT_TILES][ROW_TILES][4] = {};
    for (int block = warp; block < blocks; block += WARPS) {
        uint32_t w[OUT_TILES][2][8];
#pragma unroll
        for (int i = 0; i < 2 * OUT_TILES; ++i) {
            const int out = min(first_out + i * 8 + lane / 4, outputs - 1);
            float values[8];
            Format::values(weights + (size_t(out) * blocks + block) * Format::BYTES, part, values);
#pragma unroll
            for (int k = 0; k < 8; ++k) {
                w[i / 2][i % 2][k] = to_tf32(values[k]);
            }
        }
#pragma unroll
        for (int n = 0; n < ROW_TILES; ++n) {
            const int row = min(first_row + n * 8 + lane / 4, rows - 1);
            const float4* from = reinterpret_cast<const float4*>(x + size_t(row) * inputs + block * INPUTS + part * 8);
            const float4 low = from[0], high = from[1];
            const uint32_t b[8] = {
                to_tf32(low.x), to_tf32(low.y), to_tf32(low.z), to_tf32(low.w),
                to_tf32(high.x), to_tf32(high.y), to_tf32(high.z), to_tf32(high.w),
            };
#pragma unroll
            for (int k = 0; k < 8; k += 2) {
#pragma unroll
                for (int m = 0; m < OUT_TILES; ++m) {
                    const uint32_t a[4] = {w[m][0][k], w[m][1][k], w[m][0][k + 1], w[m][1][k + 1]};
                    multiply_tf32(sum[m][n], a, b[k], b[k + 1]);
                }
            }
        }
    }
#pragma unroll
    for (int m = 0; m < OUT_TILES; ++m) {
#pragma unroll
        for (int n = 0; n < ROW_TILES; ++n) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                sums[warp][n * 8 + part * 2 + j % 2][m * 16 + lane / 4 + j / 2 * 8] = sum[m][n][j];
            }
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < ROW_TILES * 8 * OUT_TILES * 16; i += WARPS * WARP) {
        const int row = i / (OUT_TILES * 16), out = i % (OUT_TILES * 16);
        if (first_row + row < rows && first_out + out < outputs) {
            float total = sums[0][row][out];
#pragma unroll
            for (int from = 1; from < WARPS; ++from) {
                total = __fadd_rn(total, sums[from][row][out]);
            }
            y[size_t(first_row + row) * outputs + first_out + out] = total;
        }
    }
}

// out[i] = the exact values of row ids[i]. One block a row, eight values a thread.
template <typename Format>
__device__ void embed(const uint8_t* weights, const uint32_t* ids, float* out, int width) {
    const uint8_t* row = weights + size_t(ids[blockIdx.x]) * (width / INPUTS) * Format::BYTES;
    for (int i = threadIdx.x; i < width / 8; i += blockDim.x) {
        float values[8];
        Format::values(row + i / 4 * Format::BYTES, i % 4, values);
        float4* to = reinterpret_cast<float4*>(out + size_t(blockIdx.x) * width + i * 8);
        to[0] = make_float4(values[0], values[1], values[2], values[3]);
        to[1] = make_float4(values[4], values[5], values[6], values[7]);
    }
}

#define EMBED(name, format) \
    extern "C" __global__ void name(const uint8_t* weights, const uint32_t* ids, float* out, int width) { \
        embed<format>(weights, ids, out, width); \
    }

#define MATMUL(name, format, out_tiles, row_tiles) \
    extern "C" __global__ void __launch_bounds__(WARPS * WARP) \
    name(const uint8_t* weights, const float* x, float* y, int rows, int outputs, int inputs) { \
        matmul<format, out_tiles, row_tiles>(weights, x, y, rows, outputs, inputs); \
    }

MATMUL(matmul_few_q4_0, Q4_0, 1, 1)
MATMUL(matmul_few_q4_1, Q4_1, 1, 1)
MATMUL(matmul_few_q8_0, Q8_0, 1, 1)
MATMUL(matmul_many_q4_0, Q4_0, 2, 8)
MATMUL(matmul_many_q4_1, Q4_1, 2, 8)
MATMUL(matmul_many_q8_0, Q8_0, 2, 8)
EMBED(embed_q4_0, Q4_0)
EMBED(embed_q4_1, Q4_1)
EMBED(embed_q8_0, Q8_0)
