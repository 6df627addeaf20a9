// What every kernel shares: threads, the wheel's matrix products, and an exponential that compilers vectorise.
//
// All matrices are fp32 and row-major; products may read theirs rounded to bf16, and sum in fp32 all the same. Kernels know pointers and sizes, nothing of Paddle. Results do not depend on
// the number of threads except through the matrix product, and never on timing: work is split into fixed blocks and
// every sum has a fixed order.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <utility>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

using Size = int64_t;

// dnnl_sgemm: row-major c = alpha * op(a) op(b) + beta * c.
using Sgemm = int (*)(char, char, Size, Size, Size, float, const float*, Size, const float*, Size, float, float*, Size);

// dnnl_gemm_bf16bf16f32: the same with a and b in bf16; null where the processor has no instruction for it.
using HalfGemm = int (*)(char, char, Size, Size, Size, float, const uint16_t*, Size, const uint16_t*, Size, float,
                         float*, Size);

struct Settings {
    Sgemm sgemm = nullptr;
    HalfGemm half_gemm = nullptr;
    int threads = 1;
};
inline Settings settings;

// Threads while a kernel runs. Outside, OpenMP's default stays what the process chose (docs/performance.md).
class Threads {
public:
    Threads() : before_(omp_get_max_threads()) { omp_set_num_threads(settings.threads); }
    ~Threads() { omp_set_num_threads(before_); }
    Threads(const Threads&) = delete;

private:
    int before_;
};

// Memory that starts where a cache line does: vectors that straddle two lines cost twice.
template <typename T>
struct LineAllocator {
    using value_type = T;
    static constexpr std::align_val_t line{64};
    LineAllocator() = default;
    template <typename U>
    LineAllocator(const LineAllocator<U>&) {}
    T* allocate(size_t size) { return static_cast<T*>(::operator new(size * sizeof(T), line)); }
    void deallocate(T* data, size_t) { ::operator delete(data, line); }
    // A vector's new elements stay what the memory holds: buffers are written before they are read.
    template <typename U>
    void construct(U*) {}
    template <typename U, typename... Args>
    void construct(U* at, Args&&... args) {
        ::new (at) U(std::forward<Args>(args)...);
    }
    bool operator==(const LineAllocator&) const { return true; }
    bool operator!=(const LineAllocator&) const { return false; }
};
using Buffer = std::vector<float, LineAllocator<float>>;

// The nearest bf16, to even from the middle; NaN stays NaN.
inline uint16_t rounded(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const uint32_t near = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : near;
}

// A matrix as a product reads it, perhaps the transpose of what lies there.
struct View {
    const float* data;
    const uint16_t* halves;  // null: fp32
    Size stride, rows, columns;
    char turned = 'N';

    // Some columns of a matrix that is not turned.
    View columns_from(Size first, Size size) const {
        return {data + first, halves ? halves + first : nullptr, stride, rows, size};
    }
};

// A contiguous matrix for any number of products; rounded once, if it is to be rounded.
class Operand {
public:
    Operand(const float* data, Size rows, Size columns, bool bf16) : data_(data), rows_(rows), columns_(columns) {
        if (!bf16) return;
        halves_.resize(rows * columns);
        uint16_t* out = halves_.data();
#pragma omp parallel for simd
        for (Size i = 0; i < rows * columns; ++i) out[i] = rounded(data[i]);
    }
    operator View() const { return {data_, halves(), columns_, rows_, columns_}; }
    View transposed() const { return {data_, halves(), columns_, columns_, rows_, 'T'}; }

private:
    const uint16_t* halves() const { return halves_.empty() ? nullptr : halves_.data(); }
    const float* data_;
    Size rows_, columns_;
    std::vector<uint16_t, LineAllocator<uint16_t>> halves_;
};

// c = a b + beta * c; `stride` numbers from one row of c to the next, 0: contiguous.
inline void matmul(View a, View b, float* c, float beta = 0, Size stride = 0) {
    const Size m = a.rows, n = b.columns, k = a.columns;
    stride = stride ? stride : n;
    if (!m || !n) return;
    if (!k && !beta) std::fill_n(c, m * n, 0.0f);
    if (!k) return;
    if (a.halves)
        settings.half_gemm(a.turned, b.turned, m, n, k, 1.0f, a.halves, a.stride, b.halves, b.stride, beta, c,
                           stride);
    else
        settings.sgemm(a.turned, b.turned, m, n, k, 1.0f, a.data, a.stride, b.data, b.stride, beta, c, stride);
}

// e^x for x <= 0 within one unit in the last place; 0 below -87; NaN stays NaN.
inline float exponential(float x) {
    const float shifter = 12582912.0f;  // 1.5 * 2^23: adding it rounds, and leaves the integer in the lowest bits
    const float shifted = x * 1.44269504f + shifter;
    const float whole = shifted - shifter;
    const float rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    float power = 1.3814540579915047e-3f;
    power = power * rest + 8.36874544620514e-3f;
    power = power * rest + 4.166838899254799e-2f;
    power = power * rest + 1.666652113199234e-1f;
    power = power * rest + 4.999999403953552e-1f;
    power = power * rest + 1.0f;
    power = power * rest + 1.0f;
    uint32_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = (bits + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return x < -87.0f ? 0.0f : power * scale;
}

// The greatest of `start` and the values. (With std::max, compilers leave the loop scalar.)
inline float greatest(const float* values, Size size, float start) {
    float top = start;
#pragma omp simd reduction(max : top)
    for (Size i = 0; i < size; ++i) top = values[i] > top ? values[i] : top;
    return top;
}

inline float sigmoid(float x) {
    const float small = exponential(-std::fabs(x));
    return (x < 0 ? small : 1.0f) / (1.0f + small);
}
