// The driver of the layouts that are walked weight by weight. Vector lanes are tokens: x is packed into panels
// P [columns][V * W] of 32-bit lanes (a column is one float or two bfloat16 of a token), a weight is spread over a vector,
// and C [rows][V * W] collects float sums over blocks of columns, mostly 64, whose slice of the panel sits in L1.
// Between the linears of an MLP a panel is taken from the one before and left for the one after (Passed).
// A layout is a type `Source` with most_V, the widest panel it takes; its Number; Special, the Number for a panel with
// Inf or NaN (Number itself, if they need no care); and group<Number, V>(rb, kb, P, C): add the weights of row block rb
// (block_rows rows) and column block kb (block_lanes of the panel) to C.

constexpr int64_t block_rows = 128;          // rows of a row block (part of the formats)
constexpr int64_t c_bytes = 384 * 1024;      // C of one pass over the columns: leaves room in a 1-MiB L2

// Adds weight w times its column of the panel, the lowest of `mask`, which then leaves the mask.
template <class Number, int V>
inline __attribute__((always_inline)) void step(uint64_t& mask, F w, const float* P, F* acc) {
    const float* p = P + uint64_t(__builtin_ctzll(mask)) * (V * W);
    mask &= mask - 1;
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) acc[v] = Number::multiply_add(acc[v], w, load(p + v * W));
}

// Adds all of a mask's weights, which it spreads from registers. Only an instruction set with lanes_from_V <= max_V
// defines it.
template <class Number, int V>
inline __attribute__((always_inline)) void add_by_lanes(uint64_t mask, const float* values, const float* P, F* acc);

// Adds one row's weights in one column block to C: bit k of mask is set where column k has the next of `values`.
// The sums start from zero and meet C at the end, which rounds less than one chain over all columns. A narrow panel
// takes several columns at a time, each with its own sums, because an FMA takes four cycles.
template <class Number, int V>
inline __attribute__((always_inline)) const float* walk(uint64_t mask, const float* values, const float* P, float* C) {
    constexpr int chains = V == 1 ? 4 : V <= 3 ? 2 : 1;
    const float* end = values + __builtin_popcountll(mask);
    F acc[chains * V] = {};
    if constexpr (V >= lanes_from_V) {
        add_by_lanes<Number, V>(mask, values, P, acc);
    } else {
        if constexpr (chains > 1) {
            for (int64_t left = (end - values) / chains; left; --left) {
#pragma GCC unroll 4
                for (int u = 0; u < chains; ++u) step<Number, V>(mask, spread(values++), P, acc + u * V);
            }
#pragma GCC unroll 4
            for (int u = 1; u < chains; ++u)
#pragma GCC unroll 16
                for (int v = 0; v < V; ++v) acc[v] = acc[v] + acc[u * V + v];
        }
        while (mask) step<Number, V>(mask, spread(values++), P, acc);
    }
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) store(C + v * W, load(C + v * W) + acc[v]);
    return end;
}

// How the rows of x become lanes: as they are.
template <class Number>
struct PlainRows {
    using Item = typename Number::Item;
    explicit PlainRows(const LinearArgs&) {}
    void take(const Item* const*) {}
    void columns(int64_t, int64_t) {}
    F lanes(const Item* p, int) const { return load_lanes(p); }
};

// How the rows of x become lanes: normalised, as layernorm.inl does it.
template <class Number>
struct NormedRows {
    using Item = typename Number::Item;
    static constexpr int per = Number::per_lane;
    const Norm& norm;
    LayerNormArgs args;
    RowStatistics rows[W];
    F weight[per], bias[per];  // of a vector of lanes

    explicit NormedRows(const LinearArgs& a) : norm(*a.norm) {
        args.K = a.K;
        args.eps = norm.eps;
    }

    void take(const Item* const* x) {
        const LayerNorm<Number> sums{args, 0};
        for (int i = 0; i < W; ++i) rows[i] = sums.statistics(x[i]);
    }

    static void spread_out(const void* from, Item missing, int64_t first, int64_t width, F (&out)[per]) {
        Item items[per * W] = {};
        for (int64_t j = 0; j < width; ++j) items[j] = from ? static_cast<const Item*>(from)[first + j] : missing;
        const F all = load_lanes(items);
        if constexpr (per == 1) out[0] = all;
        else out[0] = lower(all), out[1] = upper(all);
    }

    void columns(int64_t first, int64_t width) {
        spread_out(norm.weight, Number::ones[0], first, width, weight);
        spread_out(norm.bias, Item{}, first, width, bias);
    }

    F one(F x, int i, int part) const {
        const F v = x - broadcast(rows[i].center);
        return (v * broadcast(rows[i].scale) + broadcast(rows[i].shift)) * weight[part] + bias[part];
    }

    F lanes(const Item* p, int i) const {
        const F all = load_lanes(p);
        if constexpr (per == 1) return one(all, i, 0);
        else return pair_lanes(one(lower(all), i, 0), one(upper(all), i, 1));
    }
};

