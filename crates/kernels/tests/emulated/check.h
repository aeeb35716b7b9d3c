// What the checks share: random values, and the comparison with a sum in double precision.
#pragma once

#include "emulation.h"

// Values in [-1, 1), a function of the seed.
struct Random {
    uint32_t state;
    float operator()() {
        state = state * 1664525u + 1013904223u;
        return float(int32_t(state)) / 2147483648.0f;
    }
    std::vector<float> values(size_t count) {
        std::vector<float> values(count);
        for (float& x : values) x = (*this)();
        return values;
    }
};

// |x - y| / |y|, term by term.
struct Difference {
    double apart = 0, size = 0;
    void add(double x, double y) {
        apart += (x - y) * (x - y);
        size += y * y;
    }
    double relative() const { return std::sqrt(apart / size); }
};

inline int failures = 0;

inline void expect(bool holds, const char* what) {
    std::printf("%s: %s\n", holds ? "ok" : "FAILED", what);
    failures += !holds;
}

inline void expect_below(double value, double most, const char* what) {
    std::printf("%s: %s, %.1e, at most %.0e\n", value <= most ? "ok" : "FAILED", what, value, most);
    failures += !(value <= most);
}

// Whether `count` values have the same bits.
inline bool same(const float* a, const float* b, size_t count) { return std::memcmp(a, b, count * sizeof *a) == 0; }
