// The driver of the layouts that are walked weight by weight. Vector lanes are tokens: x is packed into panels
// P [columns][V * W] of 32-bit lanes (a column is one float or two bfloat16 of a token), a weight is spread over a vector,
// and C [rows][V * W] collects float sums over blocks of columns, mostly 64, whose slice of the panel sits in L1.
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

// x [tokens t0 ..., K] -> P [columns][V * W]; whether a bfloat16 is Inf or NaN. Tokens past the end repeat the last one;
// their sums are never stored. An odd K leaves a zero in the last pair.
template <class Number>
bool pack_panel(const LinearArgs& a, int64_t t0, int V, float* P) {
    using Item = typename Number::Item;
    constexpr int per = Number::per_lane;
    const int64_t stride = int64_t(V) * W, whole = a.K / (per * W) * W, columns = (a.K + per - 1) / per;
    U special = {};
    for (int v = 0; v < V; ++v) {
        const Item* rows[W];
        for (int i = 0; i < W; ++i) {
            const int64_t t = t0 + v * W + i;
            rows[i] = static_cast<const Item*>(a.x) + (t < a.T ? t : a.T - 1) * a.K;
        }
        for (int64_t k = 0; k < whole; k += W) {
            F r[W];
#pragma GCC unroll 16
            for (int i = 0; i < W; ++i) {
                r[i] = load_lanes(rows[i] + per * k);
                if constexpr (per == 2) special |= special_pairs(r[i]);
            }
            transpose(r);
#pragma GCC unroll 16
            for (int i = 0; i < W; ++i) store(P + (k + i) * stride + v * W, r[i]);
        }
        for (int64_t k = whole; k < columns; ++k) {
            for (int i = 0; i < W; ++i) {
                Item lane[per] = {};
                for (int j = 0; j < per && per * k + j < a.K; ++j) lane[j] = rows[i][per * k + j];
                __builtin_memcpy(P + k * stride + v * W + i, lane, 4);
            }
            if constexpr (per == 2) special |= special_pairs(load(P + k * stride + v * W));
        }
    }
    uint32_t any = 0;
    for (int i = 0; i < W; ++i) any |= special[i];
    return any;
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

template <class Source>
struct Panels {
    const LinearArgs& a;
    const Source& source;
    int64_t col_blocks, row_blocks, vectors, panels;
};

// Rows [rb0, rb1) in blocks, tokens of one panel: columns outside, rows inside, so that a slice of P stays in L1.
template <class Number, int V, class Source>
void run_panel(const Panels<Source>& job, int64_t t0, int64_t rb0, int64_t rb1, const float* P, float* C) {
    constexpr int64_t stride = V * W;
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
        for (int v = 0; v < V; ++v)
            if (t0 + v * W < a.T) finish<FinishTokens, Number>(a, C + v * W, stride, t0 + v * W, f0, f1 - f0);
    }
}

template <class Number, int V, class Source>
void run_panel_of(int wanted, const Panels<Source>& job, int64_t t0, int64_t rb0, int64_t rb1, const float* P,
                  float* C) {
    if (wanted == V) return run_panel<Number, V>(job, t0, rb0, rb1, P, C);
    if constexpr (V > 1) run_panel_of<Number, V - 1>(wanted, job, t0, rb0, rb1, P, C);
}

// Threads take equal runs of vectors of tokens x row blocks, panel by panel: they end together, and only a panel that two of
// them share is packed by both.
template <class Source>
void panels_thread(const void* arg, int i, int n) {
    const auto& job = *static_cast<const Panels<Source>*>(arg);
    const int64_t all = job.vectors * job.row_blocks, from = all * i / n, to = all * (i + 1) / n;
    const int64_t widest = (job.vectors + job.panels - 1) / job.panels * W;
    const int64_t p_floats = job.col_blocks * block_lanes<Source> * widest;
    int64_t c_floats = c_bytes / 4 > block_rows * widest ? c_bytes / 4 : block_rows * widest;
    if (c_floats > job.row_blocks * block_rows * widest) c_floats = job.row_blocks * block_rows * widest;
    const int64_t room = middle_blocks(job.source) * 64 * widest;
    if (c_floats < room) c_floats = room;
    float* P = scratch(size_t(p_floats + c_floats));
    for (int64_t p = 0; p < job.panels; ++p) {
        const int64_t v0 = job.vectors * p / job.panels, v1 = job.vectors * (p + 1) / job.panels, V = v1 - v0;
        const auto rows_before = [&](int64_t place) {  // a place in the run -> the panel's row blocks before it
            const int64_t inside = place - v0 * job.row_blocks;
            return inside <= 0 ? 0 : inside >= V * job.row_blocks ? job.row_blocks : inside / V;
        };
        const int64_t rb0 = rows_before(from), rb1 = rows_before(to);
        if (rb0 == rb1) continue;
        if (pack_source(job.a, job.source, v0 * W, int(V), P, P + p_floats))
            run_panel_of<typename Source::Special, Source::most_V>(int(V), job, v0 * W, rb0, rb1, P, P + p_floats);
        else
            run_panel_of<typename Source::Number, Source::most_V>(int(V), job, v0 * W, rb0, rb1, P, P + p_floats);
    }
}

template <class Source>
void run_panels(const LinearArgs& a, const Source& source) {
    constexpr int64_t columns = block_lanes<Source> * Source::Number::per_lane;
    const int64_t col_blocks = (a.K + columns - 1) / columns + middle_blocks(source);
    Panels<Source> job{a, source, col_blocks, (a.N + block_rows - 1) / block_rows, (a.T + W - 1) / W, 0};
    job.panels = (job.vectors + Source::most_V - 1) / Source::most_V;
    const int64_t pieces = job.panels * job.row_blocks;
    parallel(a.threads < pieces ? a.threads : int(pieces), panels_thread<Source>, &job);
}
