// How much a chunk lengthens or shortens a state, or its gradient, at most: for the windows of context parallelism.
#pragma once

#include "cuda/block_sm90.cuh"

namespace flashdelta::cuda {

constexpr int WINDOW_WARPS = 8, WINDOW_THREADS = 32 * WINDOW_WARPS;

struct WindowMemory {
  float factor[WINDOW_WARPS];
  float decay[WINDOW_WARPS];
};

// What follows takes log2 of factors, rounded up, of the tokens of a chunk: `first` + 32 and `first`, which is the lane's
// own, and those of the warp's other lanes.
constexpr float WINDOW_ROUNDING = 1e-5f;

// |k|^2 of the lane's tokens. Half of the warp loads a row; then a lane adds up what the others of its half have of its
// rows.
template <typename T, typename Parameters>
__device__ __forceinline__ float2 key_squares(const Parameters& p, int64_t batch, int head, int64_t first, int lane) {
  constexpr int ROWS = 16;
  const auto* k =
      static_cast<const uint16_t*>(p.k.data) + p.k.at(batch, first - lane % ROWS, head) + KEYS / ROWS * (lane % ROWS);
  float2 out = {};
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    uint32_t part[4 * ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const uint4 x = *reinterpret_cast<const uint4*>(k + (32 * half + i) * p.k.stride[1]);
      part[4 * i] = x.x;
      part[4 * i + 1] = x.y;
      part[4 * i + 2] = x.z;
      part[4 * i + 3] = x.w;
    }
    computed(part);  // all loads are under way before the first is waited for
    float square[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      square[i] = 0.0f;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float2 y = unpack<T>(part[4 * i + e]);
        square[i] = fmaf(y.x, y.x, fmaf(y.y, y.y, square[i]));
      }
    }
#pragma unroll
    for (int step = ROWS / 2; step > 0; step /= 2) {
      const bool upper = (lane & step) != 0;
#pragma unroll
      for (int i = 0; i < ROWS / 2; ++i) {
        if (i >= step) break;
        const float theirs = __shfl_xor_sync(~0u, upper ? square[i] : square[i + step], step);
        square[i] = (upper ? square[i + step] : square[i]) + theirs;
      }
    }
    out = {out.y, square[0]};
  }
  return out;
}

// By how much the decay alone lengthens a state. Of the parameters: gates.
template <typename Parameters>
__device__ __forceinline__ float chunk_decay(const Parameters& p, int64_t batch, int value_head, int64_t first) {
  constexpr float LOG2E = 1.44269504088896341f;
  Gates::Bits bits[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) bits[i] = p.gates.gate_bits(batch, first + 32 * i, value_head);
  float sum = 0, size = 0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float decay = fmaxf(p.gates.log_decay(bits[i], value_head) * LOG2E, -1e4f);
    sum += decay;
    size += fabsf(decay);
  }
  return warp_sum(sum) + WINDOW_ROUNDING * (1.0f + warp_sum(size));
}

// By how much the keys do, at most: max(1, |1 - beta |k|^2|) each, docs/math.md. With l2 norm |k| is at most 1. Of the
// parameters: gates, k, heads, value_heads, l2norm.
template <typename T, typename Parameters>
__device__ __forceinline__ float chunk_growth(const Parameters& p, int64_t batch, int value_head, int64_t first) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  Gates::Bits bits[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) bits[i] = p.gates.bits(batch, first + 32 * i, value_head);
  float2 square = {1.0f, 1.0f};
  if (p.l2norm == 0) square = key_squares<T>(p, batch, value_head / (p.value_heads / p.heads), first, lane);
  const float growth = log2f(fmaxf(1.0f, fabsf(1.0f - p.gates.write_strength(bits[0]) * square.x))) +
                       log2f(fmaxf(1.0f, fabsf(1.0f - p.gates.write_strength(bits[1]) * square.y)));
  return (1.0f + WINDOW_ROUNDING) * warp_sum(growth);
}

// Both.
template <typename T, typename Parameters>
__device__ __forceinline__ float chunk_factor(const Parameters& p, int64_t batch, int value_head, int64_t first) {
  return chunk_growth<T>(p, batch, value_head, first) + chunk_decay(p, batch, value_head, first);
}

}  // namespace flashdelta::cuda
