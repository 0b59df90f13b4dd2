// Attention: softmax(q k^T scale + mask) v, a few queries at a time, so that their scores never leave the cache. K and
// V of a block of keys are packed once for many queries; more keys than a block are joined by running maxima and sums
// (Milakov & Gimelshein 2018; Dao et al. 2022). Both products are tile(), with a row of queries or of probabilities
// spread. Number is the format in memory, Math that of the products: bfloat16 without a native dot product is packed as
// floats.

constexpr int query_rows = max_sums >= 24 ? 6 : 3;           // rows x vectors of sums in registers
constexpr int most_vectors = max_sums / query_rows;
constexpr int64_t block_queries = 24;                        // share a slice of K in L1; a multiple of query_rows
constexpr int64_t attention_floats = 96 * 1024;              // of scratch memory, while d <= 256: 384 KiB of a 1-MiB L2
constexpr int64_t state_floats = 12 * 1024;                  // of unfinished outputs, when keys come in several blocks

inline int64_t ceil_to(int64_t n, int64_t m) { return (n + m - 1) / m * m; }

// The next panel of at most `most` of `left` vectors, such that all panels are about as wide.
inline int panel_of(int64_t left, int most) {
    const int64_t panels = (left + most - 1) / most;
    return int((left + panels - 1) / panels);
}

template <int... i>
inline I lane_numbers(std::integer_sequence<int, i...>) {
    return I{i...};
}

template <class Number, class Math>
struct Attention {
    using Item = typename Number::Item;
    using MathItem = typename Math::Item;
    static constexpr int per = Math::per_lane;
    const AttentionArgs& a;
    int64_t lanes, wide, row_items;   // lanes of a query; d in whole vectors of floats; d in whole vectors of items
    int64_t unit, units;              // queries of a head that a thread takes at a time, and such units of a head
    int64_t key_blocks, block, line;  // blocks of keys, keys in one, floats from one row of scores to the next

    Attention(const AttentionArgs& args) : a(args) {
        lanes = (a.d + per - 1) / per;
        wide = ceil_to(a.d, W);
        row_items = ceil_to(a.d, per * W);
        const int64_t chunk = state_floats / wide / block_queries * block_queries;
        const int64_t free = attention_floats - (block_queries + W) * row_items / per - state_floats;
        int64_t most = free / (lanes + wide / per + block_queries) / W * W - W;
        if (most < 4 * W) most = 4 * W;
        key_blocks = (a.Tk + most - 1) / most;
        block = ceil_to((a.Tk + key_blocks - 1) / key_blocks, W);
        line = block + W;  // so that rows of a power of two do not share their sets of the cache
        unit = key_blocks == 1 || chunk < block_queries ? block_queries : chunk;
        units = (a.Tq + unit - 1) / unit;
    }

    struct Memory {
        float *K, *V, *S, *Q, *stage, *out, *most, *sum;
    };

    size_t floats() const {
        return size_t(lanes * block + block / per * wide + block_queries * line +
                      (block_queries + W) * row_items / per + (key_blocks > 1 ? unit * wide : 0) + 2 * unit);
    }

    Memory divide(float* p) const {
        Memory m;
        m.K = p;
        m.V = m.K + lanes * block;
        m.S = m.V + block / per * wide;
        m.Q = m.S + block_queries * line;
        m.stage = m.Q + block_queries * row_items / per;
        m.out = m.stage + W * row_items / per;
        m.most = m.out + (key_blocks > 1 ? unit * wide : 0);
        m.sum = m.most + unit;
        return m;
    }

    // `there` rows of d items -> rows of row_items, `rows` of them; what is not there is zero.
    void copy_rows(const Item* from, int64_t stride, int64_t there, int64_t rows, float* to) const {
        auto* items = reinterpret_cast<MathItem*>(to);
        for (int64_t r = 0; r < rows; ++r, items += row_items) {
            int64_t c = 0;
            for (; r < there && c < a.d; c += W)
                Math::store_values(items + c, load_some<Number>(from + r * stride + c, a.d - c < W ? a.d - c : W));
            for (; c < row_items; c += W) Math::store_values(items + c, F{});
        }
    }

