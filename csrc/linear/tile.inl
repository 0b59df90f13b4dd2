// Dense products with outputs in the lanes: x lies as the caller has it, the weight in tiles of tile_width outputs,
// [lanes of K][tile_width] lanes of 32 bits each. The format is defined in rmtkern/layouts/tiles.py.

constexpr int tile_width = 32;          // outputs of a tile (part of the format)
constexpr int tile_vectors = 2;         // vectors of outputs that a kernel sums at once
constexpr int tile_tokens = max_sums / tile_vectors;
constexpr int64_t tile_bytes = 512 * 1024;  // of tiles that all tokens pass by: half of a 1-MiB L2

// Adds to acc [M * NV] the products of M rows of x, `stride` items apart, with NV * W outputs of a tile over K columns.
// Few rows take several lanes of K at a time, each with its own sums, because an FMA takes four cycles.
template <class Number, int M, int NV>
inline __attribute__((always_inline)) void tile(const typename Number::Item* x, int64_t stride, const float* B,
                                                int64_t K, F* acc) {
    constexpr int per = Number::per_lane, chains = M == 1 ? 4 : M <= 3 ? 2 : 1;
    const int64_t whole = K / per;
    F sums[chains * M * NV] = {};
    int64_t k = 0;
    for (; k + chains <= whole; k += chains) {
#pragma GCC unroll 4
        for (int u = 0; u < chains; ++u) {
            F b[NV];
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) b[v] = load(B + (k + u) * tile_width + v * W);
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
        for (int v = 0; v < NV; ++v) b[v] = load(B + k * tile_width + v * W);
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
