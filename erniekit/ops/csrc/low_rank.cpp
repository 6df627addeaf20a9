// Low-rank adapters: what they add to the product of the base, for rows sorted by expert.
//
// a [E, size, rank], b [E, rank, width]; a linear layer is one expert with all the rows.
#include "common.h"

// hidden = scale * x a_e, kept for backward; out = y + hidden b_e.
EXPORT void low_rank_forward(const float* x, const float* y, const float* a, const float* b, const int64_t* counts,
                             float* hidden, float* out, Size num_experts, Size size, Size rank, Size width,
                             float scale) {
    Threads threads;
    for (Size e = 0; e < num_experts; ++e) {
        const Size rows = counts[e];
        matmul(Operand(x, rows, size, false), Operand(a, size, rank, false), hidden);
#pragma omp parallel for
        for (Size row = 0; row < rows; ++row) {
            std::copy_n(y + row * width, width, out + row * width);
            for (Size i = row * rank; i < (row + 1) * rank; ++i) hidden[i] *= scale;
        }
        matmul(Operand(hidden, rows, rank, false), Operand(b, rank, width, false), out, 1.0f);
        x += rows * size, y += rows * width, hidden += rows * rank, out += rows * width;
        a += size * rank, b += rank * width;
    }
}

// A gradient pointer may be null: then nobody wants that gradient. The gradient of y is that of the output.
EXPORT void low_rank_backward(const float* x, const float* a, const float* b, const int64_t* counts,
                              const float* hidden, const float* grad, float* grad_x, float* grad_a, float* grad_b,
                              Size num_experts, Size size, Size rank, Size width, float scale) {
    Threads threads;
    Buffer grad_hidden(*std::max_element(counts, counts + num_experts) * rank);
    for (Size e = 0; e < num_experts; ++e) {
        const Size rows = counts[e];
        const Operand right(grad, rows, width, false), inner(grad_hidden.data(), rows, rank, false);
        if (grad_x || grad_a) {
            matmul(right, Operand(b + e * rank * width, rank, width, false).transposed(), grad_hidden.data());
            for (Size i = 0; i < rows * rank; ++i) grad_hidden[i] *= scale;
        }
        if (grad_b) matmul(Operand(hidden, rows, rank, false).transposed(), right, grad_b + e * rank * width);
        if (grad_a) matmul(Operand(x, rows, size, false).transposed(), inner, grad_a + e * size * rank);
        if (grad_x) {
            matmul(inner, Operand(a + e * size * rank, size, rank, false).transposed(), grad_x);
            grad_x += rows * size;
        }
        x += rows * size, hidden += rows * rank, grad += rows * width;
    }
}