    // Keys [n, d] -> panels [lanes][vectors * W], lanes are keys.
    void pack_keys(const Item* k, int64_t n, float* stage, float* out) const {
        const int64_t vectors = (n + W - 1) / W;
        for (int64_t v = 0; v < vectors;) {
            const int width = panel_of(vectors - v, most_vectors);
            for (int i = 0; i < width; ++i, ++v) {
                copy_rows(k + v * W * a.k_stride[2], a.k_stride[2], n - v * W, W, stage);
                for (int64_t lane = 0; lane < lanes; lane += W) {
                    F r[W];
#pragma GCC unroll 16
                    for (int key = 0; key < W; ++key) r[key] = load(stage + key * (row_items / per) + lane);
                    transpose(r);
                    if (lane + W <= lanes) {
#pragma GCC unroll 16
                        for (int j = 0; j < W; ++j) store(out + ((lane + j) * width + i) * W, r[j]);
                    } else {
                        for (int j = 0; lane + j < lanes; ++j) store(out + ((lane + j) * width + i) * W, r[j]);
                    }
                }
            }
            out += lanes * width * W;
        }
    }

    // Values [n, d] -> panels [key lanes][vectors * W], lanes are outputs; in bfloat16 two keys make a lane.
    void pack_values(const Item* v, int64_t n, float* out) const {
        const int64_t key_lanes = (n + per - 1) / per;
        for (int64_t first = 0; first < wide / W;) {
            const int width = panel_of(wide / W - first, most_vectors);
            for (int64_t lane = 0; lane < key_lanes; ++lane) {
                for (int i = 0; i < width; ++i) {
                    const int64_t c = (first + i) * W, columns = a.d - c < W ? a.d - c : W;
                    const Item *one = v + lane * per * a.v_stride[2] + c, *two = one + a.v_stride[2];
                    F r = load_some<Number>(one, columns);
                    if constexpr (per == 2) {  // a bfloat16 is the upper half of the float it is
                        U both = reinterpret_cast<U>(r) >> 16;
                        if (lane * 2 + 1 < n) both |= reinterpret_cast<U>(load_some<Number>(two, columns));
                        r = reinterpret_cast<F>(both);
                    }
                    store(out + (lane * width + i) * W, r);
                }
            }
            out += key_lanes * width * W;
            first += width;
        }
    }

    // Scores of query_rows queries and NV vectors of keys, `n` of them there; top [query_rows] takes the maxima.
    template <int NV>
    void score(const MathItem* q, const float* K, int64_t n, const Item* const* mask, float* S, F* top) const {
        const I numbers = lane_numbers(std::make_integer_sequence<int, W>{});
        F sums[query_rows * NV] = {};
        tile<Math, query_rows, NV>(q, row_items, K, NV * W, lanes * per, sums);
        for (int m = 0; m < query_rows; ++m) {
            for (int v = 0; v < NV; ++v) {
                const int64_t left = n - v * W;
                F s = sums[m * NV + v] * broadcast(a.scale);
                if (mask) s = s + load_some<Number>(mask[m] + v * W, left < W ? left : W);
                if (left < W) s = numbers < int32_t(left) ? s : broadcast(-__builtin_inff());
                store(S + m * line + v * W, s);
                top[m] = s > top[m] ? s : top[m];
            }
        }
    }

    template <int NV>
    void score_of(int wanted, const MathItem* q, const float* K, int64_t n, const Item* const* mask, float* S,
                  F* top) const {
        if (wanted == NV) return score<NV>(q, K, n, mask, S, top);
        if constexpr (NV > 1) score_of<NV - 1>(wanted, q, K, n, mask, S, top);
    }

    // Scores of one query -> probabilities up to their sum, in the same place; by what its outputs so far shrink.
    float soften(float* S, int64_t n, F top, float* most, float* sum) const {
        float best = *most;
        for (int j = 0; j < W; ++j) best = best > top[j] ? best : top[j];
        const float base = best == -__builtin_inff() ? 0.0f : best;  // no key so far: each is e^-inf
        const float shrink = *most == -__builtin_inff() ? 0.0f : exp_falling<Number>(broadcast(*most - base))[0];
        auto* p = reinterpret_cast<MathItem*>(S);
        F total = {};
        for (int64_t i = 0; i < n; i += W) {
            const F e = exp_falling<Number>(load(S + i) - broadcast(base));
            total = total + e;
            Math::store_values(p + i, e);
        }
        float added = 0;
        for (int j = 0; j < W; ++j) added += total[j];
        *sum = *sum * shrink + added;
        *most = best;
        return shrink;
    }

