#include <algorithm>

#include "cuda/device.hpp"
#include "cuda/finish_sm90.hpp"
#include "cuda/ptx.cuh"

namespace flashdelta::cuda {
namespace {

// A block sums SUM_HEADS value heads, whose sums lie in one sector of memory, each by SUM_THREADS threads.
constexpr int SUM_HEADS = 4, SUM_THREADS = 64, THREADS_PER_BLOCK = SUM_HEADS * SUM_THREADS;

// A sum in fp32 that remembers what its last bits lost.
struct CompensatedSum {
  float sum = 0.0f, lost = 0.0f;

  __device__ void add(float x) {
    const float next = sum + x;
    if (fabsf(next) <= 3.4028234663852886e38f) lost += fabsf(sum) >= fabsf(x) ? sum - next + x : x - next + sum;
    sum = next;
  }
  __device__ void add(const CompensatedSum& other) {
    add(other.sum);
    lost += other.lost;
  }
};

struct ParameterSums {
  CompensatedSum A_log, dt_bias;
};

// dA_log and ddt_bias of value heads SUM_HEADS * `group`..: each thread's slots in order, then pairs of threads.
__device__ void sum_gates(const FinishParameters& p, int group, ParameterSums (&sums)[THREADS_PER_BLOCK]) {
  const int thread = static_cast<int>(threadIdx.x), value_head = group * SUM_HEADS + thread % SUM_HEADS;
  ParameterSums mine;
  if (value_head < p.value_heads) {
#pragma unroll 4
    for (int64_t slot = thread / SUM_HEADS; slot < p.sum_count; slot += SUM_THREADS) {
      const float2 part = p.gate_sums[slot * p.value_heads + value_head];
      mine.A_log.add(part.x);
      mine.dt_bias.add(part.y);
    }
  }
  sums[thread] = mine;
  for (int step = SUM_THREADS / 2; step > 0; step /= 2) {
    __syncthreads();
    if (thread < step * SUM_HEADS) {
      const ParameterSums& other = sums[thread + step * SUM_HEADS];
      sums[thread].A_log.add(other.A_log);
      sums[thread].dt_bias.add(other.dt_bias);
    }
  }
  if (thread >= SUM_HEADS || value_head >= p.value_heads) return;
  const ParameterSums& all = sums[thread];
  if (p.dA_log.data != nullptr) {
    store_element(p.dA_log.data, p.dA_log.type, value_head * p.dA_log.stride[0], all.A_log.sum + all.A_log.lost);
  }
  if (p.ddt_bias.data != nullptr) {
    store_element(p.ddt_bias.data, p.ddt_bias.type, value_head * p.ddt_bias.stride[0], all.dt_bias.sum + all.dt_bias.lost);
  }
}

// Zeros in `rows` tokens from `first` on of a packed tensor [1, T, heads, columns]; all blocks together. PIECE elements at
// once: 8, 16 bytes of a tensor with a tensor map, or one.
template <int PIECE>
__device__ void clear_rows(const View& tensor, int64_t first, int64_t rows, int heads, int columns) {
  if (tensor.data == nullptr) return;
  const int64_t pieces = columns / PIECE, per_row = heads * pieces;
  const int64_t step = static_cast<int64_t>(gridDim.x) * THREADS_PER_BLOCK;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS_PER_BLOCK + threadIdx.x; i < rows * per_row; i += step) {
    const int64_t piece = i % per_row, at = tensor.at(0, first + i / per_row, piece / pieces) + piece % pieces * PIECE;
    if constexpr (PIECE == 8) {
      *reinterpret_cast<uint4*>(static_cast<uint16_t*>(tensor.data) + at) = make_uint4(0, 0, 0, 0);
    } else {
      store_element(tensor.data, tensor.type, at, 0.0f);
    }
  }
}

// Blocks that sum a group of value heads; all of them clear.
__host__ __device__ int sum_blocks(const FinishParameters& p) {
  const bool wanted = p.dA_log.data != nullptr || p.ddt_bias.data != nullptr;
  return wanted ? (p.value_heads + SUM_HEADS - 1) / SUM_HEADS : 0;
}

}  // namespace

__global__ void __launch_bounds__(THREADS_PER_BLOCK) finish_kernel(const __grid_constant__ FinishParameters p) {
  extern __shared__ __align__(1024) uint8_t raw[];
  auto& sums = *reinterpret_cast<ParameterSums(*)[THREADS_PER_BLOCK]>(raw);
  wait_for_earlier_kernels();
  if (static_cast<int>(blockIdx.x) < sum_blocks(p)) sum_gates(p, static_cast<int>(blockIdx.x), sums);
  if (p.sequences.cu_seqlens == nullptr) return;
  const int64_t first = p.sequences.used_tokens(), rows = p.sequences.T - first;
  clear_rows<8>(p.dq, first, rows, p.heads, KEYS);
  clear_rows<8>(p.dk, first, rows, p.heads, KEYS);
  clear_rows<8>(p.dv, first, rows, p.value_heads, p.values);
  clear_rows<1>(p.dg, first, rows, p.value_heads, 1);
  clear_rows<1>(p.dbeta, first, rows, p.value_heads, 1);
}

fd_status launch_finish(const FinishParameters& p, int sm_count, void* stream) {
  const bool clears = p.sequences.cu_seqlens != nullptr && p.sequences.T > 0;
  const int blocks = std::max(sum_blocks(p), clears ? sm_count : 0);
  if (blocks == 0) return FD_OK;
  const Launch config{.name = "finish_kernel",
                      .grid = dim3(static_cast<unsigned>(blocks)),
                      .block = dim3(THREADS_PER_BLOCK),
                      .shared = THREADS_PER_BLOCK * sizeof(ParameterSums),
                      .overlap = true};
  return launch(finish_kernel, config, p, stream);
}

}  // namespace flashdelta::cuda
