// mlp: two linears in one call, strip of tokens by strip, so that what lies between them stays in the cache. Where both
// layouts are walked weight by weight it stays in panels: the first leaves them as the second reads them, and nobody
// transposes them to rows and back. Else a strip's rows lie between them.

constexpr int64_t strip_bytes = 2 * 1024 * 1024;  // of rows between the linears, for each thread: weights pass once for all

// What a linear does once for all strips; null when done, or what is wrong with its parts.
inline const char* prepare(Layer& layer, Scratch use) {
    const LinearArgs& a = layer.args;
    if (layer.body.run != bitmask_linear || !expands_pairs(a)) return nullptr;
    if (!bitmask_pairs(a).consistent(a.parts[0].shape[0], a.K)) return strips_damage;
    layer = {{block_linear, block_width}, expand_pairs(a, use)};
    layer.args.params[0] = 1, layer.args.params[1] = 2;
    return nullptr;
}

// Tokens [t0, t1) of the call.
inline const char* run_strip(const Layer& first, const Layer& second, int64_t t0, int64_t t1) {
    const int64_t item = first.args.dtype == DType::bfloat16 ? 2 : 4;
    LinearArgs a = first.args, b = second.args;
    a.T = b.T = t1 - t0;
    a.x = static_cast<const char*>(a.x) + t0 * a.K * item;
    b.y = static_cast<char*>(b.y) + t0 * b.N * item;
    if (b.residual) b.residual = static_cast<const char*>(b.residual) + t0 * b.N * item;
    const char* damage = normed(first.body, a);
    return damage ? damage : second.body.run(b);
}

// Strips of whole vectors of tokens, a panel for each thread.
inline const char* mlp_in_panels(Layer first, Layer second, int width) {
    const LinearArgs& a = first.args;
    const int64_t vectors = (a.T + W - 1) / W, strips = ((vectors + width - 1) / width + a.threads - 1) / a.threads;
    const int64_t most = (vectors + strips - 1) / strips, panels = (most + width - 1) / width;  // of a strip
    const int64_t per = a.dtype == DType::bfloat16 ? 2 : 1, lanes = ((a.N + per - 1) / per + 63) / 64 * 64;
    const int64_t marks = (panels + 15) / 16 * 16;
    Passed passed;
    passed.floats = lanes * W * (most < width ? most : width);
    passed.vectors = width;
    float* memory = scratch(size_t(marks + panels * passed.floats), Scratch::passed);
    passed.special = reinterpret_cast<uint32_t*>(memory);
    passed.data = memory + marks;
    first.args.y_passed = second.args.x_passed = &passed;
    for (int64_t s = 0; s < strips; ++s) {
        for (int64_t p = 0; p < panels; ++p) passed.special[p] = 0;
        const int64_t t0 = vectors * s / strips * W, t1 = vectors * (s + 1) / strips * W;
        if (const char* damage = run_strip(first, second, t0, t1 < a.T ? t1 : a.T)) return damage;
        first.args.checked = second.args.checked = true;
    }
    return nullptr;
}

inline const char* mlp_in_rows(Layer first, Layer second) {
    const LinearArgs& a = first.args;
    const int64_t row = a.N * (a.dtype == DType::bfloat16 ? 2 : 4);
    const int64_t wanted = (strip_bytes / row > 32 ? strip_bytes / row : 32) * a.threads;
    const int64_t strips = (a.T + wanted - 1) / wanted, most = (a.T + strips - 1) / strips;
    first.args.y = scratch(size_t((most * row + 3) / 4), Scratch::passed);
    second.args.x = first.args.y;
    for (int64_t s = 0; s < strips; ++s) {
        if (const char* damage = run_strip(first, second, a.T * s / strips, a.T * (s + 1) / strips)) return damage;
        first.args.checked = second.args.checked = true;
    }
    return nullptr;
}

const char* mlp(Layer first, Layer second) {
    if (const char* damage = prepare(first, Scratch::pairs)) return damage;
    if (const char* damage = prepare(second, Scratch::second_pairs)) return damage;
    const int w1 = first.body.width(first.args), w2 = second.body.width(second.args), width = w1 < w2 ? w1 : w2;
    return width ? mlp_in_panels(first, second, width) : mlp_in_rows(first, second);
}
