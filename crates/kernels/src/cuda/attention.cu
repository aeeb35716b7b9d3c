// Causal grouped-query attention over the paged cache in half precision, on the tensor cores, softmax online in float32 (Milakov &
// Gimelshein 2018; Dao 2023).
//
// A sequence's queries of one KV head are numbered row by row: query m is head m % group of row m / group. A warp takes 16 of them and a
// partition of 256 positions, aligned to the absolute position, in tiles of 64 keys; partitions are merged in their order. Short spans
// (decoding) have a block a partition and merge afterwards (`combine`), long ones merge as they go: the same operations in the same
// order, and no operation of the tensor cores mixes two queries. So a query's bits depend on its own sequence alone. What lies before a
// window's first position is never read: it may be another sequence's by now.

#include "common.cuh"

constexpr int QUERIES = 16;
constexpr int TILE = 64;
constexpr int PARTITION = 256;

struct Sequence {
    uint32_t first_row;
    uint32_t rows;
    uint32_t start;  // the first row's position
    uint32_t table;  // where its blocks begin in the list of blocks
};

struct Task {
    uint32_t sequence;
    uint32_t first;  // query
    uint32_t partial;  // where its partitions begin among the partial results, for a split task
};

// How a layer attends. `scale`: of the products; with a cap they are what tanh takes, else exponents of 2. `cap`: what tanh(product) is
// multiplied with to be an exponent of 2, 0 for none. `window`: how many positions a query sees, its own included.
struct Form {
    float scale;
    float cap;
    int window;

    // The first position that a query sees.
    __device__ int from(int position) const { return max(position - window + 1, 0); }
};

struct Cache {
    const __half* keys;
    const __half* values;
    const uint32_t* blocks;
    int block_tokens;
};

__device__ inline uint32_t pack(float low, float high) {
    const __half2 pair = __halves2half2(to_half(low), to_half(high));
    return *reinterpret_cast<const uint32_t*>(&pair);
}

// What a maximum's terms count for under a larger one; nothing where there are none yet.
__device__ inline float weight_under(float top, float larger) {
    return top == -INFINITY ? 0.0f : exp2f(top - larger);
}

// x of one partition after what came before it.
__device__ inline float merged(float before, float weight_before, float x, float weight) {
    return __fadd_rn(__fmul_rn(before, weight_before), __fmul_rn(x, weight));
}

// The softmax of two queries of a lane (rows lane / 4 and lane / 4 + 8 of its warp's 16): largest score, sum, weighted values.
template <int DIM>
struct Softmax {
    float top[2], sum[2];
    float values[DIM / 8][4];

    __device__ void clear() {
        top[0] = top[1] = -INFINITY;
        sum[0] = sum[1] = 0.0f;
#pragma unroll
        for (int i = 0; i < DIM / 8; ++i) {
            values[i][0] = values[i][1] = values[i][2] = values[i][3] = 0.0f;
        }
    }

    __device__ void merge(const Softmax& next) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float larger = fmaxf(top[i], next.top[i]);
            const float before = weight_under(top[i], larger), weight = weight_under(next.top[i], larger);
            sum[i] = merged(sum[i], before, next.sum[i], weight);
#pragma unroll
            for (int j = 0; j < DIM / 8; ++j) {
                values[j][2 * i] = merged(values[j][2 * i], before, next.values[j][2 * i], weight);
                values[j][2 * i + 1] = merged(values[j][2 * i + 1], before, next.values[j][2 * i + 1], weight);
            }
            top[i] = larger;
        }
    }
};

template <int DIM>
constexpr int PITCH = DIM + 8;  // halves; the padding spreads a column over the banks

