// Products of small matrices that stay in the cache, on the calling thread.
//
// A block of kBlockM x kBlockN results is summed in registers; sizes must be multiples of the block, callers pad.
// Compilers turn the vector type into whatever the processor has: AVX-512, AVX2 or less.
#pragma once

#include "common.h"

#ifdef __AVX512F__
constexpr Size kLanes = 16, kBlockM = 8;
#else
constexpr Size kLanes = 8, kBlockM = 4;
#endif
constexpr Size kVectors = 2, kBlockN = kVectors * kLanes;

typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float)), aligned(alignof(float)), may_alias));

struct Left {  // a(i, p) = data[i * row + p * column]: a matrix or its transpose
    const float* data;
    Size row, column;
};

// c [m, n] = a [m, k] b [k, n], or += if `add`.
inline void tile_matmul(Left a, const float* b, Size b_stride, float* c, Size c_stride, Size m, Size n, Size k,
                        bool add) {
    for (Size j = 0; j < n; j += kBlockN)
        for (Size i = 0; i < m; i += kBlockM) {
            Lanes sums[kBlockM][kVectors] = {};
            const float* left = a.data + i * a.row;
            for (Size p = 0; p < k; ++p) {
                const Lanes* right = reinterpret_cast<const Lanes*>(b + p * b_stride + j);
#pragma GCC unroll 8
                for (Size r = 0; r < kBlockM; ++r)
#pragma GCC unroll 2
                    for (Size v = 0; v < kVectors; ++v) sums[r][v] += left[r * a.row + p * a.column] * right[v];
            }
            for (Size r = 0; r < kBlockM; ++r) {
                Lanes* out = reinterpret_cast<Lanes*>(c + (i + r) * c_stride + j);
                for (Size v = 0; v < kVectors; ++v) out[v] = add ? out[v] + sums[r][v] : sums[r][v];
            }
        }
}
