// What every kernel receives and how kernels are found. Knows neither Python nor any instruction set.
#pragma once

#include <cstdint>
#include <cstddef>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "kernels.inl"

// Opens a region in which functions are compiled for more instructions than the file. Only after the last include, so
// that nothing from a header is compiled for an instruction set that the CPU may lack.
#define RK_PRAGMA(x) _Pragma(#x)
#if defined(__clang__)
#define RK_TARGET_BEGIN(features) \
    RK_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define RK_TARGET_END RK_PRAGMA(clang attribute pop)
#else
#define RK_TARGET_BEGIN(features) RK_PRAGMA(GCC push_options) RK_PRAGMA(GCC target(features))
#define RK_TARGET_END RK_PRAGMA(GCC pop_options)
#endif

// Each instruction set as a bundle of features: the compiler's target string, and what the CPU must have.
#define RK_AVX2_FEATURES "avx2,fma,bmi,bmi2,lzcnt,popcnt"
#define RK_AVX512_FEATURES "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,bmi,bmi2,lzcnt,popcnt"
#define RK_AVX512_BF16_FEATURES "avx512bf16,avx512vbmi2," RK_AVX512_FEATURES

namespace rk {

enum class DType { float32, bfloat16, uint8, int32, int64 };

struct Array {
    const void* data = nullptr;  // null: not given
    DType dtype = DType::float32;
    int ndim = 0;
    int64_t shape[2] = {0, 0};

    template <class T>
    const T* as() const {
        return static_cast<const T*>(data);
    }
    int64_t size() const { return ndim == 2 ? shape[0] * shape[1] : shape[0]; }
};

enum class Activation { none, gelu, gelu_tanh, silu, relu };

constexpr int max_parts = 6, max_params = 4;
constexpr int64_t gate_chunk = 8;  // half of the fewest outputs that any kernel finishes at a time

// LayerNorm of the rows of x on their way into a linear.
struct Norm {
    const void* weight = nullptr;  // [K]; may be null: ones
    const void* bias = nullptr;    // [K]; may be null: zeros
    float eps = 0;
};

// The values between the two linears of an MLP, as the panels that panel.inl walks: nobody writes them row by row.
struct Passed {
    float* data = nullptr;
    int64_t floats = 0;           // from one panel to the next
    int vectors = 0;              // of tokens in the widest panel
    uint32_t* special = nullptr;  // of each panel: not zero if a bfloat16 in it is Inf or NaN
};

// y [T, N] = activation(x [T, K] W^T + bias [N]) * scale [N] + residual [T, N], where W [N, K] is parts and params.
// Gated (F > 0): y [T, F] = activation(x Wg^T + bg) * (x Wu^T + bu) * scale [F] + residual [T, F], where the rows of W and
// of bias are pairs in chunks: gate_chunk rows of Wg, then the same ones of Wu; the last chunks are filled up.
struct LinearArgs {
    int64_t T = 0, N = 0, K = 0, F = 0;
    DType dtype = DType::float32;    // of x, bias, scale, residual and y: float32 or bfloat16
    const void* x = nullptr;
    const void* bias = nullptr;      // may be null
    const void* scale = nullptr;     // may be null
    const void* residual = nullptr;  // may be null
    void* y = nullptr;
    Array parts[max_parts];
    int n_parts = 0;
    int64_t params[max_params] = {};
    int n_params = 0;
    Activation activation = Activation::none;
    int threads = 1;
    const Norm* norm = nullptr;        // of x: y = activation(norm(x) W^T + bias) ...
    const Passed* x_passed = nullptr;  // in place of x
    const Passed* y_passed = nullptr;  // in place of y: neither scale nor residual
    bool checked = false;              // the contents of the parts were looked at by an earlier call

    int64_t outputs() const { return F ? F : N; }  // of a token
};

// A kernel; null when done, or what is wrong with the contents of the parts (then nothing was read past their end).
using LinearFn = const char* (*)(const LinearArgs&);
using CheckFn = void (*)(const LinearArgs&);
// How many vectors of tokens its widest panel has; 0: it takes and writes rows, and passes nothing on.
using WidthFn = int (*)(const LinearArgs&);

// What an instruction set has for a layout.
struct Body {
    LinearFn run;
    WidthFn width;
};

// As the body's kernel, of which only those that walk panels know `norm`.
using NormedFn = const char* (*)(const Body&, const LinearArgs&);

// One linear of an MLP.
struct Layer {
    Body body;
    LinearArgs args;
};

// y = epilogue of `second` (activation(x W1^T + b1) W2^T + b2); x is of `first`, y of `second`. As LinearFn.
using MlpFn = const char* (*)(Layer first, Layer second);

// y [B, Tq, H, d] = softmax(q k^T * scale + mask) v; q [B, H, Tq, d], k and v [B, H, Tk, d] with strides in items over all
// dimensions but the last, which is contiguous; mask (may be null) [B, H, Tq, Tk] likewise, where strides may be 0.
struct AttentionArgs {
    int64_t B = 0, H = 0, Tq = 0, Tk = 0, d = 0;
    DType dtype = DType::float32;  // of all arrays: float32 or bfloat16
    const void *q = nullptr, *k = nullptr, *v = nullptr, *mask = nullptr;
    int64_t q_stride[3] = {}, k_stride[3] = {}, v_stride[3] = {}, mask_stride[3] = {};
    void* y = nullptr;
    float scale = 1;
    int threads = 1;
};
using AttentionFn = void (*)(const AttentionArgs&);

// y [T, K] = (x [T, K] - mean) / sqrt(variance + eps) * weight [K] + bias [K], mean and variance of each row.
struct LayerNormArgs {
    int64_t T = 0, K = 0;
    DType dtype = DType::float32;  // of all arrays: float32 or bfloat16
    const void* x = nullptr;
    const void* weight = nullptr;  // may be null: ones
    const void* bias = nullptr;    // may be null: zeros
    void* y = nullptr;
    float eps = 0;
    int threads = 1;
};
using LayerNormFn = void (*)(const LayerNormArgs&);

#define RK_FIELD(name) Body name;
struct Table {
    const char* isa;
    AttentionFn attention;
    LayerNormFn layernorm;
    NormedFn normed;
    MlpFn mlp;
    RK_LAYOUTS(RK_FIELD)
};
#undef RK_FIELD

// A part or an array has the wrong type; arrives in Python as TypeError. std::invalid_argument arrives as ValueError.
struct TypeMismatch : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// One per layout (linear/<layout>.cpp): throws unless the parts have the types and shapes of a weight [N, K].
#define RK_CHECK(name) void name##_check(const LinearArgs&);
RK_LAYOUTS(RK_CHECK)
#undef RK_CHECK

// Throws unless part `i` is given with this dtype and shape (cols = -1: one-dimensional).
void require_part(const LinearArgs& a, int i, const char* name, DType dtype, int64_t rows, int64_t cols = -1);

// Instruction sets that this CPU runs, best first; the list ends with a null pointer.
const Table* const* tables();

// The check and the kernel of a layout; `isa` empty means the best. ValueError with the valid names otherwise.
struct Kernel {
    CheckFn check;
    Body body;
};
Kernel find(const std::string& layout, const std::string& isa);

// The table of an instruction set; empty means the best. ValueError with the valid names otherwise.
const Table& table_of(const std::string& isa);

}  // namespace rk
