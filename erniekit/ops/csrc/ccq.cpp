// The nearest codewords of a weight, for given scales: what the encoders of precision/ccq.py repeat while they search
// for scales. arrays/ccq.py is the plain twin.
//
// Both minimise the sum of h (x - scale * v)^2 and give what scales can be fitted from: for each group of 64 rows of a
// column the sums of h x v (`xv`) and of h v v (`vv`), v the codeword's whole numbers. `h` [in] may be null: all one.
// Weights lie transposed, [out, in], for wint2, whose columns are searched one by one; [in, out] for wint2.5.
#include "ccq.h"
#include "tiles.h"

namespace ccq {

typedef int32_t Places __attribute__((vector_size(kLanes * sizeof(int32_t))));

constexpr Size kBytes = 256, kTogether = 2;  // codewords of a column, vectors that are searched side by side

// The 256 codewords of a column as four rows of numbers.
struct Book {
    alignas(64) float value[4][kBytes];
    alignas(64) float half_square[4][kBytes];
    alignas(64) float half_norm[kBytes];

    Book(float code_scale, float code_zp) {
        uint8_t bytes[kBytes];
        float scale[kBytes], zp[kBytes];
        int32_t codes[kBytes];
        for (Size k = 0; k < kBytes; ++k) bytes[k] = k, scale[k] = code_scale, zp[k] = code_zp;
        wint2_codes(bytes, scale, zp, kBytes, codes);
        for (Size k = 0; k < kBytes; ++k) {
            half_norm[k] = 0;
            for (int i = 0; i < 4; ++i) {
                value[i][k] = (codes[k] >> kShifts2[i] & 63) - 32;
                half_square[i][k] = 0.5f * value[i][k] * value[i][k];
                half_norm[k] += half_square[i][k];
            }
        }
    }
};

inline Lanes at(const float* row, Size k) { return *reinterpret_cast<const Lanes*>(row + k); }

// The least of the lanes, the first of equals.
inline Size least_place(Lanes costs, Places places) {
    alignas(64) float cost[kLanes];
    alignas(64) int32_t place[kLanes];
    std::memcpy(cost, &costs, sizeof costs), std::memcpy(place, &places, sizeof places);
    float least = cost[0];
#pragma omp simd reduction(min : least)
    for (Size i = 1; i < kLanes; ++i) least = cost[i] < least ? cost[i] : least;
    int32_t first = kBytes;
#pragma omp simd reduction(min : first)
    for (Size i = 0; i < kLanes; ++i) {
        const int32_t here = cost[i] == least ? place[i] + int32_t(i) : int32_t(kBytes);
        first = here < first ? here : first;
    }
    return first;
}

// The codewords nearest to kTogether vectors y under weights h: least sum of h (v v / 2 - y v), the first of equals.
template <bool weighted>
inline void nearest(const Book& book, const float (*y)[4], const float* h, Size* found) {
    Lanes best[kTogether];
    Places where[kTogether] = {};
    float z[kTogether][4];
    for (Size n = 0; n < kTogether; ++n) {
        best[n] = Lanes{} + std::numeric_limits<float>::infinity();
        for (int i = 0; i < 4; ++i) z[n][i] = weighted ? h[n * 4 + i] * y[n][i] : y[n][i];
    }
    for (Size k = 0; k < kBytes; k += kLanes)
#pragma GCC unroll 4
        for (Size n = 0; n < kTogether; ++n) {
            Lanes cost = weighted ? h[n * 4] * at(book.half_square[0], k) : at(book.half_norm, k);
#pragma GCC unroll 4
            for (int i = 1; weighted && i < 4; ++i) cost += h[n * 4 + i] * at(book.half_square[i], k);
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) cost -= z[n][i] * at(book.value[i], k);
            const Places closer = cost < best[n];
            best[n] = closer ? cost : best[n];
            where[n] = closer ? Places{} + int32_t(k) : where[n];
        }
    for (Size n = 0; n < kTogether; ++n) found[n] = least_place(best[n], where[n]);
}

template <bool weighted>
void wint2_column(const Book& book, const float* x, const float* h, const float* scales, Size stride, Size in,
                  uint8_t* codes, double* xv, double* vv) {
    for (Size group = 0; group < in / kGroup; ++group) {
        const float inverse = 1.0f / scales[group * stride];
        double sum_xv = 0, sum_vv = 0;
        for (Size row = group * kGroup; row < (group + 1) * kGroup; row += 4 * kTogether) {
            float y[kTogether][4];
            Size found[kTogether];
            for (Size i = 0; i < 4 * kTogether; ++i) y[i / 4][i % 4] = x[row + i] * inverse;
            nearest<weighted>(book, y, h + row, found);
            for (Size i = 0; i < 4 * kTogether; ++i) {
                const double v = book.value[i % 4][found[i / 4]], hv = weighted ? h[row + i] * v : v;
                sum_xv += hv * x[row + i], sum_vv += hv * v;
            }
            for (Size n = 0; codes && n < kTogether; ++n) codes[(row / 4 + n) * stride] = found[n];
        }
        xv[group * stride] = sum_xv, vv[group * stride] = sum_vv;
    }
}

