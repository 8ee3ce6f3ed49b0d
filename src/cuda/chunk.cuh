// Gated-delta algebra on the tiles of one 64-token chunk (docs/math.md), for one warpgroup: the tile P = scale Gam .* (Q
// K^T) and the transpose of the tile T = Gam .* (I + strict_lower(K K^T diag(beta)))^-1.
#pragma once

#include "cuda/gates_sm90.cuh"

namespace flashdelta::cuda {

// Scratch. `lower`: the blocks of 16 x 16 below the diagonal of L = strict_lower(K K^T diag(beta)) in fp16, as
// `block_piece` says. `inverses`, per warp: first the two 8 x 8 blocks on the diagonal of its rows of L in fp32 (the blocks
// in different banks), then minus the transposed inverse of its 16 x 16 block in fp16, likewise.
constexpr int DIAGONAL_BLOCK = 272, INVERSE_BYTES = 2 * DIAGONAL_BLOCK, LOWER_BYTES = 6 * 512;
struct alignas(16) TileScratch {
  uint8_t lower[LOWER_BYTES];
  uint8_t inverses[4 * INVERSE_BYTES];
};

// Changes the address of the first of a tile's 16 x 16 blocks in a row of a swizzled tile to that of block `b`.
__device__ __forceinline__ uint32_t block_offset(int b) { return static_cast<uint32_t>(b) << 5; }
// Byte offset of columns 8 `piece`.. of row `row` of a block: eight rows in a row lie in different banks.
__device__ __forceinline__ uint32_t block_piece(int row, int piece) {
  return static_cast<uint32_t>(row * 32 + ((piece ^ (row >> 2 & 1)) << 4));
}

// Minus the transposed inverse of the warp's unit lower triangular 16 x 16 block [A 0; C B], as the left operand of a
// product and in `scratch`. Its 8 x 8 blocks A and B by substitution in fp32, where lane 8 h + c has column c of block h;
// then C by products: -B^-1 C A^-1. On entry A and B without their diagonals are in `scratch`; `lower`: C in fp16, lane l
// has (l / 4, 2 (l % 4)) and the next.
__device__ __forceinline__ void invert_diagonal(uint32_t (&x)[4], uint32_t scratch, uint32_t lower, int lane) {
  const int block = lane >> 3 & 1, c = lane & 7;
  float y[8];
#pragma unroll
  for (int r = 0; r < 8; ++r) {
    y[r] = __uint_as_float(r == c ? 0xbf800000u : 0u);
#pragma unroll
    for (int piece = 0; 4 * piece < r; ++piece) {
      const float4 l = load_shared_float4(scratch + block * DIAGONAL_BLOCK + r * 32 + piece * 16);
      const float row[4] = {l.x, l.y, l.z, l.w};
#pragma unroll
      for (int k = 4 * piece; k < r && k < 4 * piece + 4; ++k) y[r] -= row[k - 4 * piece] * y[k];
    }
  }
  // Lanes from 16 on write the zeros beside the blocks.
  const bool inverse = lane < 16;
  uint4 h = {};
  if (inverse) {
    h = make_uint4(pack<__half>(y[0], y[1]), pack<__half>(y[2], y[3]), pack<__half>(y[4], y[5]), pack<__half>(y[6], y[7]));
  }
  __syncwarp();
  store_shared(scratch + block_piece(lane & 15, block ^ (inverse ? 0 : 1)), h);
  __syncwarp();
  const uint32_t at = scratch + block_piece(lane & 15, lane >> 4);
  uint32_t b[4];
  load_matrices(x, at);
  load_matrices_transposed(b, at);
  float product[4] = {}, corner[4] = {};
  mma_half(product, x, lower, 0);
  const uint32_t a[4] = {pack<__half>(product[0], product[1]), 0, 0, 0};
  mma_half(corner, a, b[3], 0);
  x[2] = pack<__half>(corner[0], corner[1]);
  store_shared(scratch + block_piece(lane >> 2, 1) + 4 * (lane & 3), x[2]);
}

// e^(later - earlier), from what TileGates holds: where the chunk's decay is small (FACTORED) the factors of
// both, else the exponents.
template <bool FACTORED, bool MINUS = false>
__device__ __forceinline__ float gate(float later, float earlier) {
  if (FACTORED) return later * earlier;
  const float x = exp2_fast(fminf(MINUS ? later + earlier : later - earlier, 0.0f));
  return MINUS ? 0.0f - x : x;
}

// A 16 x 16 block of the transposed tile T, from minus what it is without gates, in accumulator layout: times the gates
// Gam[column][row] = e^(gam_column - gam_row), rounded; `earlier`: of rows r and r + 8, `later`: vector of the columns from
// `column` on.
template <typename T, bool FACTORED>
__device__ __forceinline__ void gate_transposed(uint32_t (&out)[4], const float (&x)[8], const float2& earlier,
                                                const float* later) {
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const float2 c = *reinterpret_cast<const float2*>(later + 8 * n);
    const float f[4] = {gate<FACTORED, true>(c.x, earlier.x), gate<FACTORED, true>(c.y, earlier.x),
                        gate<FACTORED, true>(c.x, earlier.y), gate<FACTORED, true>(c.y, earlier.y)};
    out[2 * n] = pack<T>(x[4 * n + 0] * f[0], x[4 * n + 1] * f[1]);
    out[2 * n + 1] = pack<T>(x[4 * n + 2] * f[2], x[4 * n + 3] * f[3]);
  }
}