    // Adds query_rows rows of P times NV vectors of V to the outputs; y takes `there` rows, null
    // before the last block.
    template <int NV>
    void weigh(const MathItem* p, const float* V, int64_t key_lanes, const float* shrink, float* out, const float* sum,
               Item* y, int64_t there, int64_t columns) const {
        F sums[query_rows * NV] = {};
        if (out && shrink)
            for (int m = 0; m < query_rows; ++m)
                for (int v = 0; v < NV; ++v) sums[m * NV + v] = load(out + m * wide + v * W) * broadcast(shrink[m]);
        tile<Math, query_rows, NV>(p, line * per, V, NV * W, key_lanes * per, sums);
        if (!y) {
            for (int m = 0; m < query_rows; ++m)
                for (int v = 0; v < NV; ++v) store(out + m * wide + v * W, sums[m * NV + v]);
            return;
        }
        for (int m = 0; m < query_rows && m < there; ++m) {
            const F part = broadcast(sum[m] == 0.0f ? 0.0f : 1.0f / sum[m]);  // a query that sees no key gets zeros
            for (int v = 0; v < NV; ++v) {
                store_some<Number>(y + m * a.H * a.d + v * W, sums[m * NV + v] * part, columns - v * W);
            }
        }
    }

    template <int NV>
    void weigh_of(int wanted, const MathItem* p, const float* V, int64_t key_lanes, const float* shrink, float* out,
                  const float* sum, Item* y, int64_t there, int64_t columns) const {
        if (wanted == NV) return weigh<NV>(p, V, key_lanes, shrink, out, sum, y, there, columns);
        if constexpr (NV > 1) weigh_of<NV - 1>(wanted, p, V, key_lanes, shrink, out, sum, y, there, columns);
    }

    // `there` queries, at most block_queries, against the packed block of n keys from `first`.
    void run(const Memory& m, const Item* q, const Item* mask, int64_t there, int64_t first, int64_t n, float* out,
             float* most, float* sum, Item* y) const {
        const int64_t rows = ceil_to(there, query_rows);
        const bool last = first + n == a.Tk;
        copy_rows(q, a.q_stride[2], there, rows, m.Q);
        const Item* masks[block_queries];
        F top[block_queries];
        float shrink[block_queries];
        for (int64_t r = 0; r < rows; ++r) {
            if (mask) masks[r] = mask + (r < there ? r : there - 1) * a.mask_stride[2] + first;
            top[r] = broadcast(-__builtin_inff());
            if (first == 0) most[r] = -__builtin_inff(), sum[r] = 0;
        }
        const MathItem* block_q = reinterpret_cast<const MathItem*>(m.Q);
        const Item* row_masks[query_rows];
        const float* panel = m.K;
        for (int64_t s = 0; s < n;) {  // panels outside: a slice of K stays in L1
            const int width = panel_of((n - s + W - 1) / W, most_vectors);
            for (int64_t r = 0; r < rows; r += query_rows) {
                for (int i = 0; mask && i < query_rows; ++i) row_masks[i] = masks[r + i] + s;
                score_of<most_vectors>(width, block_q + r * row_items, panel, n - s, mask ? row_masks : nullptr,
                                       m.S + r * line + s, top + r);
            }
            panel += lanes * width * W;
            s += width * W;
        }
        for (int64_t r = 0; r < rows; ++r) shrink[r] = soften(m.S + r * line, n, top[r], most + r, sum + r);
        const int64_t key_lanes = (n + per - 1) / per;
        panel = m.V;
        for (int64_t c = 0; c < wide;) {
            const int width = panel_of((wide - c) / W, most_vectors);
            for (int64_t r = 0; r < rows; r += query_rows)
                weigh_of<most_vectors>(width, reinterpret_cast<const MathItem*>(m.S + r * line), panel, key_lanes,
                                       first ? shrink + r : nullptr, out ? out + r * wide + c : nullptr, sum + r,
                                       last ? y + r * a.H * a.d + c : nullptr, there - r, a.d - c);
            panel += key_lanes * width * W;
            c += width * W;
        }
    }

