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

    int64_t row_blocks() const { return (N + block_rows - 1) / block_rows; }
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

// The pairs of a whole weight, stored as `block` stores 1x2: made once for all panels of a call.
struct Expansion {
    const BitmaskPairs& source;
    float* pairs;
    uint64_t* masks;
    int64_t* starts;

    // Where a row block's pairs begin: there are at most as many as entries, and pair_up writes a vector too many.
    int64_t first(int64_t rb) const { return source.starts[rb * source.col_blocks] + 16 * rb; }

    static void expand_all(const void* job, int64_t rb0, int64_t rb1) {
        for (int64_t rb = rb0; rb < rb1; ++rb) static_cast<const Expansion*>(job)->expand(rb);
    }

    void expand(int64_t rb) const {
        const int64_t count = source.height(rb);
        int64_t segment = rb * block_rows * source.col_blocks;
        const uint16_t* w = source.values + source.starts[rb * source.col_blocks];
        int64_t at = first(rb);
        for (int64_t kb = 0; kb < source.col_blocks; ++kb) {
            starts[rb * source.col_blocks + kb] = at;
            for (int64_t i = 0; i < count; ++i, ++segment) {
                const uint64_t* mask = source.masks + 2 * segment;
                masks[segment] = pair_up(mask, w, reinterpret_cast<uint32_t*>(pairs + at));
                w += __builtin_popcountll(mask[0]) + __builtin_popcountll(mask[1]);
                at += __builtin_popcountll(masks[segment]);
            }
        }
    }
};

void expansion_thread(const void* arg, int i, int n) {
    const int64_t row_blocks = static_cast<const Expansion*>(arg)->source.row_blocks();
    Expansion::expand_all(arg, row_blocks * i / n, row_blocks * (i + 1) / n);
}

BitmaskPairs bitmask_pairs(const LinearArgs& a) {
    return {a.parts[0].as<uint16_t>(), a.parts[1].as<uint64_t>(), a.parts[2].as<uint8_t>(),
            a.parts[3].as<int64_t>(),  a.N, (a.K + 127) / 128};
}

// Whether a call of a bfloat16 weight has panels enough to make the pairs first.
inline bool expands_pairs(const LinearArgs& a) { return a.dtype == DType::bfloat16 && a.T > max_V * W; }

// Memory for `use` that takes the pairs of a call.
Expansion pairs_memory(const BitmaskPairs& source, int64_t stored, Scratch use) {
    const int64_t row_blocks = source.row_blocks(), segments = source.N * source.col_blocks;
    const int64_t integers = segments + row_blocks * source.col_blocks;
    float* memory = scratch(size_t(2 * integers + stored + 16 * row_blocks), use);
    auto* masks = reinterpret_cast<uint64_t*>(memory);
    return {source, memory + 2 * integers, masks, reinterpret_cast<int64_t*>(masks + segments)};
}

// The same call with the parts of `block` 1x2 in place of its own. They were checked.
LinearArgs with_pairs(const LinearArgs& a, const Expansion& job) {
    LinearArgs out = a;
    out.parts[0].data = job.pairs;
    out.parts[1].data = job.masks;
    out.parts[3].data = job.starts;
    out.checked = true;
    return out;
}

LinearArgs expand_pairs(const LinearArgs& a, Scratch use) {
    const BitmaskPairs source = bitmask_pairs(a);
    const Expansion job = pairs_memory(source, a.parts[0].shape[0], use);
    const int64_t row_blocks = source.row_blocks();
    parallel(a.threads < row_blocks ? a.threads : int(row_blocks), expansion_thread, &job);
    return with_pairs(a, job);
}

// Whether threads take rows, each the pairs that it made: where panels packed by every thread cost less than pairs read from
// another core, and the row blocks divide well. Measured with two threads: at 788 tokens there is nothing in it, at 1,576 a loss.
inline bool pairs_by_rows(const LinearArgs& a, int64_t row_blocks) {
    return a.threads > 1 && a.T <= 40 * W && (row_blocks % a.threads == 0 || row_blocks >= 8 * a.threads);
}

const char* bitmask_linear(const LinearArgs& a) {
    if (a.dtype == DType::float32) return run_strips<1, Float32>(a);
    const BitmaskPairs source = bitmask_pairs(a);
    if (!a.checked && !source.consistent(a.parts[0].shape[0], a.K)) return strips_damage;
    if (!expands_pairs(a)) {
        run_panels(a, source);
    } else if (pairs_by_rows(a, source.row_blocks())) {
        const Expansion job = pairs_memory(source, a.parts[0].shape[0], Scratch::pairs);
        const LinearArgs expanded = with_pairs(a, job);
        const RowWork row_work{Expansion::expand_all, &job};
        run_panels(expanded, Strips<1, BFloat16>(expanded), &row_work);
    } else {
        return run_strips<1, BFloat16>(expand_pairs(a, Scratch::pairs));
    }
    return nullptr;
}

int bitmask_width(const LinearArgs&) { return max_V; }
