// The activations, and what a finished tile of outputs goes through: activation, transposition, scale, residual, store.

constexpr float round_shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which the low bits then hold

// 2^(n + f), n an integer that was rounded by adding round_shift + 127 into z, |f| <= 1/2; as precise as the Number's
// rounding asks: relative error 8e-8, or 8e-5 for bfloat16. Minimax polynomials.
template <class Number>
inline F exp2_parts(F z, F f) {
    F p;
    if constexpr (Number::per_lane == 1) {
        p = broadcast(1.327647245e-3f);
        p = p * f + broadcast(9.675541893e-3f);
        p = p * f + broadcast(5.550713092e-2f);
        p = p * f + broadcast(2.402212024e-1f);
        p = p * f + broadcast(6.931469440e-1f);
        p = p * f + broadcast(1.0f);
    } else {
        p = broadcast(5.517166853e-2f);
        p = p * f + broadcast(2.426111400e-1f);
        p = p * f + broadcast(6.932609677e-1f);
        p = p * f + broadcast(9.999280572e-1f);
    }
    return p * reinterpret_cast<F>(reinterpret_cast<U>(z) << 23);
}

// e^x for x <= 0 (0 below -87, NaN stays NaN).
template <class Number>
inline F exp_falling(F x) {
    const F shift = broadcast(round_shift + 127.0f);  // 127 more makes the low bits an exponent
    const F z = x * broadcast(1.44269504088896341f) + shift;
    const F f = x * broadcast(1.44269504088896341f) - (z - shift);
    return x < -87.0f ? F{} : exp2_parts<Number>(z, f);
}

inline F magnitude(F x) { return reinterpret_cast<F>(reinterpret_cast<U>(x) & 0x7fffffffu); }

// The upper tail of the normal distribution, 1 - Phi(t) for t >= 0, with a relative error that stays small far out, so that
// GELU has no cancellation for negative x.
template <class Number>
inline F normal_tail(F t) {
    if constexpr (Number::per_lane == 1) {
        // e^(-t^2 / 2) g(u), u = 1 / (1 + .21 t), with g fitted for the relative error over t < 13.2 (1.2e-8)
        const F u = 1.0f / (t * broadcast(0.21f) + broadcast(1.0f));
        F g = broadcast(-0.07226858f);
        g = g * u + broadcast(0.28661243f);
        g = g * u + broadcast(-0.33663925f);
        g = g * u + broadcast(0.35692264f);
        g = g * u + broadcast(-0.09932264f);
        g = g * u + broadcast(0.1272861f);
        g = g * u + broadcast(0.06853622f);
        g = g * u + broadcast(0.08516787f);
        g = g * u + broadcast(0.08370522f);
        return exp_falling<Number>(t * t * broadcast(-0.5f)) * g * u;
    } else {
        // 2^p(t), a polynomial: relative error 1.5e-4 up to t = 3, and GELU off by 2.2e-5 at most; it falls up to t = 14
        const F shift = broadcast(round_shift + 127.0f);
        const F s = t < 14.0f ? t : broadcast(14.0f);
        F p = broadcast(9.390496416e-6f);
        p = p * s + broadcast(-3.684683726e-4f);
        p = p * s + broadcast(5.691621918e-3f);
        p = p * s + broadcast(-4.706485942e-2f);
        p = p * s + broadcast(-0.4662545323f);
        p = p * s + broadcast(-1.1479988098f);
        p = p * s + broadcast(-1.0002180338f);
        const F z = p + shift;
        return p < -126.0f ? F{} : exp2_parts<Number>(z, p - (z - shift));
    }
}

// x Phi(x), the exact GELU.
template <class Number>
inline F gelu(F x) {
    const F q = normal_tail<Number>(magnitude(x));
    return x * (x < F{} ? q : 1.0f - q);
}

// x / (1 + e^-v), through the exponential of -|v|, which does not overflow.
template <class Number>
inline F times_sigmoid(F x, F v) {
    const F e = exp_falling<Number>(-magnitude(v));
    return x * (v < F{} ? e : broadcast(1.0f)) / (1.0f + e);
}

template <class Number>
inline F silu(F x) {
    return times_sigmoid<Number>(x, x);
}

// The tanh form of GELU: x / (1 + e^(-2 s)), s = sqrt(2 / pi) (x + 0.044715 x^3).
template <class Number>
inline F gelu_tanh(F x) {
    return times_sigmoid<Number>(x, x * (x * x * broadcast(2 * 0.0356774081f) + broadcast(2 * 0.7978845608f)));
}

