// Rotations of every 32 neighbours by Sylvester's Hadamard matrix, not normalised, along rows or along columns.
#include "tiles.h"

namespace {

constexpr Size kSize = 32, kHadamardVectors = kSize / kLanes;

// Every lane's partner is `step` lanes away; of the two, the lower gets the sum and the upper the difference.
template <int kStep>
inline Lanes rotate_lanes(Lanes x) {
    typedef int32_t Places __attribute__((vector_size(sizeof(Lanes))));
    Places partner;
    Lanes sign;
    for (int i = 0; i < kLanes; ++i) partner[i] = i ^ kStep, sign[i] = i & kStep ? -1.0f : 1.0f;
    return __builtin_shuffle(x, partner) + sign * x;
}

inline void rotate_block(const float* x, float* y) {
    Lanes v[kHadamardVectors];
    for (Size i = 0; i < kHadamardVectors; ++i) {
        v[i] = reinterpret_cast<const Lanes*>(x)[i];
        v[i] = rotate_lanes<4>(rotate_lanes<2>(rotate_lanes<1>(v[i])));
        if (kLanes == 16) v[i] = rotate_lanes<8 % kLanes>(v[i]);
    }
    for (Size step = 1; step < kHadamardVectors; step *= 2)
        for (Size i = 0; i < kHadamardVectors; ++i)
            if (!(i & step)) {
                const Lanes low = v[i], high = v[i + step];
                v[i] = low + high, v[i + step] = low - high;
            }
    for (Size i = 0; i < kHadamardVectors; ++i) reinterpret_cast<Lanes*>(y)[i] = v[i];
}

}  // namespace

// Every 32 neighbours of a row.
EXPORT void rotate(const float* x, float* y, Size blocks) {
    Threads threads;
#pragma omp parallel for
    for (Size b = 0; b < blocks; ++b) rotate_block(x + b * kSize, y + b * kSize);
}

// Every 32 neighbours of a column; `blocks` times 32 rows.
EXPORT void rotate_columns(const float* x, float* y, Size blocks, Size columns) {
    Threads threads;
#pragma omp parallel for
    for (Size b = 0; b < blocks; ++b) {
        const float* in = x + b * kSize * columns;
        float* out = y + b * kSize * columns;
        for (Size step = 1; step < kSize; step *= 2, in = out)
            for (Size r = 0; r < kSize; ++r) {
                if (r & step) continue;
                const float *low = in + r * columns, *high = low + step * columns;
                float *sum = out + r * columns, *difference = sum + step * columns;
#pragma omp simd
                for (Size c = 0; c < columns; ++c) {
                    const float one = low[c], other = high[c];
                    sum[c] = one + other, difference[c] = one - other;
                }
            }
    }
}
