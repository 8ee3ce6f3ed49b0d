// Gradients of q, k, the gates and the write strengths for Hopper, chunk by chunk (docs/math.md): nothing here is serial. A
// persistent block takes work items (chunk, key head) and walks the value heads of the key head; dq and dk stay in registers
// over them. See docs/kernels.md.
//
//   warpgroup 0, warp 0        loads     items, all tiles
//                warp 1        gates     sums of all roles -> dg, dbeta
//                warps 2, 3    states    <dS, S>
//   warpgroup 1                queries   dq; the triangles dP and X
//   warpgroup 2                keys      dk
//
//   per value head, from 64 values at a time     queries:  do S^T,  do R^T,  dv R^T
//                                                keys:     dv S^T,  R dS^T
//   then                                         queries:  dP, X -> dq += dP K;  tiles W, dP^T -> keys
//                                                keys:     dk += W K + dP^T Q
#pragma once

#include "cuda/block_sm90.cuh"
#include "cuda/gradients_sm90.hpp"
#include "cuda/ptx.cuh"

namespace flashdelta::cuda {
namespace gradients {

constexpr int THREADS = 384;
constexpr int STAGES = 2, HEADS = 2, ITEMS = 2;  // of the rings
// Registers per thread. Together at most 504: what 384 threads are launched with.
constexpr int PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232;
static_assert(PRODUCER_REGISTERS + 2 * CONSUMER_REGISTERS <= 504);

struct Item {
  int slot;  // -1: no more
  int head;  // key head
  int64_t batch;
  ChunkPlace place;
};

// Barriers, each with its phase bit per stage. Who arrives -> who waits:
enum Barrier {
  ITEM_FULL,      // loads -> all other warps
  ITEM_FREE,      // all other warps -> loads
  KQ_FULL,        // copy engine -> queries, keys
  KQ_FREE,        // queries, keys -> loads
  BLOCK_FULL,     // copy engine -> queries, keys, states
  BLOCK_FREE,     // queries, keys, states -> loads
  VECTORS_FULL,   // copy engine -> queries, keys, gates
  VECTORS_FREE,   // queries, keys, gates -> loads
  TILES_FULL,     // queries -> keys
  TILES_FREE,     // keys -> queries
  SUMS_FULL,      // queries, keys, states -> gates
  SUMS_FREE,      // gates -> queries, keys, states
  PRODUCTS_FREE,  // keys -> queries: their dk has left the space of K K^T
  BARRIERS
};

// Named barriers.
constexpr int QUERIES = 1, KEYS_ = 2;

// What 64 values of a chunk bring.
struct Block {
  uint8_t do_[TILE], dv[TILE], r[TILE];   // tokens x values
  uint8_t s[STATE_TILE], ds[STATE_TILE];  // values x keys
};
constexpr int BLOCK_BYTES = sizeof(Block);

// What a value head's tokens give to dg and dbeta.
struct Sums {
  float read[2][CHUNK];       // terms of a_i from rows: of queries, of keys
  float column[2][4][CHUNK];  // sums over rows 16 w.. of dP .* Q K^T below the diagonal, and of X .* K K^T
  float written[CHUNK];       // w_j
  float own[CHUNK];           // <dv_i, R_i>
  float overlap[CHUNK];       // sum over j of (k_i.k_j)^2, j = i left out
  float state[2];             // <dS, S>: even and odd pieces of the tiles
  float padding[2];
};

struct alignas(1024) SharedMemory {
  uint8_t k[CHUNK * KEYS * 2];  // two halves of 64 columns
  uint8_t q[CHUNK * KEYS * 2];
  Block blocks[STAGES];
  // K K^T and Q K^T of the item with their l2 norms, each thread's accumulators by themselves; then dk and dq.
  float4 kk[8][128], qk[8][128];
  uint8_t w[TILE];   // E |k_j|^-1 below the diagonal, its mirror image with |k_i|^-1 above
  uint8_t dp[TILE];  // dP^T |q_i|^-1
  ChunkVectors vectors[HEADS];
  Sums sums[HEADS];
  Item items[ITEMS];
  uint64_t barriers[BARRIERS][MAX_STAGES];
};
static_assert(sizeof(SharedMemory) <= 227 * 1024);
static_assert(sizeof(ChunkVectors) % 16 == 0);

// Coordinates of the item's first token in the tensor maps.
__device__ __forceinline__ Place place(const GradientParameters& p, const Item& item) {
  if (p.sequences.cu_seqlens == nullptr) return cuda::place(false, item.batch, 0, 0, item.place.begin);
  return cuda::place(true, 0, item.place.begin, item.place.tokens, 0);
}

// --- loads

__device__ __forceinline__ void load(const GradientParameters& p, SharedMemory& shared) {
  Ring items, blocks, heads, keys;
  const int group = p.scratch.value_heads / p.heads, value_blocks = p.scratch.value_blocks;
  for (int64_t index = blockIdx.x; index < static_cast<int64_t>(p.slots) * p.heads; index += gridDim.x) {
    Item item;
    item.slot = static_cast<int>(index / p.heads);
    item.head = static_cast<int>(index % p.heads);
    item.place = p.chunks[item.slot];
    if (item.place.sequence < 0) {
      for (int i = 0; p.gate_sums != nullptr && i < group; ++i) {
        p.gate_sums[p.scratch.head(item.slot, item.head * group + i)] = make_float2(0.0f, 0.0f);
      }
      continue;
    }
    item.batch = p.sequences.cu_seqlens == nullptr ? item.place.sequence : 0;
    wait_free(shared, ITEM_FREE, items);
    shared.items[items.stage] = item;
    barrier_arrive(barrier_address(shared, ITEM_FULL, items.stage));
    items.next<ITEMS>();
    const Place at = place(p, item);
    for (int i = 0; i < group; ++i) {
      const int value_head = item.head * group + i;
      wait_free(shared, VECTORS_FREE, heads);
      const uint32_t vectors_full = barrier_address(shared, VECTORS_FULL, heads.stage);
      barrier_arrive_expect(vectors_full, sizeof(ChunkVectors));
      bulk_load(shared_address(&shared.vectors[heads.stage]), &p.scratch.vectors[p.scratch.head(item.slot, value_head)],
                sizeof(ChunkVectors), vectors_full);
      heads.next<HEADS>();
      for (int b = 0; b < value_blocks; ++b) {
        wait_free(shared, BLOCK_FREE, blocks);
        const uint32_t full = barrier_address(shared, BLOCK_FULL, blocks.stage);
        const Block& to = shared.blocks[blocks.stage];
        const int64_t from = p.scratch.block(item.slot, value_head, b);
        barrier_arrive_expect(full, p.has_do != 0 ? BLOCK_BYTES : BLOCK_BYTES - TILE);
        if (p.has_do != 0) {
          tensor_load(shared_address(to.do_), &p.do_, full, b * VALUES, at.token, value_head, at.third, at.fourth);
        }
        bulk_load(shared_address(to.r), p.scratch.r + from * TILE, TILE, full);
        bulk_load(shared_address(to.dv), p.scratch.dv + from * TILE, TILE, full);
        bulk_load(shared_address(to.s), p.scratch.s + from * STATE_TILE, STATE_TILE, full);
        bulk_load(shared_address(to.ds), p.scratch.ds + from * STATE_TILE, STATE_TILE, full);
        blocks.next<STAGES>();
      }
      if (i > 0) continue;
      // The first products do not need K and Q, whose space the item before may still use.
      wait_free(shared, KQ_FREE, keys);
      const uint32_t full = barrier_address(shared, KQ_FULL, 0), k = shared_address(shared.k), q = shared_address(shared.q);
      barrier_arrive_expect(full, 2 * CHUNK * KEYS * 2);
      tensor_load(k, &p.k, full, 0, at.token, item.head, at.third, at.fourth);
      tensor_load(k + TILE, &p.k, full, 64, at.token, item.head, at.third, at.fourth);
      tensor_load(q, &p.q, full, 0, at.token, item.head, at.third, at.fourth);
      tensor_load(q + TILE, &p.q, full, 64, at.token, item.head, at.third, at.fourth);
      keys.next<1>();
    }
  }
  wait_free(shared, ITEM_FREE, items);
  shared.items[items.stage].slot = -1;
  barrier_arrive(barrier_address(shared, ITEM_FULL, items.stage));
}

// --- states: <dS, S> of each value head; `turn`: of two warps

template <typename T>
__device__ __forceinline__ float dot(uint32_t x, uint32_t y, float sum) {
  const float2 a = unpack<T>(x), b = unpack<T>(y);
  return fmaf(a.x, b.x, fmaf(a.y, b.y, sum));
}

template <typename T>
__device__ __forceinline__ void sum_states(const GradientParameters& p, SharedMemory& shared, int turn, int lane) {
  Ring items, blocks, heads;
  const int group = p.scratch.value_heads / p.heads;
  while (true) {
    wait_full(shared, ITEM_FULL, items);
    const bool more = shared.items[items.stage].slot >= 0;
    arrive(shared, ITEM_FREE, items, lane);
    items.next<ITEMS>();
    if (!more) break;
    for (int i = 0; i < group; ++i) {
      float total = 0.0f;
      for (int b = 0; b < p.scratch.value_blocks; ++b) {
        wait_full(shared, BLOCK_FULL, blocks);
        // Elements of the two tiles lie alike; the order of the sum is of no importance, but fixed.
        const auto* s = reinterpret_cast<const uint4*>(shared.blocks[blocks.stage].s) + 32 * turn + lane;
        const auto* ds = reinterpret_cast<const uint4*>(shared.blocks[blocks.stage].ds) + 32 * turn + lane;
        float sum[2] = {0.0f, 0.0f};
#pragma unroll 2
        for (int j = 0; j < STATE_TILE / 16; j += 64) {
          const uint4 x = s[j], y = ds[j];
          sum[0] = dot<T>(x.x, y.x, dot<T>(x.y, y.y, sum[0]));
          sum[1] = dot<T>(x.z, y.z, dot<T>(x.w, y.w, sum[1]));
        }
        arrive(shared, BLOCK_FREE, blocks, lane);
        blocks.next<STAGES>();
        total += sum[0] + sum[1];
      }
#pragma unroll
      for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(~0u, total, step);
      wait_free(shared, SUMS_FREE, heads);
      if (lane == 0) shared.sums[heads.stage].state[turn] = total;
      arrive(shared, SUMS_FULL, heads, lane);
      heads.next<HEADS>();
    }
  }
}

// --- gates: lane l has tokens l and l + 32

struct GateGradient {
  float a, A_log, dt_bias;  // of the gate as given, and what it adds for the head's parameters
};
// From the gradient of the log decay, which is -exp(A_log) softplus(a + dt_bias) for raw gates.
__device__ __forceinline__ GateGradient gate_gradient(const Gates& gates, int64_t batch, int64_t token, int value_head,
                                                      float dg) {
  if (gates.gate != FD_GATE_RAW) return {dg, 0.0f, 0.0f};
  const float bias = gates.dt_bias.data == nullptr ? 0.0f : gates.dt_bias[value_head * gates.dt_bias.stride[0]];
  const float x = gates.g[gates.g.at(batch, token, value_head)] + bias;
  const float rate = -expf(gates.A_log[value_head * gates.A_log.stride[0]]), small = expf(-fabsf(x));
  const float da = dg * rate * ((x < 0.0f ? small : 1.0f) / (1.0f + small));
  return {da, dg * rate * (fmaxf(x, 0.0f) + log1pf(small)), da};
}

// From the gradient of the write strength.
__device__ __forceinline__ float strength_gradient(const Gates& gates, int64_t batch, int64_t token, int value_head,
                                                   float dbeta) {
  if (gates.strength != FD_BETA_LOGIT) return dbeta;
  const float small = expf(-fabsf(gates.beta[gates.beta.at(batch, token, value_head)]));
  return dbeta * gates.largest * (small / ((1.0f + small) * (1.0f + small)));
}

// Both of the head's gradients at the lane's tokens from the sums of all roles: dg[0], dbeta[0] at token `lane`, the others
// at `lane` + 32.
__device__ __forceinline__ void gather(const Sums& sums, const ChunkVectors& vectors, float (&dg)[2], float (&dbeta)[2],
                                       int lane) {
  float a[2], w[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int t = lane + 32 * i;
    float p = 0.0f, x = 0.0f;
    for (int warp = t / 16; warp < 4; ++warp) {
      p += sums.column[0][warp][t];
      x += sums.column[1][warp][t];
    }
    const float beta = vectors.beta[t];
    a[i] = sums.read[0][t] + sums.read[1][t] - (p - beta * x);
    // dbeta is also <dv_i, R_i> / beta_i. Each rounding of dv counts there once over beta, in the difference once for every
    // token whose key resembles this one's.
    dbeta[i] = beta * beta * sums.overlap[t] > 1.0f ? sums.own[t] / beta : dbeta[i] - x;
    w[i] = sums.written[t];
  }
  // Sums of a from each token on, of w up to each token.
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const float a0 = __shfl_down_sync(~0u, a[0], step), a1 = __shfl_down_sync(~0u, a[1], step);
    const float w0 = __shfl_up_sync(~0u, w[0], step), w1 = __shfl_up_sync(~0u, w[1], step);
    if (lane + step < 32) {
      a[0] += a0;
      a[1] += a1;
    }
    if (lane >= step) {
      w[0] += w0;
      w[1] += w1;
    }
  }
  a[0] += __shfl_sync(~0u, a[1], 0);
  const float half = __shfl_sync(~0u, w[0], 31);
  const float before[2] = {__shfl_up_sync(~0u, w[0], 1), __shfl_up_sync(~0u, w[1], 1)};
  const float last = vectors.rise[CHUNK - 1] * (sums.state[0] + sums.state[1]);
  dg[0] = a[0] + (lane > 0 ? before[0] : 0.0f) + last;
  dg[1] = a[1] + (half + (lane > 0 ? before[1] : 0.0f)) + last;
}

__device__ __forceinline__ void write_gates(const GradientParameters& p, SharedMemory& shared, int lane) {
  Ring items, heads;
  const int group = p.scratch.value_heads / p.heads;
  while (true) {
    wait_full(shared, ITEM_FULL, items);
    const Item& item = shared.items[items.stage];  // read again where needed: registers are short
    if (item.slot < 0) break;
    for (int i = 0; i < group; ++i) {
      const int value_head = item.head * group + i;
      float dg[2], dbeta[2] = {0.0f, 0.0f};
      for (int b = 0; b < p.scratch.value_blocks; ++b) {
        const float* part = p.scratch.dbeta + p.scratch.block(item.slot, value_head, b) * CHUNK + lane;
        dbeta[0] += part[0];
        dbeta[1] += part[32];
      }
      wait_full(shared, VECTORS_FULL, heads);
      wait_full(shared, SUMS_FULL, heads);
      gather(shared.sums[heads.stage], shared.vectors[heads.stage], dg, dbeta, lane);
      arrive(shared, VECTORS_FREE, heads, lane);
      arrive(shared, SUMS_FREE, heads, lane);
      heads.next<HEADS>();

      float2 sum = {0.0f, 0.0f};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (lane + 32 * half >= item.place.tokens) continue;
        const int64_t token = item.place.begin + lane + 32 * half;
        const GateGradient gate = gate_gradient(p.gates, item.batch, token, value_head, dg[half]);
        sum.x += gate.A_log;
        sum.y += gate.dt_bias;
        if (p.dg.data != nullptr) store_element(p.dg.data, p.dg.type, p.dg.at(item.batch, token, value_head), gate.a);
        if (p.dbeta.data != nullptr) {
          store_element(p.dbeta.data, p.dbeta.type, p.dbeta.at(item.batch, token, value_head),
                        strength_gradient(p.gates, item.batch, token, value_head, dbeta[half]));
        }
      }
#pragma unroll
      for (int step = 16; step > 0; step /= 2) {
        sum.x += __shfl_xor_sync(~0u, sum.x, step);
        sum.y += __shfl_xor_sync(~0u, sum.y, step);
      }
      if (lane == 0 && p.gate_sums != nullptr) p.gate_sums[p.scratch.head(item.slot, value_head)] = sum;
    }
    arrive(shared, ITEM_FREE, items, lane);
    items.next<ITEMS>();
  }
}