// Rows 16 w.. of the transposed inverse, X_i = T0^T[w][i] for i >= w, by forward substitution over blocks:
//   -X_w = -D_w^T,  -X_i = (sum_{w <= k < i} -X_k L_ik^T) (-D_i^T)
// with minus the diagonal inverses D and the blocks L in scratch. One piece of code for all warps, because four would not
// fit in the cache of instructions.
struct SolverPlace {
  uint32_t lower;    // the lane's row of the ldmatrix of the first block of L
  uint32_t inverse;  // likewise of D_w
  uint32_t tile;     // the lane's row of the stmatrix of block (w, 0) of the tile
  int w;

  __device__ __forceinline__ SolverPlace(uint32_t tile_, const TileScratch& scratch, int w_, int lane)
      : lower(shared_address(scratch.lower) + block_piece((lane & 7) + 8 * (lane >> 4), lane >> 3 & 1)),
        inverse(shared_address(scratch.inverses) + w_ * INVERSE_BYTES + block_piece(lane & 15, lane >> 4)),
        tile(tile_ + swizzled(16 * w_ + (lane & 15), lane >> 4)),
        w(w_) {}
};

// Where block (i, k), k < i, of L lies in scratch.
__device__ __forceinline__ uint32_t lower_block(int i, int k) { return static_cast<uint32_t>(i * (i - 1) / 2 + k) << 9; }

// What step J, of X_{w + J}, needs besides the blocks before; past the last step any of the blocks, so that no load is
// conditional: its registers would be taken all the time.
template <int J>
struct SolverStep {
  uint32_t l[J][4], d[4];  // L_ik, -D_i^T
  __device__ __forceinline__ void load(const SolverPlace& at) {
    const int i = at.w + J > 3 ? 3 : at.w + J;
#pragma unroll
    for (int k = 0; k < J; ++k) load_matrices(l[k], at.lower + lower_block(i, at.w + k > 2 ? 2 : at.w + k));
    load_matrices_transposed(d, at.inverse + (i - at.w) * INVERSE_BYTES);
  }
};

// d += a b, 16 x 16 each.
__device__ __forceinline__ void mma_half(float (&d)[2][4], const uint32_t (&a)[4], const uint32_t (&b)[4]) {
  mma_half(d[0], a, b[0], b[1]);
  mma_half(d[1], a, b[2], b[3]);
}

// Steps from J on. `x`: the blocks before; `y`: the last of them before rounding; `sum`: of step J, but for the last block.
template <typename T, bool FACTORED, int J>
__device__ __forceinline__ void solve_rows(const SolverPlace& at, const SolverStep<J>& step, const uint32_t (&x)[J][4],
                                           const float (&y)[8], float (&sum)[2][4], const float* later,
                                           float2 minus_earlier) {
  // The products' latencies are the time this takes: what can be done beside them is.
  SolverStep<J + 1> next;
  if constexpr (J < 3) next.load(at);
  mma_half(sum, x[J - 1], step.l[J - 1]);  // of no use after the last step
  uint32_t out[4];
  gate_transposed<T, FACTORED>(out, y, minus_earlier, later + 16 * (J - 1));
  store_matrices(at.tile ^ block_offset(at.w + J - 1), out[0], out[1], out[2], out[3]);
  if (at.w + J > 3) return;
  const uint32_t a[4] = {pack<__half>(sum[0][0], sum[0][1]), pack<__half>(sum[0][2], sum[0][3]),
                         pack<__half>(sum[1][0], sum[1][1]), pack<__half>(sum[1][2], sum[1][3])};
  float z[2][4] = {};
  mma_half(z, a, step.d);
  const float flat[8] = {z[0][0], z[0][1], z[0][2], z[0][3], z[1][0], z[1][1], z[1][2], z[1][3]};
  if constexpr (J == 3) {
    gate_transposed<T, FACTORED>(out, flat, minus_earlier, later + 16 * J);
    store_matrices(at.tile ^ block_offset(at.w + J), out[0], out[1], out[2], out[3]);
  } else {
    float next_sum[2][4] = {};
    uint32_t xs[J + 1][4];
#pragma unroll
    for (int k = 0; k < J; ++k) {
      mma_half(next_sum, x[k], next.l[k]);
#pragma unroll
      for (int i = 0; i < 4; ++i) xs[k][i] = x[k][i];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) xs[J][i] = pack<__half>(flat[2 * i], flat[2 * i + 1]);
    solve_rows<T, FACTORED>(at, next, xs, flat, next_sum, later, minus_earlier);
  }
}

template <typename T, bool FACTORED>
__device__ __forceinline__ void solve(const SolverPlace& at, const SolverStep<1>& step, const uint32_t (&x)[4],
                                      const float* later, float2 minus_earlier) {
  float y[8], sum[2][4] = {};
  uint32_t xs[1][4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    xs[0][i] = x[i];
    const float2 pair = unpack<__half>(x[i]);
    y[2 * i] = pair.x;
    y[2 * i + 1] = pair.y;
  }
  solve_rows<T, FACTORED>(at, step, xs, y, sum, later, minus_earlier);
}

// Times Gam: e^(gam_row - gam_column), where the exponents cannot be taken apart.
__device__ __forceinline__ void decay_queries(float (&qk)[32], const TileGates& gates, int row, int column) {
  const float g0 = gates.later[row], g1 = gates.later[row + 8];
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float2 g = *reinterpret_cast<const float2*>(&gates.later[8 * j + column]);
    qk[4 * j] *= gate<false>(g0, g.x);
    qk[4 * j + 1] *= gate<false>(g0, g.y);
    qk[4 * j + 2] *= gate<false>(g1, g.x);
    qk[4 * j + 3] *= gate<false>(g1, g.y);
  }
}

// The warp's 16 rows of P from those of Q K^T and the factors of its rows and columns, rounded, into the tile; the blocks
// right of the diagonal are not written.
template <typename T>
__device__ __forceinline__ void write_queries(const float (&qk)[32], uint32_t tile_p, float2 rows,
                                              const float2 (&columns)[8], int w, int lane) {
  // What stays of each pair of elements of a diagonal block.
  const int distance = (lane >> 2) - 2 * (lane & 3);
  const uint32_t below = (distance >= 0 ? 0xffffu : 0u) | (distance >= 1 ? 0xffff0000u : 0u);
  const uint32_t at = tile_p + swizzled(16 * w + (lane & 15), lane >> 4);
#pragma unroll
  for (int b = 0; b < 4; ++b) {
    if (b > w) break;  // the fewer blocks here, the more in solve_rows
    uint32_t y[4];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const float2 c = columns[2 * b + n];
      const float* x = qk + 8 * b + 4 * n;
      y[2 * n] = pack<T>(x[0] * (rows.x * c.x), x[1] * (rows.x * c.y));
      y[2 * n + 1] = pack<T>(x[2] * (rows.y * c.x), x[3] * (rows.y * c.y));
    }
    const uint32_t keep = b == w ? below : ~0u;
    store_matrices(at ^ block_offset(b), y[0] & keep, y[1], b == w ? 0 : y[2], y[3] & keep);
  }
}

// d (64 x 64) = a b^T, both 64 x 128 tiles; begun only.
template <typename T>
__device__ __forceinline__ void begin_product(float (&d)[32], uint32_t tile_a, uint32_t tile_b) {
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    const uint64_t a = advance(matrix_descriptor(tile_a, 16), (k / 4) * 8192 + (k % 4) * 32);
    const uint64_t b = advance(matrix_descriptor(tile_b, 16), (k / 4) * 8192 + (k % 4) * 32);
    if (k == 0) {
      wgmma<T, true>(d, a, b);
    } else {
      wgmma<T, false>(d, a, b);
    }
  }
  wgmma_commit();
}

// Zeros in tiles of this file, of which the blocks left of T's diagonal and right of P's are never written. One warpgroup;
// on return they are fenced for wgmma.
__device__ __forceinline__ void clear_tiles(uint32_t tiles, int bytes, int thread) {
  for (int i = thread * 16; i < bytes; i += 128 * 16) store_shared(tiles + i, make_uint4(0, 0, 0, 0));
  fence_async_shared();
}

// Makes both tiles of one chunk. The warpgroup's 128 threads; `barrier`: their named barrier. On entry K, Q (64 x 128, two
// halves of 64 columns, 8 KB each) are in shared memory, and the tiles were cleared once. `meanwhile` is called while the
// first product runs; when it returns, `gates` are there, too, and the tiles' space is free. On return the tiles are
// written, but not fenced for wgmma: `tile_t` is T transposed, `tile_p` is P, 64 x 64, swizzled. Without QUERIES there is no
// Q, and `tile_p` is not touched. With EARLY, which takes 32 registers more, Q K^T is begun together with K K^T.
template <typename T, bool NORM, bool QUERIES, bool EARLY = false, typename Meanwhile>
__device__ __forceinline__ void make_tiles(uint32_t tile_k, uint32_t tile_q, uint32_t tile_t, uint32_t tile_p,
                                           TileScratch& scratch, const TileGates& gates, int barrier, int warp, int lane_,
                                           const Meanwhile& meanwhile) {
  int lane = opaque(lane_), row = 16 * warp + (lane >> 2), column = 2 * (lane & 3);
  float kk[32];
  [[maybe_unused]] float qk[32];
  begin_product<T>(kk, tile_k, tile_k);
  if constexpr (QUERIES && EARLY) begin_product<T>(qk, tile_q, tile_k);
  meanwhile();
  float2 columns[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) columns[j] = *reinterpret_cast<const float2*>(&gates.column[8 * j + column]);
  float2 rows = {1.0f, 1.0f};
  if constexpr (NORM) rows = {gates.row[row], gates.row[row + 8]};
  wgmma_wait<QUERIES && EARLY ? 1 : 0>();
  accumulators_ready(kk);
  named_barrier(barrier, 128);  // nobody reads the scratch of the chunk before any more

  // L = K K^T diag(beta) of all blocks, though those right of the diagonal are wrong and not used: the same steps for all
  // warps are faster than steps that depend on the warp.
  const uint32_t own = shared_address(scratch.inverses) + warp * INVERSE_BYTES;
  const uint32_t lower = shared_address(scratch.lower) + lower_block(warp, 0) + block_piece(lane & 15, lane >> 4);
  uint32_t corner = 0;  // of the diagonal block, below its 8 x 8 blocks on the diagonal
#pragma unroll
  for (int b = 0; b < 4; ++b) {
    float l[8];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const float2 c = columns[2 * b + n];
      const float* x = kk + 8 * b + 4 * n;
      l[4 * n + 0] = x[0] * (rows.x * c.x);
      l[4 * n + 1] = x[1] * (rows.x * c.y);
      l[4 * n + 2] = x[2] * (rows.y * c.x);
      l[4 * n + 3] = x[3] * (rows.y * c.y);
    }
    const uint32_t y[4] = {pack<__half>(l[0], l[1]), pack<__half>(l[2], l[3]), pack<__half>(l[4], l[5]),
                           pack<__half>(l[6], l[7])};
    if (b < warp) store_matrices(lower + (b << 9), y[0], y[1], y[2], y[3]);
    if (b == warp) {
      corner = y[1];
      const uint32_t at = own + (lane >> 2) * 32 + (lane & 3) * 8;
      store_shared(at, make_float2(l[0], l[1]));
      store_shared(at + DIAGONAL_BLOCK, make_float2(l[6], l[7]));
    }
  }
  corner = static_cast<uint32_t>(opaque(static_cast<int>(corner)));  // one register from here on, not four
  // Q K^T runs while the diagonal blocks are inverted.
  if constexpr (QUERIES && !EARLY) begin_product<T>(qk, tile_q, tile_k);
  __syncwarp();
  uint32_t x[4];
  invert_diagonal(x, own, corner, lane);

  lane = opaque(lane);
  row = 16 * warp + (lane >> 2);
  column = 2 * (lane & 3);
  const bool factored = gates.factored != 0;
  const float2 minus_earlier = {0.0f - gates.earlier[row], 0.0f - gates.earlier[row + 8]};
  if constexpr (QUERIES) {
    rows = {gates.p_row[row], gates.p_row[row + 8]};
#pragma unroll
    for (int j = 0; j < 8; ++j) columns[j] = *reinterpret_cast<const float2*>(&gates.p_column[8 * j + column]);
    wgmma_wait<0>();
    accumulators_ready(qk);
  }
  named_barrier(barrier, 128);  // L and the inverses are written
  lane = opaque(lane);
  const SolverPlace place(tile_t, scratch, warp, lane);
  SolverStep<1> step;
  step.load(place);
  if constexpr (QUERIES) {
    if (!factored) decay_queries(qk, gates, 16 * warp + (lane >> 2), 2 * (lane & 3));
    write_queries<T>(qk, tile_p, rows, columns, warp, lane);
  }
  const float* later = gates.later + 16 * warp + 2 * (lane & 3);
  if (factored) {
    solve<T, true>(place, step, x, later, minus_earlier);
  } else {
    solve<T, false>(place, step, x, later, minus_earlier);
  }
}

}  // namespace flashdelta::cuda
