// Every body for AVX-512 (32 registers of 16 floats). Nothing here runs before dispatch.
#include <immintrin.h>

#include "../kernels.h"
#include "../linear/system.h"

RK_TARGET_BEGIN(RK_AVX512_FEATURES)
namespace rk::avx512 {
namespace {
constexpr bool native_pairs = false;  // bfloat16 by shifts and float FMAs
#include "avx512.inl"
}  // namespace
extern const Table table;
const Table table = RK_TABLE("avx512");
}  // namespace rk::avx512
RK_TARGET_END
