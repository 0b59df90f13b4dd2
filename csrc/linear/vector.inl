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

// e^x, relative error below 2e-7; 0 below -87.3, inf above 88.7, NaN stays NaN. Cody & Waite (1980) reduction by
// ln 2 in two parts, then the degree-6 polynomial of Cephes expf.
inline F exp(F x) {
    const F shift = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const F z = x * broadcast(1.44269504088896341f) + shift;
    const F n = z - shift;
    F r = x - n * broadcast(0.693359375f);
    r = r + n * broadcast(2.12194440e-4f);
    F p = broadcast(1.9875691500e-4f);
    p = p * r + broadcast(1.3981999507e-3f);
    p = p * r + broadcast(8.3334519073e-3f);
    p = p * r + broadcast(4.1665795894e-2f);
    p = p * r + broadcast(1.6666665459e-1f);
    p = p * r + broadcast(5.0000001201e-1f);
    p = p * (r * r) + r + broadcast(1.0f);
    const I whole = reinterpret_cast<I>(z) - reinterpret_cast<I>(shift);
    // 2^n as a product of two factors, so that n = 128 still has a representation
    const I half = whole >> 1;
    const F low = reinterpret_cast<F>((half + 127) << 23), high = reinterpret_cast<F>((whole - half + 127) << 23);
    F y = p * low * high;
    y = x < -87.3f ? F{} : y;
    y = x > 88.7228f ? broadcast(__builtin_inff()) : y;
    return x == x ? y : x;
}
