// dense: our own product, outputs in the lanes. The weight lies in tiles of tile_width outputs, [lanes of K][tile_width]
// lanes of 32 bits each (rmtkern/layouts/tiles.py). Groups of tiles that fit L2 outside, all tokens inside.

constexpr int tile_width = 32;          // outputs of a tile (part of the format)
constexpr int tile_vectors = 2;         // vectors of outputs that a kernel sums at once
constexpr int tile_tokens = max_sums / tile_vectors;
constexpr int64_t tile_bytes = 512 * 1024;  // of tiles that all tokens pass by: half of a 1-MiB L2

struct Dense {
    const LinearArgs& a;
    const float* tiles;
    int64_t blocks, groups, group;  // blocks of tokens; groups of so many tiles
    int block_threads;              // threads form a grid: block_threads x the rest over blocks x groups
};

// Tokens [t0, t0 + M) by the outputs of one tile.
template <class Number, int M>
void dense_tile(const LinearArgs& a, const float* B, int64_t t0, int64_t f0) {
    constexpr int64_t columns = 256 * Number::per_lane;  // summed from zero: rounds less than one chain over all
    float C[M * tile_width];
    const int64_t features = a.N - f0 < tile_width ? a.N - f0 : tile_width;
    const auto* x = static_cast<const typename Number::Item*>(a.x) + t0 * a.K;
    for (int64_t f = 0; f < features; f += tile_vectors * W) {
        F acc[M * tile_vectors] = {};
        for (int64_t k = 0; k < a.K; k += columns)
            tile<Number, M, tile_vectors>(x + k, a.K, B + k / Number::per_lane * tile_width + f, tile_width,
                                          a.K - k < columns ? a.K - k : columns, acc);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
            for (int v = 0; v < tile_vectors; ++v) store(C + m * tile_width + f + v * W, acc[m * tile_vectors + v]);
    }
    finish<FinishOutputs, Number>(a, C, int64_t(tile_width), t0, int64_t(M), f0);
}

template <class Number, int M>
void dense_tile_of(int64_t wanted, const LinearArgs& a, const float* B, int64_t t0, int64_t f0) {
    if (wanted == M) return dense_tile<Number, M>(a, B, t0, f0);
    if constexpr (M > 1) dense_tile_of<Number, M - 1>(wanted, a, B, t0, f0);
}

template <class Number>
void dense_thread(const void* arg, int i, int n) {
    const auto& job = *static_cast<const Dense*>(arg);
    const LinearArgs& a = job.a;
    const int group_threads = n / job.block_threads, bi = i % job.block_threads, gi = i / job.block_threads;
    const int64_t lanes = (a.K + Number::per_lane - 1) / Number::per_lane, all = (a.N + tile_width - 1) / tile_width;
    const int64_t g0 = job.groups * gi / group_threads, g1 = job.groups * (gi + 1) / group_threads;
    const int64_t b0 = job.blocks * bi / job.block_threads, b1 = job.blocks * (bi + 1) / job.block_threads;
    for (int64_t g = g0; g < g1; ++g) {
        const int64_t last = (g + 1) * job.group < all ? (g + 1) * job.group : all;
        for (int64_t b = b0; b < b1; ++b) {
            const int64_t t0 = a.T * b / job.blocks, t1 = a.T * (b + 1) / job.blocks;
            for (int64_t j = g * job.group; j < last; ++j)
                dense_tile_of<Number, tile_tokens>(t1 - t0, a, job.tiles + j * lanes * tile_width, t0, j * tile_width);
        }
    }
}

// Splits rows x columns of work over at most `threads` threads so that the busiest has the least. Returns how many share
// the rows; threads becomes how many there are.
inline int grid(int& threads, int64_t rows, int64_t columns) {
    const int most = threads;
    if (threads > rows * columns) threads = int(rows * columns);
    int64_t least = INT64_MAX;
    int best = 1;
    for (int d = threads; d >= 1; --d) {
        const int r = threads / d;
        if (d * r != threads || d > rows || r > columns) continue;
        const int64_t busiest = ((rows + d - 1) / d) * ((columns + r - 1) / r);
        if (busiest < least) {
            least = busiest;
            best = d;
        }
    }
    if (least == INT64_MAX) {  // no grid of that many threads fits: fall back to the larger side
        threads = int(rows > columns ? (threads < rows ? threads : rows) : columns);
        best = rows > columns ? threads : 1;
        if (threads > most) threads = most;
    }
    return best;
}

// y = epilogue(x W^T) with the weight in tiles.
template <class Number>
void run_dense(const LinearArgs& a, const float* tiles) {
    const int64_t lanes = (a.K + Number::per_lane - 1) / Number::per_lane, all = (a.N + tile_width - 1) / tile_width;
    Dense job{a, tiles, (a.T + tile_tokens - 1) / tile_tokens, 0, tile_bytes / (lanes * tile_width * 4), 1};
    const int64_t most = (all + a.threads - 1) / a.threads;  // so that each thread has a group
    if (job.group > most) job.group = most;
    if (job.group < 1) job.group = 1;
    job.groups = (all + job.group - 1) / job.group;
    int threads = a.threads;
    job.block_threads = grid(threads, job.blocks, job.groups);
    parallel(threads, dense_thread<Number>, &job);
}

const char* dense_linear(const LinearArgs& a) {
    if (a.dtype == DType::float32) run_dense<Float32>(a, a.parts[0].as<float>());
    else run_dense<BFloat16>(a, a.parts[0].as<float>());
    return nullptr;
}

int dense_width(const LinearArgs&) { return 0; }