// --- queries and keys: products of 64 tokens by a warpgroup

// d += a b^T, 64 deep; with FIRST d = a b^T. Rows of `a` are tokens, the depth runs along them; so it does in `b`, whose
// rows are N, or else (TRANSPOSED_B) its rows are the depth and N runs along them, in tiles of 64.
template <typename T, bool FIRST, int TRANSPOSED_B, int COUNT>
__device__ __forceinline__ void multiply(float (&d)[COUNT], uint32_t a, uint32_t b) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const uint64_t x = matrix_descriptor(a + k * 32, 16);
    const uint64_t y = TRANSPOSED_B ? matrix_descriptor(b + k * 2048, TILE) : matrix_descriptor(b + k * 32, 16);
    if (FIRST && k == 0) {
      wgmma<T, true, 0, TRANSPOSED_B>(d, x, y);
    } else {
      wgmma<T, false, 0, TRANSPOSED_B>(d, x, y);
    }
  }
}

// A thread's place in the accumulators of its warpgroup: rows `row` and `row` + 8, columns `column` and the next of each 8.
// And the lane's row and 16-byte block of 16 x 16 elements in a load or store of matrices, and in one that transposes.
struct Lane {
  int warp, row, column;
  __device__ Lane(int warp_, int lane) : warp(warp_), row(16 * warp_ + (lane >> 2)), column(2 * (lane & 3)) {
    const int r8 = lane & 7, middle = (lane >> 3) & 1, upper = lane >> 4;
    straight = static_cast<uint32_t>(r8 + 8 * middle) << 1 | static_cast<uint32_t>(upper);
    transposed = static_cast<uint32_t>(r8 + 8 * upper) << 1 | static_cast<uint32_t>(middle);
  }
  // Offset in a tile of the 16 x 16 block (i, j).
  __device__ uint32_t at(int i, int j) const { return offset(straight, i, j); }
  __device__ uint32_t at_transposed(int i, int j) const { return offset(transposed, i, j); }

