// Every body for AVX2 and FMA (16 registers of 8 floats). Nothing here runs before dispatch.
#include "../kernels.h"
#include "../linear/system.h"

RK_TARGET_BEGIN(RK_AVX2_FEATURES)
namespace rk::avx2 {
namespace {
constexpr int W = 8;        // floats in a vector
constexpr int max_V = 12;   // vectors of tokens in a panel: accumulators that fit 16 registers with one to spare
constexpr int max_sums = 12;  // accumulators of a kernel that feeds several rows from one load
constexpr int max_V_pairs = max_V;
constexpr int lanes_from_V = max_V + 1;  // never: weights are broadcast from memory
constexpr bool native_pairs = false;  // bfloat16 by shifts and float FMAs
#define RK_BODIES
#include "../kernels.inl"
}  // namespace
extern const Table table;
const Table table = RK_TABLE("avx2");
}  // namespace rk::avx2
RK_TARGET_END
