// Scratch memory for kernels that are tested alone, and what they work on, from a test case.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <vector>

#include "backend.hpp"
#include "tests/emulation/chunk_reference.hpp"
#include "tests/support/data.hpp"
#include "tests/support/tensor.hpp"

// In a build with CUDA the real namespace is in the same program.
#define cuda emulated_cuda
#include "cuda/tiling_sm90.hpp"

namespace flashdelta::emulation {

// Scratch memory, poisoned and guarded, and the table for all chunks of a call in one wave.
struct Wave {
  std::vector<cuda::ChunkPlace> chunks;  // by slot
  std::vector<int> first_slot;           // of each sequence
  testing::Memory vectors, t, p, s, r;
  cuda::Scratch scratch;

  explicit Wave(const testing::Case&);
  bool guards_intact() const;
};

// Calls `body` with the arguments of the case's forward call in normal form; memory is checked as in tests/support/call.hpp.
void with_call(const testing::Case&, const testing::Data&, const std::function<fd_status(const fd_forward_args&)>& body);

// What one value head of sequence n sees, in float64.
HeadInputs head_inputs(const testing::Case&, const testing::Data&, std::int64_t n, std::int64_t value_head);

// 1 / |row| of a [B, T, heads, columns] array, `token` counted over the batch.
double inverse_norm(const testing::Array&, std::int64_t token, std::int64_t head);

// Sum of squared differences over the sum of squares expected, and the root of it.
class RelativeError {
 public:
  void add(double got, double expected) {
    error_ += (got - expected) * (got - expected);
    norm_ += expected * expected;
  }
  double value() const { return std::sqrt(error_ / norm_); }

 private:
  double error_ = 0, norm_ = 1e-30;
};

bool same_bytes(const testing::Memory&, const testing::Memory&);
bool poison(const void* from, std::int64_t bytes);  // nothing was written there

}  // namespace flashdelta::emulation
