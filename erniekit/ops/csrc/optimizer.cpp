// AdamW: one pass over a parameter, its gradient and its moments.
#include "common.h"

// With the bias corrections folded into `rate` = lr / (1 - beta1^t) and `root` = (1 - beta2^t)^-1/2, and decay into
// `shrink` = 1 - lr * decay.
EXPORT void adamw(float* p, const float* grad, float* first, float* second, Size size, float grad_scale, float beta1,
                  float beta2, float epsilon, float rate, float root, float shrink) {
    Threads threads;
#pragma omp parallel for simd
    for (Size i = 0; i < size; ++i) {
        const float g = grad[i] * grad_scale;
        first[i] = beta1 * first[i] + (1.0f - beta1) * g;
        second[i] = beta2 * second[i] + (1.0f - beta2) * g * g;
        p[i] = p[i] * shrink - rate * first[i] / (std::sqrt(second[i]) * root + epsilon);
    }
}
