// Dense products with outputs in the lanes: x [M][K] lies as the caller has it, B [lanes of K][NV * W] in lanes of 32 bits.

// Adds to acc [M * NV] the products of M rows of x, `stride` items apart, with B, whose lanes are `width` floats apart.
// Few sums take several lanes of K at a time, because an FMA takes four cycles.
template <class Number, int M, int NV>
inline __attribute__((always_inline)) void tile(const typename Number::Item* x, int64_t stride, const float* B,
                                                int64_t width, int64_t K, F* acc) {
    constexpr int per = Number::per_lane, chains = M * NV >= 8 ? 1 : M * NV >= 4 ? 2 : 4;
    const int64_t whole = K / per;
    F sums[chains * M * NV] = {};
    int64_t k = 0;
    for (; k + chains <= whole; k += chains) {
#pragma GCC unroll 4
        for (int u = 0; u < chains; ++u) {
            F b[NV];
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) b[v] = load(B + (k + u) * width + v * W);
#pragma GCC unroll 16
            for (int m = 0; m < M; ++m) {
                const F a = spread(x + m * stride + (k + u) * per);
                F* sum = sums + (u * M + m) * NV;
#pragma GCC unroll 8
                for (int v = 0; v < NV; ++v) sum[v] = Number::multiply_add(sum[v], b[v], a);
            }
        }
    }
    for (; k * per < K; ++k) {  // what is left, and the last column of an odd K: nothing is read past x
        F b[NV];
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) b[v] = load(B + k * width + v * W);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
            typename Number::Item lane[per] = {};
            for (int j = 0; j < per && per * k + j < K; ++j) lane[j] = x[m * stride + per * k + j];
            const F a = spread(lane);
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) sums[m * NV + v] = Number::multiply_add(sums[m * NV + v], b[v], a);
        }
    }
#pragma GCC unroll 4
    for (int u = 0; u < chains; ++u)
#pragma GCC unroll 32
        for (int i = 0; i < M * NV; ++i) acc[i] = acc[i] + sums[u * M * NV + i];
}
