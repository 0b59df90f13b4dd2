// Attention: softmax(q k^T * scale + mask) v for each batch entry and head, one block of queries at a time, so that the scores
// never leave the cache. K and V of a block of keys are packed once for many queries; more keys than one block are
// joined by running maxima and sums (Milakov & Gimelshein 2018; Dao et al. 2022). Both products are tile() with a row of
// queries or of probabilities spread; bfloat16 rounds the probabilities as PyTorch does.

constexpr int query_rows = W == 16 ? 6 : 3;                      // of a block: query_rows x score_vectors sums
constexpr int score_vectors = W == 16 ? 4 : max_sums / query_rows;
constexpr int64_t block_keys = 512, chunk_queries = 192;         // multiples of W and query_rows

inline int64_t round_up(int64_t n, int64_t m) { return (n + m - 1) / m * m; }

// The next panel of at most `most` of `left` vectors, such that all panels are about as wide.
inline int panel_of(int64_t left, int most) {
    const int64_t panels = (left + most - 1) / most;
    return int((left + panels - 1) / panels);
}

// 2^x for x <= 0 (0 below -126, NaN stays NaN), to the precision of the Number: relative error below 2e-7, or 1e-4 for
// bfloat16. Minimax polynomials of 2^f on [-1/2, 1/2].
template <class Number>
inline F exp2_of(F x) {
    const F shift = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const F z = (x < -126.0f ? broadcast(-126.0f) : x) + shift;
    const F f = (x < -126.0f ? F{} : x) - (z - shift);
    F p;
    if constexpr (Number::per_lane == 1) {
        p = broadcast(1.535336188e-4f);
        p = p * f + broadcast(1.339887440e-3f);
        p = p * f + broadcast(9.618437357e-3f);
        p = p * f + broadcast(5.550332471e-2f);
        p = p * f + broadcast(2.402264791e-1f);
        p = p * f + broadcast(6.931472028e-1f);
        p = p * f + broadcast(1.0f);
    } else {
        p = broadcast(5.5503327e-2f);
        p = p * f + broadcast(2.4226442e-1f);
        p = p * f + broadcast(6.9314698e-1f);
        p = p * f + broadcast(1.0f);
    }
    const I whole = reinterpret_cast<I>(z) - reinterpret_cast<I>(shift);
    const F y = reinterpret_cast<F>(reinterpret_cast<I>(p) + (whole << 23));
    return x < -126.0f ? F{} : y;
}

// A bfloat16 in each lane as the float it is, moved to the lower half; and a second one put above it.
inline F upper_as_lower(F value) { return reinterpret_cast<F>(reinterpret_cast<U>(value) >> 16); }
inline F pair_with(F low, F value) { return reinterpret_cast<F>(reinterpret_cast<U>(low) | reinterpret_cast<U>(value)); }

template <class Number>
struct Attention {
    using Item = typename Number::Item;
    static constexpr int per = Number::per_lane;
    const AttentionArgs& a;
    int64_t lanes, wide;  // lanes of a query; d rounded up to whole vectors
    I lane_numbers = lanes_of(std::make_integer_sequence<int, W>{});  // 0, 1, 2 ...

    Attention(const AttentionArgs& args) : a(args), lanes((args.d + per - 1) / per), wide(round_up(args.d, W)) {}

    int64_t keys_at_once() const { return round_up(a.Tk < block_keys ? a.Tk : block_keys, per * W); }

    // Floats of scratch memory: packed keys and values, scores, probabilities, queries; sums, maxima and outputs of a chunk.
    size_t floats() const {
        const int64_t keys = keys_at_once();
        return size_t(lanes * keys + keys / per * wide + 2 * query_rows * keys + query_rows * lanes +
                      round_up(2 * chunk_queries, W) + chunk_queries * wide);
    }

    // Keys [n, d] -> panels [lanes][vectors * W], lanes are keys; keys that are not there are zero.
    void pack_keys(const Item* k, int64_t n, float* out) const {
        const int64_t vectors = round_up(n, W) / W, whole = a.d / (per * W) * W;
        for (int64_t v = 0; v < vectors;) {
            const int width = panel_of(vectors - v, score_vectors);
            for (int i = 0; i < width; ++i) {
                const Item* rows = k + (v + i) * W * a.k_stride[2];
                const int64_t there = n - (v + i) * W < W ? n - (v + i) * W : W;
                for (int64_t lane = 0; lane < whole; lane += W) {
                    F r[W];
#pragma GCC unroll 16
                    for (int r_ = 0; r_ < W; ++r_) r[r_] = r_ < there ? load_lanes(rows + r_ * a.k_stride[2] + lane * per) : F{};
                    transpose(r);
#pragma GCC unroll 16
                    for (int r_ = 0; r_ < W; ++r_) store(out + (lane + r_) * width * W + i * W, r[r_]);
                }
                for (int64_t lane = whole; lane < lanes; ++lane) {
                    for (int key = 0; key < W; ++key) {
                        Item both[per] = {};
                        for (int c = 0; c < per; ++c)
                            if (key < there && lane * per + c < a.d) both[c] = rows[key * a.k_stride[2] + lane * per + c];
                        __builtin_memcpy(out + lane * width * W + i * W + key, both, 4);
                    }
                }
            }
            out += lanes * width * W;
            v += width;
        }
    }

