// lowrank: W = B A. Two dense products; the middle x A^T (rounded to the dtype of x) of a block of tokens stays in cache.

template <class Number>
void run_lowrank(const LinearArgs& a) {
    using Item = typename Number::Item;
    const int64_t R = a.params[0], most = 16 * tile_tokens * int64_t(a.threads);
    auto* middle = reinterpret_cast<Item*>(scratch(size_t(((a.T < most ? a.T : most) * R * sizeof(Item) + 3) / 4)));
    for (int64_t t = 0; t < a.T; t += most) {
        const int64_t tokens = a.T - t < most ? a.T - t : most;
        LinearArgs first, second = a;
        first.T = tokens;
        first.N = R;
        first.K = a.K;
        first.x = static_cast<const Item*>(a.x) + t * a.K;
        first.y = middle;
        first.threads = a.threads;
        run_dense<Number>(first, a.parts[0].as<float>());
        second.T = tokens;
        second.K = R;
        second.x = middle;
        second.y = static_cast<Item*>(a.y) + t * a.outputs();
        if (a.residual) second.residual = static_cast<const Item*>(a.residual) + t * a.outputs();
        run_dense<Number>(second, a.parts[1].as<float>());
    }
}

const char* lowrank_linear(const LinearArgs& a) {
    if (a.dtype == DType::float32) run_lowrank<Float32>(a);
    else run_lowrank<BFloat16>(a);
    return nullptr;
}

int lowrank_width(const LinearArgs&) { return 0; }
