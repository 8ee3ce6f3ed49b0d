// What the kernel of gradients_sm90.cuh has in shared memory, and what its warpgroups do with tiles: products, the
// triangles dP and X of a chunk with all that follows from them, the end of dq and dk.
#pragma once

#include "cuda/block_sm90.cuh"

namespace flashdelta::cuda::gradients {

constexpr int THREADS = 512;
constexpr int STAGES = 2, HEADS = 2, ITEMS = 2;  // of the rings
// Registers per thread, together at most 512.
constexpr int PRODUCER_REGISTERS = 48, ROWS_REGISTERS = 160, TRIANGLES_REGISTERS = 144;
static_assert(PRODUCER_REGISTERS + 2 * ROWS_REGISTERS + TRIANGLES_REGISTERS <= 512);

struct Item {
  int slot;  // -1: no more
  int head;  // key head
  int64_t batch;
  ChunkPlace place;
};

// Barriers, each with its phase bit per stage; "rows": the warpgroups of queries and of keys. Who arrives -> who waits:
enum Barrier {
  ITEM_FULL,      // loads -> all other warps
  ITEM_FREE,      // all other warps -> loads
  KQ_FULL,        // copy engine -> rows, triangles
  KQ_FREE,        // rows, triangles -> loads
  BLOCK_FULL,     // copy engine -> rows, triangles, states
  BLOCK_FREE,     // rows, triangles, states -> loads
  VECTORS_FULL,   // copy engine -> rows, triangles, gates
  VECTORS_FREE,   // rows, triangles, gates -> loads
  TILES_FULL,     // triangles -> rows
  TILES_FREE,     // rows -> triangles
  SUMS_FULL,      // each thread of rows, triangles, states -> gates
  SUMS_FREE,      // each thread of gates -> rows, triangles, states
  PRODUCTS_FREE,  // rows -> triangles: their dq and dk have left the space of the products
  BARRIERS
};

// Rows of dq or of dk: which of both a warpgroup makes. Its named barrier is the next number.
enum Side { OF_QUERIES, OF_KEYS };

// What 64 values of a chunk bring.
struct Block {
  uint8_t do_[TILE], dv[TILE], r[TILE];   // tokens x values
  uint8_t s[STATE_TILE], ds[STATE_TILE];  // values x keys
};
constexpr int BLOCK_BYTES = sizeof(Block);

// What a value head's tokens give to dg and dbeta. The decays, the scale and the l2 norms are in it, beta is not.
struct Sums {
  float read[2][CHUNK];       // <q_i, do_i S^T>, -<k_i, dv_i S^T>
  float written[CHUNK];       // <k_i, R_i dS^T>
  float row[CHUNK];           // sums over columns below the diagonal of beta_j (dP_ij q_i.k_j / beta_j - X_ij k_i.k_j)
  float column[2][4][CHUNK];  // sums over rows 16 w.. below the diagonal of dP_ij q_i.k_j / beta_j, and of X_ij k_i.k_j
  float diagonal[CHUNK];      // dP_ii q_i.k_i / beta_i
  float own[CHUNK];           // <dv_i, R_i>
  float overlap[CHUNK];       // sum over j of (k_i.k_j)^2, j = i left out
  float state;                // <dS, S>
  float padding[3];
};

struct alignas(1024) SharedMemory {
  uint8_t k[CHUNK * KEYS * 2];  // two halves of 64 columns
  uint8_t q[CHUNK * KEYS * 2];
  Block blocks[STAGES];
  // scale Q K^T and K K^T of the item with their l2 norms, each thread's accumulators by themselves; then dq and dk.
  float4 products[2][8][128];
  // The triangles as operands, their left sides. Above dP's diagonal zeros stay from the start.
  uint8_t dp[TILE];             // of dq = dP K: dP |k_j|^-1
  uint8_t dp_transposed[TILE];  // of dk = dP^T Q: dP^T |q_i|^-1
  uint8_t w[TILE];              // of dk = W K: E |k_j|^-1 below the diagonal, its mirror image with |k_i|^-1 above
  ChunkVectors vectors[HEADS];
  Sums sums[HEADS];
  Item items[ITEMS];
  uint64_t barriers[BARRIERS][MAX_STAGES];
};
static_assert(sizeof(SharedMemory) <= 227 * 1024);
static_assert(sizeof(ChunkVectors) % 16 == 0);

// One arrival per thread, where all lanes have written or read: the sanitizer's race check does not take what the others of
// a warp did to come before the arrival of one, although __syncwarp lies between.
template <typename Shared>
__device__ __forceinline__ void arrive_each(Shared& shared, int barrier, const Ring& ring) {
  barrier_arrive(barrier_address(shared, barrier, ring.stage));
}

// --- for a warpgroup

// d += a b^T, 64 deep; with FIRST d = a b^T. Rows of `a` are tokens, the depth runs along them; so it does in `b`, whose
// rows are N, or else (TRANSPOSED_B) its rows are the depth and N runs along them, in tiles of 64.
template <typename T, bool FIRST, int TRANSPOSED_B, int COUNT>
__device__ __forceinline__ void multiply(float (&d)[COUNT], uint32_t a, uint32_t b) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const uint64_t x = advance(matrix_descriptor(a, 16), k * 32);
    const uint64_t y = advance(matrix_descriptor(b, TRANSPOSED_B ? TILE : 16), k * (TRANSPOSED_B ? 2048 : 32));
    if (FIRST && k == 0) {
      wgmma<T, true, 0, TRANSPOSED_B>(d, x, y);
    } else {
      wgmma<T, false, 0, TRANSPOSED_B>(d, x, y);
    }
  }
}

