// Every body for AVX-512 with the bfloat16 dot product (and VBMI2, which each such CPU but Cooper Lake has).
// Nothing here runs before dispatch.
#include <immintrin.h>

#include "../kernels.h"
#include "../linear/system.h"

RK_TARGET_BEGIN(RK_AVX512_BF16_FEATURES)
namespace rk::avx512_bf16 {
namespace {
constexpr bool native_pairs = true;
#include "avx512.inl"

template <class Vector>
inline __attribute__((always_inline)) Vector native_dot(Vector sum, Vector w, Vector x) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(x));
}

template <class Vector>
inline __attribute__((always_inline)) H native_to_bfloat16(Vector x) {
    return reinterpret_cast<H>(_mm512_cvtneps_pbh(x));
}

template <class Quad>
inline __attribute__((always_inline)) F native_pick(Quad quad, U control) {
    return reinterpret_cast<F>(_mm512_shuffle_epi8(_mm512_set1_epi64(int64_t(quad)), reinterpret_cast<__m512i>(control)));
}

// 32 columns at a time: expand the entries to their columns, then drop the pairs that are empty.
template <class Entry>
uint64_t native_pair_up(const uint64_t* mask, const Entry* values, uint32_t* pairs) {
    uint64_t found = 0;
#pragma GCC unroll 4
    for (int quarter = 0; quarter < 4; ++quarter) {
        const uint32_t columns = uint32_t(mask[quarter / 2] >> quarter % 2 * 32);
        const int count = __builtin_popcount(columns);
        const __m512i packed = _mm512_maskz_loadu_epi16(_bzhi_u32(~0u, unsigned(count)), values);
        const uint32_t any = _pext_u32(columns | columns >> 1, 0x55555555);
        const __m512i spread = _mm512_maskz_expand_epi16(columns, packed);
        _mm512_storeu_si512(pairs, _mm512_maskz_compress_epi32(__mmask16(any), spread));
        found |= uint64_t(any) << quarter * 16;
        pairs += __builtin_popcount(any);
        values += count;
    }
    return found;
}
}  // namespace
extern const Table table;
const Table table = RK_TABLE("avx512_bf16");
}  // namespace rk::avx512_bf16
RK_TARGET_END