 private:
  uint32_t straight, transposed;
  __device__ static uint32_t offset(uint32_t x, int i, int j) {
    return swizzled(16 * i + static_cast<int>(x >> 1), 2 * j + static_cast<int>(x & 1));
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
                                               const Place& to, int head, const Lane& lane, bool first_thread) {
#pragma unroll
  for (int b = 0; b < 8; ++b) {
    const float* x = d + 8 * b;
    store_matrices(space + (b / 4) * TILE + lane.at(lane.warp, b % 4), pack<T>(x[0], x[1]), pack<T>(x[2], x[3]),
                   pack<T>(x[4], x[5]), pack<T>(x[6], x[7]));
  }
  fence_async_shared();
  named_barrier(barrier, 128);
  if (first_thread) {
    tensor_store(&map, space, 0, to.token, head, to.third, to.fourth);
    tensor_store(&map, space + TILE, 64, to.token, head, to.third, to.fourth);
    stores_commit();
  }
}

// --- queries

template <typename T, bool FIRST>
__device__ __forceinline__ void multiply_block(float (&s)[64], float (&dr)[32], float (&xr)[32], const Block& block) {
  const uint32_t do_ = shared_address(block.do_), r = shared_address(block.r);
  wgmma_fence();
  multiply<T, FIRST, 0>(dr, do_, r);
  multiply<T, FIRST, 0>(xr, shared_address(block.dv), r);
  multiply<T, FIRST, 1>(s, do_, shared_address(block.s));
  wgmma_commit();
  wgmma_wait<0>();
  accumulators_ready(s);
  accumulators_ready(dr);
  accumulators_ready(xr);
}

// Q K^T and K K^T of an item below the diagonal, times the l2 norms of both sides. Returns the thread's part of its rows'
// Sums::overlap.
template <typename T>
__device__ __forceinline__ float2 make_products(SharedMemory& shared, const ChunkVectors& vectors, const Lane& lane,
                                                int thread) {
  const uint32_t k = shared_address(shared.k), q = shared_address(shared.q);
  float qk[32], kk[32];
  wgmma_fence();
  multiply<T, true, 0>(qk, q, k);
  multiply<T, false, 0>(qk, q + TILE, k + TILE);
  multiply<T, true, 0>(kk, k, k);
  multiply<T, false, 0>(kk, k + TILE, k + TILE);
  wgmma_commit();
  wgmma_wait<0>();
  accumulators_ready(qk);
  accumulators_ready(kk);
  const float q_[2] = {vectors.query[lane.row], vectors.query[lane.row + 8]};
  const float k_[2] = {vectors.key[lane.row], vectors.key[lane.row + 8]};
  float overlap[2] = {0.0f, 0.0f};
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    const float2 c = *reinterpret_cast<const float2*>(&vectors.key[8 * n + lane.column]);
    float x[4], y[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int right = 8 * n + lane.column + (i & 1) - lane.row - 8 * (i / 2);  // of the diagonal
      const float key = (i & 1) == 0 ? c.x : c.y;
      x[i] = right < 0 ? qk[4 * n + i] * (q_[i / 2] * key) : 0.0f;
      y[i] = right != 0 ? kk[4 * n + i] * (k_[i / 2] * key) : 0.0f;
      overlap[i / 2] = fmaf(y[i], y[i], overlap[i / 2]);
      y[i] = right < 0 ? y[i] : 0.0f;
    }
    shared.qk[n][thread] = make_float4(x[0], x[1], x[2], x[3]);
    shared.kk[n][thread] = make_float4(y[0], y[1], y[2], y[3]);
  }
  return {overlap[0], overlap[1]};
}

