// The one unit that is compiled: all kernels and their set-up.
#include "attention.cpp"
#include "ccq.cpp"
#include "cross_entropy.cpp"
#include "dense.cpp"
#include "experts.cpp"
#include "float8.cpp"
#include "hadamard.cpp"
#include "low_rank.cpp"
#include "optimizer.cpp"
#include "packed.cpp"

EXPORT void set_up(Sgemm sgemm, HalfGemm half_gemm, int threads) { settings = {sgemm, half_gemm, threads}; }
