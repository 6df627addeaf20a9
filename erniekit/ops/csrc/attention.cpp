// Causal attention with rotary positions under column intervals, in tiles: memory O(rows), never rows x rows.
//
// Tensors are [batch, rows, heads, dim]. Column j is seen by the rows j <= i < ends[j]. A tile of scores that nobody may
// see is skipped, so a row of many short documents costs what the documents cost. The forward pass keeps the logarithm of
// every row's softmax sum and the rotated q (scaled by dim^-1/2) and k; backward makes each tile of probabilities again.
#include "common.h"

namespace {

constexpr Size kTileRows = 128, kTileColumns = 128;
constexpr float kHidden = -std::numeric_limits<float>::infinity();
constexpr float kLowest = -1e30f;  // a running maximum must be finite, so that kHidden - maximum stays -infinity

struct Shape {
    Size batch, rows, heads, groups, dim;
    Size q_stride() const { return heads * dim; }
    Size k_stride() const { return groups * dim; }
    Size group(Size head) const { return head * groups / heads; }
};

// Which tiles are seen at all, and which are seen whole: from the least and greatest end in every block of columns.
class Mask {
public:
    Mask(const int32_t* ends, Shape s) : ends_(ends), rows_(s.rows), blocks_((s.rows + kTileColumns - 1) / kTileColumns) {
        for (Size b = 0; b < s.batch; ++b)
            for (Size j = 0; j < rows_; j += kTileColumns) {
                const int32_t *first = ends + b * rows_ + j, *last = ends + b * rows_ + std::min(j + kTileColumns, rows_);
                least_.push_back(*std::min_element(first, last));
                greatest_.push_back(*std::max_element(first, last));
            }
    }
    bool seen(Size b, Size i0, Size i1, Size j0) const { return j0 < i1 && greatest_[block(b, j0)] > i0; }

    // Hides what row i must not see in the scores of the columns j0..j1.
    void apply(float* scores, Size b, Size i0, Size i1, Size j0, Size j1) const {
        if (j1 - 1 <= i0 && least_[block(b, j0)] >= i1) return;
        const int32_t* ends = ends_ + b * rows_;
        for (Size i = i0; i < i1; ++i, scores += kTileColumns)
#pragma omp simd
            for (Size j = j0; j < j1; ++j) scores[j - j0] = (j <= i && i < ends[j]) ? scores[j - j0] : kHidden;
    }

private:
    Size block(Size b, Size j0) const { return b * blocks_ + j0 / kTileColumns; }
    const int32_t* ends_;
    Size rows_, blocks_;
    std::vector<int32_t> least_, greatest_;
};

// out = scale * rotation(in) of every neighbouring pair; a negative `way` turns back. Sums `copies` heads into each.
void rotate(const float* in, float* out, const float* cos, const float* sin, Shape s, Size heads, Size copies, float way,
            float scale) {
    const Size pairs = s.dim / 2;
#pragma omp parallel for
    for (Size row = 0; row < s.batch * s.rows; ++row)
        for (Size head = 0; head < heads; ++head) {
            const float* from = in + (row * heads + head) * copies * s.dim;
            float* to = out + (row * heads + head) * s.dim;
#pragma omp simd
            for (Size j = 0; j < pairs; ++j) {
                float even = from[2 * j], odd = from[2 * j + 1];
                for (Size c = 1; c < copies; ++c) even += from[c * s.dim + 2 * j], odd += from[c * s.dim + 2 * j + 1];
                const float x = cos[row * pairs + j] * scale, y = sin[row * pairs + j] * scale * way;
                to[2 * j] = even * x - odd * y;
                to[2 * j + 1] = odd * x + even * y;
            }
        }
}

// One row of a tile joins the running softmax: scores become exp(score - maximum), earlier output shrinks to match.
void join(float* scores, Size columns, float& maximum, float& sum, float* out, Size dim) {
    float top = maximum, add = 0;
#pragma omp simd reduction(max : top)
    for (Size j = 0; j < columns; ++j) top = std::max(top, scores[j]);
#pragma omp simd reduction(+ : add)
    for (Size j = 0; j < columns; ++j) {
        scores[j] = exponential(scores[j] - top);
        add += scores[j];
    }
    const float shrink = exponential(maximum - top);
#pragma omp simd
    for (Size i = 0; i < dim; ++i) out[i] *= shrink;
    sum = sum * shrink + add;
    maximum = top;
}

// The rows i0..i1 of one head.
void attend(const float* q, const float* k, const float* v, float* out, float* log_sums, const Mask& mask, Shape s, Size b,
            Size i0, Size i1, float* scores) {
    float maxima[kTileRows], sums[kTileRows];
    std::fill_n(maxima, kTileRows, kLowest);
    std::fill_n(sums, kTileRows, 0.0f);
    for (Size i = i0; i < i1; ++i) std::fill_n(out + i * s.q_stride(), s.dim, 0.0f);
    for (Size j0 = 0; j0 < i1; j0 += kTileColumns) {
        if (!mask.seen(b, i0, i1, j0)) continue;
        const Size j1 = std::min({j0 + kTileColumns, s.rows, i1}), columns = j1 - j0;
        matmul({q + i0 * s.q_stride(), s.q_stride()}, transposed(k + j0 * s.k_stride(), s.k_stride()), scores,
               kTileColumns, i1 - i0, columns, s.dim);
        mask.apply(scores, b, i0, i1, j0, j1);
        for (Size i = i0; i < i1; ++i)
            join(scores + (i - i0) * kTileColumns, columns, maxima[i - i0], sums[i - i0], out + i * s.q_stride(), s.dim);
        matmul({scores, kTileColumns}, {v + j0 * s.k_stride(), s.k_stride()}, out + i0 * s.q_stride(), s.q_stride(),
               i1 - i0, s.dim, columns, 1);
    }
    for (Size i = i0; i < i1; ++i) {
        const float sum = sums[i - i0];
        log_sums[i] = sum > 0 ? maxima[i - i0] + std::log(sum) : -kHidden;  // a row that sees nothing gives 0
        const float scale = sum > 0 ? 1.0f / sum : 0.0f;
#pragma omp simd
        for (Size d = 0; d < s.dim; ++d) out[i * s.q_stride() + d] *= scale;
    }
}

}  // namespace

