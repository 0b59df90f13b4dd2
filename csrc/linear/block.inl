// block: r x 1 mini-blocks, strips of r rows.
const char* block_linear(const LinearArgs& a) {
    return a.params[0] == 2 ? run_strips<2>(a) : a.params[0] == 4 ? run_strips<4>(a) : run_strips<8>(a);
}
