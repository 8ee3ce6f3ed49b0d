// Gated-delta algebra on the tiles of one 64-token chunk (docs/math.md), for one warpgroup: the tile P = scale Gam .* (Q
// K^T) and the transpose of the tile T = Gam .* (I + strict_lower(K K^T diag(beta)))^-1.
#pragma once

#include "cuda/gates_sm90.cuh"

namespace flashdelta::cuda {

// Scratch. In T's space until T is written: L = strict_lower(K K^T diag(beta)), its blocks below the diagonal, in fp16,
// swizzled like a tile. In P's space until P is written: per diagonal block of L, its transpose in fp32, rows of 80 bytes.
// In a space of its own: per diagonal block, the transpose of its inverse in fp16, rows of 48 bytes.
constexpr int DIAGONAL_ROW = 80, DIAGONAL_BYTES = 16 * DIAGONAL_ROW, INVERSE_ROW = 48, INVERSE_BYTES = 16 * INVERSE_ROW;

// Inverse of the warp's unit lower triangular 16 x 16 block by substitution in fp32: lane c (and c + 16) has column c.
__device__ __forceinline__ void invert_diagonal(uint32_t diagonal, uint32_t inverse, int lane) {
  const int c = lane & 15;
  float x[16];
#pragma unroll
  for (int r = 0; r < 16; ++r) x[r] = r == c ? 1.0f : 0.0f;
#pragma unroll
  for (int k = 0; k < 15; ++k) {
#pragma unroll
    for (int r4 = (k + 1) / 4; r4 < 4; ++r4) {
      const float4 l = load_shared_float4(diagonal + k * DIAGONAL_ROW + r4 * 16);
      if (4 * r4 + 0 > k) x[4 * r4 + 0] -= l.x * x[k];
      if (4 * r4 + 1 > k) x[4 * r4 + 1] -= l.y * x[k];
      if (4 * r4 + 2 > k) x[4 * r4 + 2] -= l.z * x[k];
      if (4 * r4 + 3 > k) x[4 * r4 + 3] -= l.w * x[k];
    }
  }
  if (lane < 16) {
    uint32_t h[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) h[i] = pack<__half>(x[2 * i], x[2 * i + 1]);
    const uint32_t row = inverse + c * INVERSE_ROW;
    store_shared(row, make_uint4(h[0], h[1], h[2], h[3]));
    store_shared(row + 16, make_uint4(h[4], h[5], h[6], h[7]));
  }
}

// e^(later - earlier), from what ChunkGates holds: where the chunk's decay is small (FACTORED) the factors of
// both, else the exponents.
template <bool FACTORED>
__device__ __forceinline__ float gate(float later, float earlier) {
  return FACTORED ? later * earlier : exp2_fast(fminf(later - earlier, 0.0f));
}

// A 16 x 16 block of the transposed tile T, in accumulator layout, times the gates Gam[column][row] = e^(gam_column -
// gam_row), rounded; `earlier`: of rows r and r + 8, `later`: vector of the columns from `column` on.
template <typename T, bool FACTORED>
__device__ __forceinline__ void gate_transposed(uint32_t (&out)[4], const float (&x)[8], const float2& earlier,
                                                const float* later) {
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const float2 c = *reinterpret_cast<const float2*>(later + 8 * n);
    out[2 * n] = pack<T>(x[4 * n + 0] * gate<FACTORED>(c.x, earlier.x), x[4 * n + 1] * gate<FACTORED>(c.y, earlier.x));
    out[2 * n + 1] = pack<T>(x[4 * n + 2] * gate<FACTORED>(c.x, earlier.y), x[4 * n + 3] * gate<FACTORED>(c.y, earlier.y));
  }
}

// Rows 16 w.. of the transposed inverse, X_i = T0^T[w][i] for i >= w, by forward substitution over blocks:
//   X_w = D_w^T,  X_i = -(sum_{w <= k < i} X_k L_ik^T) D_i^T
// with the diagonal inverses D and the blocks L in scratch. Block w + j, gated and rounded, in out[j]; zero past the last.
// One piece of code for all warps, because four would not fit in the cache of instructions.
template <typename T, bool FACTORED>
__device__ __forceinline__ void solve_rows(uint32_t (&out)[4][4], uint32_t lower, uint32_t inverses, const ChunkGates& gates,
                                           int w, int lane_) {
  const int lane = opaque(lane_);
  const int r8 = lane & 7, upper = (lane >> 3) & 1, right = lane >> 4;  // the lane's row of the ldmatrix of 16 x 16
  const int row = 16 * w + (lane >> 2);
  const float* later = (FACTORED ? gates.rise : gates.gam) + 16 * w + 2 * (lane & 3);
  const float* earlier = (FACTORED ? gates.fall : gates.gam) + row;
  const float2 rows = make_float2(earlier[0], earlier[8]);
  const uint32_t inverse = inverses + w * INVERSE_BYTES + (r8 + 8 * upper) * INVERSE_ROW + right * 16;
  uint32_t x[4][4];
  load_matrices(x[0], inverse);
  {
    float d[8];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 pair = unpack<__half>(x[0][j]);
      d[2 * j] = pair.x;
      d[2 * j + 1] = pair.y;
    }
    gate_transposed<T, FACTORED>(out[0], d, rows, later);
  }
