// A vector of W floats, written once for every instruction set with the compiler's vector types.
// Included by kernels.inl inside an instruction set's namespace, which has defined W.

using F = float __attribute__((vector_size(4 * W)));
using I = int32_t __attribute__((vector_size(4 * W)));
using UnalignedF = float __attribute__((vector_size(4 * W), aligned(4), may_alias));

inline F load(const float* p) { return *reinterpret_cast<const UnalignedF*>(p); }
inline void store(float* p, F v) { *reinterpret_cast<UnalignedF*>(p) = v; }
inline F broadcast(float v) { return v - F{}; }  // v - 0 is v, also for -0.0, so this is one instruction

// Interleaves the lower (upper) halves of a and b: a0 b0 a1 b1 ...
template <int... i>
inline F zip_lower(F a, F b, std::integer_sequence<int, i...>) {
    return __builtin_shufflevector(a, b, (i % 2 * W + i / 2)...);
}
template <int... i>
inline F zip_upper(F a, F b, std::integer_sequence<int, i...>) {
    return __builtin_shufflevector(a, b, (i % 2 * W + i / 2 + W / 2)...);
}

// Transposes W rows of W floats: log2(W) perfect shuffles.
inline void transpose(F (&r)[W]) {
    constexpr std::make_integer_sequence<int, W> lanes{};
#pragma GCC unroll 4
    for (int stage = 1; stage < W; stage *= 2) {
        F s[W];
#pragma GCC unroll 8
        for (int i = 0; i < W / 2; ++i) {
            s[2 * i] = zip_lower(r[i], r[i + W / 2], lanes);
            s[2 * i + 1] = zip_upper(r[i], r[i + W / 2], lanes);
        }
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) r[i] = s[i];
    }
}
