// The fallback for any CPU: 128-bit vectors of the compiler, no target region. Nothing here runs before dispatch.
#include "../kernels.h"
#include "../linear/system.h"

namespace rk::portable {
namespace {
constexpr int W = 4;        // floats in a vector
constexpr int max_V = 12;   // vectors of tokens in a panel: accumulators that fit 16 registers with one to spare
constexpr int max_sums = 12;  // accumulators of a kernel that feeds several rows from one load
constexpr int max_V_pairs = max_V;
constexpr int lanes_from_V = max_V + 1;  // never: weights are broadcast from memory
constexpr bool native_pairs = false;  // bfloat16 by shifts and float FMAs
#define RK_BODIES
#include "../kernels.inl"
}  // namespace
extern const Table table;
const Table table = RK_TABLE("portable");
}  // namespace rk::portable
