// Stands for src/cuda/ptx.cuh in the emulation: kernels do not overlap.
#pragma once

#include <vector_types.h>

#include <cstdint>

#include "tests/emulation/emulator.hpp"

namespace flashdelta::cuda {

inline std::int64_t waits = 0;  // by threads of the last kernel
inline void wait_for_earlier_kernels() { ++waits; }
inline void allow_later_kernels() {}
inline void pin(std::uint32_t&) {}

// A vector that is not aligned is a fault on the GPU.
template <typename Vector>
Vector load_once(const Vector* address) {
  if (reinterpret_cast<std::uintptr_t>(address) % sizeof(Vector) != 0) emulation::fault("a vector that is not aligned");
  return *address;
}
inline uint4 load_at_once(const uint4* address) { return load_once(address); }
inline void prefetch_line(const void*) {}
template <typename Vector>
void __stcs(Vector* address, const Vector& x) {
  if (reinterpret_cast<std::uintptr_t>(address) % sizeof(Vector) != 0) emulation::fault("a vector that is not aligned");
  *address = x;
}
inline std::uint32_t __byte_perm(std::uint32_t x, std::uint32_t y, unsigned which) {
  const std::uint64_t both = std::uint64_t{y} << 32 | x;
  std::uint32_t result = 0;
  for (unsigned i = 0; i < 4; ++i) result |= static_cast<std::uint32_t>(both >> 8 * (which >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}

}  // namespace flashdelta::cuda
