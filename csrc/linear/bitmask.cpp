// bitmask: what the parts must look like. The format is defined in rmtkern/layouts/bitmask/weight.py.
#include "../kernels.h"

namespace rk {

void bitmask_check(const LinearArgs& a) {
    const int64_t cols = (a.K + 63) / 64, groups = (a.N + 127) / 128 * cols;
    require_part(a, 0, "values", DType::float32, a.parts[0].shape[0]);
    require_part(a, 1, "masks", DType::int64, a.N * cols);
    require_part(a, 2, "rows", DType::uint8, a.N * cols);
    require_part(a, 3, "starts", DType::int64, groups + 1);
}

}  // namespace rk
