// The other kernels against sums in double precision: products with frozen matrices, adapters, norms, rotation, the best id.

#include "check.h"

#include "common.cuh"

namespace products {
#include "matmul.cu"
}
namespace adapters {
#include "lora.cu"
}
namespace rowwise {
#include "rows.cu"
}
namespace sampling {
#include "sampling.cu"
}

static float half_at(const uint8_t* from) { return __half2float(*reinterpret_cast<const __half*>(from)); }

// Values of a block as src/blocks.rs says; `head`: bytes before the integers.
template <typename Format>
void plain_values(const uint8_t* block, float* to) {
    constexpr int head = Format::BYTES % 16 == 4 ? 4 : 2;
    const uint8_t* integers = block + head;
    for (int i = 0; i < 32; ++i) {
        if (Format::BYTES == 34) {
            to[i] = half_at(block) * int8_t(integers[i]);
            continue;
        }
        const int q = i < 16 ? integers[i] & 15 : integers[i - 16] >> 4;
        to[i] = head == 4 ? std::fmaf(half_at(block), float(q), half_at(block + 2)) : half_at(block) * (q - 8.0f);
    }
}

template <typename Format>
void frozen_matrices(int outputs, int inputs, const char* what) {
    Random random{3};
    const int blocks = inputs / 32;
    std::vector<uint8_t> bytes(size_t(outputs) * blocks * Format::BYTES);
    std::vector<float> plain(size_t(outputs) * inputs);
    for (int i = 0; i < outputs * blocks; ++i) {
        uint8_t* block = &bytes[size_t(i) * Format::BYTES];
        for (int j = 0; j < Format::BYTES; ++j) block[j] = uint8_t(128 * (random() + 1));
        const __half scales[2] = {{_Float16(0.02f + 0.01f * random())}, {_Float16(-0.1f)}};
        std::memcpy(block, scales, Format::BYTES % 16 == 4 ? 4 : 2);
        plain_values<Format>(block, &plain[size_t(i) * 32]);
    }
    const std::vector<float> x = random.values(size_t(64) * inputs);
    std::vector<float> before;
    for (int rows : {1, 8, 9, 17}) {
        std::vector<float> y(size_t(rows) * outputs, NAN);
        const int few = rows <= 8, out_tile = few ? 16 : 32;
        emulation::launch({(outputs + out_tile - 1) / out_tile, 1, 1}, products::WARPS * WARP, [&] {
            if (few) products::matmul<Format, 1, 1>(bytes.data(), x.data(), y.data(), rows, outputs, inputs);
            else products::matmul<Format, 2, 8>(bytes.data(), x.data(), y.data(), rows, outputs, inputs);
        });
        Difference difference;
        for (int i = 0; i < rows * outputs; ++i) {
            double sum = 0;
            for (int k = 0; k < inputs; ++k) sum += double(x[i / outputs * inputs + k]) * plain[i % outputs * inputs + k];
            difference.add(y[i], sum);
        }
        expect_below(difference.relative(), 1e-3, what);
        expect(same(before.data(), y.data(), before.size()), "the same bits for any number of rows");
        before = y;
    }
    const uint32_t ids[] = {0, uint32_t(outputs) - 1, 7};
    std::vector<float> embedded(3 * inputs, NAN);
    emulation::launch({3, 1, 1}, 256, [&] { products::embed<Format>(bytes.data(), ids, embedded.data(), inputs); });
    for (int i = 0; i < 3; ++i) expect(same(&embedded[i * inputs], &plain[ids[i] * inputs], inputs), "exact embeddings");
}

// One adapter on the host: A [rank][in], B [out / 16][rank][16].
struct Adapter {
    int rank;
    std::vector<__nv_bfloat16> a, b;

    Adapter(int rank, int inputs, int outputs, Random& random)
        : rank(rank), a(inputs * rank), b((outputs + 15) / 16 * 16 * rank) {
        for (auto* values : {&a, &b}) {
            for (auto& value : *values) {
                const float x = random();
                uint32_t bits;
                std::memcpy(&bits, &x, 4);
                value.bits = bits >> 16;
            }
        }
    }

    adapters::Layer layer() const { return {a.data(), b.data(), uint32_t(rank), 0.5f}; }
};

