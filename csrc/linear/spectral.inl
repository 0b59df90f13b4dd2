// spectral: W = B A + S. The middle x A^T of a panel's tokens joins the panel as more columns, which B multiplies on the
// way through the panel that S takes. A lies in tiles, B in strips of 4 outputs, S as in bitmask.

constexpr int64_t factor_rows = 4;  // outputs of a strip of B (part of the format)

// Adds to C the products of `rows` outputs of a strip of B, `lanes` lanes of it.
template <class Number, int rows, int V>
inline __attribute__((always_inline)) void walk_factor(const float* B, int64_t lanes, const float* P, float* C) {
    F acc[rows * V] = {};
    for (int64_t k = 0; k < lanes; ++k) {
        F x[V];
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) x[v] = load(P + (k * V + v) * W);
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r) {
            const F w = spread(B + k * factor_rows + r);
#pragma GCC unroll 16
            for (int v = 0; v < V; ++v) acc[r * V + v] = Number::multiply_add(acc[r * V + v], w, x[v]);
        }
    }
#pragma GCC unroll 32
    for (int i = 0; i < rows * V; ++i) store(C + i * W, load(C + i * W) + acc[i]);
}

template <class Sparse>
struct Spectral {
    using Number = typename Sparse::Number;
    using Special = typename Sparse::Special;
    static constexpr int most_V = Sparse::most_V < max_V ? Sparse::most_V : max_V;
    Sparse sparse;
    const float *A, *B;
    int64_t N, R, lanes;  // lanes of the middle

    // B is dense: a zero of it multiplies Inf and NaN of the middle as in a product of matrices.
    template <class SparseNumber, int V>
    void group(int64_t rb, int64_t kb, const float* P, float* C) const {
        if (kb < sparse.col_blocks) return sparse.template group<SparseNumber, V>(rb, kb, P, C);
        constexpr int rows = factor_rows * V <= max_sums ? factor_rows : 2 * V <= max_sums ? 2 : 1;
        const int64_t first = (kb - sparse.col_blocks) * 64, count = lanes - first < 64 ? lanes - first : 64;
        const int64_t end = (rb + 1) * block_rows < N ? (rb + 1) * block_rows : N;
        for (int64_t row = rb * block_rows; row < end; row += factor_rows) {
            const float* w = B + (row / factor_rows * lanes + first) * factor_rows;
            for (int64_t r = 0; r < factor_rows; r += rows)
                walk_factor<Number, rows, V>(w + r, count, P, C + (row % block_rows + r) * (V * W));
        }
    }
};

template <class Sparse>
int64_t middle_blocks(const Spectral<Sparse>& source) {
    return (source.lanes + 63) / 64;
}

// The middle is rounded to the dtype of x. Threads that share a panel compute it each.
template <class Sparse>
bool pack_source(const LinearArgs& a, const Spectral<Sparse>& source, int64_t t0, int V, float* P, float* room) {
    using Number = typename Sparse::Number;
    using Item = typename Number::Item;
    const int64_t tokens = a.T - t0 < V * W ? a.T - t0 : V * W;
    LinearArgs middle;
    middle.T = tokens;
    middle.N = source.R;
    middle.K = a.K;
    middle.x = static_cast<const Item*>(a.x) + t0 * a.K;
    middle.y = room;
    run_dense<Number>(middle, source.A);
    middle.K = source.R;
    middle.x = room;
    pack_panel<Number>(middle, 0, V, P + source.sparse.col_blocks * 64 * V * W);
    return pack_panel<Number>(a, t0, V, P);
}

template <class Sparse>
void run_spectral(const LinearArgs& a, const Sparse& sparse) {
    const int64_t R = a.params[0], per = Sparse::Number::per_lane;
    const Spectral<Sparse> source{sparse, a.parts[4].as<float>(), a.parts[5].as<float>(), a.N, R, (R + per - 1) / per};
    run_panels(a, source);
}

template <class Sparse>
bool spectral_consistent(const LinearArgs& a, const Sparse& sparse) {
    return a.checked || sparse.consistent(a.parts[0].shape[0], a.K);
}

const char* spectral_linear(const LinearArgs& a) {
    if (a.dtype == DType::float32) {
        const Strips<1, Float32> sparse(a);
        if (!spectral_consistent(a, sparse)) return strips_damage;
        run_spectral(a, sparse);
        return nullptr;
    }
    const BitmaskPairs sparse = bitmask_pairs(a);
    if (!spectral_consistent(a, sparse)) return strips_damage;
    if (expands_pairs(a)) {
        const LinearArgs expanded = expand_pairs(a, Scratch::pairs);
        run_spectral(expanded, Strips<1, BFloat16>(expanded));
    } else {
        run_spectral(a, sparse);
    }
    return nullptr;
}

int spectral_width(const LinearArgs&) { return 0; }  // the middle is made from rows