    // Values [n, d] -> panels [key lanes][vectors * W], lanes are the d outputs; in bfloat16 two keys make a lane.
    void pack_values(const Item* v, int64_t n, float* out) const {
        const int64_t vectors = wide / W, key_lanes = (n + per - 1) / per;
        for (int64_t first = 0; first < vectors;) {
            const int width = panel_of(vectors - first, score_vectors);
            for (int64_t lane = 0; lane < key_lanes; ++lane) {
                for (int i = 0; i < width; ++i) {
                    const int64_t c = (first + i) * W, columns = a.d - c < W ? a.d - c : W;
                    const Item* one = v + lane * per * a.v_stride[2] + c;
                    F r = load_some<Number>(one, columns);
                    if constexpr (per == 2) {
                        r = upper_as_lower(r);
                        if (lane * 2 + 1 < n) r = pair_with(r, load_some<Number>(one + a.v_stride[2], columns));
                    }
                    store(out + (lane * width + i) * W, r);
                }
            }
            out += key_lanes * width * W;
            first += width;
        }
    }

    template <int NV>
    void score(const Item* q, const float* K, float* S, int64_t stride) const {
        F sums[query_rows * NV] = {};
        tile<Number, query_rows, NV>(q, lanes * per, K, lanes, sums);
        for (int m = 0; m < query_rows; ++m)
            for (int v = 0; v < NV; ++v) store(S + m * stride + v * W, sums[m * NV + v]);
    }

    template <int NV>
    void weigh(const Item* p, int64_t stride, const float* V, int64_t key_lanes, float* out) const {
        F sums[query_rows * NV];
        for (int m = 0; m < query_rows; ++m)
            for (int v = 0; v < NV; ++v) sums[m * NV + v] = load(out + m * wide + v * W);
        tile<Number, query_rows, NV>(p, stride, V, key_lanes, sums);
        for (int m = 0; m < query_rows; ++m)
            for (int v = 0; v < NV; ++v) store(out + m * wide + v * W, sums[m * NV + v]);
    }

    template <int NV>
    void score_of(int wanted, const Item* q, const float* K, float* S, int64_t stride) const {
        if (wanted == NV) return score<NV>(q, K, S, stride);
        if constexpr (NV > 1) score_of<NV - 1>(wanted, q, K, S, stride);
    }

    template <int NV>
    void weigh_of(int wanted, const Item* p, int64_t stride, const float* V, int64_t key_lanes, float* out) const {
        if (wanted == NV) return weigh<NV>(p, stride, V, key_lanes, out);
        if constexpr (NV > 1) weigh_of<NV - 1>(wanted, p, stride, V, key_lanes, out);
    }

    template <int... i>
    static I lanes_of(std::integer_sequence<int, i...>) {
        return I{i...};
    }

    // Scores of one query against n keys -> probabilities up to their sum; the outputs so far follow the new maximum.
    // Exponents are of 2, so that scale and log2 e are one factor of the scores.
    void soften(float* S, int64_t n, const Item* mask, Item* p, float* most, float* sum, float* out) const {
        constexpr float log2e = 1.44269504088896341f;
        const int64_t whole = round_up(n, per * W);
        F best = broadcast(-__builtin_inff());
        for (int64_t i = 0; i < whole; i += W) {
            F s = load(S + i) * broadcast(a.scale * log2e);
            if (mask && i < n) s = s + load_some<Number>(mask + i, n - i < W ? n - i : W) * broadcast(log2e);
            if (i + W > n) s = lane_numbers + int32_t(i) < int32_t(n) ? s : broadcast(-__builtin_inff());
            store(S + i, s);
            best = best > s ? best : s;
        }
        float top = *most;
        for (int j = 0; j < W; ++j) top = top > best[j] ? top : best[j];
        const float base = top == -__builtin_inff() ? 0.0f : top;
        const float old = *most == -__builtin_inff() ? 0.0f : exp2_of<Number>(broadcast(*most - base))[0];
        F total = {};
        for (int64_t i = 0; i < whole; i += W) {
            const F e = exp2_of<Number>(load(S + i) - broadcast(base));
            total = total + e;
            Number::store_values(p + i, e);
        }
        float added = 0;
        for (int j = 0; j < W; ++j) added += total[j];
        const bool first = *sum == 0.0f;
        *sum = *sum * old + added;
        *most = top;
        if (!first && old != 1.0f)
            for (int64_t i = 0; i < wide; i += W) store(out + i, load(out + i) * broadcast(old));
    }

