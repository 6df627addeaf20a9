// Matrices in FP8: codes of one byte, and an fp32 scale for every block of `high` rows and `wide` columns.
//
// Rows come in parts, `counts` of them: the matrices of a stack, or the rows of each expert. Blocks of several rows begin
// anew with every part; the scales of all parts lie one below the other. How scales are made: ops/arrays/float8.py.
#include "common.h"

namespace {

template <int kMantissa, int kBias>
struct Format {
    static constexpr int kShift = 23 - kMantissa;  // from a mantissa of fp32 to one of ours
    static constexpr int kTop = kMantissa == 3 ? 8 : 15;
    static constexpr float kLargest = 1.75f * (1 << kTop);
    static constexpr uint32_t kRebias = (127 - kBias) << kMantissa;
    static constexpr float kLeast = 1.0f / (1 << (kBias - 1));                          // normal
    static constexpr float kSpacing = kLeast / (1 << kMantissa);                        // of subnormals
    static constexpr float kShifter = kSpacing * (1 << 23);                             // adding it rounds to kSpacing
    static constexpr uint32_t kNan = kMantissa == 3 ? 0x7f : 0x7d, kInfinity = kMantissa == 3 ? 0x80 : 0x7c;
};
using E4M3 = Format<3, 7>;
using E5M2 = Format<2, 15>;

inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// The nearest code of a finite number, to even from the middle; numbers beyond the format get its largest.
template <typename F>
inline uint8_t encode(float x) {
    const uint32_t sign = bits_of(x) >> 24 & 0x80;
    const float size = std::fabs(x), within = size < F::kLargest ? size : F::kLargest;
    const uint32_t bits = bits_of(within);
    const uint32_t normal = ((bits + (1u << (F::kShift - 1)) - 1 + (bits >> F::kShift & 1)) >> F::kShift) - F::kRebias;
    const uint32_t small = bits_of(within + F::kShifter) - bits_of(F::kShifter);
    return sign | (within < F::kLeast ? small : normal);
}

template <typename F>
inline float decode(uint8_t code) {
    const uint32_t size = code & 0x7f;
    const float normal = float_of((size + F::kRebias) << F::kShift), small = size * F::kSpacing;
    float x = size < (1u << (23 - F::kShift)) ? small : normal;
    x = size == F::kInfinity ? std::numeric_limits<float>::infinity() : x;
    x = size >= F::kNan ? std::numeric_limits<float>::quiet_NaN() : x;
    return code & 0x80 ? -x : x;
}

constexpr uint32_t kInfinityBits = 0x7f800000;

// The nearest bf16 number, to even from the middle; NaN stays NaN. All in 32 bits, which compilers vectorise.
inline float bf16_number(float x) {
    const uint32_t bits = bits_of(x), near = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
    return float_of((bits & 0x7fffffff) > kInfinityBits ? 0x7fc00000 : near);
}

// The bits of a magnitude order as it does, and all that is not finite comes last.
inline uint32_t magnitude(float x) { return bits_of(x) & 0x7fffffff; }

// The exponent of the smallest power of two by which a largest magnitude fits into the format.
template <typename F>
inline int32_t exponent_for(uint32_t top) {
    const int32_t exponent = int32_t(top >> 23) - 127 - F::kTop + ((top & 0x7fffff) > 0x600000);
    const int32_t normal = exponent < -126 ? -126 : exponent;
    return top ? normal : 0;
}

inline float power(int32_t exponent) { return float_of(uint32_t(exponent + 127) << 23); }

struct Strip {
    Size first, rows, scale;  // its first row of numbers, how many, and its first row of scales
};

// Rows that share scales, or a number of them that each have their own.
std::vector<Strip> strips_of(const int64_t* counts, Size parts, Size high, Size most) {
    std::vector<Strip> strips;
    Size first = 0, scale = 0;
    for (Size part = 0; part < parts; ++part)
        for (const Size end = first + counts[part]; first < end;) {
            const Size block = std::min(high == 1 ? most : high, end - first), begin = first;
            for (; first < begin + block; first += most)
                strips.push_back({first, std::min(most, begin + block - first), high == 1 ? first : scale});
            first = begin + block;
            ++scale;
        }
    return strips;
}

constexpr Size kStripRows = 64, kAll = Size(1) << 60;

// One row whose groups of `wide` neighbours have scales of their own. Returns the largest magnitude.
template <typename F>
uint32_t quantise_row(const float* x, uint8_t* codes, float* scales, Size columns, Size wide) {
    uint32_t worst = 0;
    for (Size begin = 0; begin < columns; begin += wide) {
        const Size end = std::min(begin + wide, columns);
        uint32_t top = 0;
#pragma omp simd reduction(max : top)
        for (Size c = begin; c < end; ++c) top = magnitude(x[c]) > top ? magnitude(x[c]) : top;
        const int32_t exponent = exponent_for<F>(top);
        const float inverse = power(-exponent);
        *scales++ = power(exponent);
        worst = std::max(worst, top);
#pragma omp simd
        for (Size c = begin; c < end; ++c) codes[c] = encode<F>(x[c] * inverse);
    }
    return worst;
}

// Some columns of rows that share scales; x has a stride of its own.
template <typename F>
uint32_t quantise_tile(const float* x, Size stride, Size rows, Size columns, Size wide, uint8_t* codes,
                       Size code_stride, float* scales) {
    std::vector<uint32_t> top(columns, 0);
    Buffer inverse(columns);
    for (Size r = 0; r < rows; ++r)
#pragma omp simd
        for (Size c = 0; c < columns; ++c)
            top[c] = magnitude(x[r * stride + c]) > top[c] ? magnitude(x[r * stride + c]) : top[c];
    uint32_t worst = 0;
    for (Size begin = 0; wide > 1 && begin < columns; begin += wide) {
        const auto last = top.begin() + std::min(begin + wide, columns);
        std::fill(top.begin() + begin, last, *std::max_element(top.begin() + begin, last));
    }
#pragma omp simd reduction(max : worst)
    for (Size c = 0; c < columns; ++c) {
        inverse[c] = power(-exponent_for<F>(top[c]));
        worst = top[c] > worst ? top[c] : worst;
    }
    for (Size c = 0; c < columns; c += wide) scales[c / wide] = 1.0f / inverse[c];
    for (Size r = 0; r < rows; ++r)
#pragma omp simd
        for (Size c = 0; c < columns; ++c) codes[r * code_stride + c] = encode<F>(x[r * stride + c] * inverse[c]);
    return worst;
}

// A whole matrix with one scale, perhaps a given one.
template <typename F>
uint32_t quantise_whole(const float* x, const float* given, uint8_t* codes, float* scale, Size size) {
    uint32_t top = 0;
#pragma omp parallel for simd reduction(max : top)
    for (Size i = 0; i < size; ++i) top = magnitude(x[i]) > top ? magnitude(x[i]) : top;
    const float divisor = given ? *given : power(exponent_for<F>(top));
    *scale = divisor;
#pragma omp parallel for simd
    for (Size i = 0; i < size; ++i) codes[i] = encode<F>(x[i] / divisor);
    return top;
}

template <typename F>
void dense_row(const uint8_t* codes, const float* scales, float* out, Size columns, Size wide) {
    if (wide == 1) {
#pragma omp simd
        for (Size c = 0; c < columns; ++c) out[c] = decode<F>(codes[c]) * scales[c];
        return;
    }
    for (Size begin = 0; begin < columns; begin += wide) {
        const Size end = std::min(begin + wide, columns);
        const float scale = *scales++;
#pragma omp simd
        for (Size c = begin; c < end; ++c) out[c] = decode<F>(codes[c]) * scale;
    }
}

// Columns that a thread works on at a time: as many rows of them as share a scale stay in its cache.
Size tile_width(Size wide) { return std::max(Size(256) / wide, Size(1)) * wide; }

template <typename F>
uint32_t quantise_all(const float* x, const float* given, const int64_t* counts, uint8_t* codes, float* scales,
                      Size parts, Size columns, Size high, Size wide, bool whole) {
    const Size groups = (columns + wide - 1) / wide, tile = tile_width(wide), tiles = (columns + tile - 1) / tile;
    uint32_t worst = 0;
    if (whole) {
        for (Size part = 0; part < parts; ++part) {
            const Size size = counts[part] * columns;
            if (!size) continue;
            worst = std::max(worst, quantise_whole<F>(x, given, codes, scales++, size));
            x += size, codes += size, given += given ? 1 : 0;
        }
        return worst;
    }
    const std::vector<Strip> strips = strips_of(counts, parts, high, high == 1 ? kStripRows : kAll);
    if (high == 1) {
#pragma omp parallel for reduction(max : worst)
        for (size_t s = 0; s < strips.size(); ++s)
            for (Size row = strips[s].first; row < strips[s].first + strips[s].rows; ++row)
                worst = std::max(worst, quantise_row<F>(x + row * columns, codes + row * columns,
                                                        scales + row * groups, columns, wide));
        return worst;
    }
#pragma omp parallel for collapse(2) reduction(max : worst)
    for (size_t s = 0; s < strips.size(); ++s)
        for (Size t = 0; t < tiles; ++t) {
            const Size begin = t * tile, at = strips[s].first * columns + begin;
            worst = std::max(worst, quantise_tile<F>(x + at, columns, strips[s].rows, std::min(tile, columns - begin),
                                                     wide, codes + at, columns,
                                                     scales + strips[s].scale * groups + begin / wide));
        }
    return worst;
}

template <typename F>
void dense_all(const uint8_t* codes, const float* scales, const int64_t* counts, float* out, Size parts, Size columns,
               Size high, Size wide) {
    const Size groups = (columns + wide - 1) / wide;
    const std::vector<Strip> strips = strips_of(counts, parts, high, kStripRows);
#pragma omp parallel for
    for (size_t s = 0; s < strips.size(); ++s)
        for (Size r = 0; r < strips[s].rows; ++r) {
            const Size at = (strips[s].first + r) * columns;
            dense_row<F>(codes + at, scales + (strips[s].scale + (high == 1 ? r : 0)) * groups, out + at, columns,
                         wide);
        }
}

}  // namespace