template <class Number, Activation A>
inline F activate(F x) {
    if constexpr (A == Activation::gelu) return gelu<Number>(x);
    if constexpr (A == Activation::gelu_tanh) return gelu_tanh<Number>(x);
    if constexpr (A == Activation::silu) return silu<Number>(x);
    if constexpr (A == Activation::relu) return x < F{} ? F{} : x;  // NaN stays NaN
    return x;
}

// The first `width` values at p and zeros; never reads past them.
template <class Number>
inline F load_some(const typename Number::Item* p, int64_t width) {
    if (width >= W) return Number::load_values(p);
    typename Number::Item copy[W] = {};
    for (int64_t j = 0; j < width; ++j) copy[j] = p[j];
    return Number::load_values(copy);
}

// Stores the first `width` values of v, and writes nothing past them.
template <class Number>
inline void store_some(typename Number::Item* p, F v, int64_t width) {
    if (width >= W) return Number::store_values(p, v);
    typename Number::Item row[W];
    Number::store_values(row, v);
    for (int64_t j = 0; j < width; ++j) p[j] = row[j];
}

// Scale, residual and store of a token's `width` <= W outputs from feature f, whose activation is done.
template <class Number>
inline void write(const LinearArgs& a, F v, int64_t t, int64_t f, int64_t width) {
    using Item = typename Number::Item;
    const int64_t at = t * a.outputs() + f;
    if (a.scale) v = v * load_some<Number>(static_cast<const Item*>(a.scale) + f, width);
    if (a.residual) v = v + load_some<Number>(static_cast<const Item*>(a.residual) + at, width);
    store_some<Number>(static_cast<Item*>(a.y) + at, v, width);
}

// Where the rows [f0, f0 + rows) of the weight are in y. Both ends are whole chunks of pairs, but for y's own end.
template <bool Gated>
inline int64_t first_output(int64_t f0) {
    return Gated ? f0 / 2 : f0;
}
template <bool Gated>
inline int64_t count_outputs(const LinearArgs& a, int64_t f0, int64_t rows) {
    const int64_t left = a.outputs() - first_output<Gated>(f0), most = Gated ? rows / 2 : rows;
    return left < most ? left : most;
}

// The row of output f: itself, or its gate's, which the up's follows gate_chunk rows later.
template <bool Gated>
inline int64_t row_of(int64_t f) {
    return Gated ? f / gate_chunk * (2 * gate_chunk) + f % gate_chunk : f;
}

// The gate (part 0) or the up (part 1) of the W outputs from f, out of pairs in chunks; the second chunk that a vector of
// 16 needs may not be there.
template <class Number, int part, int... i>
inline F load_part(const typename Number::Item* p, int64_t f, bool second, std::integer_sequence<int, i...>) {
    if constexpr (W <= gate_chunk) return Number::load_values(p + row_of<true>(f) + part * gate_chunk);
    else {
        const F a = Number::load_values(p + 2 * f), b = second ? Number::load_values(p + 2 * f + W) : a;
        return __builtin_shufflevector(a, b, (i / gate_chunk * W + part * gate_chunk + i % gate_chunk)...);
    }
}

// C [features][stride] holds sums with the bias in them, lanes are tokens. Writes W tokens from t0, rows of the weight
// from f0. Outputs run in the inner loop, so that a token's are written one after the other.
template <class Number, Activation A, bool Gated>
struct FinishTokens {
    static void run(const LinearArgs& a, const float* C, int64_t stride, int64_t t0, int64_t f0, int64_t rows) {
        const int64_t tokens = a.T - t0 < W ? a.T - t0 : W, features = count_outputs<Gated>(a, f0, rows);
        for (int64_t f = 0; f < features; f += W) {
            const int64_t width = features - f < W ? features - f : W;
            F r[W];
#pragma GCC unroll 16
            for (int i = 0; i < W; ++i) {
                const float* row = C + row_of<Gated>(f + (i < width ? i : width - 1)) * stride;
                r[i] = activate<Number, A>(load(row));
                if constexpr (Gated) r[i] = r[i] * load(row + gate_chunk * stride);
            }
            transpose(r);
            for (int64_t i = 0; i < tokens; ++i) write<Number>(a, r[i], t0 + i, first_output<Gated>(f0) + f, width);
        }
    }
};

