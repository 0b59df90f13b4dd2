// block: what the parts must look like. The format is defined in rmtkern/layouts/block/weight.py.
#include "../kernels.h"

namespace rk {

void block_check(const LinearArgs& a) {
    const int64_t r = a.params[0], c = a.params[1];
    const bool known = a.dtype == DType::float32 ? c == 1 && (r == 2 || r == 4 || r == 8) : c == 2 && (r == 1 || r == 4);
    if (a.n_params != 2 || !known)
        throw std::invalid_argument("block: params must be (r, c): (2, 1), (4, 1) or (8, 1) for float32, (1, 2) or (4, 2) for "
                                    "bfloat16");
    const int64_t cols = (a.K + 64 * c - 1) / (64 * c), strips = (a.N + r - 1) / r, groups = (a.N + 127) / 128 * cols;
    require_part(a, 0, "values", a.dtype, a.parts[0].shape[0], r * c);
    require_part(a, 1, "masks", DType::int64, strips * cols);
    require_part(a, 2, "rows", DType::uint8, strips * cols);
    require_part(a, 3, "starts", DType::int64, groups + 1);
}

}  // namespace rk