// Returns whether x holds NaN or infinity: then nothing else counts. `whole`: a scale for each part, given or made.
EXPORT Size float8_quantise(const float* x, const float* given, const int64_t* counts, uint8_t* codes, float* scales,
                            Size parts, Size columns, Size high, Size wide, Size whole, Size kind) {
    Threads threads;
    const auto quantise = kind ? quantise_all<E5M2> : quantise_all<E4M3>;
    return quantise(x, given, counts, codes, scales, parts, columns, high, wide, whole) >= kInfinityBits;
}

EXPORT void float8_dense(const uint8_t* codes, const float* scales, const int64_t* counts, float* out, Size parts,
                         Size columns, Size high, Size wide, Size kind) {
    Threads threads;
    (kind ? dense_all<E5M2> : dense_all<E4M3>)(codes, scales, counts, out, parts, columns, high, wide);
}

// x *= the factor of its part, if there is one; then, if `bf16`, the nearest bf16 numbers.
EXPORT void finish_products(float* x, const float* factors, const int64_t* counts, Size parts, Size columns,
                            Size bf16) {
    Threads threads;
    for (Size part = 0; part < parts; ++part) {
        const Size size = counts[part] * columns;
        const float factor = factors ? factors[part] : 1.0f;
        if (bf16) {
#pragma omp parallel for simd
            for (Size i = 0; i < size; ++i) x[i] = bf16_number(x[i] * factor);
        } else {
#pragma omp parallel for simd
            for (Size i = 0; i < size; ++i) x[i] *= factor;
        }
        x += size;
    }
}
