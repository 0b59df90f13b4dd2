// nofm: n kept entries in every group of m columns. Row-major values [N, K / m * n]; one bit per column in the masks.

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

const char* nofm_linear(const LinearArgs& a) {
    const NofM source{a.parts[0].as<float>(), a.parts[1].as<uint64_t>(), a.N, a.K, (a.K + 63) / 64, a.params[0],
                      a.params[1]};
    if (!nofm_consistent(source)) return "a group of the masks does not have exactly n bits";
    run_panels(a, source);
    return nullptr;
}
