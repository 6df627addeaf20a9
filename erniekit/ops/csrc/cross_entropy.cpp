// Cross-entropy of a linear head over chunks of tokens; ignored tokens cost nothing.
#include "common.h"

namespace {

constexpr int64_t kIgnored = -100;
constexpr int64_t kElsewhere = -101;  // a label in a part of the vocabulary that is not here

// Turns a row of logits into exp(logits - top) / sum, the gradient of log(sum exp(logits)), and returns that logarithm.
float softmax(float* logits, Size vocab, float top) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (Size i = 0; i < vocab; ++i) {
        logits[i] = exponential(logits[i] - top);
        sum += logits[i];
    }
    const float scale = 1.0f / sum;
#pragma omp simd
    for (Size i = 0; i < vocab; ++i) logits[i] *= scale;
    return top + std::log(sum);
}

void multiply(float* row, Size size, float factor) {
#pragma omp simd
    for (Size i = 0; i < size; ++i) row[i] *= factor;
}

}  // namespace

// Writes per-token losses and whether the label is the best token; with gradient pointers, the gradients of the sum of
// scales * losses (null: all 1). weight is [vocab, size] if vocab_first, else [size, vocab]. Returns the index of a label
// that is no token, or -1.
// Of a part of the vocabulary, `parts` takes log(sum exp), the label's logit (0: elsewhere) and the greatest logit of
// every token; `log_sums` over the whole vocabulary then make the gradients those of the whole loss. Both may be null.
EXPORT Size cross_entropy(const float* hidden, const float* weight, const float* bias, const int64_t* labels,
                          const float* scales, const float* log_sums, float* losses, bool* correct, float* parts,
                          float* grad_hidden, float* grad_weight, float* grad_bias,
                          Size tokens, Size size, Size vocab, Size vocab_first, Size chunk, Size bf16) {
    Threads threads;
    std::vector<Size> trained;
    for (Size m = 0; m < tokens; ++m) {
        losses[m] = 0, correct[m] = false;
        if (parts) std::fill_n(parts + 3 * m, 3, 0.0f);
        if (labels[m] == kIgnored) continue;
        const bool elsewhere = labels[m] == kElsewhere && (parts || log_sums);
        if (!elsewhere && (labels[m] < 0 || labels[m] >= vocab)) return m;
        trained.push_back(m);
    }
    if (grad_hidden) std::fill_n(grad_hidden, tokens * size, 0.0f);
    if (grad_weight) std::fill_n(grad_weight, vocab * size, 0.0f);
    if (grad_bias) std::fill_n(grad_bias, vocab, 0.0f);
    chunk = std::min<Size>(chunk, trained.size());
    Buffer x(chunk * size), logits(chunk * vocab);
    const Operand table(weight, vocab_first ? vocab : size, vocab_first ? size : vocab, bf16);
    const View head = vocab_first ? table.transposed() : View(table);  // [size, vocab]
    const View head_transposed = vocab_first ? View(table) : table.transposed();
    for (Size start = 0; start < Size(trained.size()); start += chunk) {
        const Size rows = std::min<Size>(chunk, trained.size() - start);
        const Size* token = trained.data() + start;
#pragma omp parallel for
        for (Size r = 0; r < rows; ++r) {
            std::copy_n(hidden + token[r] * size, size, x.data() + r * size);
            if (bias) std::copy_n(bias, vocab, logits.data() + r * vocab);
        }
        const Operand inputs(x.data(), rows, size, bf16);
        matmul(inputs, head, logits.data(), bias ? 1 : 0);
#pragma omp parallel for
        for (Size r = 0; r < rows; ++r) {
            float* row = logits.data() + r * vocab;
            const Size label = labels[token[r]];
            const bool here = label != kElsewhere;
            const float picked = here ? row[label] : 0, top = greatest(row, vocab, -std::numeric_limits<float>::infinity());
            correct[token[r]] = here && picked == top && std::find(row, row + label, top) == row + label;  // first of equals
            const float log_sum = softmax(row, vocab, top);
            losses[token[r]] = log_sum - picked;
            if (parts) {
                float* part = parts + 3 * token[r];
                part[0] = log_sum, part[1] = picked, part[2] = top;
            }
            if (log_sums) multiply(row, vocab, std::exp(log_sum - log_sums[token[r]]));
            if (here) row[label] -= 1.0f;
            if (scales) multiply(row, vocab, scales[token[r]]);
        }
        if (grad_bias)
            for (Size r = 0; r < rows; ++r)
#pragma omp simd
                for (Size i = 0; i < vocab; ++i) grad_bias[i] += logits[r * vocab + i];
        if (!grad_weight && !grad_hidden) continue;
        const Operand grad(logits.data(), rows, vocab, bf16);
        if (grad_weight && vocab_first) matmul(grad.transposed(), inputs, grad_weight, 1);
        if (grad_weight && !vocab_first) matmul(inputs.transposed(), grad, grad_weight, 1);
        if (grad_hidden) {
            matmul(grad, head_transposed, x.data());
#pragma omp parallel for
            for (Size r = 0; r < rows; ++r) std::copy_n(x.data() + r * size, size, grad_hidden + token[r] * size);
        }
    }
    return -1;
}