void batched_adapters(int inputs, int outputs) {
    Random random{9};
    std::vector<Adapter> all;
    for (int rank : {1, 8, 40, 16}) all.emplace_back(rank, inputs, outputs, random);
    std::vector<adapters::Layer> layers;
    for (const Adapter& adapter : all) layers.push_back(adapter.layer());
    layers.push_back({});  // leaves the layer alone
    const int rows = 40, stride = 40;
    const auto adapter_of = [](int row) { return row == 0 ? -1 : row < 12 ? 2 : row * 7 % 5; };
    const std::vector<float> x = random.values(rows * inputs), y = random.values(rows * outputs);
    const auto run = [&](auto takes_part) {
        std::vector<uint32_t> list;
        std::vector<adapters::Task> tasks;
        for (int adapter = 0; adapter < 5; ++adapter) {
            const size_t start = list.size();
            for (int row = 0; row < rows; ++row) {
                if (adapter_of(row) == adapter && takes_part(row)) list.push_back(row);
            }
            const uint64_t address = reinterpret_cast<uint64_t>(&layers[adapter]);
            for (size_t first = start; first < list.size(); first += adapters::ROWS) {
                const uint32_t count = min(list.size() - first, size_t(adapters::ROWS));
                tasks.push_back({uint32_t(address), uint32_t(address >> 32), uint32_t(first), count});
            }
        }
        std::vector<float> shrunk(list.size() * stride, NAN), out = y;
        emulation::launch({int(tasks.size()), (stride + adapters::RANKS - 1) / adapters::RANKS, 1}, adapters::SHRINK_THREADS, [&] {
            adapters::lora_shrink(x.data(), tasks.data(), list.data(), 0, inputs, shrunk.data(), stride);
        });
        emulation::launch({int(tasks.size()), (outputs + 255) / 256, 1}, adapters::EXPAND_THREADS, [&] {
            adapters::lora_expand(shrunk.data(), tasks.data(), list.data(), 0, outputs, out.data(), stride);
        });
        return out;
    };
    const std::vector<float> out = run([](int) { return true; });
    Difference difference;
    for (int row = 0; row < rows; ++row) {
        for (int o = 0; o < outputs; ++o) {
            double sum = y[row * outputs + o];
            const int of = adapter_of(row);
            for (int r = 0; of >= 0 && of < 4 && r < all[of].rank; ++r) {
                const Adapter& adapter = all[of];
                double shrunk = 0;
                for (int k = 0; k < inputs; ++k) shrunk += double(adapter.a[r * inputs + k]) * x[row * inputs + k];
                sum += 0.5 * shrunk * adapter.b[(o / 16 * adapter.rank + r) * 16 + o % 16];
            }
            difference.add(out[row * outputs + o], sum);
        }
    }
    expect_below(difference.relative(), 1e-5, "adapters of ranks 1, 8, 40 and 16");
    expect(same(out.data(), y.data(), outputs), "a row of the base keeps its bits");
    const std::vector<float> alone = run([](int row) { return row == 5; });
    expect(same(&alone[5 * outputs], &out[5 * outputs], outputs), "a row alone has the bits it has in the batch");
}

void norm() {
    Random random{4};
    const int width = 576, rows = 3;
    const std::vector<float> x = random.values(rows * width), weight = random.values(width);
    std::vector<float> out(rows * width, NAN);
    emulation::launch({rows, 1, 1}, rowwise::NORM_THREADS, [&] {
        rowwise::rms_norm(x.data(), weight.data(), out.data(), width, 1e-5f);
    });
    Difference difference;
    for (int i = 0; i < rows * width; ++i) {
        double squares = 0;
        for (int k = 0; k < width; ++k) squares += double(x[i / width * width + k]) * x[i / width * width + k];
        difference.add(out[i], x[i] / std::sqrt(squares / width + 1e-5) * weight[i % width]);
    }
    expect_below(difference.relative(), 1e-6, "norm");
}

void gates() {
    Random random{4};
    const unsigned quads = 300;
    std::vector<float> gate = random.values(4 * quads), up = random.values(4 * quads);
    for (float& x : gate) x *= 8;
    std::vector<float> silu = gate, gelu = gate;
    const auto quad = [](std::vector<float>& x) { return reinterpret_cast<float4*>(x.data()); };
    emulation::launch({2, 1, 1}, 256, [&] { rowwise::swiglu(quad(silu), quad(up), quads); });
    emulation::launch({2, 1, 1}, 256, [&] { rowwise::geglu(quad(gelu), quad(up), quads); });
    Difference of_silu, of_gelu;
    for (unsigned i = 0; i < 4 * quads; ++i) {
        const double x = gate[i];
        of_silu.add(silu[i], x / (1 + std::exp(-x)) * up[i]);
        of_gelu.add(gelu[i], 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x))) * up[i]);
    }
    expect_below(of_silu.relative(), 1e-6, "silu(gate) * up");
    expect_below(of_gelu.relative(), 1e-6, "gelu(gate) * up");
}