// Starts to copy the keys and values of TILE positions; before `start` and beyond `end` there are zeros, whatever the cache holds there.
template <int DIM, int WARPS>
__device__ void fetch(
    __half* keys, __half* values, const Cache& cache, int position, int start, int end, int kv_heads, int kv_head
) {
    constexpr int OWN = TILE / WARPS, PIECES = DIM / 8, AT_ONCE = WARP / PIECES;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    uint32_t slots[(OWN + WARP - 1) / WARP];
#pragma unroll
    for (int i = 0; i < (OWN + WARP - 1) / WARP; ++i) {
        const int p = min(max(position + warp * OWN + i * WARP + lane, start), end - 1);
        slots[i] = cache.blocks[p / cache.block_tokens] * cache.block_tokens + p % cache.block_tokens;
    }
#pragma unroll
    for (int i = 0; i < OWN / AT_ONCE; ++i) {
        const int own = i * AT_ONCE + lane / PIECES, piece = lane % PIECES * 8;
        const uint32_t slot = __shfl_sync(ALL_LANES, slots[i * AT_ONCE / WARP], own % WARP);
        const size_t place = (size_t(slot) * kv_heads + kv_head) * DIM + piece;
        const int key = warp * OWN + own;
        const bool real = position + key >= start && position + key < end;
        copy_16_bytes(keys + key * PITCH<DIM> + piece, cache.keys + place, real);
        copy_16_bytes(values + key * PITCH<DIM> + piece, cache.values + place, real);
    }
}

// Takes a tile of keys, the first at `position`, into a partition. `seen`: the positions of the lane's two queries, -1 for none.
template <int DIM>
__device__ void attend(
    Softmax<DIM>& state, const uint32_t (&q)[DIM / 16][4], const __half* keys, const __half* values, int position, const int (&seen)[2],
    const Form& form
) {
    const int lane = threadIdx.x % WARP, quad = lane % 4;
    float scores[TILE / 8][4] = {};
#pragma unroll
    for (int n = 0; n < TILE / 8; ++n) {
#pragma unroll
        for (int d = 0; d < DIM / 32; ++d) {
            uint32_t k[4];  // of 8 keys, 32 dimensions
            load_matrices(k, keys + (n * 8 + lane % 8) * PITCH<DIM> + d * 32 + lane / 8 * 8);
            multiply_halves(scores[n], q[2 * d], k[0], k[1]);
            multiply_halves(scores[n], q[2 * d + 1], k[2], k[3]);
        }
    }
    float top[2] = {state.top[0], state.top[1]};
#pragma unroll
    for (int n = 0; n < TILE / 8; ++n) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            if (form.cap > 0.0f) {
                scores[n][j] = form.cap * tanhf(scores[n][j]);
            }
            const int key = position + n * 8 + quad * 2 + j % 2;
            if (key > seen[j / 2] || key < form.from(seen[j / 2])) {
                scores[n][j] = -INFINITY;
            }
            top[j / 2] = fmaxf(top[j / 2], scores[n][j]);
        }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        top[i] = fmaxf(top[i], __shfl_xor_sync(ALL_LANES, top[i], 1));
        top[i] = fmaxf(top[i], __shfl_xor_sync(ALL_LANES, top[i], 2));
        const float before = weight_under(state.top[i], top[i]);
        state.top[i] = top[i];
        state.sum[i] = __fmul_rn(state.sum[i], before);
#pragma unroll
        for (int j = 0; j < DIM / 8; ++j) {
            state.values[j][2 * i] = __fmul_rn(state.values[j][2 * i], before);
            state.values[j][2 * i + 1] = __fmul_rn(state.values[j][2 * i + 1], before);
        }
    }
    float sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (int n = 0; n < TILE / 8; ++n) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            // A query that sees none of these keys has no largest score; its weights are 0, not a difference of infinities.
            const float largest = top[j / 2] == -INFINITY ? 0.0f : top[j / 2];
            scores[n][j] = exp2f(__fsub_rn(scores[n][j], largest));
            sum[j / 2] = __fadd_rn(sum[j / 2], scores[n][j]);
        }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        sum[i] = __fadd_rn(sum[i], __shfl_xor_sync(ALL_LANES, sum[i], 1));
        sum[i] = __fadd_rn(sum[i], __shfl_xor_sync(ALL_LANES, sum[i], 2));
        state.sum[i] = __fadd_rn(state.sum[i], sum[i]);
    }