// Sums over the warp's 16 rows of four columns of dP .* Q K^T and of X .* K K^T: v[2 n + e] and v[4 + 2 n + e] for column
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

// What the triangles of one value head go to and come from.
struct Triangles {
  uint32_t w, dp;  // tiles
  const float4 (&qk)[8][128], (&kk)[8][128];
  const ChunkVectors& vectors;
  Sums& sums;
  float scale;
};

// A block of 16 columns of the triangles; DIAGONAL: of the warp's own rows. See make_triangles.
template <typename T, bool DIAGONAL>
__device__ __forceinline__ void make_triangles_block(const Triangles& to, uint32_t* a, uint32_t (&dp_row)[4],
                                                     const float* dr, const float* xr, float (&sum)[2], int b,
                                                     const Lane& lane, int thread) {
  const ChunkVectors& vectors = to.vectors;
  const int row = lane.row;
  const float g[2] = {vectors.gam[row], vectors.gam[row + 8]};
  const float query[2] = {vectors.query[row], vectors.query[row + 8]};
  const float key[2] = {vectors.key[row], vectors.key[row + 8]};
  uint32_t e_row[4], e_column[4];  // E |k_i|^-1, E |k_j|^-1
  float columns[8];
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const int j = 16 * b + 8 * n + lane.column;
    const float2 gam_ = *reinterpret_cast<const float2*>(&vectors.gam[j]);
    const float2 beta_ = *reinterpret_cast<const float2*>(&vectors.beta[j]);
    const float2 key_ = *reinterpret_cast<const float2*>(&vectors.key[j]);
    const float4 qk_ = to.qk[2 * b + n][thread], kk_ = to.kk[2 * b + n][thread];
    const float gam[2] = {gam_.x, gam_.y}, beta[2] = {beta_.x, beta_.y}, key_j[2] = {key_.x, key_.y};
    const float qk[4] = {qk_.x, qk_.y, qk_.z, qk_.w}, kk[4] = {kk_.x, kk_.y, kk_.z, kk_.w};
    float dp_k[4], dp_q[4], e_i[4], e_j[4], m[4], z[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int c = i & 1, r = i / 2, right = j + c - row - 8 * r;  // of the diagonal
      const float decay = exp2_fast(g[r] - gam[c]);
      const float dp = dr[4 * n + i] * (DIAGONAL && right > 0 ? 0.0f : decay) * (to.scale * beta[c]);
      const float x = xr[4 * n + i] * (DIAGONAL && right >= 0 ? 0.0f : decay);
      const float e = -(x * beta[c]);
      m[i] = dp * qk[i];
      z[i] = x * kk[i];
      sum[r] += m[i];
      sum[r] = fmaf(-beta[c], z[i], sum[r]);
      dp_k[i] = dp * key_j[c];
      dp_q[i] = dp * query[r];
      e_i[i] = e * key[r];
      e_j[i] = e * key_j[c];
    }
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      columns[2 * n + c] = m[c] + m[2 + c];
      columns[4 + 2 * n + c] = z[c] + z[2 + c];
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      a[2 * n + r] = pack<T>(dp_k[2 * r], dp_k[2 * r + 1]);
      dp_row[2 * n + r] = pack<T>(dp_q[2 * r], dp_q[2 * r + 1]);
      e_row[2 * n + r] = pack<T>(e_i[2 * r], e_i[2 * r + 1]);
      e_column[2 * n + r] = pack<T>(e_j[2 * r], e_j[2 * r + 1]);
    }
  }
  const int lane_ = thread % 32;
  const float column = sum_columns(columns, lane_);
  to.sums.column[lane_ >> 4][lane.warp][16 * b + (lane_ & 8) + lane.column + ((lane_ >> 2) & 1)] = column;
  if constexpr (DIAGONAL) {
    if (lane.column == (row & 6)) {  // the thread has the diagonal of both its rows
      to.sums.own[row] = (row & 1) == 0 ? xr[0] : xr[1];
      to.sums.own[row + 8] = (row & 1) == 0 ? xr[6] : xr[7];
    }
    // Both halves of the diagonal block: E below, its mirror image (through memory) above.
    uint32_t mirrored[4];
    store_matrices(to.w + lane.at(b, b), e_row[0], e_row[1], e_row[2], e_row[3]);
    __syncwarp();
    load_matrices_transposed(mirrored, to.w + lane.at_transposed(b, b));
    __syncwarp();
    const int right = lane.column - (row & 7);
    const uint32_t below = (right < 0 ? 0xffffu : 0u) | (right < -1 ? 0xffff0000u : 0u);
    e_column[0] = (e_column[0] & below) | (mirrored[0] & ~below);
    e_column[2] = mirrored[2];
    e_column[3] = (e_column[3] & below) | (mirrored[3] & ~below);
  } else {
    store_matrices_transposed(to.w + lane.at_transposed(b, lane.warp), e_row[0], e_row[1], e_row[2], e_row[3]);
  }
  store_matrices(to.w + lane.at(lane.warp, b), e_column[0], e_column[1], e_column[2], e_column[3]);
}