// A vector of columns of W rows, from `first` on, `width` of them: transposed to P, `lanes` vectors `stride` apart.
template <class Number, class Rows>
inline __attribute__((always_inline)) void pack_square(Rows& source, const typename Number::Item* const* rows, int64_t first,
                                                       int64_t at, int64_t width, int64_t lanes, float* P, int64_t stride,
                                                       U& special) {
    source.columns(first, width);
    F r[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
        r[i] = source.lanes(rows[i] + at, i);
        if constexpr (Number::per_lane == 2) special |= special_pairs(r[i]);
    }
    transpose(r);
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i)
        if (i < lanes) store(P + i * stride, r[i]);
}

// x [tokens t0 ..., K] -> P [columns][V * W]; whether a bfloat16 is Inf or NaN. Tokens past the end repeat the last one;
// their sums are never stored. An odd K leaves a zero in the last pair.
template <class Number, class Rows>
bool pack_rows(const LinearArgs& a, int64_t t0, int V, float* P) {
    using Item = typename Number::Item;
    constexpr int64_t per = Number::per_lane, step = per * W;
    const int64_t stride = int64_t(V) * W, rest = a.K % step;
    U special = {};
    Rows source(a);
    for (int v = 0; v < V; ++v) {
        const Item *rows[W], *ends[W];
        for (int i = 0; i < W; ++i) {
            const int64_t t = t0 + v * W + i;
            rows[i] = static_cast<const Item*>(a.x) + (t < a.T ? t : a.T - 1) * a.K;
        }
        source.take(rows);
        float* to = P + v * W;
        int64_t k = 0;
        for (; k + step <= a.K; k += step, to += W * stride)
            pack_square<Number>(source, rows, k, k, step, W, to, stride, special);
        if (rest == 0) continue;
        Item items[W][step] = {};  // nothing is read past a row
        for (int i = 0; i < W; ++i) {
            for (int64_t j = 0; j < rest; ++j) items[i][j] = rows[i][k + j];
            ends[i] = items[i];
        }
        pack_square<Number>(source, ends, k, 0, rest, (rest + per - 1) / per, to, stride, special);
    }
    uint32_t any = 0;
    for (int i = 0; i < W; ++i) any |= special[i];
    return any;
}

template <class Number>
bool pack_panel(const LinearArgs& a, int64_t t0, int V, float* P) {
    return a.norm ? pack_rows<Number, NormedRows<Number>>(a, t0, V, P) : pack_rows<Number, PlainRows<Number>>(a, t0, V, P);
}

// A source may multiply more than x: then it has blocks of 64 more columns, and its own overload of both functions.
// `room` is at least as long as these columns in a panel.
template <class Source>
int64_t middle_blocks(const Source&) {
    return 0;
}
template <class Source>
bool pack_source(const LinearArgs& a, const Source&, int64_t t0, int V, float* P, float*) {
    return pack_panel<typename Source::Number>(a, t0, V, P);
}

// Lanes of the panel in a column block. A source may want its slice in another form, of so many lanes, which it makes once for
// all rows: then it has its own overload of prepare_slice<V>(source, P, slice).
template <class Source>
constexpr int64_t block_lanes = 64;
template <class Source>
constexpr int64_t slice_lanes = 0;
template <int V, class Source>
void prepare_slice(const Source&, const float*, float*);

// What a thread does for row blocks [rb0, rb1) before it reads their weights. Threads then take row blocks and each all panels,
// so that a thread reads what itself has written.
struct RowWork {
    void (*run)(const void* arg, int64_t rb0, int64_t rb1);
    const void* arg;
};

template <class Source>
struct Panels {
    const LinearArgs& a;
    const Source& source;
    const RowWork* row_work;
    int64_t col_blocks, row_blocks, vectors, panels;

    int64_t first_vector(int64_t p) const { return vectors * p / panels; }
};

