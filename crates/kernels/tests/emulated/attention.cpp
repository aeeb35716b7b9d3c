// Attention: against sums in double precision, over a cache that holds no numbers where no sequence has written; and the same bits in
// short spans, in long ones and in any batch.

#include "check.h"

#include "attention.cu"

struct Span { int start, rows; };

struct Model {
    int heads, kv_heads, block_tokens;
    float scale = 0.0f, cap = 0.0f;  // 1 / sqrt(DIM) for 0; no cap for 0
    int window = 1 << 20;
};

// All sequences hold the same values. Gives the rows of all spans.
template <int DIM>
std::vector<float> attend(const std::vector<Span>& spans, Model model, double* difference = nullptr) {
    const auto [heads, kv_heads, block_tokens, given_scale, cap, window] = model;
    const float natural = given_scale > 0 ? given_scale : 1 / std::sqrt(float(DIM));
    const Form form{cap > 0 ? natural / cap : natural * float(M_LOG2E), cap * float(M_LOG2E), window};
    const int group = heads / kv_heads, kv_width = kv_heads * DIM, width = heads * DIM, most_blocks = 700 / block_tokens + 1;
    const size_t cached = size_t(most_blocks) * 8 * block_tokens * kv_width;
    std::vector<__half> keys(cached, {_Float16(NAN)}), values = keys;
    std::vector<uint32_t> blocks;
    std::vector<Sequence> sequences;
    std::vector<Task> short_tasks, long_tasks;
    std::vector<float> q;
    std::vector<double> plain_keys, plain_values;
    int rows = 0, partitions = 0, most = 0;
    for (size_t s = 0; s < spans.size(); ++s) {
        const auto [start, count] = spans[s];
        const int end = start + count, queries = count * group;
        sequences.push_back({uint32_t(rows), uint32_t(count), uint32_t(start), uint32_t(blocks.size())});
        for (int i = 0; i * block_tokens < end; ++i) blocks.push_back((most_blocks - 1 - i) * 8 + s);
        Random random{77};
        for (int p = 0; p < end; ++p) {
            const size_t slot = size_t(blocks[sequences[s].table + p / block_tokens]) * block_tokens + p % block_tokens;
            for (int i = 0; i < kv_width; ++i) {
                const __half k{_Float16(2 * random())}, v{_Float16(random())};
                // What no row sees any more may be another sequence's.
                keys[slot * kv_width + i] = p < form.from(start) ? __half{_Float16(NAN)} : k;
                values[slot * kv_width + i] = p < form.from(start) ? __half{_Float16(NAN)} : v;
                if (plain_keys.size() <= size_t(p) * kv_width + i) {
                    plain_keys.push_back(__half2float(k));
                    plain_values.push_back(__half2float(v));
                }
            }
        }
        std::vector<float> all = Random{5}.values(size_t(end) * width);
        q.insert(q.end(), all.begin() + size_t(start) * width, all.end());
        if (queries <= QUERIES) {
            const int own = (end + PARTITION - 1) / PARTITION;
            short_tasks.push_back({uint32_t(s), 0, uint32_t(partitions)});
            partitions += own;
            most = max(most, own);
        } else {
            for (int first = 0; first < queries; first += 4 * QUERIES) long_tasks.push_back({uint32_t(s), uint32_t(first), 0});
        }
        rows += count;
    }
    std::vector<float> out(size_t(rows) * width, NAN), partial(size_t(partitions) * kv_heads * QUERIES * (DIM + 2), NAN);
    const Cache cache{keys.data(), values.data(), blocks.data(), block_tokens};
    emulation::launch({int(short_tasks.size()), kv_heads, most}, WARP, [&] {
        attention<DIM, 1, true>(q.data(), cache, partial.data(), short_tasks.data(), sequences.data(), heads, kv_heads, form);
    });
    emulation::launch({int(short_tasks.size()), kv_heads, QUERIES}, DIM, [&] {
        combine<DIM>(partial.data(), out.data(), short_tasks.data(), sequences.data(), heads, kv_heads, form);
    });
    emulation::launch({int(long_tasks.size()), kv_heads, 1}, 4 * WARP, [&] {
        attention<DIM, 4, false>(q.data(), cache, out.data(), long_tasks.data(), sequences.data(), heads, kv_heads, form);
    });
    if (!difference) return out;

    Difference found;
    for (const Sequence& sequence : sequences) {
        for (uint32_t i = 0; i < sequence.rows * heads; ++i) {
            const int row = i / heads, head = i % heads, seen = sequence.start + row + 1, from = form.from(seen - 1);
            const size_t at = (size_t(sequence.first_row + row) * heads + head) * DIM;
            const auto place = [&](int p, int d) { return (size_t(p) * kv_heads + head / group) * DIM + d; };
            std::vector<double> weights(seen);
            double sum = 0;
            for (int p = from; p < seen; ++p) {
                double score = 0;
                for (int d = 0; d < DIM; ++d) score += q[at + d] * plain_keys[place(p, d)];
                score *= natural;
                if (cap > 0) score = cap * std::tanh(score / cap);
                sum += weights[p] = std::exp(score);
            }
            for (int d = 0; d < DIM; ++d) {
                double value = 0;
                for (int p = from; p < seen; ++p) value += weights[p] / sum * plain_values[place(p, d)];
                found.add(out[at + d], value);
            }
        }
    }
    *difference = found.relative();
    return out;
}

template <int DIM>
void expect_right(const std::vector<Span>& spans, Model model, const char* what) {
    double difference;
    attend<DIM>(spans, model, &difference);
    expect_below(difference, 1e-3, what);
}

int main() {
    expect_right<64>({{0, 1}, {0, 70}, {300, 1}, {250, 30}, {511, 1}}, {9, 3, 16}, "9 heads over 3, one partition and several");
    expect_right<128>({{0, 1}, {0, 20}, {300, 2}, {255, 10}}, {4, 4, 5}, "heads of 128, blocks of 5");
    expect_right<64>({{100, 1}, {250, 3}, {0, 2}}, {20, 1, 32}, "20 heads over 1");
    const Model capped{4, 2, 16, 0.3f, 4.0f}, narrow{6, 3, 4, 0.0f, 0.0f, 100};
    expect_right<64>({{0, 1}, {0, 40}, {300, 1}}, capped, "a scale of its own and a cap");
    expect_right<128>({{0, 1}, {0, 130}, {300, 1}, {250, 30}, {355, 2}}, narrow, "a window");
    const auto slid = attend<64>({{200, 160}}, narrow);
    const auto decoded = attend<64>({{358, 1}, {0, 3}}, narrow);
    expect(same(&decoded[0], &slid[158 * 6 * 64], 6 * 64), "a windowed row has the bits it has in a long span");
    const Model model{9, 3, 16};
    const size_t width = 9 * 64;
    const auto whole = attend<64>({{0, 330}}, model);
    const auto mixed = attend<64>({{329, 1}, {0, 10}, {300, 2}}, model);
    expect(same(&mixed[0], &whole[329 * width], width), "a decoded row has the bits it has in a long span");
    expect(same(&mixed[11 * width], &whole[300 * width], 2 * width), "and in any batch");
    expect(same(attend<64>({{250, 20}}, model).data(), &whole[250 * width], 20 * width), "and in another chunk");
    return failures;
}
