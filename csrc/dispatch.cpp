// Which instruction sets exist, which of them this CPU has, and which one a call gets. The only file that knows all.
#include <omp.h>

#include <cstdlib>
#include <new>

#include "kernels.h"
#include "linear/system.h"

namespace rk {

namespace portable {
extern const Table table;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Table table;
}
namespace avx512 {
extern const Table table;
}
namespace avx512_bf16 {
extern const Table table;
}
#endif

namespace {

#if defined(__x86_64__)
// __builtin_cpu_supports also asks whether the operating system saves the registers.
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
           __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("lzcnt") && __builtin_cpu_supports("popcnt");
}

bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool has_avx512_bf16() {
    return has_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi2");
}
#endif

struct Tables {
    const Table* list[8] = {};
    Tables() {
        int n = 0;
#if defined(__x86_64__)
        if (has_avx512_bf16()) list[n++] = &avx512_bf16::table;
        if (has_avx512()) list[n++] = &avx512::table;
        if (has_avx2()) list[n++] = &avx2::table;
#endif
        list[n++] = &portable::table;
    }
};

struct Buffer {
    float* data = nullptr;
    size_t size = 0;
    ~Buffer() { ::operator delete(data, std::align_val_t(64)); }
};

struct Layout {
    const char* name;
    CheckFn check;
    Body Table::* body;
};

#define RK_LAYOUT(name) {#name, name##_check, &Table::name},
constexpr Layout layouts[] = {RK_LAYOUTS(RK_LAYOUT)};
#undef RK_LAYOUT

}  // namespace

const Table* const* tables() {
    static const Tables found;
    return found.list;
}

const Table& table_of(const std::string& isa) {
    std::string names;
    for (auto t = tables(); *t; ++t) {
        if (isa.empty() || isa == (*t)->isa) return **t;
        names += (names.empty() ? "" : ", ") + std::string((*t)->isa);
    }
    throw std::invalid_argument("unknown instruction set '" + isa + "'; this CPU runs: " + names);
}

Kernel find(const std::string& layout, const std::string& isa) {
    const Table& table = table_of(isa);
    std::string names;
    for (const Layout& l : layouts) {
        if (layout == l.name) return {l.check, table.*l.body};
        names += (names.empty() ? "" : ", ") + std::string(l.name);
    }
    throw std::invalid_argument("no CPU kernel for layout '" + layout + "'; layouts with one: " + names);
}

void require_part(const LinearArgs& a, int i, const char* name, DType dtype, int64_t rows, int64_t cols) {
    static const char* const names[] = {"float32", "bfloat16 (as uint16)", "uint8", "int32", "int64"};
    if (i >= a.n_parts)
        throw std::invalid_argument("part '" + std::string(name) + "' is missing: got " + std::to_string(a.n_parts) +
                                    " parts");
    const Array& p = a.parts[i];
    if (p.dtype != dtype)
        throw TypeMismatch("part '" + std::string(name) + "' must be " + names[int(dtype)] + ", got " +
                           names[int(p.dtype)]);
    const bool flat = cols < 0;
    if (p.ndim != (flat ? 1 : 2) || p.shape[0] != rows || (!flat && p.shape[1] != cols))
        throw std::invalid_argument(
            "part '" + std::string(name) + "' must have shape (" + std::to_string(rows) +
            (flat ? "" : ", " + std::to_string(cols)) + ") for a weight of (" + std::to_string(a.N) + ", " +
            std::to_string(a.K) + "), got (" + std::to_string(p.shape[0]) +
            (p.ndim == 2 ? ", " + std::to_string(p.shape[1]) : "") + ")");
}

float* scratch(size_t floats, Scratch use) {
    thread_local Buffer buffers[scratch_uses];
    Buffer& buffer = buffers[int(use)];
    if (buffer.size < floats) {
        auto* data = static_cast<float*>(::operator new(floats * sizeof(float), std::align_val_t(64)));
        ::operator delete(buffer.data, std::align_val_t(64));
        buffer.data = data;
        buffer.size = floats;
    }
    return buffer.data;
}

void parallel(int n, void (*work)(const void* arg, int i, int n), const void* arg) {
    if (n == 1) {
        work(arg, 0, 1);
        return;
    }
#pragma omp parallel num_threads(n)
    for (int i = omp_get_thread_num(); i < n; i += omp_get_num_threads()) work(arg, i, n);
}

}  // namespace rk