// `half`: half of what turns of a head.
void rotation(int half, bool scaled, const char* what) {
    Random random{4};
    const int heads = 9, kv_heads = 3, dim = 64, rows = 3, width = dim * heads, kv_width = dim * kv_heads;
    std::vector<float> q = random.values(rows * width), k = random.values(rows * kv_width), v = random.values(rows * kv_width);
    v[0] = 1e6f;
    v[1] = NAN;
    const std::vector<float> cos = random.values(100 * half), sin = random.values(100 * half), factors = random.values(100), before = q;
    std::vector<__half> keys(50 * kv_width), values(50 * kv_width);
    const uint32_t positions[] = {5, 99, 0}, slots[] = {7, 49, 0};
    emulation::launch({rows, 1, 1}, 256, [&] {
        rowwise::rotate_and_store(q.data(), k.data(), v.data(), keys.data(), values.data(), cos.data(), sin.data(),
                                  scaled ? factors.data() : nullptr, positions, slots, heads, kv_heads, dim, half);
    });
    Difference turned, stored;
    const auto turn = [&](const std::vector<float>& x, int row, int width, int i) -> double {
        const int within = i % dim;
        if (within >= 2 * half) return x[row * width + i];
        const int angle = positions[row] * half + within % half, low = row * width + i / dim * dim + within % half;
        const double a = x[low], b = x[low + half], c = cos[angle], s = sin[angle];
        return within < half ? a * c - b * s : b * c + a * s;
    };
    for (int row = 0; row < rows; ++row) {
        const double factor = scaled ? factors[positions[row]] : 1.0;
        for (int i = 0; i < width; ++i) turned.add(q[row * width + i], factor * turn(before, row, width, i));
        for (int i = 0; i < kv_width; ++i) {
            stored.add(__half2float(keys[slots[row] * kv_width + i]), turn(k, row, kv_width, i));
            if (row > 0 || i > 1) stored.add(__half2float(values[slots[row] * kv_width + i]), v[row * kv_width + i]);
        }
    }
    expect_below(turned.relative(), 1e-6, what);
    expect_below(stored.relative(), 1e-3, "keys and values as stored");
    const __half* first = &values[7 * kv_width];
    expect(__half2float(first[0]) == LARGEST_HALF && isnan(__half2float(first[1])), "what overflows is clamped, what is broken stays so");
}

void best_ids() {
    const int vocab = 5000;
    std::vector<float> logits = Random{4}.values(5 * vocab);
    logits[777] = logits[4000] = 2;
    logits[vocab + 4800] = 3;
    logits[2 * vocab + 5] = NAN;
    logits[3 * vocab + 5] = INFINITY;
    std::fill(&logits[4 * vocab], &logits[4 * vocab] + vocab, -INFINITY);
    sampling::Best best[5];
    emulation::launch({5, 1, 1}, sampling::THREADS, [&] { sampling::best(logits.data(), vocab, best); });
    expect(best[0].id == 777 && best[1].id == 4800, "the lowest of the best ids");
    for (int i = 2; i < 5; ++i) expect(best[i].id == sampling::NONE && isnan(best[i].logprob), "no id where a row is broken");
    double sum = 0;
    for (int i = 0; i < vocab; ++i) sum += std::exp(double(logits[i]));
    expect_below(std::fabs(best[0].logprob - (2 - std::log(sum))), 1e-5, "its log-probability");
}

int main() {
    frozen_matrices<products::Q4_0>(40, 576, "Q4_0");
    frozen_matrices<products::Q4_1>(70, 576, "Q4_1");
    frozen_matrices<products::Q8_0>(65, 1536, "Q8_0");
    batched_adapters(576, 200);
    batched_adapters(64, 33);
    norm();
    gates();
    rotation(32, false, "turned q");
    rotation(24, true, "q turned in part and scaled");
    rotation(0, false, "q as it is");
    best_ids();
    return failures;
}
