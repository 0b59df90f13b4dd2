// LayerNorm: y = (x - mean) / sqrt(variance + eps) * weight + bias for each row. The sums of a row are taken in one pass
// over its items as they are stored; a row whose mean is large beside its deviation is summed again around its mean.
// (Two and four rows at once, which share the loads of scale and shift, were slower.)

constexpr float far_mean = 4;  // mean^2 over variance above which x^2 - mean^2 loses digits that float32 outputs need

inline float sum_lanes(F v) {
    float s[W];
    __builtin_memcpy(s, &v, sizeof v);
#pragma GCC unroll 4
    for (int half = W / 2; half; half /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < half; ++i) s[i] += s[i + half];
    return s[0];
}

struct RowStatistics {
    float center, shift, scale;  // y = ((x - center) * scale + shift) * weight + bias
};

template <class Number>
struct LayerNorm {
    using Item = typename Number::Item;
    const LayerNormArgs& a;
    int64_t wide;  // K in whole vectors

    size_t floats() const { return size_t(2 * wide); }

    void widen(const void* row, float missing, float* out) const {
        for (int64_t k = 0; k < a.K; k += W)
            store(out + k, row ? load_some<Number>(static_cast<const Item*>(row) + k, a.K - k) : broadcast(missing));
    }

    RowStatistics statistics(const Item* x) const {
        constexpr int sums = 2;  // chains of each kind
        constexpr int64_t step = W * Number::per_lane;
        const F ones = spread(Number::ones);
        F sum[sums] = {}, square[sums] = {};
        int64_t k = 0;
        for (; k + sums * step <= a.K; k += sums * step)
#pragma GCC unroll 2
            for (int i = 0; i < sums; ++i) {
                const F v = load_lanes(x + k + i * step);
                sum[i] = Number::multiply_add(sum[i], ones, v);
                square[i] = Number::multiply_add(square[i], v, v);
            }
        for (; k < a.K; k += W) {
            const F v = load_some<Number>(x + k, a.K - k);
            sum[0] += v;
            square[0] += v * v;
        }
        const float n = float(a.K), mean = sum_lanes(sum[0] + sum[1]) / n;
        const float variance = sum_lanes(square[0] + square[1]) / n - mean * mean;
        if (mean * mean <= far_mean * variance) return finish(0, mean, variance);
        return around(x, mean - mean == 0 ? mean : Number::value(x[0]));  // the sums may have overflowed
    }

    // The sums of distances from a center near the mean: a constant row has none, a row far from zero keeps its digits.
    RowStatistics around(const Item* x, float center) const {
        const F c = broadcast(center);
        F sum{}, square{};
        int64_t k = 0;
        for (; k + W <= a.K; k += W) {
            const F v = Number::load_values(x + k) - c;
            sum += v;
            square += v * v;
        }
        float off = sum_lanes(sum), squares = sum_lanes(square);
        for (; k < a.K; ++k) {
            const float v = Number::value(x[k]) - center;
            off += v;
            squares += v * v;
        }
        const float n = float(a.K), mean = off / n;
        return finish(center, mean, squares / n - mean * mean);
    }

    RowStatistics finish(float center, float mean, float variance) const {
        if (variance < 0) variance = 0;  // by rounding; NaN stays NaN
        const float scale = 1 / __builtin_sqrtf(variance + a.eps);
        return {center, -mean * scale, scale};
    }

    void run(const Item* x, const float* weight, const float* bias, Item* y) const {
        const RowStatistics s = statistics(x);
        const F center = broadcast(s.center), shift = broadcast(s.shift), scale = broadcast(s.scale);
        int64_t k = 0;
        for (; k + W <= a.K; k += W) {
            const F v = Number::load_values(x + k) - center;
            Number::store_values(y + k, (v * scale + shift) * load(weight + k) + load(bias + k));
        }
        if (k == a.K) return;
        const F v = load_some<Number>(x + k, a.K - k) - center;
        store_some<Number>(y + k, (v * scale + shift) * load(weight + k) + load(bias + k), a.K - k);
    }
};

template <class Number>
void layernorm_thread(const void* arg, int i, int n) {
    using Item = typename Number::Item;
    const auto& job = *static_cast<const LayerNorm<Number>*>(arg);
    float *weight = scratch(job.floats()), *bias = weight + job.wide;
    job.widen(job.a.weight, 1, weight);
    job.widen(job.a.bias, 0, bias);
    for (int64_t t = job.a.T * i / n; t < job.a.T * (i + 1) / n; ++t)
        job.run(static_cast<const Item*>(job.a.x) + t * job.a.K, weight, bias, static_cast<Item*>(job.a.y) + t * job.a.K);
}

template <class Number>
void normalize(const LayerNormArgs& a) {
    const LayerNorm<Number> job{a, (a.K + W - 1) / W * W};
    parallel(int(a.T < a.threads ? a.T : a.threads), layernorm_thread<Number>, &job);
}

void layernorm(const LayerNormArgs& a) {
    a.dtype == DType::bfloat16 ? normalize<BFloat16>(a) : normalize<Float32>(a);
}