    // Queries [t0, t1) of one head.
    void run(int64_t b, int64_t h, int64_t t0, int64_t t1, float* memory) const {
        const Item* q = static_cast<const Item*>(a.q) + b * a.q_stride[0] + h * a.q_stride[1];
        const Item* k = static_cast<const Item*>(a.k) + b * a.k_stride[0] + h * a.k_stride[1];
        const Item* v = static_cast<const Item*>(a.v) + b * a.v_stride[0] + h * a.v_stride[1];
        const Item* mask = a.mask ? static_cast<const Item*>(a.mask) + b * a.mask_stride[0] + h * a.mask_stride[1] : nullptr;
        const int64_t keys = keys_at_once(), rows = round_up(t1 - t0, query_rows);
        float* K = memory;
        float* V = K + lanes * keys;
        float* S = V + keys / per * wide;
        float* P = S + query_rows * keys;
        float* Q = P + query_rows * keys;
        float* most = Q + query_rows * lanes;
        float* sum = most + chunk_queries;
        float* out = most + round_up(2 * chunk_queries, W);
        for (int64_t i = 0; i < rows; ++i) most[i] = -__builtin_inff(), sum[i] = 0;
        for (int64_t i = 0; i < rows * wide; ++i) out[i] = 0;
        for (int64_t first = 0; first < a.Tk; first += block_keys) {
            const int64_t n = a.Tk - first < block_keys ? a.Tk - first : block_keys, key_lanes = (n + per - 1) / per;
            pack_keys(k + first * a.k_stride[2], n, K);
            pack_values(v + first * a.v_stride[2], n, V);
            for (int64_t i = 0; i < rows; i += query_rows) {
                Item* block = reinterpret_cast<Item*>(Q);
                for (int m = 0; m < query_rows; ++m) {
                    const int64_t t = t0 + i + m < t1 ? t0 + i + m : t1 - 1;  // the last one again, never stored
                    block[(m + 1) * lanes * per - 1] = Item{};  // the half of a pair that an odd d leaves
                    __builtin_memcpy(block + m * lanes * per, q + t * a.q_stride[2], size_t(a.d) * sizeof(Item));
                }
                const int64_t vectors = round_up(n, W) / W;
                const float* panel = K;
                for (int64_t s = 0; s < vectors;) {
                    const int width = panel_of(vectors - s, score_vectors);
                    score_of<score_vectors>(width, block, panel, S + s * W, keys);
                    panel += lanes * width * W;
                    s += width;
                }
                Item* p = reinterpret_cast<Item*>(P);
                for (int m = 0; m < query_rows; ++m) {
                    const int64_t t = t0 + i + m < t1 ? t0 + i + m : t1 - 1;
                    soften(S + m * keys, n, mask ? mask + t * a.mask_stride[2] + first : nullptr, p + m * keys, most + i + m,
                           sum + i + m, out + (i + m) * wide);
                }
                panel = V;
                for (int64_t c = 0; c < wide / W;) {
                    const int width = panel_of(wide / W - c, score_vectors);
                    weigh_of<score_vectors>(width, p, keys, panel, key_lanes, out + i * wide + c * W);
                    panel += key_lanes * width * W;
                    c += width;
                }
            }
        }
        Item* y = static_cast<Item*>(a.y);
        for (int64_t t = t0; t < t1; ++t) {
            const float* row = out + (t - t0) * wide;
            const float part = sum[t - t0] == 0.0f ? 0.0f : 1.0f / sum[t - t0];  // a query that sees no key gets zeros
            Item* to = y + ((b * a.Tq + t) * a.H + h) * a.d;
            for (int64_t c = 0; c < a.d; c += W) {
                const F r = load(row + c) * broadcast(part);
                if (c + W <= a.d) {
                    Number::store_values(to + c, r);
                } else {
                    Item edge[W];
                    Number::store_values(edge, r);
                    for (int64_t j = 0; c + j < a.d; ++j) to[c + j] = edge[j];
                }
            }
        }
    }
};

template <class Number>
void attention_thread(const void* arg, int i, int n) {
    const auto& job = *static_cast<const Attention<Number>*>(arg);
    const AttentionArgs& a = job.a;
    const int64_t chunks = (a.Tq + chunk_queries - 1) / chunk_queries, all = a.B * a.H * chunks;
    float* memory = scratch(job.floats());
    for (int64_t unit = all * i / n; unit < all * (i + 1) / n; ++unit) {
        const int64_t head = unit / chunks, chunk = unit % chunks;
        job.run(head / a.H, head % a.H, a.Tq * chunk / chunks, a.Tq * (chunk + 1) / chunks, memory);
    }
}

template <class Number>
void attend(const AttentionArgs& a) {
    const Attention<Number> job(a);
    const int64_t all = a.B * a.H * ((a.Tq + chunk_queries - 1) / chunk_queries);
    parallel(int(all < a.threads ? all : a.threads), attention_thread<Number>, &job);
}

void attention(const AttentionArgs& a) { return a.dtype == DType::bfloat16 ? attend<BFloat16>(a) : attend<Float32>(a); }