#pragma unroll
  for (int j = 1; j < 4; ++j) {
#pragma unroll
    for (int k = 0; k < 4; ++k) out[j][k] = 0;
  }
#pragma unroll
  for (int j = 1; j < 4; ++j) {
    if (w + j > 3) break;
    const uint32_t l_row = lower + (16 * (w + j) + r8 + 8 * right) * 128;
    float sum[2][4] = {};
#pragma unroll
    for (int k = 0; k < j; ++k) {
      uint32_t l[4];
      load_matrices(l, l_row + (((2 * (w + k) + upper) ^ r8) << 4));
      mma_half(sum[0], x[k], l[0], l[1]);
      mma_half(sum[1], x[k], l[2], l[3]);
    }
    const uint32_t a[4] = {pack<__half>(-sum[0][0], -sum[0][1]), pack<__half>(-sum[0][2], -sum[0][3]),
                           pack<__half>(-sum[1][0], -sum[1][1]), pack<__half>(-sum[1][2], -sum[1][3])};
    uint32_t d[4];
    load_matrices_transposed(d, inverse + j * INVERSE_BYTES);
    float y[2][4] = {};
    mma_half(y[0], a, d[0], d[1]);
    mma_half(y[1], a, d[2], d[3]);
    x[j][0] = pack<__half>(y[0][0], y[0][1]);
    x[j][1] = pack<__half>(y[0][2], y[0][3]);
    x[j][2] = pack<__half>(y[1][0], y[1][1]);
    x[j][3] = pack<__half>(y[1][2], y[1][3]);
    const float flat[8] = {y[0][0], y[0][1], y[0][2], y[0][3], y[1][0], y[1][1], y[1][2], y[1][3]};
    gate_transposed<T, FACTORED>(out[j], flat, rows, later + 16 * j);
  }
}

// The warp's 16 rows of P from those of Q K^T, rounded, into the tile; zero right of the diagonal.
template <typename T, bool FACTORED>
__device__ __forceinline__ void write_queries(const float (&qk)[32], uint32_t tile_p, const ChunkGates& gates, int w,
                                              int lane_) {
  const int lane = opaque(lane_);
  const int r8 = lane & 7, upper = (lane >> 3) & 1, right = lane >> 4, row = 16 * w + (lane >> 2), column = 2 * (lane & 3);
  const float r0 = FACTORED ? gates.output[row] : gates.query[row],
              r1 = FACTORED ? gates.output[row + 8] : gates.query[row + 8];
  const float g0 = gates.gam[row], g1 = gates.gam[row + 8];
  // What stays of each pair of elements of a diagonal block.
  const int distance = (lane >> 2) - column;
  const uint32_t below = (distance >= 0 ? 0xffffu : 0u) | (distance >= 1 ? 0xffff0000u : 0u);
  const uint32_t diagonal[4] = {below, ~0u, 0u, below};
  const uint32_t at = tile_p + (16 * w + r8 + 8 * upper) * 128;
#pragma unroll
  for (int b = 0; b < 4; ++b) {
    uint32_t y[4] = {};
    if (b <= w) {  // the fewer blocks here, the more in solve_rows
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const int j = 16 * b + 8 * n + column;
        const float2 c = *reinterpret_cast<const float2*>(&gates.fall_key[j]);
        float f[4] = {r0 * c.x, r0 * c.y, r1 * c.x, r1 * c.y};
        if constexpr (!FACTORED) {
          const float2 g = *reinterpret_cast<const float2*>(&gates.gam[j]);
          f[0] *= gate<false>(g0, g.x);
          f[1] *= gate<false>(g0, g.y);
          f[2] *= gate<false>(g1, g.x);
          f[3] *= gate<false>(g1, g.y);
        }
        const float* x = qk + 8 * b + 4 * n;
        y[2 * n] = pack<T>(x[0] * f[0], x[1] * f[1]);
        y[2 * n + 1] = pack<T>(x[2] * f[2], x[3] * f[3]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) y[i] &= b < w ? ~0u : diagonal[i];
    }
    store_matrices(at + (((2 * b + right) ^ r8) << 4), y[0], y[1], y[2], y[3]);
  }
}

