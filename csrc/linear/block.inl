// block: r x 1 mini-blocks of floats, or r x 2 of bfloat16; strips of r rows.
const char* block_linear(const LinearArgs& a) {
    if (a.dtype == DType::bfloat16)
        return a.params[0] == 1 ? run_strips<1, BFloat16>(a) : run_strips<4, BFloat16>(a);
    return a.params[0] == 2   ? run_strips<2, Float32>(a)
           : a.params[0] == 4 ? run_strips<4, Float32>(a)
                              : run_strips<8, Float32>(a);
}

int block_width(const LinearArgs& a) {
    if (a.dtype == DType::bfloat16) return a.params[0] == 1 ? Strips<1, BFloat16>::most_V : Strips<4, BFloat16>::most_V;
    return a.params[0] == 2   ? Strips<2, Float32>::most_V
           : a.params[0] == 4 ? Strips<4, Float32>::most_V
                              : Strips<8, Float32>::most_V;
}
