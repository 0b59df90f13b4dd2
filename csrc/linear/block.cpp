// block: what the parts must look like. The format is defined in rmtkern/layouts/block/weight.py.
#include "../kernels.h"

namespace rk {

void block_check(const LinearArgs& a) {
    const int64_t r = a.params[0];
    if (a.n_params != 1 || (r != 2 && r != 4 && r != 8)) throw std::invalid_argument("block: params must be (r), 2, 4 or 8");
    const int64_t cols = (a.K + 63) / 64, strips = (a.N + r - 1) / r, groups = (a.N + 127) / 128 * cols;
    require_part(a, 0, "values", DType::float32, a.parts[0].shape[0], r);
    require_part(a, 1, "masks", DType::int64, strips * cols);
    require_part(a, 2, "rows", DType::uint8, strips * cols);
    require_part(a, 3, "starts", DType::int64, groups + 1);
}

}  // namespace rk