// The thread's number in its warpgroup, and in its warp.
__device__ __forceinline__ int thread_number() { return static_cast<int>(threadIdx.x) % 128; }
__device__ __forceinline__ int lane_number() { return static_cast<int>(threadIdx.x) % 32; }

// A thread's place in the accumulators of its warpgroup: rows `row` and `row` + 8, columns `column` and the next of each 8.
// Made where it is used, so that nothing that follows from it takes registers all the time.
struct Lane {
  int warp, lane, row, column;
  __device__ explicit Lane(int warp_)
      : warp(warp_), lane(opaque(lane_number())), row(16 * warp + (lane >> 2)), column(2 * (lane & 3)) {}
  // Of the warp's own rows: one element of each of the lane's two.
  __device__ bool has_diagonal() const { return column == (row & 6); }
  // Where in a tile the lane's row of block (i, j) of 16 x 16 elements is, to load or store matrices; or to do so
  // transposing.
  __device__ uint32_t at(int i, int j) const { return offset((lane & 7) + 8 * ((lane >> 3) & 1), lane >> 4, i, j); }
  __device__ uint32_t at_transposed(int i, int j) const {
    return offset((lane & 7) + 8 * (lane >> 4), (lane >> 3) & 1, i, j);
  }

 private:
  // swizzled(16 * i + row_, 2 * j + half), with little that depends on i and j.
  __device__ static uint32_t offset(int row_, int half, int i, int j) {
    return (swizzled(row_, half) ^ static_cast<uint32_t>(j << 5)) + static_cast<uint32_t>(i * 2048);
  }
};

