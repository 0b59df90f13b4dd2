// bitmask: what the parts must look like. The format is defined in rmtkern/layouts/bitmask/weight.py.
#include "../kernels.h"

namespace rk {

void bitmask_check(const LinearArgs& a) {
    const int64_t words = a.dtype == DType::bfloat16 ? 2 : 1;  // of a mask: 64 columns of float, 128 of bfloat16
    const int64_t cols = (a.K + 64 * words - 1) / (64 * words), groups = (a.N + 127) / 128 * cols;
    require_part(a, 0, "values", a.dtype, a.parts[0].shape[0]);
    require_part(a, 1, "masks", DType::int64, a.N * cols * words);
    require_part(a, 2, "rows", DType::uint8, a.N * cols);
    require_part(a, 3, "starts", DType::int64, groups + 1);
}

}  // namespace rk