#pragma unroll
    for (int k = 0; k < TILE / 16; ++k) {
        const uint32_t weights[4] = {
            pack(scores[2 * k][0], scores[2 * k][1]), pack(scores[2 * k][2], scores[2 * k][3]),
            pack(scores[2 * k + 1][0], scores[2 * k + 1][1]), pack(scores[2 * k + 1][2], scores[2 * k + 1][3]),
        };
#pragma unroll
        for (int d = 0; d < DIM / 16; ++d) {
            uint32_t v[4];  // of 16 keys, 16 dimensions
            load_matrices_transposed(v, values + (k * 16 + lane % 16) * PITCH<DIM> + d * 16 + lane / 16 * 8);
            multiply_halves(state.values[2 * d], weights, v[0], v[1]);
            multiply_halves(state.values[2 * d + 1], weights, v[2], v[3]);
        }
    }
}

// The warp's 16 queries, scaled, in the order in which the tensor cores take them.
template <int DIM>
__device__ void load_queries(
    uint32_t (&to)[DIM / 16][4], const float* q, const Sequence& sequence, const int (&query)[2], int queries, int group, int heads,
    int kv_head, float scale
) {
    const int quad = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const bool real = query[i] < queries;
        const size_t row = sequence.first_row + (real ? query[i] / group : 0);
        const float* from = q + (row * heads + kv_head * group + query[i] % group) * DIM + quad * 2;
#pragma unroll
        for (int d = 0; d < DIM / 16; ++d) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const float2 pair = real ? *reinterpret_cast<const float2*>(from + d * 16 + j * 8) : make_float2(0.0f, 0.0f);
                to[d][2 * j + i] = pack(pair.x * scale, pair.y * scale);
            }
        }
    }
}

// grid: (tasks, KV heads, partitions of the longest sequence if SPLIT). A task is WARPS * 16 queries of one sequence. SPLIT writes each
// partition's largest scores, sums and values to `out`, [partition of a task][KV head][16][DIM + 2]; else `out` is [rows][heads * DIM].
template <int DIM, int WARPS, bool SPLIT>
__device__ void attention(
    const float* q, Cache cache, float* out, const Task* tasks, const Sequence* sequences, int heads, int kv_heads, Form form
) {
    DYNAMIC_SHARED(__half, tiles);  // [2 stages][keys, values][TILE][PITCH]
    constexpr int PLANE = TILE * PITCH<DIM>;
    const Task task = tasks[blockIdx.x];
    const Sequence sequence = sequences[task.sequence];
    const int kv_head = blockIdx.y, group = heads / kv_heads, queries = sequence.rows * group;
    // Every query of the block sees less than this.
    const int last = min(int(task.first) + WARPS * QUERIES, queries) - 1;
    const int visible = sequence.start + last / group + 1;
    // None of them sees what lies before.
    const int start = form.from(sequence.start + task.first / group);
    const int begin = SPLIT ? blockIdx.z * PARTITION : start / PARTITION * PARTITION;
    const int end = SPLIT ? min(begin + PARTITION, visible) : visible;
    if (begin >= end || begin + PARTITION <= start) {
        return;
    }
    cache.blocks += sequence.table;

    const int lane = threadIdx.x % WARP, quad = lane % 4;
    const int first = task.first + threadIdx.x / WARP * QUERIES + lane / 4;
    const int query[2] = {first, first + 8};
    int seen[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        seen[i] = query[i] < queries ? int(sequence.start) + query[i] / group : -1;
    }
    uint32_t scaled[DIM / 16][4];
    load_queries<DIM>(scaled, q, sequence, query, queries, group, heads, kv_head, form.scale);

    Softmax<DIM> total, partition;
    total.clear();
    partition.clear();
    const auto fetch_tile = [&](int position, int stage) {
        if (position < end && position + TILE > start) {
            __half* keys = tiles + stage * 2 * PLANE;
            fetch<DIM, WARPS>(keys, keys + PLANE, cache, position, start, end, kv_heads, kv_head);
        }
        commit_copies();
    };
    fetch_tile(begin, 0);
    int stage = 0;
    for (int position = begin; position < end; position += TILE) {
        fetch_tile(position + TILE, 1 - stage);
        await_copies<1>();
        __syncthreads();
        const __half* keys = tiles + stage * 2 * PLANE;
        if (position + TILE > start) {
            attend<DIM>(partition, scaled, keys, keys + PLANE, position, seen, form);
        }
        __syncthreads();  // before the stage is written again
        stage = 1 - stage;
        if (!SPLIT && ((position + TILE) % PARTITION == 0 || position + TILE >= end)) {
            total.merge(partition);
            partition.clear();
        }
    }

#pragma unroll
    for (int i = 0; i < 2; ++i) {
        if (query[i] >= queries) {
            continue;
        }
        if (SPLIT) {
            const size_t place = (size_t(task.partial + blockIdx.z) * kv_heads + kv_head) * QUERIES + lane / 4 + 8 * i;
            float* to = out + place * (DIM + 2);
            if (quad == 0) {
                to[0] = partition.top[i];
                to[1] = partition.sum[i];
            }
#pragma unroll
            for (int j = 0; j < DIM / 8; ++j) {
                *reinterpret_cast<float2*>(to + 2 + j * 8 + quad * 2) = make_float2(partition.values[j][2 * i], partition.values[j][2 * i + 1]);
            }
        } else {
            const size_t row = sequence.first_row + query[i] / group;
            float* to = out + (row * heads + kv_head * group + query[i] % group) * DIM;
#pragma unroll
            for (int j = 0; j < DIM / 8; ++j) {
                *reinterpret_cast<float2*>(to + j * 8 + quad * 2) = make_float2(
                    __fdiv_rn(total.values[j][2 * i], total.sum[i]), __fdiv_rn(total.values[j][2 * i + 1], total.sum[i])
                );
            }
        }
    }
}

