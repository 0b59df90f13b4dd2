// bitmask: unstructured. Segments (a row's 64 columns) in groups (row block x column block), by count inside a group.

struct Bitmask {
    const float* values;
    const uint64_t* masks;
    const uint8_t* rows;
    const int64_t* starts;
    int64_t N, col_blocks;

    template <int V>
    void group(int64_t rb, int64_t kb, const float* P, float* C) const {
        const int64_t height = N - rb * block_rows < block_rows ? N - rb * block_rows : block_rows;
        const int64_t segment = rb * block_rows * col_blocks + kb * height;
        const float* w = values + starts[rb * col_blocks + kb];
        for (int64_t i = segment; i < segment + height && masks[i]; ++i)  // the most full first, so the rest is empty
            w = walk<V>(masks[i], w, P, C + rows[i] * int64_t(V * W));
    }
};

// Whether walking the groups stays inside values, C and P, whatever the parts contain.
inline bool bitmask_consistent(const Bitmask& s, int64_t nnz, int64_t K) {
    const uint64_t outside = K % 64 ? ~uint64_t(0) << K % 64 : 0;  // columns that the last block does not have
    const int64_t row_blocks = (s.N + block_rows - 1) / block_rows;
    const uint64_t* mask = s.masks;
    const uint8_t* row = s.rows;
    int64_t at = 0;
    uint64_t bad = 0;
    for (int64_t rb = 0, g = 0; rb < row_blocks; ++rb) {
        const int64_t height = s.N - rb * block_rows < block_rows ? s.N - rb * block_rows : block_rows;
        for (int64_t kb = 0; kb < s.col_blocks; ++kb, ++g, mask += height, row += height) {
            bad |= s.starts[g] != at;
            for (int64_t i = 0; i < height; ++i) {
                at += __builtin_popcountll(mask[i]);
                bad |= row[i] >= height;
                bad |= i > 0 && !mask[i - 1] && mask[i];  // group() stops at the first empty segment
                if (kb == s.col_blocks - 1) bad |= mask[i] & outside;
            }
        }
    }
    bad |= s.starts[row_blocks * s.col_blocks] != at;
    return !bad && at == nnz;
}

const char* bitmask_linear(const LinearArgs& a) {
    const Bitmask source{a.parts[0].as<float>(), a.parts[1].as<uint64_t>(), a.parts[2].as<uint8_t>(),
                         a.parts[3].as<int64_t>(), a.N, (a.K + 63) / 64};
    if (!bitmask_consistent(source, a.parts[0].shape[0], a.K)) return "masks, rows, starts and values disagree";
    run_panels(a, source);
    return nullptr;
}