// dP, X and E from do R^T and dv R^T. Leaves dP |k_j|^-1 as operand `a`, the tiles W and dP^T, sums over columns; adds up
// the thread's part of its rows of dP .* Q K^T + E .* K K^T, the diagonal left out (there it cancels).
template <typename T>
__device__ __forceinline__ void make_triangles(const Triangles& to, uint32_t (&a)[16], const float (&dr)[32],
                                               const float (&xr)[32], float (&sum)[2], const Lane& lane, int thread) {
#pragma unroll
  for (int b = 0; b < 4; ++b) {
    uint32_t dp_row[4] = {};  // dP |q_i|^-1
    if (b < lane.warp) {
      make_triangles_block<T, false>(to, a + 4 * b, dp_row, dr + 8 * b, xr + 8 * b, sum, b, lane, thread);
    } else if (b == lane.warp) {
      make_triangles_block<T, true>(to, a + 4 * b, dp_row, dr + 8 * b, xr + 8 * b, sum, b, lane, thread);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[4 * b + i] = 0;
    }
    store_matrices_transposed(to.dp + lane.at_transposed(b, lane.warp), dp_row[0], dp_row[1], dp_row[2], dp_row[3]);
  }
}

template <typename T>
__device__ __forceinline__ void run_queries(const GradientParameters& p, SharedMemory& shared, int thread) {
  const Lane lane(__shfl_sync(~0u, thread / 32, 0), thread % 32);
  Ring items, blocks, heads, tiles, keys;
  const int group = p.scratch.value_heads / p.heads;
  float dq[64];
  while (true) {
    wait_full(shared, ITEM_FULL, items);
    const Item& item = shared.items[items.stage];  // read again where needed: registers are short
    if (item.slot < 0) break;
#pragma unroll
    for (int i = 0; i < 64; ++i) dq[i] = 0.0f;
    const uint32_t tile_q = shared_address(shared.q);
    float f0 = 1.0f, f1 = 1.0f;
    float2 overlap = {0.0f, 0.0f};
    for (int i = 0; i < group; ++i) {
      float s[64], dr[32], xr[32];
      wait_full(shared, BLOCK_FULL, blocks);
      multiply_block<T, true>(s, dr, xr, shared.blocks[blocks.stage]);
      arrive(shared, BLOCK_FREE, blocks, thread % 32);
      blocks.next<STAGES>();
      for (int b = 1; b < p.scratch.value_blocks; ++b) {
        wait_full(shared, BLOCK_FULL, blocks);
        multiply_block<T, false>(s, dr, xr, shared.blocks[blocks.stage]);
        arrive(shared, BLOCK_FREE, blocks, thread % 32);
        blocks.next<STAGES>();
      }

      wait_full(shared, VECTORS_FULL, heads);
      const ChunkVectors& vectors = shared.vectors[heads.stage];
      if (i == 0) wait_full(shared, KQ_FULL, keys);
      f0 = vectors.query[lane.row];
      f1 = vectors.query[lane.row + 8];
      const float r0 = p.scale * vectors.rise[lane.row], r1 = p.scale * vectors.rise[lane.row + 8];
      float dot0 = 0.0f, dot1 = 0.0f;
#pragma unroll
      for (int b = 0; b < 8; ++b) {
        uint32_t x[4];
        load_matrices(x, tile_q + (b / 4) * TILE + lane.at(lane.warp, b % 4));
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float2 x0 = unpack<T>(x[2 * h]), x1 = unpack<T>(x[2 * h + 1]);
          const float* y = s + 8 * b + 4 * h;
          float* d = dq + 8 * b + 4 * h;
          dot0 = fmaf(x0.x, y[0], fmaf(x0.y, y[1], dot0));
          dot1 = fmaf(x1.x, y[2], fmaf(x1.y, y[3], dot1));
          d[0] = fmaf(r0, y[0], d[0]);
          d[1] = fmaf(r0, y[1], d[1]);
          d[2] = fmaf(r1, y[2], d[2]);
          d[3] = fmaf(r1, y[3], d[3]);
        }
      }
      dot0 *= r0 * f0;
      dot1 *= r1 * f1;
      if (i == 0) {
        // Nobody needs the products of the item before: its dq has been read, its dk as well.
        if (thread == 0) {
          stores_wait_read<0>();
          barrier_wait(barrier_address(shared, PRODUCTS_FREE, 0), keys.parity);
        }
        named_barrier(QUERIES, 128);
        overlap = make_products<T>(shared, vectors, lane, thread);
        overlap.x = sum_row(overlap.x);
        overlap.y = sum_row(overlap.y);
      }

      wait_free(shared, SUMS_FREE, heads);
      wait_free(shared, TILES_FREE, tiles);
      Sums& sums = shared.sums[heads.stage];
      uint32_t a[16];
      float sum[2] = {dot0, dot1};
      make_triangles<T>({shared_address(shared.w), shared_address(shared.dp), shared.qk, shared.kk, vectors, sums, p.scale},
                        a, dr, xr, sum, lane, thread);
      fence_async_shared();
      arrive(shared, TILES_FULL, tiles, thread % 32);
      tiles.next<1>();
      arrive(shared, VECTORS_FREE, heads, thread % 32);

      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        wgmma<T, false, 1>(dq, a[4 * k], a[4 * k + 1], a[4 * k + 2], a[4 * k + 3],
                           matrix_descriptor(shared_address(shared.k) + k * 2048, TILE));
      }
      wgmma_commit();
      sum[0] = sum_row(sum[0]);
      sum[1] = sum_row(sum[1]);
      if (lane.column == 0) {
        sums.read[0][lane.row] = sum[0];
        sums.read[0][lane.row + 8] = sum[1];
        sums.overlap[lane.row] = overlap.x;
        sums.overlap[lane.row + 8] = overlap.y;
      }
      arrive(shared, SUMS_FULL, heads, thread % 32);
      heads.next<HEADS>();
      wgmma_wait<0>();
      accumulators_ready(dq);
    }
    keys.next<1>();

    if (p.has_dq != 0) {
      if (p.l2norm != 0) differentiate_norm<T>(dq, tile_q, f0, f1, lane);
      named_barrier(QUERIES, 128);  // all have read their Q K^T
      store_gradient<T>(p.dq, dq, shared_address(shared.qk), QUERIES, place(p, item), item.head, lane, thread == 0);
    }
    arrive(shared, KQ_FREE, Ring{}, thread % 32);
    arrive(shared, ITEM_FREE, items, thread % 32);
    items.next<ITEMS>();
  }
  if (thread == 0) stores_wait();
}

