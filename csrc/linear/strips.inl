// Strips: R consecutive rows that share one mask, so that one load of the panel feeds R rows. A column is a float, or a
// pair of bfloat16. Segments (a strip's 64 columns) lie in groups (row block x column block), by count inside a group.

constexpr char strips_damage[] = "masks, rows, starts and values disagree";

// Adds one strip's weights in one column block to C, R rows of it: bit k of mask is set where column k has the next R of
// `values`, one for each row.
template <class Number, int R, int V>
inline __attribute__((always_inline)) const float* walk_strip(uint64_t mask, const float* values, const float* P,
                                                              float* C) {
    F acc[R * V] = {};
    while (mask) {
        const float* p = P + uint64_t(__builtin_ctzll(mask)) * (V * W);
        mask &= mask - 1;
        F x[V];
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) x[v] = load(p + v * W);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const F w = spread(values + r);
#pragma GCC unroll 16
            for (int v = 0; v < V; ++v) acc[r * V + v] = Number::multiply_add(acc[r * V + v], w, x[v]);
        }
        values += R;
    }
#pragma GCC unroll 32
    for (int i = 0; i < R * V; ++i) store(C + i * W, load(C + i * W) + acc[i]);
    return values;
}

// Whether walking the groups stays inside values (`stored` units), C and P, whatever the parts contain. A segment's mask has
// `words` words; `units` is how many a row has.
template <int words>
bool strips_consistent(const uint64_t* mask, const uint8_t* row, const int64_t* starts, int64_t strips, int64_t block_strips,
                       int64_t units, int64_t stored) {
    const int64_t col_blocks = (units + 64 * words - 1) / (64 * words);
    uint64_t outside[words] = {};  // units that the last column block does not have
    for (int64_t u = units - (col_blocks - 1) * 64 * words; u < 64 * words; ++u) outside[u / 64] |= uint64_t(1) << u % 64;
    int64_t at = 0, group = 0;
    uint64_t bad = 0;
    for (int64_t first = 0; first < strips; first += block_strips) {
        const int64_t count = strips - first < block_strips ? strips - first : block_strips;
        for (int64_t kb = 0; kb < col_blocks; ++kb, ++group) {
            bad |= starts[group] != at;
            uint64_t before = 1;
            for (int64_t i = 0; i < count; ++i, mask += words, ++row) {
                uint64_t any = 0;
                for (int w = 0; w < words; ++w) {
                    any |= mask[w];
                    at += __builtin_popcountll(mask[w]);
                    if (kb == col_blocks - 1) bad |= mask[w] & outside[w];
                }
                bad |= *row >= count;
                bad |= !before && any;  // group() stops at the first empty segment
                before = any;
            }
        }
    }
    bad |= starts[group] != at;
    return !bad && at == stored;
}

template <int R, class Number_>
struct Strips {
    using Number = Number_;
    using Special = std::conditional_t<std::is_same_v<Number, BFloat16>, BFloat16Structural, Number>;
    static constexpr int most_V = R == 1 && Number::per_lane == 2   ? max_V_pairs
                                  : R == 1 || max_sums / R > max_V ? max_V
                                                                    : max_sums / R;
    static constexpr int64_t block_strips = block_rows / R;
    const float* values;
    const uint64_t* masks;
    const uint8_t* rows;
    const int64_t* starts;
    int64_t strips, col_blocks;

    Strips(const LinearArgs& a)
        : values(a.parts[0].as<float>()), masks(a.parts[1].as<uint64_t>()), rows(a.parts[2].as<uint8_t>()),
          starts(a.parts[3].as<int64_t>()), strips((a.N + R - 1) / R),
          col_blocks((a.K + 64 * Number::per_lane - 1) / (64 * Number::per_lane)) {}

    int64_t height(int64_t rb) const {
        return strips - rb * block_strips < block_strips ? strips - rb * block_strips : block_strips;
    }

    template <class PanelNumber, int V>
    void group(int64_t rb, int64_t kb, const float* P, float* C) const {
        const int64_t count = height(rb), segment = rb * block_strips * col_blocks + kb * count;
        const float* w = values + R * starts[rb * col_blocks + kb];
        for (int64_t i = segment; i < segment + count && masks[i]; ++i) {  // the most full first, so the rest is empty
            float* c = C + rows[i] * int64_t(R * V * W);
            if constexpr (R == 1) w = walk<PanelNumber, V>(masks[i], w, P, c);
            else w = walk_strip<PanelNumber, R, V>(masks[i], w, P, c);
        }
    }

    bool consistent(int64_t stored, int64_t K) const {
        const int64_t columns = (K + Number::per_lane - 1) / Number::per_lane;
        return strips_consistent<1>(masks, rows, starts, strips, block_strips, columns, stored);
    }
};

template <int R, class Number>
const char* run_strips(const LinearArgs& a) {
    const Strips<R, Number> source(a);
    if (!a.checked && !source.consistent(a.parts[0].shape[0], a.K)) return strips_damage;
    run_panels(a, source);
    return nullptr;
}