// Merges the partitions of split tasks as `attention` does those of long ones. grid: (tasks, KV heads, 16); a thread a dimension.
template <int DIM>
__device__ void combine(
    const float* partial, float* out, const Task* tasks, const Sequence* sequences, int heads, int kv_heads, Form form
) {
    const Task task = tasks[blockIdx.x];
    const Sequence sequence = sequences[task.sequence];
    const int kv_head = blockIdx.y, group = heads / kv_heads, query = task.first + blockIdx.z;
    if (query >= sequence.rows * group) {
        return;
    }
    const int position = sequence.start + query / group;
    float top = -INFINITY, sum = 0.0f, value = 0.0f;
    for (int i = form.from(position) / PARTITION; i <= position / PARTITION; ++i) {
        const float* next = partial + ((size_t(task.partial + i) * kv_heads + kv_head) * QUERIES + blockIdx.z) * (DIM + 2);
        const float larger = fmaxf(top, next[0]);
        const float before = weight_under(top, larger), weight = weight_under(next[0], larger);
        sum = merged(sum, before, next[1], weight);
        value = merged(value, before, next[2 + threadIdx.x], weight);
        top = larger;
    }
    const size_t row = sequence.first_row + query / group;
    out[(row * heads + kv_head * group + query % group) * DIM + threadIdx.x] = __fdiv_rn(value, sum);
}

#define ATTENTION(name, dim, warps, split) \
    extern "C" __global__ void __launch_bounds__(warps * WARP) name( \
        const float* q, const __half* keys, const __half* values, const uint32_t* blocks, int block_tokens, float* out, \
        const Task* tasks, const Sequence* sequences, int heads, int kv_heads, float scale, float cap, int window \
    ) { \
        const Cache cache{keys, values, blocks, block_tokens}; \
        attention<dim, warps, split>(q, cache, out, tasks, sequences, heads, kv_heads, {scale, cap, window}); \
    }

#define COMBINE(name, dim) \
    extern "C" __global__ void __launch_bounds__(dim) name( \
        const float* partial, float* out, const Task* tasks, const Sequence* sequences, int heads, int kv_heads, int window \
    ) { \
        combine<dim>(partial, out, tasks, sequences, heads, kv_heads, {0.0f, 0.0f, window}); \
    }

ATTENTION(attention_short_64, 64, 1, true)
ATTENTION(attention_short_128, 128, 1, true)
ATTENTION(attention_long_64, 64, 4, false)
ATTENTION(attention_long_128, 128, 4, false)
COMBINE(combine_64, 64)
COMBINE(combine_128, 128)