// --- keys

template <typename T, bool FIRST>
__device__ __forceinline__ void multiply_block(float (&read)[64], float (&written)[64], const Block& block) {
  wgmma_fence();
  multiply<T, FIRST, 1>(read, shared_address(block.dv), shared_address(block.s));
  multiply<T, FIRST, 1>(written, shared_address(block.r), shared_address(block.ds));
  wgmma_commit();
  wgmma_wait<0>();
  accumulators_ready(read);
  accumulators_ready(written);
}

template <typename T>
__device__ __forceinline__ void run_keys(const GradientParameters& p, SharedMemory& shared, int thread) {
  const Lane lane(__shfl_sync(~0u, thread / 32, 0), thread % 32);
  Ring items, blocks, heads, tiles, keys;
  const int group = p.scratch.value_heads / p.heads;
  float dk[64];
  while (true) {
    wait_full(shared, ITEM_FULL, items);
    const Item& item = shared.items[items.stage];  // read again where needed: registers are short
    if (item.slot < 0) break;
#pragma unroll
    for (int i = 0; i < 64; ++i) dk[i] = 0.0f;
    const uint32_t tile_k = shared_address(shared.k);
    float f0 = 1.0f, f1 = 1.0f;
    for (int i = 0; i < group; ++i) {
      float read[64], written[64];  // dv S^T, R dS^T
      wait_full(shared, BLOCK_FULL, blocks);
      multiply_block<T, true>(read, written, shared.blocks[blocks.stage]);
      arrive(shared, BLOCK_FREE, blocks, thread % 32);
      blocks.next<STAGES>();
      for (int b = 1; b < p.scratch.value_blocks; ++b) {
        wait_full(shared, BLOCK_FULL, blocks);
        multiply_block<T, false>(read, written, shared.blocks[blocks.stage]);
        arrive(shared, BLOCK_FREE, blocks, thread % 32);
        blocks.next<STAGES>();
      }

      wait_full(shared, VECTORS_FULL, heads);
      const ChunkVectors& vectors = shared.vectors[heads.stage];
      if (i == 0) {
        wait_full(shared, KQ_FULL, keys);
        keys.next<1>();
        if (thread == 0) {  // the dk of the item before has left
          stores_wait_read<0>();
          barrier_arrive(barrier_address(shared, PRODUCTS_FREE, 0));
        }
      }
      f0 = vectors.key[lane.row];
      f1 = vectors.key[lane.row + 8];
      const float r0 = -vectors.rise[lane.row], r1 = -vectors.rise[lane.row + 8];
      const float w0 = vectors.end[lane.row] * vectors.beta[lane.row],
                  w1 = vectors.end[lane.row + 8] * vectors.beta[lane.row + 8];
      float read0 = 0.0f, read1 = 0.0f, written0 = 0.0f, written1 = 0.0f;
#pragma unroll
      for (int b = 0; b < 8; ++b) {
        uint32_t x[4];
        load_matrices(x, tile_k + (b / 4) * TILE + lane.at(lane.warp, b % 4));
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float2 x0 = unpack<T>(x[2 * h]), x1 = unpack<T>(x[2 * h + 1]);
          const float* y = read + 8 * b + 4 * h;
          const float* z = written + 8 * b + 4 * h;
          float* d = dk + 8 * b + 4 * h;
          read0 = fmaf(x0.x, y[0], fmaf(x0.y, y[1], read0));
          read1 = fmaf(x1.x, y[2], fmaf(x1.y, y[3], read1));
          written0 = fmaf(x0.x, z[0], fmaf(x0.y, z[1], written0));
          written1 = fmaf(x1.x, z[2], fmaf(x1.y, z[3], written1));
          d[0] = fmaf(r0, y[0], fmaf(w0, z[0], d[0]));
          d[1] = fmaf(r0, y[1], fmaf(w0, z[1], d[1]));
          d[2] = fmaf(r1, y[2], fmaf(w1, z[2], d[2]));
          d[3] = fmaf(r1, y[3], fmaf(w1, z[3], d[3]));
        }
      }
      arrive(shared, VECTORS_FREE, heads, thread % 32);
      read0 = sum_row(read0) * (r0 * f0);
      read1 = sum_row(read1) * (r1 * f1);
      written0 = sum_row(written0) * (w0 * f0);
      written1 = sum_row(written1) * (w1 * f1);
      wait_free(shared, SUMS_FREE, heads);
      if (lane.column == 0) {
        Sums& sums = shared.sums[heads.stage];
        sums.read[1][lane.row] = read0;
        sums.read[1][lane.row + 8] = read1;
        sums.written[lane.row] = written0;
        sums.written[lane.row + 8] = written1;
      }
      arrive(shared, SUMS_FULL, heads, thread % 32);
      heads.next<HEADS>();

      wait_full(shared, TILES_FULL, tiles);
      wgmma_fence();
      multiply<T, false, 1>(dk, shared_address(shared.dp), shared_address(shared.q));
      multiply<T, false, 1>(dk, shared_address(shared.w), tile_k);
      wgmma_commit();
      wgmma_wait<0>();
      accumulators_ready(dk);
      arrive(shared, TILES_FREE, tiles, thread % 32);
      tiles.next<1>();
    }

    if (p.has_dk != 0) {
      if (p.l2norm != 0) differentiate_norm<T>(dk, tile_k, f0, f1, lane);
      // The queries' warpgroup has read its K K^T: its last tiles came after that.
      store_gradient<T>(p.dk, dk, shared_address(shared.kk), KEYS_, place(p, item), item.head, lane, thread == 0);
    }
    arrive(shared, KQ_FREE, Ring{}, thread % 32);
    arrive(shared, ITEM_FREE, items, thread % 32);
    items.next<ITEMS>();
  }
  if (thread == 0) stores_wait();
}

}  // namespace gradients

