// 2:4 of bfloat16 with tokens in the lanes, the pattern shared by the four rows of a strip. A slice of a panel is spread out
// once for all rows: for every group of four columns its six pairs of two, so that a kept pair is one load.

constexpr int64_t strip_rows = 4;    // part of the format
constexpr int64_t code_groups = 16;  // groups of a segment; a word has their codes, four bits each (part of the format)

struct Picks {
    using Number = BFloat16;
    using Special = BFloat16Structural;
    // four vectors of tokens, so that a slice is 24 KiB of a 32-KiB L1
    static constexpr int most_V = max_sums / strip_rows < 4 ? max_sums / strip_rows : 4;
    static constexpr int64_t block_strips = block_rows / strip_rows;
    const float* values;    // segment by segment, four pairs for each group
    const uint64_t* codes;  // a word for each segment
    int64_t strips, groups, words;

    Picks(const LinearArgs& a)
        : values(a.parts[0].as<float>()), codes(a.parts[1].as<uint64_t>()),
          strips((a.N + strip_rows - 1) / strip_rows), groups(a.K / 4), words((groups + code_groups - 1) / code_groups) {}

    // Adds a group: four rows' pairs at w, times the columns that the code names.
    template <class PanelNumber, int V>
    static inline __attribute__((always_inline)) void add(uint64_t code, const float* w, const float* P, F* acc) {
        const float* p = P + int64_t(code & 15) * (V * W);
        F x[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) x[v] = load(p + v * W);
#pragma GCC unroll 4
        for (int r = 0; r < strip_rows; ++r) {
            const F pair = spread(w + r);
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) acc[r * V + v] = PanelNumber::multiply_add(acc[r * V + v], pair, x[v]);
        }
    }

    template <class PanelNumber, int V>
    void group(int64_t rb, int64_t kb, const float* P, float* C) const {
        const int64_t first = rb * block_strips, count = strips - first < block_strips ? strips - first : block_strips;
        const int64_t before = kb * code_groups, length = groups - before < code_groups ? groups - before : code_groups;
        const uint64_t* code = codes + first * words + kb * count;
        const float* w = values + strip_rows * (first * groups + before * count);
        for (int64_t i = 0; i < count; ++i, w += strip_rows * length, C += strip_rows * V * W) {
            F acc[strip_rows * V] = {};
            if (length == code_groups) {
#pragma GCC unroll 16
                for (int g = 0; g < code_groups; ++g)
                    add<PanelNumber, V>(code[i] >> 4 * g, w + strip_rows * g, P + g * (6 * V * W), acc);
            } else {
                for (int64_t g = 0; g < length; ++g)
                    add<PanelNumber, V>(code[i] >> 4 * g, w + strip_rows * g, P + g * (6 * V * W), acc);
            }
#pragma GCC unroll 16
            for (int j = 0; j < strip_rows * V; ++j) store(C + j * W, load(C + j * W) + acc[j]);
        }
    }

    // Whether every code is one of the six.
    bool consistent() const {
        uint64_t bad = 0;
        for (int64_t i = 0; i < strips * words; ++i)
            bad |= (codes[i] & 0x8888888888888888) | (codes[i] & codes[i] >> 1 & 0x2222222222222222);
        return !bad;
    }
};

template <>
constexpr int64_t block_lanes<Picks> = 2 * code_groups;
template <>
constexpr int64_t slice_lanes<Picks> = 6 * code_groups;

// The pairs in the order of their codes: columns 01, 02, 03, 12, 13, 23 (part of the format).
template <int V>
void prepare_slice(const Picks&, const float* P, float* slice) {
    for (int64_t g = 0; g < code_groups; ++g, P += 2 * V * W, slice += 6 * V * W) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            const U a = reinterpret_cast<U>(load(P + v * W)), b = reinterpret_cast<U>(load(P + (V + v) * W));
            const U low_a = a & 0xffffu, high_a = a >> 16, low_b = b << 16, high_b = b & 0xffff0000u;
            float* to = slice + v * W;
            store(to, reinterpret_cast<F>(a));
            store(to + V * W, reinterpret_cast<F>(low_a | low_b));
            store(to + 2 * V * W, reinterpret_cast<F>(low_a | high_b));
            store(to + 3 * V * W, reinterpret_cast<F>(high_a | low_b));
            store(to + 4 * V * W, reinterpret_cast<F>(high_a | high_b));
            store(to + 5 * V * W, reinterpret_cast<F>(b));
        }
    }
}

const char* run_picks(const LinearArgs& a) {
    const Picks source(a);
    if (!a.checked && !source.consistent()) return "a code is none of the six pairs of four columns";
    run_panels(a, source);
    return nullptr;
}
