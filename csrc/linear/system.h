// What the bodies need from outside an instruction set: scratch memory and threads. Compiled for any CPU.
#pragma once

#include <cstddef>
#include <cstdint>

namespace rk {

// What memory is for: a kernel may call another one, whose memory must be another.
enum class Scratch { working, passed, pairs, second_pairs, normed };
constexpr int scratch_uses = 5;

// This thread's scratch memory for a use, 64-byte aligned, at least `floats` long; it only grows and is freed with the
// thread. Throws std::bad_alloc. The content is whatever was there.
float* scratch(size_t floats, Scratch use = Scratch::working);

// Runs work(arg, i, n) for i = 0 ... n-1 on n OpenMP threads.
void parallel(int n, void (*work)(const void* arg, int i, int n), const void* arg);

}  // namespace rk
