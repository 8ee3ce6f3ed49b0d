// What the folds of context parallelism, of states and of their gradients, do alike: 8 rows of a state (one value each, 128
// keys) times transitions one after another, in fp32. A block of 8 warps; a thread has a share of a row: four keys, a warp
// the row. Or 4 rows, a thread two keys.
#pragma once

#include "cuda/block_sm90.cuh"

namespace flashdelta::cuda {

constexpr int FOLD_ROWS = 8, FOLD_WARPS = FOLD_ROWS, FOLD_THREADS = 32 * FOLD_WARPS, FOLD_STAGES = 2;

struct FoldMemory {
  alignas(128) float transitions[FOLD_STAGES][KEYS][KEYS];
  float state[FOLD_ROWS][KEYS];
  float parts[FOLD_WARPS][FOLD_ROWS][KEYS];  // a warp's share of a product's sums
  uint64_t barriers[1][FOLD_STAGES];         // transitions: copy engine -> all
};

// By one thread: the transition comes into its stage, which all have left.
__device__ __forceinline__ void load_transition(FoldMemory& shared, const Ring& ring, const float* transition) {
  const uint32_t full = barrier_address(shared, 0, ring.stage);
  barrier_arrive_expect(full, sizeof(shared.transitions[0]));
  bulk_load(shared_address(shared.transitions[ring.stage]), transition, sizeof(shared.transitions[0]), full);
}

// a + s x
__device__ __forceinline__ float4 plus(const float4& a, float s, const float4& x) {
  return make_float4(fmaf(s, x.x, a.x), fmaf(s, x.y, a.y), fmaf(s, x.z, a.z), fmaf(s, x.w, a.w));
}

__device__ __forceinline__ float2 plus(const float2& a, const float2& b) { return make_float2(a.x + b.x, a.y + b.y); }
__device__ __forceinline__ float4 plus(const float4& a, const float4& b) { return plus(a, 1.0f, b); }

// Rows of which each thread has a Share, float4 or float2, and where the thread's share is.
template <typename Share>
struct FoldShape {
  static constexpr int KEYS_EACH = sizeof(Share) / sizeof(float), ROWS = KEYS_EACH * FOLD_THREADS / KEYS;
  int row, key;
  __device__ __forceinline__ FoldShape(int warp, int lane)
      : row((32 * warp + lane) * KEYS_EACH / KEYS), key((32 * warp + lane) * KEYS_EACH % KEYS) {}
};

// state M + b, with the transition M of this stage; all threads of the block have left the stage then. A warp has 16 keys of
// the sums; then a thread adds the warps' parts of its share.
template <typename Share>
__device__ __forceinline__ Share next_state(FoldMemory& shared, const Ring& ring, const Share& state, const Share& b,
                                            int warp, int lane) {
  constexpr int ROWS = FoldShape<Share>::ROWS;
  const FoldShape<Share> own(warp, lane);
  const int key = 4 * lane;
  *reinterpret_cast<Share*>(&shared.state[own.row][own.key]) = state;
  __syncthreads();
  wait_full(shared, 0, ring);
  const auto& transition = shared.transitions[ring.stage];
  float4 sum[ROWS] = {};
#pragma unroll
  for (int j = 4 * warp; j < KEYS; j += 4 * FOLD_WARPS) {
    float4 m[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) m[e] = *reinterpret_cast<const float4*>(&transition[j + e][key]);
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
      const float4 s = *reinterpret_cast<const float4*>(&shared.state[row][j]);
      sum[row] = plus(plus(plus(plus(sum[row], s.x, m[0]), s.y, m[1]), s.z, m[2]), s.w, m[3]);
    }
  }
#pragma unroll
  for (int row = 0; row < ROWS; ++row) *reinterpret_cast<float4*>(&shared.parts[warp][row][key]) = sum[row];
  __syncthreads();
  Share next = b;
#pragma unroll
  for (int w = 0; w < FOLD_WARPS; ++w) {
    next = plus(next, *reinterpret_cast<const Share*>(&shared.parts[w][own.row][own.key]));
  }
  return next;
}

}  // namespace flashdelta::cuda
