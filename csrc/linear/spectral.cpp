// spectral: what the parts must look like. The format is defined in rmtkern/layouts/spectral/weight.py.
#include "../kernels.h"

namespace rk {

void spectral_check(const LinearArgs& a) {
    const int64_t per = a.dtype == DType::bfloat16 ? 2 : 1, rank = a.params[0];
    if (a.n_params != 1 || rank < 1 || rank > (a.N < a.K ? a.N : a.K))
        throw std::invalid_argument("spectral: params must be (rank), 1 <= rank <= min(N, K)");
    bitmask_check(a);  // the sparse part comes first
    require_part(a, 4, "a", a.dtype, (rank + 31) / 32 * ((a.K + per - 1) / per), 32 * per);
    require_part(a, 5, "b", a.dtype, (a.N + 3) / 4 * ((rank + per - 1) / per), 4 * per);
}

}  // namespace rk