EXPORT void attention_forward(const float* q, const float* k, const float* v, const float* cos, const float* sin,
                              const int32_t* ends, float* q_turned, float* k_turned, float* out, float* log_sums,
                              Size batch, Size rows, Size heads, Size groups, Size dim) {
    Threads threads;
    const Shape s{batch, rows, heads, groups, dim};
    const Mask mask(ends, s);
    rotate(q, q_turned, cos, sin, s, heads, 1, 1.0f, 1.0f / std::sqrt(float(dim)));
    rotate(k, k_turned, cos, sin, s, groups, 1, 1.0f, 1.0f);
    const Size tiles = (rows + kTileRows - 1) / kTileRows;
#pragma omp parallel
    {
        auto scores = scratch(kTileRows * kTileColumns);
#pragma omp for schedule(monotonic : dynamic)
        for (Size task = 0; task < batch * heads * tiles; ++task) {
            const Size b = task / (heads * tiles), h = task / tiles % heads, i0 = task % tiles * kTileRows;
            const Size q_start = b * rows * s.q_stride() + h * dim;
            const Size k_start = b * rows * s.k_stride() + s.group(h) * dim;
            attend(q_turned + q_start, k_turned + k_start, v + k_start, out + q_start, log_sums + (b * heads + h) * rows,
                   mask, s, b, i0, std::min(i0 + kTileRows, rows), scores.get());
        }
    }
}

