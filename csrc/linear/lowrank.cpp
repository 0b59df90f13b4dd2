// lowrank: what the parts must look like. The format is defined in rmtkern/layouts/lowrank/weight.py.
#include "../kernels.h"

namespace rk {

void lowrank_check(const LinearArgs& a) {
    const int64_t per = a.dtype == DType::bfloat16 ? 2 : 1, rank = a.params[0];
    if (a.n_params != 1 || rank < 1 || rank > (a.N < a.K ? a.N : a.K))
        throw std::invalid_argument("lowrank: params must be (rank), 1 <= rank <= min(N, K)");
    require_part(a, 0, "a", a.dtype, (rank + 31) / 32 * ((a.K + per - 1) / per), 32 * per);
    require_part(a, 1, "b", a.dtype, (a.N + 31) / 32 * ((rank + per - 1) / per), 32 * per);
}

}  // namespace rk
