// nofm: n kept entries in every group of m columns.
// float32, any n:m: row-major values [N, K / m * n]; one bit per column in the masks.
// bfloat16, 2:4 with a pattern that four rows share: picks.inl.
// bfloat16, 2:4 of each row: outputs in the lanes. Tiles of 16 rows: values [K / 4][16] pairs, and which two of a group's four columns a
// pair multiplies: bytes for the shuffle that picks them from a token's four activations, two groups to a byte, so that a
// shift is all the decoding.

struct NofM {
    using Number = Float32;
    using Special = Number;
    static constexpr int most_V = max_V;
    const float* values;
    const uint64_t* masks;
    int64_t N, K, col_blocks, n, m;

    template <class, int V>
    void group(int64_t rb, int64_t kb, const float* P, float* C) const {
        const int64_t r0 = rb * block_rows, r1 = r0 + block_rows < N ? r0 + block_rows : N;
        const int64_t row_values = K / m * n, before = kb * 64 / m * n;
        const int64_t cut = kb * 64 % m;  // columns of a group that began in the block before
        for (int64_t r = r0; r < r1; ++r) {
            const uint64_t* mask = masks + r * col_blocks + kb;
            const float* w = values + r * row_values + before;
            if (cut) w += __builtin_popcountll(mask[-1] >> (64 - cut));
            __builtin_prefetch(w + 4 * row_values);
            __builtin_prefetch(w + 4 * row_values + 16);
            __builtin_prefetch(mask + 8 * col_blocks);
            walk<Number, V>(*mask, w, P, C + (r - r0) * int64_t(V * W));
        }
    }
};

// The number of set bits in each field of m bits, m a power of two up to 16.
inline uint64_t count_fields(uint64_t x, int64_t m) {
    if (m >= 2) x -= x >> 1 & 0x5555555555555555;
    if (m >= 4) x = (x & 0x3333333333333333) + (x >> 2 & 0x3333333333333333);
    if (m >= 8) x = (x + (x >> 4)) & 0x0f0f0f0f0f0f0f0f;
    if (m >= 16) x = (x + (x >> 8)) & 0x00ff00ff00ff00ff;
    return x;
}

// Whether every group has exactly n bits, which is what keeps a walk inside its row of values and of P.
inline bool nofm_consistent(const NofM& s) {
    uint64_t bad = 0;
    const uint64_t group = (uint64_t(1) << s.m) - 1, all = ~uint64_t(0);
    const uint64_t inside = s.K % 64 ? all >> (64 - s.K % 64) : all;  // columns that the last word has
    const uint64_t expected = all / group * uint64_t(s.n);            // n in each field, if m divides 64
    for (int64_t r = 0; r < s.N; ++r) {
        const uint64_t* mask = s.masks + r * s.col_blocks;
        bad |= mask[s.col_blocks - 1] & ~inside;
        if (64 % s.m == 0) {
            for (int64_t b = 0; b < s.col_blocks - 1; ++b) bad |= count_fields(mask[b], s.m) ^ expected;
            bad |= count_fields(mask[s.col_blocks - 1], s.m) ^ (expected & inside);
            continue;
        }
        for (int64_t k = 0; k < s.K; k += s.m) {
            const int64_t shift = k % 64;
            uint64_t bits = mask[k / 64] >> shift;
            if (shift + s.m > 64) bits |= mask[k / 64 + 1] << (64 - shift);
            bad |= __builtin_popcountll(bits & group) != s.n;
        }
    }
    return !bad;
}

// The two bfloat16 of `quad` (four of them) that each lane's control names: its bytes are 2 c0, 2 c0 + 1, 2 c1, 2 c1 + 1 in
// their lowest four bits, and the highest bit is 0, as vpshufb has it.
template <class Quad>
inline __attribute__((always_inline)) F native_pick(Quad quad, U control);  // defined where native_pairs

inline __attribute__((always_inline)) F pick(uint64_t quad, U control) {
    if constexpr (native_pairs) return native_pick(quad, control);
    else {
        const U low = uint32_t(quad) - U{}, high = uint32_t(quad >> 32) - U{};
        const U first = (control & 4u) != 0u ? high : low, second = (control & 0x40000u) != 0u ? high : low;
        return reinterpret_cast<F>(((control & 2u) != 0u ? first >> 16 : first & 0xffffu) |
                                   ((control & 0x20000u) != 0u ? second & 0xffff0000u : second << 16));
    }
}

constexpr int rows_of_tile = 16;
constexpr int step_vectors = (W == 16 ? 2 : 1) * rows_of_tile / W;  // of outputs in a step; on AVX-512 two tiles
constexpr int step_tokens = W == 16 ? 11 : 16 / step_vectors / 2;   // whose sums, with the vectors, fit the registers
constexpr int64_t chunk_bytes = 256 * 1024;                         // of x that stays in L2 while all tiles pass

struct TwoOfFour {
    const LinearArgs& a;
    const float* values;    // [tiles][groups][rows_of_tile] pairs
    const float* controls;  // [tiles][(groups + 1) / 2][rows_of_tile] of 32 bits
    int64_t groups, steps;  // steps: step_vectors * W outputs each; the last one may have a tile that is not there
    int token_threads;

