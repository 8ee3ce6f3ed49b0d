// What the kernels of the decode step share: the parameters of a call, sums over a warp.
#pragma once

#include "cuda/inputs.cuh"

namespace flashdelta::cuda {

// How vectors of a state are accessed: in one piece of 16 or 8 bytes, or, where a base or stride forbids that, by 2 bytes.
enum class Access { whole16, whole8, pieces };

struct StepParameters {
  View q, k;  // [B, T, H, K]
  View v, o;  // [B, T, HV, V]
  Gates gates;
  Sequences sequences;
  Pool initial, final;  // states: [P, HV, K, V] or [P, HV, V, K]
  Access initial_access, final_access;
  const void* accepted;  // [N], of the indices' type; null: slot 0
  bool state_per_token;  // final.index is [N, S]
  int32_t HV, group;     // value heads; of these, per query/key head
  int32_t K, V;
  int32_t value_blocks;  // blocks per head
  int32_t capacity;      // tokens taken at once
  bool l2norm;
  float l2norm_eps, scale;
};

constexpr unsigned ALL_LANES = 0xffffffffu;

// Sums x over the lanes that differ in the bits MASK, MASK / 2, .. LAST, and leaves each lane with its share: returns p such
// that x[0..] holds the sums of elements p.. (COUNT over the number of lanes of them, at least one).
template <int COUNT, int MASK, int LAST>
__device__ int sum_and_share(float* x, int lane) {
  int position = 0;
  if constexpr (COUNT > 1) {
    const bool upper = (lane & MASK) != 0;
#pragma unroll
    for (int i = 0; i < COUNT / 2; ++i) {
      const float given = upper ? x[i] : x[i + COUNT / 2], kept = upper ? x[i + COUNT / 2] : x[i];
      x[i] = kept + __shfl_xor_sync(ALL_LANES, given, MASK);
    }
    position = upper ? COUNT / 2 : 0;
  } else {
    x[0] += __shfl_xor_sync(ALL_LANES, x[0], MASK);
  }
  if constexpr (MASK > LAST) position += sum_and_share<(COUNT > 1 ? COUNT / 2 : 1), MASK / 2, LAST>(x, lane);
  return position;
}

// The first one in the lower half.
__device__ inline uint32_t pack_bf16(float x, float y) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
  return static_cast<uint32_t>(__bfloat16_as_ushort(pair.y)) << 16 | __bfloat16_as_ushort(pair.x);
}

__device__ inline float sum_of_warp(float x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x += __shfl_xor_sync(ALL_LANES, x, mask);
  return x;
}

// Row [batch, token, head] of q or k: element lane + 32 i in x[i], zero past K.
template <int COUNT>
__device__ void load_row(float (&x)[COUNT], const View& tensor, int64_t offset, int K, int lane) {
  const auto each = [&](auto&& element) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) x[i] = lane + 32 * i < K ? element(offset + lane + 32 * i) : 0.0f;
  };
  if (tensor.type == FD_FLOAT32) {
    each([&](int64_t i) { return static_cast<const float*>(tensor.data)[i]; });
  } else if (tensor.type == FD_BFLOAT16) {
    each([&](int64_t i) { return __bfloat162float(static_cast<const __nv_bfloat16*>(tensor.data)[i]); });
  } else {
    each([&](int64_t i) { return __half2float(static_cast<const __half*>(tensor.data)[i]); });
  }
}

template <int COUNT>
__device__ float l2norm_factor(const float (&x)[COUNT], float eps) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) sum = fmaf(x[i], x[i], sum);
  return 1.0f / sqrtf(sum_of_warp(sum) + eps);
}

}  // namespace flashdelta::cuda
