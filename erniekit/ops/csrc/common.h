// What every kernel shares: threads, the wheel's matrix product, and an exponential that compilers vectorise.
//
// All matrices are fp32 and row-major. Kernels know pointers and sizes, nothing of Paddle. Results do not depend on
// the number of threads except through the matrix product, and never on timing: work is split into fixed blocks and
// every sum has a fixed order.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

using Size = int64_t;

// dnnl_sgemm: row-major c = alpha * op(a) op(b) + beta * c.
using Sgemm = int (*)(char, char, Size, Size, Size, float, const float*, Size, const float*, Size, float, float*, Size);

struct Settings {
    Sgemm sgemm = nullptr;
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

struct Operand {
    const float* data;
    Size stride;
    bool transposed = false;
};

inline Operand transposed(const float* data, Size stride) { return {data, stride, true}; }

// c [m, n] = a [m, k] b [k, n] + beta * c. Inside a parallel region it runs on the calling thread alone.
inline void matmul(Operand a, Operand b, float* c, Size c_stride, Size m, Size n, Size k, float beta = 0) {
    if (!m || !n) return;
    if (!k && !beta)
        for (Size i = 0; i < m; ++i) std::fill_n(c + i * c_stride, n, 0.0f);
    if (k)
        settings.sgemm(a.transposed ? 'T' : 'N', b.transposed ? 'T' : 'N', m, n, k, 1.0f, a.data, a.stride, b.data,
                       b.stride, beta, c, c_stride);
}

inline std::unique_ptr<float[]> scratch(Size size) { return std::unique_ptr<float[]>(new float[size]); }

// e^x within 2 units in the last place; 0 below -87, infinity above 88.4; NaN stays NaN.
inline float exponential(float x) {
    const float bounded = x > 89.0f ? 89.0f : x;
    const float shifter = 12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds to an integer
    const float whole = (bounded * 1.44269504f + shifter) - shifter;
    const float rest = bounded - whole * 0.693359375f + whole * 2.12194440e-4f;
    float power = 1.9875691500e-4f;
    power = power * rest + 1.3981999507e-3f;
    power = power * rest + 8.3334519073e-3f;
    power = power * rest + 4.1665795894e-2f;
    power = power * rest + 1.6666665459e-1f;
    power = power * rest + 5.0000001201e-1f;
    power = power * rest * rest + rest + 1.0f;
    const int32_t bits = (static_cast<int32_t>(whole) + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return x < -87.0f ? 0.0f : power * scale;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }
