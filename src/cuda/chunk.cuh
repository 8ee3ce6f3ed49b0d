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

// A 16 x 16 block (column block `block`) of a tile's rows 16 W.., in accumulator layout, times the gates
// Gam[column][row] = e^(gam_column - gam_row), rounded: rows are the earlier tokens (the transposed tile T).
template <typename T>
__device__ __forceinline__ void gate_transposed(uint32_t (&out)[4], const float (&x)[8], const ChunkGates& gates, int row,
                                                int column) {
  float y[8];
  if (gates.factored != 0) {
    const float r0 = gates.fall[row], r1 = gates.fall[row + 8];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const float2 c = *reinterpret_cast<const float2*>(&gates.rise[column + 8 * n]);
      y[4 * n + 0] = x[4 * n + 0] * (r0 * c.x);
      y[4 * n + 1] = x[4 * n + 1] * (r0 * c.y);
      y[4 * n + 2] = x[4 * n + 2] * (r1 * c.x);
      y[4 * n + 3] = x[4 * n + 3] * (r1 * c.y);
    }
  } else {
    const float r0 = gates.gam[row], r1 = gates.gam[row + 8];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const float2 c = *reinterpret_cast<const float2*>(&gates.gam[column + 8 * n]);
      y[4 * n + 0] = x[4 * n + 0] * exp2_fast(fminf(c.x - r0, 0.0f));
      y[4 * n + 1] = x[4 * n + 1] * exp2_fast(fminf(c.y - r0, 0.0f));
      y[4 * n + 2] = x[4 * n + 2] * exp2_fast(fminf(c.x - r1, 0.0f));
      y[4 * n + 3] = x[4 * n + 3] * exp2_fast(fminf(c.y - r1, 0.0f));
    }
  }
  out[0] = pack<T>(y[0], y[1]);
  out[1] = pack<T>(y[2], y[3]);
  out[2] = pack<T>(y[4], y[5]);
  out[3] = pack<T>(y[6], y[7]);
}

// Rows 16 W.. of the transposed inverse, X_i = T0^T[W][i] for i >= W, by forward substitution over blocks:
//   X_W = D_W^T,  X_i = -(sum_{W <= k < i} X_k L_ik^T) D_i^T
// with the diagonal inverses D and the blocks L in scratch. Gated and rounded into `out`; blocks left of the diagonal zero.
template <typename T, int W>
__device__ __forceinline__ void solve_rows(uint32_t (&out)[4][4], uint32_t lower, uint32_t inverses, const ChunkGates& gates,
                                           int lane) {
  const int r8 = lane & 7, upper = (lane >> 3) & 1, right = lane >> 4;  // the lane's row of the ldmatrix of 16 x 16
  const int row = 16 * W + (lane >> 2), column = 2 * (lane & 3);
  uint32_t x[4][4];
#pragma unroll
  for (int i = 0; i < W; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) out[i][j] = 0;
  }
  load_matrices(x[W], inverses + W * INVERSE_BYTES + (r8 + 8 * upper) * INVERSE_ROW + right * 16);
  {
    float d[8];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 pair = unpack<__half>(x[W][j]);
      d[2 * j] = pair.x;
      d[2 * j + 1] = pair.y;
    }
    gate_transposed<T>(out[W], d, gates, row, 16 * W + column);
  }
#pragma unroll
  for (int i = W + 1; i < 4; ++i) {
    float sum[2][4] = {};
#pragma unroll
    for (int k = W; k < i; ++k) {
      uint32_t l[4];
      load_matrices(l, lower + swizzled(16 * i + r8 + 8 * right, 2 * k + upper));
      mma_half(sum[0], x[k], l[0], l[1]);
      mma_half(sum[1], x[k], l[2], l[3]);
    }
    const uint32_t a[4] = {pack<__half>(-sum[0][0], -sum[0][1]), pack<__half>(-sum[0][2], -sum[0][3]),
                           pack<__half>(-sum[1][0], -sum[1][1]), pack<__half>(-sum[1][2], -sum[1][3])};
    uint32_t d[4];
    load_matrices_transposed(d, inverses + i * INVERSE_BYTES + (r8 + 8 * upper) * INVERSE_ROW + right * 16);
    float y[2][4] = {};
    mma_half(y[0], a, d[0], d[1]);
    mma_half(y[1], a, d[2], d[3]);
    x[i][0] = pack<__half>(y[0][0], y[0][1]);
    x[i][1] = pack<__half>(y[0][2], y[0][3]);
    x[i][2] = pack<__half>(y[1][0], y[1][1]);
    x[i][3] = pack<__half>(y[1][2], y[1][3]);
    const float flat[8] = {y[0][0], y[0][1], y[0][2], y[0][3], y[1][0], y[1][1], y[1][2], y[1][3]};
    gate_transposed<T>(out[i], flat, gates, row, 16 * i + column);
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
    const uint64_t d = matrix_descriptor(tile_k + (k / 4) * 8192 + (k % 4) * 32, 16);
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
      const uint64_t a = matrix_descriptor(tile_q + (k / 4) * 8192 + (k % 4) * 32, 16);
      const uint64_t b = matrix_descriptor(tile_k + (k / 4) * 8192 + (k % 4) * 32, 16);
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
  if constexpr (QUERIES) {
    const bool factored = gates.factored != 0;
    const float r0 = factored ? gates.output[row] : gates.query[row],
                r1 = factored ? gates.output[row + 8] : gates.query[row + 8];
    const float g0 = gates.gam[row], g1 = gates.gam[row + 8];
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      float y[8] = {};
      if (b <= warp) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const int j = 16 * b + 8 * n + column;
          const float2 c = *reinterpret_cast<const float2*>(&gates.fall_key[j]);
          float f[4] = {r0 * c.x, r0 * c.y, r1 * c.x, r1 * c.y};
          if (!factored) {
            const float2 g = *reinterpret_cast<const float2*>(&gates.gam[j]);
            f[0] *= exp2_fast(fminf(g0 - g.x, 0.0f));
            f[1] *= exp2_fast(fminf(g0 - g.y, 0.0f));
            f[2] *= exp2_fast(fminf(g1 - g.x, 0.0f));
            f[3] *= exp2_fast(fminf(g1 - g.y, 0.0f));
          }
          const float* x = qk + 8 * b + 4 * n;
          y[4 * n + 0] = j <= row ? x[0] * f[0] : 0.0f;
          y[4 * n + 1] = j + 1 <= row ? x[1] * f[1] : 0.0f;
          y[4 * n + 2] = j <= row + 8 ? x[2] * f[2] : 0.0f;
          y[4 * n + 3] = j + 1 <= row + 8 ? x[3] * f[3] : 0.0f;
        }
      }
      store_matrices(tile_p + swizzled(16 * warp + r8 + 8 * upper, 2 * b + right), pack<T>(y[0], y[1]), pack<T>(y[2], y[3]),
                     pack<T>(y[4], y[5]), pack<T>(y[6], y[7]));
    }
  }

  uint32_t t[4][4];
  if (warp == 0) {
    solve_rows<T, 0>(t, tile_t, inverses, gates, lane);
  } else if (warp == 1) {
    solve_rows<T, 1>(t, tile_t, inverses, gates, lane);
  } else if (warp == 2) {
    solve_rows<T, 2>(t, tile_t, inverses, gates, lane);
  } else {
    solve_rows<T, 3>(t, tile_t, inverses, gates, lane);
  }
  named_barrier(barrier, 128);  // nobody reads L any more
#pragma unroll
  for (int b = 0; b < 4; ++b) {
    store_matrices(tile_t + swizzled(16 * warp + r8 + 8 * upper, 2 * b + right), t[b][0], t[b][1], t[b][2], t[b][3]);
  }
  fence_async_shared();
}

}  // namespace flashdelta::cuda
