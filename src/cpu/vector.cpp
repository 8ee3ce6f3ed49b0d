// Which table of vector kernels is in use.
#include "cpu/vector.hpp"

#include <array>
#include <atomic>

namespace flashdelta {

#if defined(__x86_64__)
extern const VectorKernels vector_kernels_avx512, vector_kernels_avx2;
#endif
extern const VectorKernels vector_kernels_baseline;

namespace {

// What this machine can run, best first, ended by null. Each target's list of features is what CMakeLists.txt compiles it
// with.
std::array<const VectorKernels*, 4> find_targets() {
  std::array<const VectorKernels*, 4> found{};
  std::size_t n = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  // Every processor with AVX2, FMA and BMI2 also has the older F16C and LZCNT, which not every compiler can ask for by name.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                    __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512) found[n++] = &vector_kernels_avx512;
  if (avx2) found[n++] = &vector_kernels_avx2;
  if (__builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt")) found[n++] = &vector_kernels_baseline;
#else
  found[n++] = &vector_kernels_baseline;
#endif
  return found;
}

std::atomic<const VectorKernels*> chosen{nullptr};

}  // namespace

const VectorKernels* const* vector_targets() {
  static const std::array<const VectorKernels*, 4> targets = find_targets();
  return targets.data();
}

const VectorKernels& vector_kernels() {
  const VectorKernels* table = chosen.load(std::memory_order_relaxed);
  return table != nullptr ? *table : *vector_targets()[0];
}

void use_vector_target(const VectorKernels* table) { chosen.store(table, std::memory_order_relaxed); }

}  // namespace flashdelta
