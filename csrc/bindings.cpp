// The Python face: arrays are taken as they are (never copied), checked, and handed over without the GIL.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <optional>
#include <vector>

#include "kernels.h"

namespace py = pybind11;

namespace {

std::string shape_text(const py::array& a) { return py::str(a.attr("shape")); }

rk::Array as_array(const py::array& a, const std::string& name) {
    rk::Array out;
    const py::dtype dtype = a.dtype();
    const char kind = dtype.kind();
    const auto size = dtype.itemsize();
    if (kind == 'f' && size == 4) out.dtype = rk::DType::float32;
    else if (kind == 'u' && size == 2) out.dtype = rk::DType::bfloat16;  // NumPy has no bfloat16: it crosses as uint16
    else if (kind == 'u' && size == 1) out.dtype = rk::DType::uint8;
    else if (kind == 'i' && size == 4) out.dtype = rk::DType::int32;
    else if (kind == 'i' && size == 8) out.dtype = rk::DType::int64;
    else throw rk::TypeMismatch(name + " has dtype " + std::string(py::str(dtype)) + "; no kernel takes it");
    if (!(a.flags() & py::array::c_style))
        throw rk::TypeMismatch(name + " is not C-contiguous; call .contiguous() first (it is never copied here)");
    if (a.ndim() < 1 || a.ndim() > 2)
        throw std::invalid_argument(name + " must have 1 or 2 dimensions, got shape " + shape_text(a));
    out.data = a.data();
    out.ndim = int(a.ndim());
    for (int i = 0; i < out.ndim; ++i) out.shape[i] = a.shape(i);
    return out;
}

// An array of activations: `dtype` and shape (cols = -1: one-dimensional).
rk::Array as_values(const py::array& a, const std::string& name, rk::DType dtype, int64_t rows, int64_t cols) {
    rk::Array out = as_array(a, name);
    if (out.dtype != dtype)
        throw rk::TypeMismatch(name + " must be " + (dtype == rk::DType::float32 ? "float32" : "bfloat16 (as uint16)") +
                               " as x is, got " + std::string(py::str(a.dtype())));
    const bool flat = cols < 0;
    if (out.ndim != (flat ? 1 : 2) || out.shape[0] != rows || (!flat && out.shape[1] != cols))
        throw std::invalid_argument(name + " must have shape (" + std::to_string(rows) +
                                    (flat ? "," : ", " + std::to_string(cols)) + "), got " + shape_text(a));
    return out;
}

// float32, or bfloat16, which crosses as uint16.
rk::DType activations_dtype(const py::dtype& dtype, const std::string& name) {
    if (dtype.kind() == 'f' && dtype.itemsize() == 4) return rk::DType::float32;
    if (dtype.kind() == 'u' && dtype.itemsize() == 2) return rk::DType::bfloat16;
    throw rk::TypeMismatch(name + " must be float32 or bfloat16 (as uint16), got " + std::string(py::str(dtype)));
}

rk::Activation as_activation(const std::optional<std::string>& name) {
    if (!name) return rk::Activation::none;
    if (*name == "gelu") return rk::Activation::gelu;
    if (*name == "gelu_tanh") return rk::Activation::gelu_tanh;
    if (*name == "silu") return rk::Activation::silu;
    if (*name == "relu") return rk::Activation::relu;
    throw std::invalid_argument("unknown activation '" + *name + "'; valid: None, gelu, gelu_tanh, relu, silu");
}

std::string isa_or_environment(const std::optional<std::string>& isa) {
    const char* env = std::getenv("RMTKERN_ISA");
    return isa ? *isa : env ? env : "";
}

// Four dimensions, the last one contiguous; strides in items go to `strides`.
const void* as_heads(const py::array& a, const std::string& name, const py::dtype& dtype, const int64_t (&shape)[4],
                     int64_t (&strides)[3]) {
    if (a.dtype().num() != dtype.num())
        throw rk::TypeMismatch(name + " must be " + std::string(py::str(dtype)) + " as q is, got " +
                               std::string(py::str(a.dtype())));
    bool fits = a.ndim() == 4;
    for (int i = 0; fits && i < 4; ++i) fits = a.shape(i) == shape[i];
    if (!fits) {
        std::string wanted;
        for (const int64_t n : shape) wanted += (wanted.empty() ? "" : ", ") + std::to_string(n);
        throw std::invalid_argument(name + " must have shape (" + wanted + "), got " + shape_text(a));
    }
    const int64_t size = a.itemsize();
    if (shape[3] > 1 && a.strides(3) != size)
        throw rk::TypeMismatch(name + " must be contiguous in its last dimension; call .contiguous() first");
    for (int i = 0; i < 3; ++i) strides[i] = a.strides(i) / size;
    return a.data();
}

void attention(const py::array& q, const py::array& k, const py::array& v, const std::optional<py::array>& mask,
               py::array& y, double scale, int threads, const std::optional<std::string>& isa) {
    const rk::Table& table = rk::table_of(isa_or_environment(isa));
    rk::AttentionArgs a;
    const py::dtype dtype = q.dtype();
    a.dtype = activations_dtype(dtype, "q");
    if (q.ndim() != 4 || k.ndim() != 4)
        throw std::invalid_argument("q and k must have shape (B, H, T, d), got " + shape_text(q) + " and " + shape_text(k));
    a.B = q.shape(0), a.H = q.shape(1), a.Tq = q.shape(2), a.d = q.shape(3), a.Tk = k.shape(2);
    if (a.Tk < 1 || a.d < 1) throw std::invalid_argument("attention needs at least one key and d >= 1, got " + shape_text(k));
    a.q = as_heads(q, "q", dtype, {a.B, a.H, a.Tq, a.d}, a.q_stride);
    a.k = as_heads(k, "k", dtype, {a.B, a.H, a.Tk, a.d}, a.k_stride);
    a.v = as_heads(v, "v", dtype, {a.B, a.H, a.Tk, a.d}, a.v_stride);
    if (mask) a.mask = as_heads(*mask, "mask", dtype, {a.B, a.H, a.Tq, a.Tk}, a.mask_stride);
    int64_t strides[3];
    as_heads(y, "y", dtype, {a.B, a.Tq, a.H, a.d}, strides);
    if (!(y.flags() & py::array::c_style)) throw rk::TypeMismatch("y must be C-contiguous");
    a.y = y.mutable_data();
    a.scale = float(scale);
    if (threads < 1) throw std::invalid_argument("threads must be >= 1, got " + std::to_string(threads));
    a.threads = threads;
    py::gil_scoped_release release;
    if (a.B && a.H && a.Tq) table.attention(a);
}

void layernorm(const py::array& x, const std::optional<py::array>& weight, const std::optional<py::array>& bias,
               py::array& y, double eps, int threads, const std::optional<std::string>& isa) {
    const rk::Table& table = rk::table_of(isa_or_environment(isa));
    rk::LayerNormArgs a;
    const rk::Array xa = as_array(x, "x");
    if (xa.ndim != 2) throw std::invalid_argument("x must have shape (T, K), got " + shape_text(x));
    a.T = xa.shape[0];
    a.K = xa.shape[1];
    if (a.K < 1) throw std::invalid_argument("layernorm needs K >= 1, got " + shape_text(x));
    a.dtype = activations_dtype(x.dtype(), "x");
    a.x = xa.data;
    if (weight) a.weight = as_values(*weight, "weight", a.dtype, a.K, -1).data;
    if (bias) a.bias = as_values(*bias, "bias", a.dtype, a.K, -1).data;
    as_values(y, "y", a.dtype, a.T, a.K);
    a.y = y.mutable_data();  // refuses a read-only array
    a.eps = float(eps);
    if (threads < 1) throw std::invalid_argument("threads must be >= 1, got " + std::to_string(threads));
    a.threads = threads;
    py::gil_scoped_release release;
    if (a.T) table.layernorm(a);
}

// The weight, bias and activation of a linear from rows of x, whose K and dtype are set, to N features.
rk::LinearArgs as_linear(const rk::LinearArgs& input, int64_t N, const std::vector<py::array>& parts,
                         const std::vector<int64_t>& params, const std::optional<py::array>& bias,
                         const std::optional<std::string>& activation) {
    rk::LinearArgs a = input;
    a.N = N;
    if (a.N < 1 || a.K < 1) throw std::invalid_argument("a weight needs N, K >= 1");
    if (bias) a.bias = as_values(*bias, "bias", a.dtype, a.N, -1).data;
    if (parts.size() > size_t(rk::max_parts) || params.size() > size_t(rk::max_params))
        throw std::invalid_argument("too many parts or params: got " + std::to_string(parts.size()) + " and " +
                                    std::to_string(params.size()));
    a.n_parts = int(parts.size());
    for (int i = 0; i < a.n_parts; ++i) a.parts[i] = as_array(parts[i], "part " + std::to_string(i));
    a.n_params = int(params.size());
    for (int i = 0; i < a.n_params; ++i) a.params[i] = params[i];
    a.activation = as_activation(activation);
    return a;
}

// What a call of linears from x to y has in common; K is that of x.
rk::LinearArgs as_call(const py::array& x, const py::array& y, int threads) {
    rk::LinearArgs a;
    const rk::Array xa = as_array(x, "x"), ya = as_array(y, "y");
    if (xa.ndim != 2) throw std::invalid_argument("x must have shape (T, K), got " + shape_text(x));
    if (ya.ndim != 2) throw std::invalid_argument("y must have shape (T, N), got " + shape_text(y));
    a.T = xa.shape[0];
    a.K = xa.shape[1];
    a.dtype = activations_dtype(x.dtype(), "x");
    a.x = xa.data;
    if (threads < 1) throw std::invalid_argument("threads must be >= 1, got " + std::to_string(threads));
    a.threads = threads;
    return a;
}

using Row = std::optional<py::array>;
using NormOf = std::optional<std::tuple<Row, Row, double>>;  // weight, bias, eps

// Of the rows of x of a call.
rk::Norm as_norm(const NormOf& norm, const rk::LinearArgs& call) {
    rk::Norm out;
    if (!norm) return out;
    const auto& [weight, bias, eps] = *norm;
    if (weight) out.weight = as_values(*weight, "the norm's weight", call.dtype, call.K, -1).data;
    if (bias) out.bias = as_values(*bias, "the norm's bias", call.dtype, call.K, -1).data;
    out.eps = float(eps);
    return out;
}

// y, scale and residual of a linear whose features are known.
void take_output(rk::LinearArgs& a, py::array& y, const std::optional<py::array>& scale,
                 const std::optional<py::array>& residual) {
    as_values(y, "y", a.dtype, a.T, a.outputs());
    a.y = y.mutable_data();  // refuses a read-only array
    if (scale) a.scale = as_values(*scale, "scale", a.dtype, a.outputs(), -1).data;
    if (residual) a.residual = as_values(*residual, "residual", a.dtype, a.T, a.outputs()).data;
}

void linear(const std::string& layout, const py::array& x, const std::vector<py::array>& parts,
            const std::vector<int64_t>& params, const std::optional<py::array>& bias,
            const std::optional<py::array>& scale, const std::optional<py::array>& residual, py::array& y,
            const std::optional<std::string>& activation, int threads, const std::optional<std::string>& isa, bool gated,
            const NormOf& norm) {
    const std::string name = isa_or_environment(isa);
    const rk::Table& table = rk::table_of(name);
    const rk::Kernel kernel = rk::find(layout, name);
    const rk::LinearArgs call = as_call(x, y, threads);
    const rk::Norm rows = as_norm(norm, call);
    const int64_t F = gated ? y.shape(1) : 0;
    const int64_t N = gated ? (F + rk::gate_chunk - 1) / rk::gate_chunk * 2 * rk::gate_chunk : y.shape(1);
    rk::LinearArgs a = as_linear(call, N, parts, params, bias, activation);
    a.F = F;
    if (norm) a.norm = &rows;
    take_output(a, y, scale, residual);
    py::gil_scoped_release release;
    kernel.check(a);
    if (a.T == 0) return;
    if (const char* damage = table.normed(kernel.body, a))
        throw std::invalid_argument(layout + ": " + damage + "; pack the weight again");
}

using Parts = std::vector<py::array>;
using Params = std::vector<int64_t>;
using Both = std::pair<std::optional<py::array>, std::optional<py::array>>;

void mlp(const std::pair<std::string, std::string>& layouts, const py::array& x, int64_t hidden,
         const std::pair<Parts, Parts>& parts, const std::pair<Params, Params>& params, const Both& biases,
         const std::optional<py::array>& scale, const std::optional<py::array>& residual, py::array& y,
         const std::optional<std::string>& activation, int threads, const std::optional<std::string>& isa,
         const NormOf& norm) {
    const std::string name = isa_or_environment(isa);
    const rk::Table& table = rk::table_of(name);
    const rk::Kernel first = rk::find(layouts.first, name), second = rk::find(layouts.second, name);
    rk::LinearArgs call = as_call(x, y, threads);
    const rk::Norm rows = as_norm(norm, call);
    rk::LinearArgs a = as_linear(call, hidden, parts.first, params.first, biases.first, activation);
    if (norm) a.norm = &rows;
    call.K = hidden;
    rk::LinearArgs b = as_linear(call, y.shape(1), parts.second, params.second, biases.second, std::nullopt);
    take_output(b, y, scale, residual);
    py::gil_scoped_release release;
    first.check(a);
    second.check(b);
    if (a.T == 0) return;
    if (const char* damage = table.mlp({first.body, a}, {second.body, b}))
        throw std::invalid_argument("mlp of " + layouts.first + " and " + layouts.second + ": " + damage +
                                    "; pack the weights again");
}

std::vector<std::string> isas() {
    std::vector<std::string> names;
    for (auto t = rk::tables(); *t; ++t) names.push_back((*t)->isa);
    return names;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    py::register_exception_translator([](std::exception_ptr p) {
        try {
            if (p) std::rethrow_exception(p);
        } catch (const rk::TypeMismatch& e) {
            PyErr_SetString(PyExc_TypeError, e.what());
        }
    });
    m.def("isas", &isas);
    m.def("attention", &attention, py::arg("q").noconvert(), py::arg("k").noconvert(), py::arg("v").noconvert(),
          py::arg("mask").noconvert().none(true), py::arg("y").noconvert(), py::arg("scale"), py::arg("threads"),
          py::arg("isa") = py::none());
    m.def("layernorm", &layernorm, py::arg("x").noconvert(), py::arg("weight").noconvert().none(true),
          py::arg("bias").noconvert().none(true), py::arg("y").noconvert(), py::arg("eps"), py::arg("threads"),
          py::arg("isa") = py::none());
    m.def("linear", &linear, py::arg("layout"), py::arg("x").noconvert(), py::arg("parts").noconvert(), py::arg("params"),
          py::arg("bias").noconvert().none(true), py::arg("scale").noconvert().none(true), py::arg("residual").noconvert().none(true),
          py::arg("y").noconvert(), py::arg("activation"), py::arg("threads"), py::arg("isa") = py::none(),
          py::arg("gated") = false, py::arg("norm").noconvert().none(true) = py::none());
    m.def("mlp", &mlp, py::arg("layouts"), py::arg("x").noconvert(), py::arg("hidden"), py::arg("parts").noconvert(),
          py::arg("params"), py::arg("biases").noconvert(), py::arg("scale").noconvert().none(true),
          py::arg("residual").noconvert().none(true), py::arg("y").noconvert(), py::arg("activation"), py::arg("threads"),
          py::arg("isa") = py::none(), py::arg("norm").noconvert().none(true) = py::none());
}