// Sum over the four lanes that share a row.
__device__ __forceinline__ float sum_row(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// l2 norm's gradient for rows y = f x of the tile with x: dx = f (dy - y <y, dy>).
template <typename T>
__device__ __forceinline__ void differentiate_norm(float (&d)[64], uint32_t tile, float f0, float f1, const Lane& lane) {
  float dot0 = 0.0f, dot1 = 0.0f;
#pragma unroll
  for (int b = 0; b < 8; ++b) {
    uint32_t x[4];
    load_matrices(x, tile + (b / 4) * TILE + lane.at(lane.warp, b % 4));
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float2 x0 = unpack<T>(x[2 * h]), x1 = unpack<T>(x[2 * h + 1]);
      const float* y = d + 8 * b + 4 * h;
      dot0 = fmaf(x0.x, y[0], fmaf(x0.y, y[1], dot0));
      dot1 = fmaf(x1.x, y[2], fmaf(x1.y, y[3], dot1));
    }
  }
  dot0 = sum_row(dot0) * f0 * f0;
  dot1 = sum_row(dot1) * f1 * f1;
#pragma unroll
  for (int b = 0; b < 8; ++b) {
    uint32_t x[4];
    load_matrices(x, tile + (b / 4) * TILE + lane.at(lane.warp, b % 4));
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float2 x0 = unpack<T>(x[2 * h]), x1 = unpack<T>(x[2 * h + 1]);
      float* y = d + 8 * b + 4 * h;
      y[0] = f0 * (y[0] - x0.x * dot0);
      y[1] = f0 * (y[1] - x0.y * dot0);
      y[2] = f1 * (y[2] - x1.x * dot1);
      y[3] = f1 * (y[3] - x1.y * dot1);
    }
  }
}

// Rounds a gradient of 64 tokens x 128 keys and stores it from `space`, which is free. The store still reads when this
// returns.
template <typename T>
__device__ __forceinline__ void store_gradient(const CUtensorMap& map, const float (&d)[64], uint32_t space, int barrier,
                                               const Place& to, int head, const Lane& lane) {
#pragma unroll
  for (int b = 0; b < 8; ++b) {
    const float* x = d + 8 * b;
    store_matrices(space + (b / 4) * TILE + lane.at(lane.warp, b % 4), pack<T>(x[0], x[1]), pack<T>(x[2], x[3]),
                   pack<T>(x[4], x[5]), pack<T>(x[6], x[7]));
  }
  fence_async_shared();
  named_barrier(barrier, 128);
  if (thread_number() == 0) {
    tensor_store(&map, space, 0, to.token, head, to.third, to.fourth);
    tensor_store(&map, space + TILE, 64, to.token, head, to.third, to.fourth);
    stores_commit();
  }
}

// --- the triangles

// What a row of an item has for all its value heads.
struct RowProducts {
  float overlap[2];   // Sums::overlap, for all lanes of the row
  float diagonal[2];  // scale q_i.k_i, for the lane that has it
};

// scale Q K^T, its diagonal left out, and K K^T of an item, times the l2 norms of both sides.
template <typename T>
__device__ __forceinline__ RowProducts make_products(SharedMemory& shared, const ChunkVectors& vectors, float scale,
                                                     int warp) {
  const uint32_t k = shared_address(shared.k);
  RowProducts result = {};
  float(&overlap)[2] = result.overlap;
#pragma unroll 1
  for (int side = 0; side < 2; ++side) {
    const uint32_t rows = side == OF_QUERIES ? shared_address(shared.q) : k;
    float x[32];
    wgmma_fence();
    multiply<T, true, 0>(x, rows, k);
    multiply<T, false, 0>(x, rows + TILE, k + TILE);
    wgmma_commit();
    const Lane lane(warp);
    const float* norms = side == OF_QUERIES ? vectors.query : vectors.key;
    const float factor = side == OF_QUERIES ? scale : 1.0f;
    const float norm[2] = {factor * norms[lane.row], factor * norms[lane.row + 8]};
    float2 keys[8];
#pragma unroll
    for (int n = 0; n < 8; ++n) keys[n] = *reinterpret_cast<const float2*>(&vectors.key[8 * n + lane.column]);
    wgmma_wait<0>();
    accumulators_ready(x);
    overlap[0] = overlap[1] = 0.0f;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const float2 key = keys[n];
      float* y = x + 4 * n;
      y[0] *= norm[0] * key.x;
      y[1] *= norm[0] * key.y;
      y[2] *= norm[1] * key.x;
      y[3] *= norm[1] * key.y;
#pragma unroll
      for (int i = 0; i < 4; ++i) overlap[i / 2] = fmaf(y[i], y[i], overlap[i / 2]);
      shared.products[side][n][thread_number()] = make_float4(y[0], y[1], y[2], y[3]);
    }
  }
  if (const Lane lane(warp); lane.has_diagonal()) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int at = 2 * r + (lane.row & 1);
      const auto own = [&](Side side) -> float& {
        return reinterpret_cast<float*>(&shared.products[side][2 * warp + r][thread_number()])[at];
      };
      overlap[r] -= own(OF_KEYS) * own(OF_KEYS);
      result.diagonal[r] = own(OF_QUERIES);
      own(OF_QUERIES) = 0.0f;
    }
  }
  overlap[0] = sum_row(overlap[0]);
  overlap[1] = sum_row(overlap[1]);
  return result;
}

