// Causal attention with rotary positions under column intervals, in tiles: memory O(rows), never rows x rows.
//
// Tensors are [batch, rows, heads, dim]. Column j is seen by the rows j <= i < ends[j]. A tile of scores that nobody
// may see is skipped, so a row of many short documents costs what its documents cost. The forward pass keeps the
// logarithm of every row's softmax sum; backward makes each tile of probabilities again (arXiv 2205.14135).
// One task is one head of one row of the batch; it works on padded, rotated copies of its own.
#include "tiles.h"

namespace {

constexpr Size kRows = 32, kColumns = 64;  // of a tile of scores
constexpr float kInfinity = std::numeric_limits<float>::infinity();  // a hidden score is -infinity
constexpr float kLowest = -1e30f;  // where a running maximum starts: finite, so that -infinity - kLowest is no NaN

Size padded(Size size, Size block) { return (size + block - 1) / block * block; }

struct Shape {
    Size batch, rows, heads, groups, dim;
    Size padded_rows() const { return padded(rows, kColumns); }
    Size padded_dim() const { return padded(dim, kBlockN); }
};

// The column ends of one row of the batch, padded with columns that nobody sees, and their bounds per tile.
class Mask {
public:
    Mask(const int32_t* ends, Size rows, Size padded_rows) : ends_(ends, ends + rows) {
        ends_.resize(padded_rows, 0);
        for (auto first = ends_.begin(); first != ends_.end(); first += kColumns) {
            least_.push_back(*std::min_element(first, first + kColumns));
            greatest_.push_back(*std::max_element(first, first + kColumns));
        }
    }
    bool seen(Size i0, Size j0) const { return j0 < i0 + kRows && greatest_[j0 / kColumns] > i0; }

    // Hides what a row must not see in the scores of the first `columns` columns from j0.
    void apply(float* scores, Size i0, Size j0, Size columns) const {
        if (j0 + columns <= i0 + 1 && least_[j0 / kColumns] >= i0 + kRows) return;
        const int32_t* ends = ends_.data() + j0;
        for (Size i = i0; i < i0 + kRows; ++i, scores += kColumns)
#pragma omp simd
            for (Size j = 0; j < columns; ++j) scores[j] = (j0 + j <= i && i < ends[j]) ? scores[j] : -kInfinity;
    }

private:
    std::vector<int32_t> ends_, least_, greatest_;
};

std::vector<Mask> masks(const int32_t* ends, Shape s) {
    std::vector<Mask> made;
    for (Size b = 0; b < s.batch; ++b) made.emplace_back(ends + b * s.rows, s.rows, s.padded_rows());
    return made;
}

struct Rotation {  // of one row of the batch
    const float *cos, *sin;
    Size pairs;

    // Turns the neighbouring pairs of a vector by the angles of row i; `way` -1 turns them back.
    void turn(const float* in, float* out, Size i, float way, float scale) const {
        const float *c = cos + i * pairs, *s = sin + i * pairs;
#pragma omp simd
        for (Size j = 0; j < pairs; ++j) {
            const float even = in[2 * j] * scale, odd = in[2 * j + 1] * scale, sine = s[j] * way;
            out[2 * j] = even * c[j] - odd * sine;
            out[2 * j + 1] = odd * c[j] + even * sine;
        }
    }
};

// One head of one row of the batch inside a tensor.
struct Head {
    Size start, stride;
    Head(Shape s, Size b, Size head, Size heads) : start((b * s.rows * heads + head) * s.dim), stride(heads * s.dim) {}
};

// A head's rows, one after the other; zeros beyond the rows and the dimension make every tile whole.
void load(const float* tensor, Head head, Shape s, Buffer& out) {
    out.assign(s.padded_rows() * s.padded_dim(), 0.0f);
    for (Size i = 0; i < s.rows; ++i)
        std::copy_n(tensor + head.start + i * head.stride, s.dim, out.data() + i * s.padded_dim());
}

void load_turned(const float* tensor, Head head, Shape s, const Rotation& rotation, float scale, Buffer& out) {
    out.assign(s.padded_rows() * s.padded_dim(), 0.0f);
    for (Size i = 0; i < s.rows; ++i)
        rotation.turn(tensor + head.start + i * head.stride, out.data() + i * s.padded_dim(), i, 1.0f, scale);
}

// The transpose of a head's rows, cut into tiles: [dim, kColumns] for every kColumns rows.
void split_columns(const Buffer& in, Shape s, Buffer& out) {
    out.resize(s.padded_rows() * s.padded_dim());
    for (Size j = 0; j < s.padded_rows(); ++j) {
        float* tile = out.data() + j / kColumns * kColumns * s.dim + j % kColumns;
        for (Size d = 0; d < s.dim; ++d) tile[d * kColumns] = in[j * s.padded_dim() + d];
    }
}

// One row of scores joins the running softmax: it becomes exp(score - maximum), and earlier sums shrink to match.
void join(float* scores, Size columns, float& maximum, float& sum, float* out, Size dim) {
    const float top = greatest(scores, columns, maximum);
    float add = 0;
#pragma omp simd reduction(+ : add)
    for (Size j = 0; j < columns; ++j) {
        scores[j] = exponential(scores[j] - top);
        add += scores[j];
    }
    const float shrink = exponential(maximum - top);
#pragma omp simd
    for (Size d = 0; d < dim; ++d) out[d] *= shrink;
    sum = sum * shrink + add;
    maximum = top;
}

struct Forward {
    Shape s;
    Buffer q, k, k_columns, v, scores = Buffer(kRows * kColumns), sums = Buffer(kRows), maxima = Buffer(kRows), out;

