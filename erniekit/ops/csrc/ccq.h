// Weights in convolutional code back to fp32; arrays/ccq.py says how they lie, and is the plain twin.
#pragma once

#include "common.h"

namespace ccq {

constexpr Size kGroup = 64, kWords = 10;  // rows with the same local scale, and words of wint2.5 for them
constexpr int kShifts2[4] = {9, 6, 3, 0}, kShifts25[7] = {13, 11, 9, 6, 4, 2, 0};

// The code that a byte stands for. The product is rounded before the sum, as numpy does and the formula says: a compiler
// that fuses the two finds another code where the sum lies close to a whole number.
__attribute__((noinline, optimize("fp-contract=off"))) inline void wint2_codes(const uint8_t* bytes,
                                                                              const float* code_scale,
                                                                              const float* code_zp, Size size,
                                                                              int32_t* codes) {
#pragma omp simd
    for (Size i = 0; i < size; ++i) codes[i] = int32_t(std::floor(bytes[i] * code_scale[i] + code_zp[i] + 0.5f));
}

// w = rows [first, last) of a weight; both are multiples of kGroup.
inline void wint2_dense(const uint8_t* bytes, const float* scales, Size in, Size out, Size first, Size last, float* w) {
    const uint8_t* local_scales = bytes + in / 4 * out;
#pragma omp parallel
    {
        std::vector<int32_t> codes(out);
#pragma omp for
        for (Size quad = first / 4; quad < last / 4; ++quad) {
            const Size group = quad * 4 / kGroup;
            const uint8_t* local = local_scales + group / 2 * out;
            const int half = (group + 1) % 2 * 4;
            wint2_codes(bytes + quad * out, scales, scales + out, out, codes.data());
            float* rows = w + (quad * 4 - first) * out;
            for (int window = 0; window < 4; ++window, rows += out) {
                const int shift = kShifts2[window];
#pragma omp simd
                for (Size i = 0; i < out; ++i)
                    rows[i] = ((codes[i] >> shift & 63) - 32) * ((local[i] >> half & 15) * scales[2 * out + i]);
            }
        }
    }
}

// w = rows [first, last) of a weight; both are multiples of kGroup.
inline void wint25_dense(const uint8_t* bytes, const float* super, Size out, Size first, Size last, float* w) {
    const uint16_t* words = reinterpret_cast<const uint16_t*>(bytes);
#pragma omp parallel for
    for (Size row = first / kGroup * kWords; row < last / kGroup * kWords; ++row) {
        const Size group = row / kWords, number = row % kWords;
        const uint16_t *word = words + row * out, *tenth = words + (group * kWords + kWords - 1) * out;
        float* rows = w + (group * kGroup - first + number * 7) * out;
        const int windows = number < kWords - 1 ? 7 : 1;
        for (int window = 0; window < windows; ++window, rows += out) {
            const int shift = kShifts25[window];
#pragma omp simd
            for (Size i = 0; i < out; ++i)
                rows[i] = ((word[i] >> shift & 7) - 4) * ((tenth[i] & 0x1fff) * super[i]);
        }
    }
}

}  // namespace ccq