// Sums over the warp's 16 rows of four columns of two matrices: v[2 n + e] and v[4 + 2 n + e] for column
// 8 n + `column` + e. Of the eight sums each lane returns one: the halves of what lanes hold are exchanged three times.
__device__ __forceinline__ float sum_columns(const float (&v)[8], int lane) {
  const bool second = (lane & 16) != 0, right = (lane & 8) != 0, odd = (lane & 4) != 0;
  float x[4], y[2];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[i] = (second ? v[4 + i] : v[i]) + __shfl_xor_sync(~0u, second ? v[i] : v[4 + i], 16);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) y[i] = (right ? x[2 + i] : x[i]) + __shfl_xor_sync(~0u, right ? x[i] : x[2 + i], 8);
  return (odd ? y[1] : y[0]) + __shfl_xor_sync(~0u, odd ? y[0] : y[1], 4);
}

// What a lane's rows bring to the triangles.
struct Rows {
  float gam[2], query[2], key[2];  // query: with the scale
};

// Block `b` of 16 columns of the triangles from the first eight of dr and xr. See make_triangles.
template <typename T>
__device__ __forceinline__ void make_triangles_block(float (&sum)[2], const float (&dr)[32], const float (&xr)[32],
                                                     const Rows& rows, const Lane& lane, SharedMemory& shared,
                                                     const ChunkVectors& vectors, Sums& sums, float scale, int b) {
  const int row = lane.row, warp = lane.warp;
  const bool diagonal = b == warp;   // the block of the warp's own rows
  uint32_t dp_row[4], dp_column[4];  // dP |q_i|^-1, dP |k_j|^-1
  uint32_t e_row[4], e_column[4];    // E |k_i|^-1, E |k_j|^-1
  float columns[8];
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const int j = 16 * b + 8 * n + lane.column;
    const float2 gam_ = *reinterpret_cast<const float2*>(&vectors.gam[j]);
    const float2 beta_ = *reinterpret_cast<const float2*>(&vectors.beta[j]);
    const float2 key_ = *reinterpret_cast<const float2*>(&vectors.key[j]);
    const float4 qk_ = shared.products[OF_QUERIES][2 * b + n][thread_number()];
    const float4 kk_ = shared.products[OF_KEYS][2 * b + n][thread_number()];
    const float gam[2] = {gam_.x, gam_.y}, beta[2] = {beta_.x, beta_.y};
    const float key_j[2] = {beta_.x * key_.x, beta_.y * key_.y};
    const float qk[4] = {qk_.x, qk_.y, qk_.z, qk_.w}, kk[4] = {kk_.x, kk_.y, kk_.z, kk_.w};
    float dp_k[4], dp_q[4], e_i[4], e_j[4], m[4], z[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int c = i & 1, r = i / 2, right = 8 * (n - r) + lane.column + c - (row & 7);  // of the diagonal, if in its block
      const float decay = exp2_fast(rows.gam[r] - gam[c]);
      const float p = diagonal && right > 0 ? 0.0f : dr[4 * n + i] * decay;  // dP / (scale beta_j)
      const float x = diagonal && right >= 0 ? 0.0f : xr[4 * n + i] * decay;
      m[i] = p * qk[i];
      z[i] = x * kk[i];
      sum[r] = fmaf(beta[c], m[i] - z[i], sum[r]);
      dp_q[i] = p * beta[c] * rows.query[r];
      dp_k[i] = p * (scale * key_j[c]);
      e_i[i] = -(x * beta[c]) * rows.key[r];
      e_j[i] = -x * key_j[c];
    }
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      columns[2 * n + c] = m[c] + m[2 + c];
      columns[4 + 2 * n + c] = z[c] + z[2 + c];
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      dp_row[2 * n + r] = pack<T>(dp_q[2 * r], dp_q[2 * r + 1]);
      dp_column[2 * n + r] = pack<T>(dp_k[2 * r], dp_k[2 * r + 1]);
      e_row[2 * n + r] = pack<T>(e_i[2 * r], e_i[2 * r + 1]);
      e_column[2 * n + r] = pack<T>(e_j[2 * r], e_j[2 * r + 1]);
    }
  }
  const float column = sum_columns(columns, lane.lane);
  sums.column[lane.lane >> 4][warp][16 * b + (lane.lane & 8) + lane.column + ((lane.lane >> 2) & 1)] = column;
  store_matrices(shared_address(shared.dp) + lane.at(warp, b), dp_column[0], dp_column[1], dp_column[2], dp_column[3]);
  store_matrices_transposed(shared_address(shared.dp_transposed) + lane.at_transposed(b, warp), dp_row[0], dp_row[1],
                            dp_row[2], dp_row[3]);
  const uint32_t w = shared_address(shared.w);
  if (diagonal) {
    // Both halves of the block: E below, its mirror image (through memory) above.
    uint32_t mirrored[4];
    store_matrices(w + lane.at(b, b), e_row[0], e_row[1], e_row[2], e_row[3]);
    __syncwarp();
    load_matrices_transposed(mirrored, w + lane.at_transposed(b, b));
    __syncwarp();
    const int right = lane.column - (row & 7);
    const uint32_t below = (right < 0 ? 0xffffu : 0u) | (right < -1 ? 0xffff0000u : 0u);
    e_column[0] = (e_column[0] & below) | (mirrored[0] & ~below);
    e_column[2] = mirrored[2];
    e_column[3] = (e_column[3] & below) | (mirrored[3] & ~below);
  } else {
    store_matrices_transposed(w + lane.at_transposed(b, warp), e_row[0], e_row[1], e_row[2], e_row[3]);
  }
  store_matrices(w + lane.at(warp, b), e_column[0], e_column[1], e_column[2], e_column[3]);
}

