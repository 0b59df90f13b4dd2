// normed: LayerNorm and a linear in one call. What walks panels normalises the rows while it packs them; other kernels get
// them strip by strip, from the cache.

constexpr int64_t normed_bytes = 256 * 1024;  // of a strip, for each thread

const char* normed(const Body& body, const LinearArgs& a) {
    if (!a.norm || body.width(a)) return body.run(a);
    const int64_t item = a.dtype == DType::bfloat16 ? 2 : 4, row = a.K * item;
    const int64_t wanted = (normed_bytes / row > 32 ? normed_bytes / row : 32) * a.threads;
    const int64_t strips = (a.T + wanted - 1) / wanted, most = (a.T + strips - 1) / strips;
    LayerNormArgs rows;
    rows.K = a.K;
    rows.dtype = a.dtype;
    rows.weight = a.norm->weight;
    rows.bias = a.norm->bias;
    rows.eps = a.norm->eps;
    rows.threads = a.threads;
    rows.y = scratch(size_t((most * row + 3) / 4), Scratch::normed);
    LinearArgs strip = a;
    strip.norm = nullptr;
    strip.x = rows.y;
    for (int64_t s = 0; s < strips; ++s) {
        const int64_t t0 = a.T * s / strips, outputs = a.outputs() * item;
        rows.T = strip.T = a.T * (s + 1) / strips - t0;
        rows.x = static_cast<const char*>(a.x) + t0 * row;
        layernorm(rows);
        strip.y = static_cast<char*>(a.y) + t0 * outputs;
        if (a.residual) strip.residual = static_cast<const char*>(a.residual) + t0 * outputs;
        if (const char* damage = body.run(strip)) return damage;
        strip.checked = true;
    }
    return nullptr;
}
