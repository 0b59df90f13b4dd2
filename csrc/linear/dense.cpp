// dense: what the parts must look like. The format is defined in rmtkern/layouts/tiles.py.
#include "../kernels.h"

namespace rk {

void dense_check(const LinearArgs& a) {
    const int64_t per = a.dtype == DType::bfloat16 ? 2 : 1;
    require_part(a, 0, "tiles", a.dtype, (a.N + 31) / 32 * ((a.K + per - 1) / per), 32 * per);
}

}  // namespace rk
