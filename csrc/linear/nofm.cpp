// nofm: what the parts must look like. The format is defined in rmtkern/layouts/nofm/weight.py.
#include "../kernels.h"

namespace rk {

void nofm_check(const LinearArgs& a) {
    const int64_t n = a.params[0], m = a.params[1];
    if (a.n_params < 2 || a.n_params > 3 || n < 1 || m > 16 || n > m)
        throw std::invalid_argument("nofm: params must be (n, m) or (n, m, r) with 1 <= n <= m <= 16");
    if (a.K % m)
        throw std::invalid_argument("nofm: in-features " + std::to_string(a.K) + " are not divisible by m = " +
                                    std::to_string(m));
    if (a.n_params == 3 && (a.params[2] != 4 || a.dtype != DType::bfloat16))
        throw std::invalid_argument("nofm: r must be 4, for bfloat16 only");
    if (a.dtype == DType::bfloat16) {
        if (n != 2 || m != 4) throw std::invalid_argument("nofm: bfloat16 has 2:4 only; use bitmask for other n:m");
        const int64_t tiles = (a.N + 15) / 16, groups = a.K / 4;
        if (a.n_params == 3) {
            const int64_t strips = (a.N + 3) / 4;
            require_part(a, 0, "values", DType::bfloat16, strips * groups, 8);
            require_part(a, 1, "masks", DType::int64, strips * ((groups + 15) / 16));
            return;
        }
        require_part(a, 0, "values", DType::bfloat16, tiles * groups, 32);
        require_part(a, 1, "masks", DType::uint8, tiles * ((groups + 1) / 2), 64);
        return;
    }
    require_part(a, 0, "values", DType::float32, a.N, a.K / m * n);
    require_part(a, 1, "masks", DType::int64, a.N, (a.K + 63) / 64);
}

}  // namespace rk
