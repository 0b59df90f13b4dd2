// bitmask: unstructured. float32: strips of one row. bfloat16: entries are paired with their neighbour on the way.

// The pairs of 128 columns that have an entry, as bits, and each pair with its entries, in order. Mask and values lie as in
// the layout; a missing entry is zero. Writes at most 16 floats more than it found.
template <class Entry>
uint64_t native_pair_up(const uint64_t* mask, const Entry* values, uint32_t* pairs);  // defined where native_pairs

inline uint64_t pair_up(const uint64_t* mask, const uint16_t* values, uint32_t* pairs) {
    if constexpr (native_pairs) return native_pair_up<uint16_t>(mask, values, pairs);
    uint64_t found = 0;
    for (int word = 0; word < 2; ++word) {
        for (uint64_t left = mask[word]; left;) {
            const int pair = __builtin_ctzll(left) / 2;
            uint32_t both = 0;
            if (left >> 2 * pair & 1) both = *values++;
            if (left >> 2 * pair & 2) both |= uint32_t(*values++) << 16;
            *pairs++ = both;
            left &= ~(uint64_t(3) << 2 * pair);
            found |= uint64_t(1) << (pair + 32 * word);
        }
    }
    return found;
}

struct BitmaskPairs {
    using Number = BFloat16;
    using Special = BFloat16Structural;
    static constexpr int most_V = max_V;
    const uint16_t* values;
    const uint64_t* masks;  // two words for each segment of 128 columns
    const uint8_t* rows;
    const int64_t* starts;
    int64_t N, col_blocks;

    int64_t height(int64_t rb) const { return N - rb * block_rows < block_rows ? N - rb * block_rows : block_rows; }

    // The pairs of a segment are made while the one before is summed, so that nobody waits for them.
    template <class Number, int V>
    void group(int64_t rb, int64_t kb, const float* P, float* C) const {
        const int64_t count = height(rb), segment = rb * block_rows * col_blocks + kb * count;
        const uint64_t* mask = masks + 2 * segment;
        const uint16_t* w = values + starts[rb * col_blocks + kb];
        uint32_t pairs[2][64 + 16];
        uint64_t next = pair_up(mask, w, pairs[0]);
        for (int64_t i = 0; next; ++i) {
            const uint64_t now = next;
            w += __builtin_popcountll(mask[2 * i]) + __builtin_popcountll(mask[2 * i + 1]);
            next = i + 1 < count ? pair_up(mask + 2 * (i + 1), w, pairs[(i + 1) % 2]) : 0;
            walk<Number, V>(now, reinterpret_cast<const float*>(pairs[i % 2]), P, C + rows[segment + i] * int64_t(V * W));
        }
    }

    bool consistent(int64_t stored, int64_t K) const {
        return strips_consistent<2>(masks, rows, starts, N, block_rows, K, stored);
    }
};

const char* bitmask_linear(const LinearArgs& a) {
    if (a.dtype == DType::float32) return run_strips<1, Float32>(a);
    const BitmaskPairs source{a.parts[0].as<uint16_t>(), a.parts[1].as<uint64_t>(), a.parts[2].as<uint8_t>(),
                              a.parts[3].as<int64_t>(),  a.N, (a.K + 127) / 128};
    if (!source.consistent(a.parts[0].shape[0], a.K)) return "masks, rows, starts and values disagree";
    run_panels(a, source);
    return nullptr;
}