namespace {

struct Head {  // one head of one row of the batch: where it starts in every tensor
    const float *q, *k, *v, *out, *grad, *log_sums;
    float *grad_q, *grad_k, *grad_v;  // [batch, rows, heads, dim], all three: groups are summed afterwards
};

struct Tiles {
    std::unique_ptr<float[]> probabilities = scratch(kTileRows * kTileColumns);
    std::unique_ptr<float[]> grads = scratch(kTileRows * kTileColumns);
    std::vector<float> deltas;
};

// The gradients of one head: per tile P = exp(scores - log_sum), dS = P (dO V^T - delta), and four products.
void attend_backward(const Head& head, const Mask& mask, Shape s, Size b, Tiles& tiles) {
    const Size qs = s.q_stride(), ks = s.k_stride();
    float *p = tiles.probabilities.get(), *g = tiles.grads.get();
    tiles.deltas.assign(s.rows, 0.0f);
    for (Size i = 0; i < s.rows; ++i) {
        float delta = 0;
#pragma omp simd reduction(+ : delta)
        for (Size d = 0; d < s.dim; ++d) delta += head.out[i * qs + d] * head.grad[i * qs + d];
        tiles.deltas[i] = delta;
    }
    for (Size j0 = 0; j0 < s.rows; j0 += kTileColumns)
        for (Size i0 = j0 / kTileRows * kTileRows; i0 < s.rows; i0 += kTileRows) {
            const Size i1 = std::min(i0 + kTileRows, s.rows), m = i1 - i0;
            if (!mask.seen(b, i0, i1, j0)) continue;
            const Size j1 = std::min({j0 + kTileColumns, s.rows, i1}), n = j1 - j0;
            matmul({head.q + i0 * qs, qs}, transposed(head.k + j0 * ks, ks), p, kTileColumns, m, n, s.dim);
            matmul({head.grad + i0 * qs, qs}, transposed(head.v + j0 * ks, ks), g, kTileColumns, m, n, s.dim);
            mask.apply(p, b, i0, i1, j0, j1);
            for (Size i = 0; i < m; ++i) {
                const float log_sum = head.log_sums[i0 + i], delta = tiles.deltas[i0 + i];
                float *p_row = p + i * kTileColumns, *g_row = g + i * kTileColumns;
#pragma omp simd
                for (Size j = 0; j < n; ++j) {
                    p_row[j] = exponential(p_row[j] - log_sum);
                    g_row[j] = p_row[j] * (g_row[j] - delta);
                }
            }
            matmul(transposed(p, kTileColumns), {head.grad + i0 * qs, qs}, head.grad_v + j0 * qs, qs, n, s.dim, m, 1);
            matmul(transposed(g, kTileColumns), {head.q + i0 * qs, qs}, head.grad_k + j0 * qs, qs, n, s.dim, m, 1);
            matmul({g, kTileColumns}, {head.k + j0 * ks, ks}, head.grad_q + i0 * qs, qs, m, s.dim, n, 1);
        }
}

// out [rows, groups, dim] = sum of each group's heads in [rows, heads, dim].
void sum_groups(const float* in, float* out, Shape s) {
    const Size copies = s.heads / s.groups;
#pragma omp parallel for
    for (Size group = 0; group < s.batch * s.rows * s.groups; ++group)
        for (Size d = 0; d < s.dim; ++d) {
            float sum = 0;
            for (Size c = 0; c < copies; ++c) sum += in[(group * copies + c) * s.dim + d];
            out[group * s.dim + d] = sum;
        }
}

}  // namespace

EXPORT void attention_backward(const float* q_turned, const float* k_turned, const float* v, const float* cos,
                               const float* sin, const int32_t* ends, const float* out, const float* log_sums,
                               const float* grad, float* grad_q, float* grad_k, float* grad_v, Size batch, Size rows,
                               Size heads, Size groups, Size dim) {
    Threads threads;
    const Shape s{batch, rows, heads, groups, dim};
    const Mask mask(ends, s);
    const Size size = batch * rows * heads * dim;
    auto of_q = scratch(size), of_k = scratch(size), of_v = scratch(size);
    for (float* made : {of_q.get(), of_k.get(), of_v.get()}) std::fill_n(made, size, 0.0f);
#pragma omp parallel
    {
        Tiles tiles;
#pragma omp for schedule(monotonic : dynamic)
        for (Size task = 0; task < batch * heads; ++task) {
            const Size b = task / heads, h = task % heads;
            const Size q = b * rows * s.q_stride() + h * dim, k = b * rows * s.k_stride() + s.group(h) * dim;
            attend_backward({q_turned + q, k_turned + k, v + k, out + q, grad + q, log_sums + task * rows,
                             of_q.get() + q, of_k.get() + q, of_v.get() + q}, mask, s, b, tiles);
        }
    }
    rotate(of_q.get(), grad_q, cos, sin, s, heads, 1, -1.0f, 1.0f / std::sqrt(float(dim)));
    rotate(of_k.get(), grad_k, cos, sin, s, groups, heads / groups, -1.0f, 1.0f);
    sum_groups(of_v.get(), grad_v, s);
}
