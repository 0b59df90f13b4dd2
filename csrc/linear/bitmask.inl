// bitmask: unstructured, strips of one row.
const char* bitmask_linear(const LinearArgs& a) { return run_strips<1>(a); }
