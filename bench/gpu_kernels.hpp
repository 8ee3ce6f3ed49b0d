// Kernels of the GPU benchmarks' own: test data, the two ceilings of the machine, the clock.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "flashdelta/flashdelta.h"

namespace flashdelta::bench {

// Random elements, a function of seed and position alone.
enum class Fill {
  normal,     // standard normal
  unit_rows,  // rows of 128 of length 1 ("count" is a multiple of 128)
  zero,
  decay,    // logsigmoid(normal) / 16
  gate,     // [.., heads]: the same, but every fourth head 0
  strength  // sigmoid(normal)
};
void fill(void* data, fd_dtype type, std::size_t count, Fill what, std::int64_t heads, std::uint64_t seed,
          cudaStream_t stream);

// Copies `bytes`, a multiple of 16, from one end of the memory to the other.
void copy(void* to, const void* from, std::size_t bytes, cudaStream_t stream);

// Dense bf16 products with fp32 sums on every SM, operands in registers and shared memory, at nothing's expense but the
// tensor cores'. `noise` is 64 KB of normal bf16 numbers, `sums` one float per thread. Returns the floating-point
// operations.
double multiply(const void* noise, float* sums, int sm_count, int rounds, cudaStream_t stream);
constexpr int MULTIPLY_THREADS = 256;
constexpr std::size_t NOISE_BYTES = std::size_t{64} << 10;

// SM, its cycle counter and the time in nanoseconds, one per block.
struct Stamp {
  unsigned long long sm, cycles, nanoseconds;
};
void stamp(Stamp* stamps, int blocks, cudaStream_t stream);

// MHz of the SMs between two sets of stamps: the median over the SMs that are in both; 0 if there is none.
double clock_between(const std::vector<Stamp>& before, const std::vector<Stamp>& after);

}  // namespace flashdelta::bench
