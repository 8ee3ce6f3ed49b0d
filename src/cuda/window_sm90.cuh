// How much a chunk lengthens or shortens a state, or its gradient, at most: for the windows of context parallelism.
#pragma once

#include "cuda/block_sm90.cuh"

namespace flashdelta::cuda {

constexpr int WINDOW_WARPS = 8, WINDOW_THREADS = 32 * WINDOW_WARPS;

struct WindowMemory {
  float factor[WINDOW_WARPS];
};

// Log2 of the most by which tokens `first` and `first` + 32 of the chunk and those of the warp's other lanes lengthen a
// state: e^g max(1, |1 - beta |k|^2|) each, docs/math.md. Rounded up. Of the parameters: gates, k, heads,
// value_heads, l2norm, l2norm_eps.
template <typename T, typename Parameters>
__device__ __forceinline__ float chunk_factor(const Parameters& p, int64_t batch, int value_head, int64_t first) {
  constexpr float LOG2E = 1.44269504088896341f, ROUNDING = 1e-5f;
  const int head = value_head / (p.value_heads / p.heads);
  // All loads first: none takes part in finding another.
  uint4 rows[2][KEYS / 8];
  Gates::Bits bits[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t token = first + 32 * i;
    bits[i] = p.gates.bits(batch, token, value_head);
    const auto* row = reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(p.k.data) + p.k.at(batch, token, head));
#pragma unroll
    for (int j = 0; j < KEYS / 8; ++j) rows[i][j] = row[j];
  }
  float sum = 0, size = 0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float square = 0;
#pragma unroll
    for (int j = 0; j < KEYS / 8; ++j) {
      const uint32_t word[4] = {rows[i][j].x, rows[i][j].y, rows[i][j].z, rows[i][j].w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float2 y = unpack<T>(word[e]);
        square = fmaf(y.x, y.x, fmaf(y.y, y.y, square));
      }
    }
    if (p.l2norm != 0) square /= square + p.l2norm_eps;
    const float growth = log2f(fmaxf(1.0f, fabsf(1.0f - p.gates.write_strength(bits[i]) * square)));
    const float decay = fmaxf(p.gates.log_decay(bits[i], value_head) * LOG2E, -1e4f);
    sum += growth + decay;
    size += growth + fabsf(decay);
  }
  return warp_sum(sum) + ROUNDING * (1.0f + warp_sum(size));
}

}  // namespace flashdelta::cuda
