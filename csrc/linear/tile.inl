// Dense products with outputs in the lanes: x [M][lanes] lies as the caller has it, B is packed [lanes][NV * W].

// Adds to acc [M * NV] the products of M rows of x, `stride` items apart, over `lanes` lanes of 32 bits.
template <class Number, int M, int NV>
inline __attribute__((always_inline)) void tile(const typename Number::Item* x, int64_t stride, const float* B,
                                                int64_t lanes, F* acc) {
    for (int64_t k = 0; k < lanes; ++k) {
        F b[NV];
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) b[v] = load(B + (k * NV + v) * W);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
            const F a = spread(x + m * stride + k * Number::per_lane);
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) acc[m * NV + v] = Number::multiply_add(acc[m * NV + v], b[v], a);
        }
    }
}
