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

// `width` <= W items; the other lanes are zero, and are not read.
template <class Number>
inline F load_part(const typename Number::Item* p, int64_t width) {
    if (width >= W) return Number::load_values(p);
    typename Number::Item row[W] = {};
    for (int64_t j = 0; j < width; ++j) row[j] = p[j];
    return Number::load_values(row);
}

// Scale, residual and store of a token's `width` <= W outputs from feature f, whose activation is done.
template <class Number>
inline void write(const LinearArgs& a, F v, int64_t t, int64_t f, int64_t width) {
    using Item = typename Number::Item;
    const int64_t at = t * a.N + f;
    if (a.scale) v = v * load_part<Number>(static_cast<const Item*>(a.scale) + f, width);
    if (a.residual) v = v + load_part<Number>(static_cast<const Item*>(a.residual) + at, width);
    Item* y = static_cast<Item*>(a.y) + at;
    if (width >= W) return Number::store_values(y, v);
    Item row[W];
    Number::store_values(row, v);
    for (int64_t j = 0; j < width; ++j) y[j] = row[j];
}

// C [features][stride] holds sums with the bias in them, lanes are tokens. Writes W tokens from t0, features from f0.
// Features run in the inner loop, so that a token's outputs are written one after the other.
template <class Number, Activation A>
void finish_tokens(const LinearArgs& a, const float* C, int64_t stride, int64_t t0, int64_t f0, int64_t features) {
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

// C [tokens][stride] holds sums without the bias, lanes are outputs. Writes tokens from t0, features from f0.
template <class Number, Activation A>
void finish_outputs(const LinearArgs& a, const float* C, int64_t stride, int64_t t0, int64_t tokens, int64_t f0,
                    int64_t features) {
    const auto* bias = static_cast<const typename Number::Item*>(a.bias);
    for (int64_t f = 0; f < features; f += W) {
        const int64_t width = features - f < W ? features - f : W;
        const F b = bias ? load_part<Number>(bias + f0 + f, width) : F{};
        for (int64_t i = 0; i < tokens; ++i)
            write<Number>(a, activate<A>(load(C + i * stride + f) + b), t0 + i, f0 + f, width);
    }
}

template <class Number>
void finish(const LinearArgs& a, const float* C, int64_t stride, int64_t t0, int64_t f0, int64_t features) {
    switch (a.activation) {
        case Activation::none: return finish_tokens<Number, Activation::none>(a, C, stride, t0, f0, features);
        case Activation::gelu: return finish_tokens<Number, Activation::gelu>(a, C, stride, t0, f0, features);
        case Activation::gelu_tanh: return finish_tokens<Number, Activation::gelu_tanh>(a, C, stride, t0, f0, features);
        case Activation::silu: return finish_tokens<Number, Activation::silu>(a, C, stride, t0, f0, features);
        case Activation::relu: return finish_tokens<Number, Activation::relu>(a, C, stride, t0, f0, features);
    }
}

template <class Number>
void finish_rows(const LinearArgs& a, const float* C, int64_t stride, int64_t t0, int64_t tokens, int64_t f0, int64_t n) {
    switch (a.activation) {
        case Activation::none: return finish_outputs<Number, Activation::none>(a, C, stride, t0, tokens, f0, n);
        case Activation::gelu: return finish_outputs<Number, Activation::gelu>(a, C, stride, t0, tokens, f0, n);
        case Activation::gelu_tanh: return finish_outputs<Number, Activation::gelu_tanh>(a, C, stride, t0, tokens, f0, n);
        case Activation::silu: return finish_outputs<Number, Activation::silu>(a, C, stride, t0, tokens, f0, n);
        case Activation::relu: return finish_outputs<Number, Activation::relu>(a, C, stride, t0, tokens, f0, n);
    }
}