    void attend(const Mask& mask, float* result, Head head, float* log_sums) {
        split_columns(k, s, k_columns);
        const Size dim = s.padded_dim();
        for (Size i0 = 0; i0 < s.rows; i0 += kRows) {
            maxima.assign(kRows, kLowest), sums.assign(kRows, 0.0f), out.assign(kRows * dim, 0.0f);
            for (Size j0 = 0; j0 < i0 + kRows; j0 += kColumns) {
                if (!mask.seen(i0, j0)) continue;
                const Size columns = std::min(kColumns, i0 + kRows - j0);
                tile_matmul({&q[i0 * dim], dim, 1}, &k_columns[j0 * s.dim], kColumns, scores.data(), kColumns, kRows,
                            columns, s.dim, false);
                mask.apply(scores.data(), i0, j0, columns);
                for (Size r = 0; r < kRows; ++r)
                    join(&scores[r * kColumns], columns, maxima[r], sums[r], &out[r * dim], dim);
                tile_matmul({scores.data(), kColumns, 1}, &v[j0 * dim], dim, out.data(), dim, kRows, dim, columns,
                            true);
            }
            for (Size r = 0; r < std::min(kRows, s.rows - i0); ++r) {
                const float scale = sums[r] > 0 ? 1.0f / sums[r] : 0.0f;  // a row that sees nothing gives 0
                log_sums[i0 + r] = sums[r] > 0 ? maxima[r] + std::log(sums[r]) : kInfinity;
                float* row = result + head.start + (i0 + r) * head.stride;
#pragma omp simd
                for (Size d = 0; d < s.dim; ++d) row[d] = out[r * dim + d] * scale;
            }
        }
    }
};

}  // namespace

EXPORT void attention_forward(const float* q, const float* k, const float* v, const float* cos, const float* sin,
                              const int32_t* ends, float* out, float* log_sums, Size batch, Size rows, Size heads,
                              Size groups, Size dim) {
    Threads threads;
    const Shape s{batch, rows, heads, groups, dim};
    const auto mask = masks(ends, s);
#pragma omp parallel
    {
        Forward work{s};
#pragma omp for schedule(monotonic : dynamic)
        for (Size task = 0; task < batch * heads; ++task) {
            const Size b = task / heads, h = task % heads, angles = b * rows * dim / 2;
            const Rotation rotation{cos + angles, sin + angles, dim / 2};
            const Head of_q(s, b, h, heads), of_k(s, b, h * groups / heads, groups);
            load_turned(q, of_q, s, rotation, 1.0f / std::sqrt(float(dim)), work.q);
            load_turned(k, of_k, s, rotation, 1.0f, work.k);
            load(v, of_k, s, work.v);
            work.attend(mask[b], out, of_q, log_sums + task * rows);
        }
    }
}

namespace {

// Per tile P = exp(scores - log_sum) and dS = P (dO V^T - delta), then dV += P^T dO, dK += dS^T Q, dQ += dS K.
struct Backward {
    Shape s;
    Buffer q, k, v, grad, k_columns, v_columns, grad_q, grad_k, grad_v, log_sums, deltas;
    Buffer p = Buffer(kRows * kColumns), g = Buffer(kRows * kColumns);

    void attend(const Mask& mask) {
        split_columns(k, s, k_columns), split_columns(v, s, v_columns);
        for (Buffer* sums : {&grad_q, &grad_k, &grad_v}) sums->assign(q.size(), 0.0f);
        for (Size j0 = 0; j0 < s.rows; j0 += kColumns)
            for (Size i0 = j0; i0 < s.rows; i0 += kRows)
                if (mask.seen(i0, j0)) tile(mask, i0, j0, std::min(kColumns, i0 + kRows - j0));
    }

