// The number formats of activations and weights. Kernels move lanes of 32 bits: one float, or two bfloat16 that are
// neighbours in K, which one instruction multiplies and adds where the CPU has it.

using U = uint32_t __attribute__((vector_size(4 * W)));
using H = uint16_t __attribute__((vector_size(2 * W)));
using UnalignedH = uint16_t __attribute__((vector_size(2 * W), aligned(2), may_alias));
using UnalignedLanes = float __attribute__((vector_size(4 * W), aligned(2), may_alias));

// The 32 bits at `p` in every lane. As integers, so that no pair is taken for a signalling NaN.
inline F spread(const void* p) {
    int32_t bits;
    __builtin_memcpy(&bits, p, 4);
    return reinterpret_cast<F>(bits - I{});
}

inline F load_lanes(const void* p) { return *static_cast<const UnalignedLanes*>(p); }

// The lower and the upper bfloat16 of each lane, as floats.
inline F lower(F pairs) { return reinterpret_cast<F>(reinterpret_cast<U>(pairs) << 16); }
inline F upper(F pairs) { return reinterpret_cast<F>(reinterpret_cast<U>(pairs) & 0xffff0000u); }

// Not zero in the lanes where a bfloat16 is Inf or NaN: the exponent is all ones, and adding one carries out of it.
inline U special_pairs(F pairs) {
    const U bits = reinterpret_cast<U>(pairs);
    return (((bits & 0x7f807f80u) + 0x00800080u) & 0x80008000u);
}

template <class Vector>
inline __attribute__((always_inline)) H native_to_bfloat16(Vector x);  // defined where native_pairs

// The nearest bfloat16, ties to even; NaN stays NaN (quiet).
inline H to_bfloat16(F x) {
    if constexpr (native_pairs) return native_to_bfloat16(x);
    const U bits = reinterpret_cast<U>(x);
    const U nearest = bits + 0x7fffu + (bits >> 16 & 1u), quiet = bits | 0x400000u;
    return __builtin_convertvector((x == x ? nearest : quiet) >> 16, H);
}

struct Float32 {
    using Item = float;
    static constexpr int per_lane = 1;
    static constexpr Item ones[] = {1};  // a lane of ones
    static F multiply_add(F sum, F w, F x) { return sum + w * x; }
    static float value(Item item) { return item; }
    static F load_values(const Item* p) { return load(p); }
    static void store_values(Item* p, F v) { store(p, v); }
};

// sum + both products of each lane's pairs; defined where native_pairs.
template <class Vector>
inline __attribute__((always_inline)) Vector native_dot(Vector sum, Vector w, Vector x);

struct BFloat16 {
    using Item = uint16_t;
    static constexpr int per_lane = 2;
    static constexpr Item ones[] = {0x3f80, 0x3f80};
    static inline __attribute__((always_inline)) F multiply_add(F sum, F w, F x) {
        if constexpr (native_pairs) return native_dot<F>(sum, w, x);
        else return sum + lower(w) * lower(x) + upper(w) * upper(x);
    }
    static float value(Item item) {
        const uint32_t bits = uint32_t(item) << 16;
        float v;
        __builtin_memcpy(&v, &bits, 4);
        return v;
    }
    static F load_values(const Item* p) {
        const H items = *reinterpret_cast<const UnalignedH*>(p);
        return reinterpret_cast<F>(__builtin_convertvector(items, U) << 16);
    }
    static void store_values(Item* p, F v) { *reinterpret_cast<UnalignedH*>(p) = to_bfloat16(v); }
};

// bfloat16 whose zero weights multiply nothing, not even Inf or NaN: for a panel that holds one.
struct BFloat16Structural : BFloat16 {
    static F multiply_add(F sum, F w, F x) {
        const U bits = reinterpret_cast<U>(w), items = reinterpret_cast<U>(x);
        const U low = (bits & 0xffffu) != 0u ? items & 0xffffu : U{}, high = bits >> 16 != 0u ? items & 0xffff0000u : U{};
        return BFloat16::multiply_add(sum, w, reinterpret_cast<F>(low | high));
    }
};