// The best windows of blocks that share bits, one block for each lane: from the last window back, the least cost of
// what follows for both values of the bit shared with the window before.
template <int windows>
inline void wint25_block(const Lanes* y, const float* h, Places* v) {
    Lanes rest[2] = {};
    Places choice[windows][2];
    for (int i = windows - 1; i >= 0; --i) {
        Lanes costs[2];
        for (int high = 0; high < 2; ++high)
            for (int low = 0; low < 2; ++low)
                for (int middle = 0; middle < 2; ++middle) {
                    const int value = high * 4 + middle * 2 + low;
                    const Lanes off = y[i] - float(value - 4);
                    const Lanes cost = h[i] * off * off + rest[low];
                    if (!low && !middle) {
                        costs[high] = cost, choice[i][high] = Places{} + value;
                    } else {
                        const Places less = cost < costs[high];
                        costs[high] = less ? cost : costs[high];
                        choice[i][high] = less ? Places{} + value : choice[i][high];
                    }
                }
        rest[0] = costs[0], rest[1] = costs[1];
    }
    Places shared = rest[1] < rest[0];
    for (int i = 0; i < windows; ++i) {
        v[i] = shared ? choice[i][1] : choice[i][0];
        shared = (v[i] & 1) != 0;
    }
}

// One group of kLanes columns.
void wint25_group(const Lanes* x, const float* h, Lanes inverse, Places* v) {
    Lanes y[kGroup];
    for (Size row = 0; row < kGroup; ++row) y[row] = x[row] * inverse;
    for (Size row = 0; row < kGroup - 1; row += 7) {
        wint25_block<3>(y + row, h + row, v + row);
        wint25_block<4>(y + row + 3, h + row + 3, v + row + 3);
    }
    wint25_block<1>(y + kGroup - 1, h + kGroup - 1, v + kGroup - 1);
}

}  // namespace ccq

// `scales`, `xv`, `vv` [in / 64, out]; `codes` [in / 4, out] may be null.
EXPORT void wint2_nearest(const float* x, const float* h, const float* scales, const float* code_scale,
                          const float* code_zp, uint8_t* codes, double* xv, double* vv, Size in, Size out) {
    Threads threads;
#pragma omp parallel for
    for (Size column = 0; column < out; ++column) {
        const ccq::Book book(code_scale[column], code_zp[column]);
        const auto search = h ? ccq::wint2_column<true> : ccq::wint2_column<false>;
        search(book, x + column * in, h, scales + column, out, in, codes ? codes + column : nullptr, xv + column,
               vv + column);
    }
}

// `scales`, `xv`, `vv` [in / 64, out]; `words` [in / 64 * 10, out] may be null, the low bits of each tenth stay zero.
EXPORT void wint25_nearest(const float* x, const float* h, const float* scales, uint16_t* words, double* xv, double* vv,
                           Size in, Size out) {
    Threads threads;
    const std::vector<float> ones(h ? 0 : in, 1.0f);
    const float* weights = h ? h : ones.data();
#pragma omp parallel for collapse(2)
    for (Size group = 0; group < in / ccq::kGroup; ++group)
        for (Size first = 0; first < out; first += kLanes) {
            const Size size = std::min(kLanes, out - first);
            Lanes tile[ccq::kGroup] = {}, inverse = {};
            ccq::Places v[ccq::kGroup];
            for (Size i = 0; i < size; ++i) inverse[i] = 1.0f / scales[group * out + first + i];
            for (Size row = 0; row < ccq::kGroup; ++row)
                std::memcpy(&tile[row], x + (group * ccq::kGroup + row) * out + first, size * sizeof(float));
            const float* h_group = weights + group * ccq::kGroup;
            ccq::wint25_group(tile, h_group, inverse, v);
            double sum_xv[kLanes] = {}, sum_vv[kLanes] = {};
            for (Size row = 0; row < ccq::kGroup; ++row)
                for (Size i = 0; i < kLanes; ++i) {
                    const double value = v[row][i] - 4, weighted = h_group[row] * value;
                    sum_xv[i] += weighted * tile[row][i], sum_vv[i] += weighted * value;
                }
            std::memcpy(xv + group * out + first, sum_xv, size * sizeof(double));
            std::memcpy(vv + group * out + first, sum_vv, size * sizeof(double));
            if (!words) continue;
            for (Size word = 0; word < ccq::kWords; ++word)
                for (Size i = 0; i < size; ++i) {
                    int bits = 0;
                    for (int j = 0; j < (word < ccq::kWords - 1 ? 7 : 1); ++j)
                        bits |= v[word * 7 + j][i] << ccq::kShifts25[j];
                    words[(group * ccq::kWords + word) * out + first + i] = bits;
                }
        }
}
