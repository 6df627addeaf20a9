// Routed experts: sort rows by expert, copy them there, one gated MLP per expert, and back with weights.
//
// T routed rows = tokens * choices; place[t] is the sorted row of routed row t; token[r] the token of sorted row r.
#include "common.h"

// A stable counting sort of the routed rows by expert. Returns the index of an id that is no expert, or -1.
EXPORT Size sort_by_expert(const int64_t* experts, int64_t* token, int64_t* place, int64_t* counts, Size routed,
                           Size choices, Size num_experts) {
    std::fill(counts, counts + num_experts, 0);
    for (Size t = 0; t < routed; ++t) {
        if (experts[t] < 0 || experts[t] >= num_experts) return t;
        ++counts[experts[t]];
    }
    std::vector<int64_t> next(num_experts, 0);
    for (Size e = 1; e < num_experts; ++e) next[e] = next[e - 1] + counts[e - 1];
    for (Size t = 0; t < routed; ++t) {
        place[t] = next[experts[t]]++;
        token[place[t]] = t / choices;
    }
    return -1;
}

// y[r] = x[token[r]]
EXPORT void permute(const float* x, const int64_t* token, float* y, Size routed, Size size) {
    Threads threads;
#pragma omp parallel for
    for (Size r = 0; r < routed; ++r) std::copy_n(x + token[r] * size, size, y + r * size);
}

// y[m] = sum over c of weights[m, c] * x[place[m, c]]; without weights, a plain sum.
EXPORT void combine(const float* x, const float* weights, const int64_t* place, float* y, Size tokens, Size choices,
                    Size size) {
    Threads threads;
#pragma omp parallel for
    for (Size m = 0; m < tokens; ++m) {
        float* out = y + m * size;
        std::fill(out, out + size, 0.0f);
        for (Size c = m * choices; c < (m + 1) * choices; ++c) {
            const float* in = x + place[c] * size;
            const float weight = weights ? weights[c] : 1.0f;
#pragma omp simd
            for (Size i = 0; i < size; ++i) out[i] += weight * in[i];
        }
    }
}

EXPORT void combine_backward(const float* x, const float* weights, const int64_t* place, const float* grad,
                             float* grad_x, float* grad_weights, Size tokens, Size choices, Size size) {
    Threads threads;
#pragma omp parallel for
    for (Size m = 0; m < tokens; ++m) {
        const float* g = grad + m * size;
        for (Size c = m * choices; c < (m + 1) * choices; ++c) {
            const float *in = x + place[c] * size, weight = weights[c];
            float* out = grad_x + place[c] * size;
            float dot = 0;
#pragma omp simd reduction(+ : dot)
            for (Size i = 0; i < size; ++i) {
                dot += g[i] * in[i];
                out[i] = weight * g[i];
            }
            grad_weights[c] = dot;
        }
    }
}

namespace {

// act[r] = silu(gate) * up of the rows [gate | up].
void activate(const float* gate_up, float* act, Size rows, Size width) {
#pragma omp parallel for
    for (Size row = 0; row < rows; ++row) {
        const float *gate = gate_up + row * 2 * width, *up = gate + width;
#pragma omp simd
        for (Size i = 0; i < width; ++i) act[row * width + i] = gate[i] * sigmoid(gate[i]) * up[i];
    }
}

// From the gradient of act in `grad_act` to that of [gate | up]; kAct: `act` is made again for the gradient of down.
template <bool kAct>
void activate_backward(const float* gate_up, const float* grad_act, float* act, float* grad_gate_up, Size rows,
                       Size width) {
#pragma omp parallel for
    for (Size row = 0; row < rows; ++row) {
        const float *gate = gate_up + row * 2 * width, *up = gate + width, *g = grad_act + row * width;
        float *grad_gate = grad_gate_up + row * 2 * width, *grad_up = grad_gate + width;
#pragma omp simd
        for (Size i = 0; i < width; ++i) {
            const float sigma = sigmoid(gate[i]), silu = gate[i] * sigma;
            if (kAct) act[row * width + i] = silu * up[i];
            grad_gate[i] = g[i] * up[i] * (sigma + silu * (1.0f - sigma));
            grad_up[i] = g[i] * silu;
        }
    }
}

}  // namespace

// gate_up [E, size, 2 * width], down [E, width, size]; hidden [T, 2 * width] is kept for backward.
EXPORT void experts_forward(const float* x, const float* gate_up, const float* down, const int64_t* counts,
                            float* hidden, float* y, Size num_experts, Size size, Size width, Size bf16) {
    Threads threads;
    Buffer act(*std::max_element(counts, counts + num_experts) * width);
    for (Size e = 0; e < num_experts; ++e) {
        const Size rows = counts[e];
        matmul(Operand(x, rows, size, bf16), Operand(gate_up, size, 2 * width, bf16), hidden);
        activate(hidden, act.data(), rows, width);
        matmul(Operand(act.data(), rows, width, bf16), Operand(down, width, size, bf16), y);
        x += rows * size, y += rows * size, hidden += rows * 2 * width;
        gate_up += size * 2 * width, down += width * size;
    }
}