template <typename T>
__global__ void __launch_bounds__(gradients::THREADS, 1) gradients_kernel(const __grid_constant__ GradientParameters p) {
  using namespace gradients;
  extern __shared__ __align__(1024) uint8_t raw[];
  auto& shared = *reinterpret_cast<SharedMemory*>(raw);
  const int warpgroup = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0);
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32 % 4, 0), lane = static_cast<int>(threadIdx.x) % 32;

  if (threadIdx.x == 0) {
    const int arrivals[BARRIERS] = {1, 11, 1, 8, 1, 10, 1, 9, 4, 4, 10, 1, 1};
    init_barriers(shared, arrivals);
  }
  if (p.has_do == 0) {
    for (int i = static_cast<int>(threadIdx.x); i < STAGES * TILE / 16; i += THREADS) {
      uint8_t* tile = shared.blocks[i / (TILE / 16)].do_;
      reinterpret_cast<uint4*>(tile)[i % (TILE / 16)] = make_uint4(0, 0, 0, 0);
    }
    fence_async_shared();
  }
  __syncthreads();
  wait_for_earlier_kernels();

  if (warpgroup == 0) {
    fewer_registers<PRODUCER_REGISTERS>();
    if (warp == 0) {
      if (lane == 0) load(p, shared);
    } else if (warp == 1) {
      write_gates(p, shared, lane);
    } else {
      sum_states<T>(p, shared, warp - 2, lane);
    }
  } else if (warpgroup == 1) {
    more_registers<CONSUMER_REGISTERS>();
    run_queries<T>(p, shared, static_cast<int>(threadIdx.x) - 128);
  } else {
    more_registers<CONSUMER_REGISTERS>();
    run_keys<T>(p, shared, static_cast<int>(threadIdx.x) - 256);
  }
}

}  // namespace flashdelta::cuda