    const Item* at(const void* p, const int64_t (&stride)[3], int64_t head) const {
        return static_cast<const Item*>(p) + head / a.H * stride[0] + head % a.H * stride[1];
    }

    // Asks for one of `parts` equal parts of n rows, which are read next. Rows of a fused projection lie one to a page,
    // where the CPU prefetches nothing by itself.
    void fetch(const Item* rows, int64_t stride, int64_t n, int64_t part, int64_t parts) const {
        for (int64_t r = n * part / parts; r < n * (part + 1) / parts; ++r)
            for (int64_t c = 0; c < a.d; c += 64 / int64_t(sizeof(Item)))
                __builtin_prefetch(rows + r * stride + c, 0, 2);
    }

    // Units [u0, u1) of all heads' queries.
    void run_units(int64_t u0, int64_t u1, float* memory) const {
        const Memory m = divide(memory);
        int64_t packed = -1;  // the head whose keys lie packed, if they are one block
        for (int64_t u = u0; u < u1; ++u) {
            const int64_t head = u / units, t0 = u % units * unit, t1 = t0 + unit < a.Tq ? t0 + unit : a.Tq;
            const Item *q = at(a.q, a.q_stride, head), *k = at(a.k, a.k_stride, head), *v = at(a.v, a.v_stride, head);
            const Item* mask = a.mask ? at(a.mask, a.mask_stride, head) : nullptr;
            Item* y = static_cast<Item*>(a.y) + (head / a.H * a.Tq * a.H + head % a.H) * a.d;
            for (int64_t first = 0; first < a.Tk; first += block) {
                const int64_t n = a.Tk - first < block ? a.Tk - first : block, next = first + n;
                if (key_blocks > 1 || packed != head) {
                    pack_keys(k + first * a.k_stride[2], n, m.stage, m.K);
                    pack_values(v + first * a.v_stride[2], n, m.V);
                    packed = head;
                }
                const int64_t parts = (t1 - t0 + block_queries - 1) / block_queries;
                for (int64_t t = t0, part = 0; t < t1; t += block_queries, ++part) {
                    if (next < a.Tk) {
                        const int64_t left = a.Tk - next < block ? a.Tk - next : block;
                        fetch(k + next * a.k_stride[2], a.k_stride[2], left, part, parts);
                        fetch(v + next * a.v_stride[2], a.v_stride[2], left, part, parts);
                    } else if (key_blocks == 1 && head + 1 < a.B * a.H) {
                        fetch(at(a.k, a.k_stride, head + 1), a.k_stride[2], a.Tk, u % units, units);
                        fetch(at(a.v, a.v_stride, head + 1), a.v_stride[2], a.Tk, u % units, units);
                        fetch(at(a.q, a.q_stride, head + 1), a.q_stride[2], a.Tq, u % units, units);
                    }
                    run(m, q + t * a.q_stride[2], mask ? mask + t * a.mask_stride[2] : nullptr,
                        t1 - t < block_queries ? t1 - t : block_queries, first, n,
                        key_blocks > 1 ? m.out + (t - t0) * wide : nullptr, m.most + t - t0, m.sum + t - t0,
                        y + t * a.H * a.d);
                }
            }
        }
    }
};

template <class Number, class Math>
void attention_thread(const void* arg, int i, int n) {
    const auto& job = *static_cast<const Attention<Number, Math>*>(arg);
    const int64_t all = job.a.B * job.a.H * job.units;
    job.run_units(all * i / n, all * (i + 1) / n, scratch(job.floats()));
}

template <class Number, class Math>
void attend(const AttentionArgs& a) {
    const Attention<Number, Math> job(a);
    const int64_t all = a.B * a.H * job.units;
    parallel(int(all < a.threads ? all : a.threads), attention_thread<Number, Math>, &job);
}

void attention(const AttentionArgs& a) {
    using Pairs = std::conditional_t<native_pairs, BFloat16, Float32>;
    return a.dtype == DType::bfloat16 ? attend<BFloat16, Pairs>(a) : attend<Float32, Float32>(a);
}