EXPORT void experts_backward(const float* x, const float* gate_up, const float* down, const int64_t* counts,
                             const float* hidden, const float* grad, float* grad_x, float* grad_gate_up,
                             float* grad_down, Size num_experts, Size size, Size width, Size bf16) {
    Threads threads;
    const Size most = *std::max_element(counts, counts + num_experts) * width;
    Buffer act(most), grad_act(most), grad_hidden(2 * most);
    for (Size e = 0; e < num_experts; ++e) {
        const Size rows = counts[e], offset = e * size * width;
        const Operand right(grad, rows, size, bf16);
        matmul(right, Operand(down + offset, width, size, bf16).transposed(), grad_act.data());
        activate_backward<true>(hidden, grad_act.data(), act.data(), grad_hidden.data(), rows, width);
        if (grad_down) matmul(Operand(act.data(), rows, width, bf16).transposed(), right, grad_down + offset);
        const Operand inner(grad_hidden.data(), rows, 2 * width, bf16);
        if (grad_gate_up) matmul(Operand(x, rows, size, bf16).transposed(), inner, grad_gate_up + 2 * offset);
        if (grad_x) {
            matmul(inner, Operand(gate_up + 2 * offset, size, 2 * width, bf16).transposed(), grad_x);
            grad_x += rows * size;
        }
        x += rows * size, grad += rows * size, hidden += rows * 2 * width;
    }
}

// act = silu(gate) * up of the rows [gate | up].
EXPORT void gated_forward(const float* gate_up, float* act, Size rows, Size width) {
    Threads threads;
    activate(gate_up, act, rows, width);
}

EXPORT void gated_backward(const float* gate_up, const float* grad, float* grad_gate_up, Size rows, Size width) {
    Threads threads;
    activate_backward<false>(gate_up, grad, nullptr, grad_gate_up, rows, width);
}

// act = silu(gate) * up * weight of the rows [gate | up]; without weights, as gated_forward.
EXPORT void weighted_gated_forward(const float* gate_up, const float* weights, float* act, Size rows, Size width) {
    Threads threads;
#pragma omp parallel for
    for (Size row = 0; row < rows; ++row) {
        const float *gate = gate_up + row * 2 * width, *up = gate + width;
        const float weight = weights ? weights[row] : 1.0f;
#pragma omp simd
        for (Size i = 0; i < width; ++i) act[row * width + i] = gate[i] * sigmoid(gate[i]) * up[i] * weight;
    }
}

// The gradients of rows and weights from that of act, which is made again.
EXPORT void weighted_gated_backward(const float* gate_up, const float* weights, const float* grad, float* act,
                                    float* grad_gate_up, float* grad_weights, Size rows, Size width) {
    Threads threads;
#pragma omp parallel for
    for (Size row = 0; row < rows; ++row) {
        const float *gate = gate_up + row * 2 * width, *up = gate + width, *given = grad + row * width;
        float *grad_gate = grad_gate_up + row * 2 * width, *grad_up = grad_gate + width;
        const float weight = weights ? weights[row] : 1.0f;
        float dot = 0;
#pragma omp simd reduction(+ : dot)
        for (Size i = 0; i < width; ++i) {
            const float sigma = sigmoid(gate[i]), silu = gate[i] * sigma, g = given[i] * weight;
            dot += given[i] * silu * up[i];
            act[row * width + i] = silu * up[i] * weight;
            grad_gate[i] = g * up[i] * (sigma + silu * (1.0f - sigma));
            grad_up[i] = g * silu;
        }
        if (weights) grad_weights[row] = dot;
    }
}

// y = x weight_e of each expert's rows; weight [E, size, width].
EXPORT void grouped_linear_forward(const float* x, const float* weight, const int64_t* counts, float* y,
                                   Size num_experts, Size size, Size width, Size bf16) {
    Threads threads;
    for (Size e = 0; e < num_experts; ++e) {
        const Size rows = counts[e];
        if (rows) matmul(Operand(x, rows, size, bf16), Operand(weight + e * size * width, size, width, bf16), y);
        x += rows * size, y += rows * width;
    }
}

// x is there if the weight's gradient is wanted, and the weight if that of the rows is.
EXPORT void grouped_linear_backward(const float* x, const float* weight, const int64_t* counts, const float* grad,
                                    float* grad_x, float* grad_weight, Size num_experts, Size size, Size width,
                                    Size bf16) {
    Threads threads;
    for (Size e = 0; e < num_experts; ++e) {
        const Size rows = counts[e], offset = e * size * width;
        const Operand right(grad, rows, width, bf16);
        if (grad_weight) {
            matmul(Operand(x, rows, size, bf16).transposed(), right, grad_weight + offset);
            x += rows * size;
        }
        if (grad_x) {
            if (rows) matmul(right, Operand(weight + offset, size, width, bf16).transposed(), grad_x);
            grad_x += rows * size;
        }
        grad += rows * width;
    }
}
