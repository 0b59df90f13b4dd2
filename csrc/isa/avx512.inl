// What the AVX-512 instruction sets share: the bodies, and the sums from weights in registers.
constexpr int W = 16;      // floats in a vector
constexpr int max_V = 6;   // vectors of tokens in a panel: 64 lanes of it are 24 KiB, inside a 32-KiB L1
constexpr int max_sums = 24;  // accumulators of a kernel that feeds several rows from one load
constexpr int max_V_pairs = 7;  // the same for pairs row by row: 28 KiB, but 197 tokens are two panels and not three
constexpr int lanes_from_V = 5;
#define RK_BODIES
#include "../kernels.inl"

// Loads 16 weights at a time and spreads each by a shuffle: a core that loads one 64-byte vector a cycle (Zen 4) then
// has all its loads for the panel, worth 7-10 % there. Narrower panels do not wait for loads.
template <class Number, int V>
inline __attribute__((always_inline)) void add_by_lanes(uint64_t mask, const float* values, const float* P, F* acc) {
    int left = __builtin_popcountll(mask);
    while (mask) {
        const __m512 block = _mm512_maskz_loadu_ps(__mmask16(_bzhi_u32(0xffff, unsigned(left))), values);
        left -= 16;
        values += 16;
#pragma GCC unroll 16
        for (int lane = 0; lane < 16; ++lane) {
            step<Number, V>(mask, _mm512_maskz_permutexvar_ps(0xffff, _mm512_set1_epi32(lane), block), P, acc);
            if (!mask) break;
        }
    }
}