// C [tokens][stride] holds sums without the bias, lanes are outputs. Writes `tokens` from t0, rows of the weight from f0
// up to stride.
template <class Number, Activation A, bool Gated>
struct FinishOutputs {
    static void run(const LinearArgs& a, const float* C, int64_t stride, int64_t t0, int64_t tokens, int64_t f0) {
        constexpr std::make_integer_sequence<int, W> lanes{};
        const auto* bias = static_cast<const typename Number::Item*>(a.bias);
        const int64_t features = count_outputs<Gated>(a, f0, stride), first = first_output<Gated>(f0);
        for (int64_t f = 0; f < features; f += W) {
            const int64_t width = features - f < W ? features - f : W;
            if constexpr (Gated) {
                const bool second = width > gate_chunk;
                const F gate = bias ? load_part<Number, 0>(bias + f0, f, second, lanes) : F{};
                const F up = bias ? load_part<Number, 1>(bias + f0, f, second, lanes) : F{};
                for (int64_t i = 0; i < tokens; ++i) {
                    const float* sums = C + i * stride;
                    const F g = load_part<Float32, 0>(sums, f, second, lanes) + gate;
                    const F u = load_part<Float32, 1>(sums, f, second, lanes) + up;
                    write<Number>(a, activate<Number, A>(g) * u, t0 + i, first + f, width);
                }
            } else {
                const F b = bias ? load_some<Number>(bias + f0 + f, width) : F{};
                for (int64_t i = 0; i < tokens; ++i)
                    write<Number>(a, activate<Number, A>(load(C + i * stride + f) + b), t0 + i, f0 + f, width);
            }
        }
    }
};

// Two vectors of floats as one of bfloat16 pairs.
inline F pair_lanes(F low, F high) {
    return reinterpret_cast<F>(__builtin_convertvector(to_bfloat16(low), U) |
                               __builtin_convertvector(to_bfloat16(high), U) << 16);
}

// C as FinishTokens has it, but of a whole panel (lanes [0, stride)), which becomes a panel P [lanes of outputs][stride] of
// the next linear: lanes stay tokens. An odd number of outputs leaves a zero in the last pair of bfloat16.
template <class Number, Activation A, bool Gated>
struct FinishPanel {
    static F output(const float* C, int64_t stride, int64_t f) {
        const float* row = C + row_of<Gated>(f) * stride;
        const F y = activate<Number, A>(load(row));
        if constexpr (Gated) return y * load(row + gate_chunk * stride);
        return y;
    }

    static void run(const LinearArgs& a, const float* C, int64_t stride, int64_t f0, int64_t rows, float* P, uint32_t* special) {
        constexpr int per = Number::per_lane;
        const int64_t features = count_outputs<Gated>(a, f0, rows);
        U bad = {};
        P += first_output<Gated>(f0) / per * stride;
        for (int64_t f = 0; f < features; f += per, P += stride) {
            for (int64_t v = 0; v < stride; v += W) {
                F y = output(C + v, stride, f);
                if constexpr (per == 2) {
                    y = pair_lanes(y, f + 1 < features ? output(C + v, stride, f + 1) : F{});
                    bad |= special_pairs(y);
                }
                store(P + v, y);
            }
        }
        uint32_t any = 0;
        for (int i = 0; i < W; ++i) any |= bad[i];
        if (any) __atomic_store_n(special, 1u, __ATOMIC_RELAXED);
    }
};

// Runs one of the three above for the activation that is asked for.
template <template <class, Activation, bool> class Finish, class Number, bool Gated, class... Place>
void finish_as(const LinearArgs& a, const float* C, Place... place) {
    switch (a.activation) {
        case Activation::none: return Finish<Number, Activation::none, Gated>::run(a, C, place...);
        case Activation::gelu: return Finish<Number, Activation::gelu, Gated>::run(a, C, place...);
        case Activation::gelu_tanh: return Finish<Number, Activation::gelu_tanh, Gated>::run(a, C, place...);
        case Activation::silu: return Finish<Number, Activation::silu, Gated>::run(a, C, place...);
        case Activation::relu: return Finish<Number, Activation::relu, Gated>::run(a, C, place...);
    }
}
template <template <class, Activation, bool> class Finish, class Number, class... Place>
void finish(const LinearArgs& a, const float* C, Place... place) {
    if (a.F) finish_as<Finish, Number, true>(a, C, place...);
    else finish_as<Finish, Number, false>(a, C, place...);
}
