// Products with weights kept in few bits: back to fp32 block by block, and multiplied.
//
// A weight [in, out] is level(code) * scale. int8 codes are levels themselves, [in, out]. 4-bit codes number the levels
// of a table; two rows share a row of bytes, [ceil(in / 2), out], the even row in the low half. E4M3 codes are the bits
// of such numbers, [in, out]. Scales are [groups, out], for in / groups inputs each. The convolutional codes lie as
// arrays/ccq.py says. Weights of experts are stacked; rows of x come sorted by expert.
#include "ccq.h"

namespace {

enum Kind : Size { kInt8, kInt4, kNormalFloat, kE4M3, kWint2, kWint25 };

// Quantiles of the normal distribution, exact at -1, 0 and 1 (arXiv 2305.14314, appendix E).
constexpr float kQuantiles[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
    -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
    0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

// Numbers that are dense at a time: for few rows a block stays in a core's cache, for many it feeds the product.
constexpr Size kFew = 1 << 18, kMany = 1 << 22, kManyRows = 32;

struct Packed {
    const uint8_t* codes;
    const float* scales;
    Size in, out, groups, kind;

    bool convolutional() const { return kind >= kWint2; }
    Size code_bytes() const {
        if (kind == kWint2) return (in / 4 + (in + 127) / 128) * out;
        if (kind == kWint25) return in / ccq::kGroup * ccq::kWords * 2 * out;
        return (kind == kInt8 || kind == kE4M3 ? in : (in + 1) / 2) * out;
    }
    Packed expert(Size e) const {
        Packed one = *this;
        one.codes += e * code_bytes(), one.scales += e * groups * out;
        return one;
    }
    Size block_rows(Size rows) const {
        const Size least = convolutional() ? ccq::kGroup : 1;  // rows that cannot be told apart
        return std::max((rows >= kManyRows ? kMany : kFew) / out / least, Size(1)) * least;
    }
};

// The number of E4M3 bits: exponent and fraction moved to where fp32 has them, times 2^(127 - 7). Subnormals come out
// right by themselves; 0x7F and 0xFF, which are NaN, are never written.
inline float e4m3(uint8_t code) {
    const uint32_t bits = uint32_t(code & 0x80) << 24 | uint32_t(code & 0x7F) << 20;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value * 0x1p120f;
}

// w = rows [first, last) of the dense weight.
void make_dense(const Packed& p, Size first, Size last, float* w) {
    if (p.kind == kWint2) return ccq::wint2_dense(p.codes, p.scales, p.in, p.out, first, last, w);
    if (p.kind == kWint25) return ccq::wint25_dense(p.codes, p.scales, p.out, first, last, w);
#pragma omp parallel for
    for (Size row = first; row < last; ++row) {
        const float* scale = p.scales + row * p.groups / p.in * p.out;
        float* out = w + (row - first) * p.out;
        if (p.kind == kInt8) {
            const int8_t* code = reinterpret_cast<const int8_t*>(p.codes) + row * p.out;
#pragma omp simd
            for (Size i = 0; i < p.out; ++i) out[i] = code[i] * scale[i];
            continue;
        }
        if (p.kind == kE4M3) {
            const uint8_t* code = p.codes + row * p.out;
#pragma omp simd
            for (Size i = 0; i < p.out; ++i) out[i] = e4m3(code[i]) * scale[i];
            continue;
        }
        const uint8_t* pair = p.codes + row / 2 * p.out;
        const int shift = row % 2 * 4;
        if (p.kind == kInt4) {
#pragma omp simd
            for (Size i = 0; i < p.out; ++i) out[i] = ((pair[i] >> shift & 15) - 8) * scale[i];
        } else {
#pragma omp simd
            for (Size i = 0; i < p.out; ++i) out[i] = kQuantiles[pair[i] >> shift & 15] * scale[i];
        }
    }
}

// work(first number of rows, number of rows, weight) for each expert that has rows.
template <typename Work>
void for_experts(const Packed& all, const int64_t* counts, Size num_experts, Work work) {
    for (Size e = 0, start = 0; e < num_experts; start += counts[e++])
        if (counts[e]) work(start, counts[e], all.expert(e));
}

}  // namespace

EXPORT void unpack(const uint8_t* codes, const float* scales, float* out, Size num_in, Size num_out, Size groups,
                   Size kind) {
    Threads threads;
    make_dense({codes, scales, num_in, num_out, groups, kind}, 0, num_in, out);
}

// y = x @ weight_e of each expert's rows.
EXPORT void packed_forward(const float* x, const int64_t* counts, const uint8_t* codes, const float* scales, float* y,
                           Size num_experts, Size num_in, Size num_out, Size groups, Size kind, Size bf16) {
    Threads threads;
    Buffer dense;
    for_experts({codes, scales, num_in, num_out, groups, kind}, counts, num_experts,
                [&](Size start, Size rows, const Packed& p) {
        const Operand left(x + start * num_in, rows, num_in, bf16);
        const Size step = p.block_rows(rows);
        for (Size first = 0; first < num_in; first += step) {
            const Size size = std::min(step, num_in - first);
            dense.resize(size * num_out);
            make_dense(p, first, first + size, dense.data());
            matmul(View(left).columns_from(first, size), Operand(dense.data(), size, num_out, bf16),
                   y + start * num_out, first ? 1.0f : 0.0f);
        }
    });
}

// grad_x = grad @ weight_e^T of each expert's rows.
EXPORT void packed_backward(const float* grad, const int64_t* counts, const uint8_t* codes, const float* scales,
                            float* grad_x, Size num_experts, Size num_in, Size num_out, Size groups, Size kind,
                            Size bf16) {
    Threads threads;
    Buffer dense;
    for_experts({codes, scales, num_in, num_out, groups, kind}, counts, num_experts,
                [&](Size start, Size rows, const Packed& p) {
        const Operand left(grad + start * num_out, rows, num_out, bf16);
        const Size step = p.block_rows(rows);
        for (Size first = 0; first < num_in; first += step) {
            const Size size = std::min(step, num_in - first);
            dense.resize(size * num_out);
            make_dense(p, first, first + size, dense.data());
            matmul(left, Operand(dense.data(), size, num_out, bf16).transposed(), grad_x + start * num_in + first,
                   0.0f, num_in);
        }
    });
}