    // Adds group g; the control of an odd one is the upper half of each byte.
    template <int M>
    inline __attribute__((always_inline)) void add_group(const uint16_t* x, const float* const* w, int64_t g, const U* control,
                                                         F* sums) const {
        constexpr int per_tile = rows_of_tile / W;
        F pairs[step_vectors];
#pragma GCC unroll 8
        for (int v = 0; v < step_vectors; ++v) pairs[v] = load(w[v / per_tile] + g * rows_of_tile + v % per_tile * W);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
            uint64_t quad;
            __builtin_memcpy(&quad, x + m * a.K + 4 * g, 8);
#pragma GCC unroll 8
            for (int v = 0; v < step_vectors; ++v)
                sums[m * step_vectors + v] =
                    BFloat16::multiply_add(sums[m * step_vectors + v], pairs[v], pick(quad, control[v]));
        }
    }

    // Tokens t0 ... t0 + M - 1, outputs of one step.
    template <int M>
    void block(int64_t t0, int64_t step) const {
        constexpr int per_tile = rows_of_tile / W, tiles = step_vectors / per_tile;
        const int64_t f0 = step * step_vectors * W, all = (a.N + rows_of_tile - 1) / rows_of_tile;
        const uint16_t* x = static_cast<const uint16_t*>(a.x) + t0 * a.K;
        const float *w[tiles], *c[tiles];
        for (int i = 0; i < tiles; ++i) {  // a tile that is not there repeats the last one; its sums are not stored
            const int64_t tile = step * tiles + i < all ? step * tiles + i : all - 1;
            w[i] = values + tile * groups * rows_of_tile;
            c[i] = controls + tile * ((groups + 1) / 2) * rows_of_tile;
        }
        F sums[M * step_vectors] = {};
        U control[step_vectors];
        for (int64_t g = 0; g + 1 < groups; g += 2) {
#pragma GCC unroll 8
            for (int v = 0; v < step_vectors; ++v)
                control[v] = reinterpret_cast<U>(load(c[v / per_tile] + g / 2 * rows_of_tile + v % per_tile * W));
            add_group<M>(x, w, g, control, sums);
#pragma GCC unroll 8
            for (int v = 0; v < step_vectors; ++v) control[v] >>= 4;
            add_group<M>(x, w, g + 1, control, sums);
        }
        if (groups % 2) {
            for (int v = 0; v < step_vectors; ++v)
                control[v] = reinterpret_cast<U>(load(c[v / per_tile] + groups / 2 * rows_of_tile + v % per_tile * W));
            add_group<M>(x, w, groups - 1, control, sums);
        }
        finish<FinishOutputs, BFloat16>(a, reinterpret_cast<const float*>(sums), int64_t(step_vectors * W), t0, int64_t(M), f0);
    }

    template <int M>
    void block_of(int wanted, int64_t t0, int64_t step) const {
        if (wanted == M) return block<M>(t0, step);
        if constexpr (M > 1) block_of<M - 1>(wanted, t0, step);
    }
};

void two_of_four_thread(const void* arg, int i, int n) {
    const auto& job = *static_cast<const TwoOfFour*>(arg);
    const int step_threads = n / job.token_threads, ti = i % job.token_threads, si = i / job.token_threads;
    const int64_t t0 = job.a.T * ti / job.token_threads, t1 = job.a.T * (ti + 1) / job.token_threads;
    const int64_t s0 = job.steps * si / step_threads, s1 = job.steps * (si + 1) / step_threads;
    const int64_t blocks = (t1 - t0 + step_tokens - 1) / step_tokens;
    int64_t chunk = chunk_bytes / (2 * job.a.K * step_tokens);
    if (chunk < 1) chunk = 1;
    for (int64_t first = 0; first < blocks; first += chunk) {
        const int64_t last = first + chunk < blocks ? first + chunk : blocks;
        for (int64_t step = s0; step < s1; ++step) {
            for (int64_t b = first; b < last; ++b) {
                const int64_t from = t0 + (t1 - t0) * b / blocks, to = t0 + (t1 - t0) * (b + 1) / blocks;
                job.block_of<step_tokens>(int(to - from), from, step);
            }
        }
    }
}

const char* two_of_four(const LinearArgs& a) {
    TwoOfFour job{a, a.parts[0].as<float>(), a.parts[1].as<float>(), a.K / 4,
                  (a.N + step_vectors * W - 1) / (step_vectors * W), 1};
    // tokens are split first, so that each thread's x stays its own; with few of them, the outputs
    int threads = a.threads;
    if (a.T >= int64_t(threads) * step_tokens) job.token_threads = threads;
    else if (threads > job.steps) threads = int(job.steps);
    parallel(threads, two_of_four_thread, &job);
    return nullptr;
}

const char* nofm_linear(const LinearArgs& a) {
    if (a.n_params == 3) return run_picks(a);
    if (a.dtype == DType::bfloat16) return two_of_four(a);
    const NofM source{a.parts[0].as<float>(), a.parts[1].as<uint64_t>(), a.N, a.K, (a.K + 63) / 64, a.params[0],
                      a.params[1]};
    if (!a.checked && !nofm_consistent(source)) return "a group of the masks does not have exactly n bits";
    run_panels(a, source);
    return nullptr;
}

int nofm_width(const LinearArgs& a) {
    if (a.n_params == 3) return Picks::most_V;
    return a.dtype == DType::bfloat16 ? 0 : NofM::most_V;
}