    void tile(const Mask& mask, Size i0, Size j0, Size columns) {
        const Size dim = s.padded_dim(), i = i0 * dim, j = j0 * dim;
        const float *k_tile = &k_columns[j0 * s.dim], *v_tile = &v_columns[j0 * s.dim];
        tile_matmul({&q[i], dim, 1}, k_tile, kColumns, p.data(), kColumns, kRows, columns, s.dim, false);
        tile_matmul({&grad[i], dim, 1}, v_tile, kColumns, g.data(), kColumns, kRows, columns, s.dim, false);
        mask.apply(p.data(), i0, j0, columns);
        for (Size r = 0; r < kRows; ++r) {
            const float log_sum = log_sums[i0 + r], delta = deltas[i0 + r];
            float *p_row = &p[r * kColumns], *g_row = &g[r * kColumns];
#pragma omp simd
            for (Size c = 0; c < columns; ++c) {
                p_row[c] = exponential(p_row[c] - log_sum);
                g_row[c] = p_row[c] * (g_row[c] - delta);
            }
        }
        tile_matmul({p.data(), 1, kColumns}, &grad[i], dim, &grad_v[j], dim, columns, dim, kRows, true);
        tile_matmul({g.data(), 1, kColumns}, &q[i], dim, &grad_k[j], dim, columns, dim, kRows, true);
        tile_matmul({g.data(), kColumns, 1}, &k[j], dim, &grad_q[i], dim, kRows, dim, columns, true);
    }

    // Takes the log_sums of one head and makes its deltas, the sums of dO * O.
    void weigh(const float* out, Head head, const float* sums) {
        log_sums.assign(s.padded_rows(), kInfinity), deltas.assign(s.padded_rows(), 0.0f);
        std::copy_n(sums, s.rows, log_sums.begin());
        for (Size i = 0; i < s.rows; ++i) {
            const float *o = out + head.start + i * head.stride, *g_row = &grad[i * s.padded_dim()];
            float delta = 0;
#pragma omp simd reduction(+ : delta)
            for (Size d = 0; d < s.dim; ++d) delta += o[d] * g_row[d];
            deltas[i] = delta;
        }
    }
};

// Each group's gradient is the sum over its heads: [rows, heads, dim] -> [rows, groups, dim].
void sum_heads(const float* in, float* out, Shape s) {
    const Size copies = s.heads / s.groups;
#pragma omp parallel for
    for (Size group = 0; group < s.batch * s.rows * s.groups; ++group) {
        float* sums = out + group * s.dim;
        std::copy_n(in + group * copies * s.dim, s.dim, sums);
        for (Size c = 1; c < copies; ++c)
#pragma omp simd
            for (Size d = 0; d < s.dim; ++d) sums[d] += in[(group * copies + c) * s.dim + d];
    }
}

}  // namespace

EXPORT void attention_backward(const float* q, const float* k, const float* v, const float* cos, const float* sin,
                               const int32_t* ends, const float* out, const float* log_sums, const float* grad,
                               float* grad_q, float* grad_k, float* grad_v, Size batch, Size rows, Size heads,
                               Size groups, Size dim) {
    Threads threads;
    const Shape s{batch, rows, heads, groups, dim};
    const auto mask = masks(ends, s);
    const bool shared = groups < heads;
    const Size size = shared ? batch * rows * heads * dim : 0;
    Buffer all_k(size), all_v(size);
    float *of_k = shared ? all_k.data() : grad_k, *of_v = shared ? all_v.data() : grad_v;
#pragma omp parallel
    {
        Backward work{s};
#pragma omp for schedule(monotonic : dynamic)
        for (Size task = 0; task < batch * heads; ++task) {
            const Size b = task / heads, h = task % heads, angles = b * rows * dim / 2;
            const Rotation rotation{cos + angles, sin + angles, dim / 2};
            const Head own(s, b, h, heads), group(s, b, h * groups / heads, groups);
            const float scale = 1.0f / std::sqrt(float(dim));
            load_turned(q, own, s, rotation, scale, work.q);
            load_turned(k, group, s, rotation, 1.0f, work.k);
            load(v, group, s, work.v);
            load(grad, own, s, work.grad);
            work.weigh(out, own, log_sums + task * rows);
            work.attend(mask[b]);
            for (Size i = 0; i < rows; ++i) {
                const Size from = i * s.padded_dim(), to = own.start + i * own.stride;
                rotation.turn(&work.grad_q[from], grad_q + to, i, -1.0f, scale);
                rotation.turn(&work.grad_k[from], of_k + to, i, -1.0f, 1.0f);
                std::copy_n(&work.grad_v[from], dim, of_v + to);
            }
        }
    }
    if (shared) sum_heads(of_k, grad_k, s), sum_heads(of_v, grad_v, s);
}