// Makes both tiles of one chunk. The warpgroup's 128 threads; `barrier`: their named barrier. On entry K, Q (64 x 128, two
// halves of 64 columns, 8 KB each) and `gates` are in shared memory and the tiles' space is free; on return the tiles are
// written and fenced for wgmma: `tile_t` is T transposed, `tile_p` is P, 64 x 64, swizzled. Without QUERIES there is no Q,
// and `tile_p` is scratch.
template <typename T, bool NORM, bool QUERIES = true>
__device__ __forceinline__ void make_tiles(uint32_t tile_k, uint32_t tile_q, uint32_t tile_t, uint32_t tile_p,
                                           uint32_t inverses, const ChunkGates& gates, int barrier, int warp, int lane_) {
  const int lane = opaque(lane_);
  float kk[32];
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    const uint64_t d = advance(matrix_descriptor(tile_k, 16), (k / 4) * 8192 + (k % 4) * 32);
    if (k == 0) {
      wgmma<T, true>(kk, d, d);
    } else {
      wgmma<T, false>(kk, d, d);
    }
  }
  wgmma_commit();
  wgmma_wait<0>();
  accumulators_ready(kk);

  const int row = 16 * warp + (lane >> 2), column = 2 * (lane & 3);
  const uint32_t diagonal = tile_p + warp * DIAGONAL_BYTES;
  const int r8 = lane & 7, upper = (lane >> 3) & 1, right = lane >> 4;

  // L = K K^T diag(beta): blocks left of the diagonal in fp16, the diagonal block, transposed, in fp32.
  {
    const float f0 = NORM ? gates.row[row] : 1.0f, f1 = NORM ? gates.row[row + 8] : 1.0f;
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      if (b > warp) break;
      float l[8];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const float2 c = *reinterpret_cast<const float2*>(&gates.column[16 * b + 8 * n + column]);
        const float* x = kk + 8 * b + 4 * n;
        l[4 * n + 0] = x[0] * (NORM ? f0 * c.x : c.x);
        l[4 * n + 1] = x[1] * (NORM ? f0 * c.y : c.y);
        l[4 * n + 2] = x[2] * (NORM ? f1 * c.x : c.x);
        l[4 * n + 3] = x[3] * (NORM ? f1 * c.y : c.y);
      }
      if (b < warp) {
        store_matrices(tile_t + swizzled(16 * warp + r8 + 8 * upper, 2 * b + right), pack<__half>(l[0], l[1]),
                       pack<__half>(l[2], l[3]), pack<__half>(l[4], l[5]), pack<__half>(l[6], l[7]));
      } else {
        const uint32_t at = diagonal + column * DIAGONAL_ROW + (lane >> 2) * 4;
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          store_shared(at + n * 8 * DIAGONAL_ROW, l[4 * n + 0]);
          store_shared(at + n * 8 * DIAGONAL_ROW + DIAGONAL_ROW, l[4 * n + 1]);
          store_shared(at + n * 8 * DIAGONAL_ROW + 32, l[4 * n + 2]);
          store_shared(at + n * 8 * DIAGONAL_ROW + DIAGONAL_ROW + 32, l[4 * n + 3]);
        }
      }
    }
  }
  // Q K^T runs while the diagonal blocks are inverted; together with K K^T it would take too many registers.
  [[maybe_unused]] float qk[32];
  if constexpr (QUERIES) {
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const uint64_t a = advance(matrix_descriptor(tile_q, 16), (k / 4) * 8192 + (k % 4) * 32);
      const uint64_t b = advance(matrix_descriptor(tile_k, 16), (k / 4) * 8192 + (k % 4) * 32);
      if (k == 0) {
        wgmma<T, true>(qk, a, b);
      } else {
        wgmma<T, false>(qk, a, b);
      }
    }
    wgmma_commit();
  }
  __syncwarp();
  invert_diagonal(diagonal, inverses + warp * INVERSE_BYTES, lane);

  // P, rounded, its blocks right of the diagonal zero.
  if constexpr (QUERIES) {
    wgmma_wait<0>();
    accumulators_ready(qk);
  }
  named_barrier(barrier, 128);  // L and the diagonal inverses are written; the diagonal blocks are read
  uint32_t t[4][4];
  if (gates.factored != 0) {
    if constexpr (QUERIES) write_queries<T, true>(qk, tile_p, gates, warp, lane);
    solve_rows<T, true>(t, tile_t, inverses, gates, warp, lane);
  } else {
    if constexpr (QUERIES) write_queries<T, false>(qk, tile_p, gates, warp, lane);
    solve_rows<T, false>(t, tile_t, inverses, gates, warp, lane);
  }
  named_barrier(barrier, 128);  // nobody reads L any more
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int b = (warp + j) & 3;  // past the last block: the zeros of those left of the diagonal
    store_matrices(tile_t + swizzled(16 * warp + r8 + 8 * upper, 2 * b + right), t[j][0], t[j][1], t[j][2], t[j][3]);
  }
  fence_async_shared();
}

}  // namespace flashdelta::cuda
