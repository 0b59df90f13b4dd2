// The activations, and what a finished tile of outputs goes through: activation, transposition, scale, residual, store.

// x Phi(x), the exact GELU. Phi from its upper tail q = erfc(|x| / sqrt 2) / 2 = e^(-x^2 / 2) g(u), u = 1 / (1 + .21 |x|),
// with g a polynomial fitted for the relative error over |x| < 13.2 (1.2e-8), so no cancellation for negative x.
inline F gelu(F x) {
    const F t = x < F{} ? -x : x;
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
    const F q = exp(x * x * broadcast(-0.5f)) * g * u;
    return x * (x < F{} ? q : 1.0f - q);
}

inline F silu(F x) { return x / (1.0f + exp(-x)); }

// The tanh form of GELU: x / (1 + e^(-2 s)), s = sqrt(2 / pi) (x + 0.044715 x^3).
inline F gelu_tanh(F x) {
    const F s = x * (x * x * broadcast(0.0356774081f) + broadcast(0.7978845608f));
    return x / (1.0f + exp(s * -2.0f));
}

template <Activation A>
inline F activate(F x) {
    if constexpr (A == Activation::gelu) return gelu(x);
    if constexpr (A == Activation::gelu_tanh) return gelu_tanh(x);
    if constexpr (A == Activation::silu) return silu(x);
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
    const int64_t at = t * a.N + f;
    if (a.scale) v = v * load_some<Number>(static_cast<const Item*>(a.scale) + f, width);
    if (a.residual) v = v + load_some<Number>(static_cast<const Item*>(a.residual) + at, width);
    store_some<Number>(static_cast<Item*>(a.y) + at, v, width);
}

// C [features][stride] holds sums with the bias in them, lanes are tokens. Writes W tokens from t0, features from f0.
// Features run in the inner loop, so that a token's outputs are written one after the other.
template <class Number, Activation A>
struct FinishTokens {
    static void run(const LinearArgs& a, const float* C, int64_t stride, int64_t t0, int64_t f0, int64_t features) {
        const int64_t tokens = a.T - t0 < W ? a.T - t0 : W;
        for (int64_t f = 0; f < features; f += W) {
            const int64_t width = features - f < W ? features - f : W;
            F r[W];
#pragma GCC unroll 16
            for (int i = 0; i < W; ++i) r[i] = activate<A>(load(C + (f + (i < width ? i : width - 1)) * stride));
            transpose(r);
            for (int64_t i = 0; i < tokens; ++i) write<Number>(a, r[i], t0 + i, f0 + f, width);
        }
    }
};

// C [tokens][stride] holds sums without the bias, lanes are outputs. Writes `tokens` from t0, features from f0 up to
// stride.
template <class Number, Activation A>
struct FinishOutputs {
    static void run(const LinearArgs& a, const float* C, int64_t stride, int64_t t0, int64_t tokens, int64_t f0) {
        const auto* bias = static_cast<const typename Number::Item*>(a.bias);
        const int64_t features = a.N - f0 < stride ? a.N - f0 : stride;
        for (int64_t f = 0; f < features; f += W) {
            const int64_t width = features - f < W ? features - f : W;
            const F b = bias ? load_some<Number>(bias + f0 + f, width) : F{};
            for (int64_t i = 0; i < tokens; ++i)
                write<Number>(a, activate<A>(load(C + i * stride + f) + b), t0 + i, f0 + f, width);
        }
    }
};

// Runs one of the two above for the activation that is asked for.
template <template <class, Activation> class Finish, class Number, class... Place>
void finish(const LinearArgs& a, const float* C, Place... place) {
    switch (a.activation) {
        case Activation::none: return Finish<Number, Activation::none>::run(a, C, place...);
        case Activation::gelu: return Finish<Number, Activation::gelu>::run(a, C, place...);
        case Activation::gelu_tanh: return Finish<Number, Activation::gelu_tanh>::run(a, C, place...);
        case Activation::silu: return Finish<Number, Activation::silu>::run(a, C, place...);
        case Activation::relu: return Finish<Number, Activation::relu>::run(a, C, place...);
    }
}