// dP, X and E from dr = do R^T and xr = dv R^T, which are used up. Leaves the operands dP, dP^T and W and the sums. One
// code for all blocks of 16 columns: registers have no index, so dr and xr move on from block to block.
template <typename T>
__device__ __forceinline__ void make_triangles(float (&dr)[32], float (&xr)[32], const RowProducts& products,
                                               SharedMemory& shared, const ChunkVectors& vectors, Sums& sums, float scale,
                                               int warp) {
  const Lane lane(warp);
  Rows rows;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = lane.row + 8 * r;
    rows.gam[r] = vectors.gam[row];
    rows.query[r] = scale * vectors.query[row];
    rows.key[r] = vectors.key[row];
  }
  float sum[2] = {0.0f, 0.0f};
#pragma unroll 1
  for (int b = 0;; ++b) {
    make_triangles_block<T>(sum, dr, xr, rows, lane, shared, vectors, sums, scale, b);
    if (b == warp) break;
#pragma unroll
    for (int i = 0; i < 24; ++i) {
      dr[i] = dr[i + 8];
      xr[i] = xr[i + 8];
    }
  }
  if (lane.has_diagonal()) {
    const bool odd = (lane.row & 1) != 0;
    sums.own[lane.row] = odd ? xr[1] : xr[0];
    sums.own[lane.row + 8] = odd ? xr[7] : xr[6];
    sums.diagonal[lane.row] = products.diagonal[0] * (odd ? dr[1] : dr[0]);
    sums.diagonal[lane.row + 8] = products.diagonal[1] * (odd ? dr[7] : dr[6]);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    sum[r] = sum_row(sum[r]);
    if (lane.column == 0) {
      sums.row[lane.row + 8 * r] = sum[r];
      sums.overlap[lane.row + 8 * r] = products.overlap[r];
    }
  }
}

}  // namespace flashdelta::cuda::gradients
