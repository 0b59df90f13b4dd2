// Every body for AVX-512 (32 registers of 16 floats). Nothing here runs before dispatch.
#include "../kernels.h"
#include "../linear/system.h"

RK_TARGET_BEGIN(RK_AVX512_FEATURES)
namespace rk::avx512 {
namespace {
constexpr int W = 16;      // floats in a vector
constexpr int max_V = 6;   // vectors of tokens in a panel: 64 columns of it are 24 KiB, inside a 32-KiB L1
#define RK_BODIES
#include "../kernels.inl"
}  // namespace
extern const Table table;
const Table table = {"avx512", RK_LAYOUTS(RK_FIELD)};
}  // namespace rk::avx512
RK_TARGET_END