// Rows [rb0, rb1) in blocks, tokens of panel p: columns outside, rows inside, so that a slice of P stays in L1.
template <class Number, int V, class Source>
void run_panel(const Panels<Source>& job, int64_t p, int64_t rb0, int64_t rb1, const float* P, float* C) {
    constexpr int64_t stride = V * W;
    const int64_t t0 = job.first_vector(p) * W;
    const LinearArgs& a = job.a;
    const auto* bias = static_cast<const typename Number::Item*>(a.bias);
    const int64_t most = c_bytes / (block_rows * stride * 4) > 1 ? c_bytes / (block_rows * stride * 4) : 1;
    for (int64_t first = rb0; first < rb1; first += most) {
        const int64_t last = first + most < rb1 ? first + most : rb1;
        const int64_t f0 = first * block_rows, f1 = last * block_rows < a.N ? last * block_rows : a.N;
        for (int64_t f = f0; f < (f1 + 7) / 8 * 8; ++f) {  // a strip of up to 8 rows may end past the last row
            const F b = broadcast(bias && f < f1 ? Number::value(bias[f]) : 0.0f);
#pragma GCC unroll 16
            for (int v = 0; v < V; ++v) store(C + (f - f0) * stride + v * W, b);
        }
        for (int64_t kb = 0; kb < job.col_blocks; ++kb) {
            const float* slice = P + kb * block_lanes<Source> * stride;
            alignas(64) float other[slice_lanes<Source> > 0 ? slice_lanes<Source> * stride : 1];
            if constexpr (slice_lanes<Source> > 0) {
                prepare_slice<V>(job.source, slice, other);
                slice = other;
            }
            for (int64_t rb = first; rb < last; ++rb)
                job.source.template group<Number, V>(rb, kb, slice, C + (rb - first) * block_rows * stride);
        }
        if (const Passed* to = a.y_passed) {
            finish<FinishPanel, Number>(a, C, stride, f0, f1 - f0, to->data + p * to->floats, to->special + p);
            continue;
        }
        for (int v = 0; v < V; ++v)
            if (t0 + v * W < a.T) finish<FinishTokens, Number>(a, C + v * W, stride, t0 + v * W, f0, f1 - f0);
    }
}

template <class Number, int V, class Source>
void run_panel_of(int wanted, const Panels<Source>& job, int64_t p, int64_t rb0, int64_t rb1, const float* P,
                  float* C) {
    if (wanted == V) return run_panel<Number, V>(job, p, rb0, rb1, P, C);
    if constexpr (V > 1) run_panel_of<Number, V - 1>(wanted, job, p, rb0, rb1, P, C);
}

// Threads take equal runs of vectors of tokens x row blocks, panel by panel: they end together, and only a panel that two of
// them share is packed by both.
template <class Source>
void panels_thread(const void* arg, int i, int n) {
    const auto& job = *static_cast<const Panels<Source>*>(arg);
    const int64_t all = job.vectors * job.row_blocks, from = all * i / n, to = all * (i + 1) / n;
    const int64_t widest = (job.vectors + job.panels - 1) / job.panels * W;
    const Passed* given = job.a.x_passed;
    const int64_t p_floats = given ? 0 : job.col_blocks * block_lanes<Source> * widest;
    int64_t c_floats = c_bytes / 4 > block_rows * widest ? c_bytes / 4 : block_rows * widest;
    if (c_floats > job.row_blocks * block_rows * widest) c_floats = job.row_blocks * block_rows * widest;
    const int64_t room = middle_blocks(job.source) * 64 * widest;
    if (c_floats < room) c_floats = room;
    float *own = scratch(size_t(p_floats + c_floats)), *C = own + p_floats;
    const int64_t own_rb0 = job.row_blocks * i / n, own_rb1 = job.row_blocks * (i + 1) / n;
    if (job.row_work) job.row_work->run(job.row_work->arg, own_rb0, own_rb1);
    for (int64_t p = 0; p < job.panels; ++p) {
        const int64_t v0 = job.first_vector(p), V = job.first_vector(p + 1) - v0;
        const auto rows_before = [&](int64_t place) {  // a place in the run -> the panel's row blocks before it
            const int64_t inside = place - v0 * job.row_blocks;
            return inside <= 0 ? 0 : inside >= V * job.row_blocks ? job.row_blocks : inside / V;
        };
        const int64_t rb0 = job.row_work ? own_rb0 : rows_before(from), rb1 = job.row_work ? own_rb1 : rows_before(to);
        if (rb0 == rb1) continue;
        const float* P = given ? given->data + p * given->floats : own;
        const bool special = given ? given->special[p] != 0 : pack_source(job.a, job.source, v0 * W, int(V), own, C);
        if (special) run_panel_of<typename Source::Special, Source::most_V>(int(V), job, p, rb0, rb1, P, C);
        else run_panel_of<typename Source::Number, Source::most_V>(int(V), job, p, rb0, rb1, P, C);
    }
}

template <class Source>
void run_panels(const LinearArgs& a, const Source& source, const RowWork* row_work = nullptr) {
    constexpr int64_t columns = block_lanes<Source> * Source::Number::per_lane;
    const int64_t col_blocks = (a.K + columns - 1) / columns + middle_blocks(source);
    Panels<Source> job{a, source, row_work, col_blocks, (a.N + block_rows - 1) / block_rows, (a.T + W - 1) / W, 0};
    const Passed* passed = a.x_passed ? a.x_passed : a.y_passed;
    const int most = passed ? passed->vectors : Source::most_V;
    job.panels = (job.vectors + most - 1) / most;
    const int64_t pieces = job.panels * job.row_blocks;
    const int64_t most_threads = row_work ? job.row_blocks : pieces;
    parallel(a.threads < most_threads ? a.threads : int(most_threads), panels_thread<Source>, &job);
}
