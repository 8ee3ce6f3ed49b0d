// Gradients of q, k, the gates and the write strengths for Hopper, chunk by chunk (docs/math.md): nothing here is serial. A
// persistent block takes work items (chunk, key head) and walks the value heads of the key head; dq and dk stay in registers
// over them. Blocks start on SMs that the chain leaves idle, and take up the chunks it is done with. See docs/kernels.md.
//
//   warpgroup 0, warp 0        states     <dS, S>
//                warps 1, 2    gates      sums of all roles -> dg, dbeta, of alternate value heads
//                warp 3        loads      items, all tiles
//   warpgroup 1                queries    dq
//   warpgroup 2                keys       dk, by the same code
//   warpgroup 3                triangles  dP and X, as operands of both
//
//   per value head, 64 values at a time      queries:    dq += do S^T
//                                            keys:       dk += dv S^T + R dS^T
//                                            triangles:  do R^T,  dv R^T
//   then                                     triangles:  dP, X -> tiles
//                                            queries:    dq += dP K
//                                            keys:       dk += W K + dP^T Q
#pragma once

#include "cuda/gradients_sm90.hpp"
#include "cuda/gradients_tiles_sm90.cuh"
#include "cuda/ptx.cuh"

namespace flashdelta::cuda {
namespace gradients {

// Coordinates of the item's first token in the tensor maps.
__device__ __forceinline__ Place place(const GradientParameters& p, const Item& item) {
  if (p.sequences.cu_seqlens == nullptr) return cuda::place(false, item.batch, 0, 0, item.place.begin);
  return cuda::place(true, 0, item.place.begin, item.place.tokens, 0);
}

// --- loads

// The slot of the item with this turn: in the chain's order, see GradientParameters.
__device__ __forceinline__ int slot_at(const GradientParameters& p, int turn) {
  const int at = turn / p.heads;
  return at < p.runs * p.run_slots ? (p.runs - at % p.runs) * p.run_slots - 1 - at / p.runs : at;
}

// Brings a value head's tiles to L2, long before there is room for them in shared memory; `stored`: the chain's, too.
__device__ __forceinline__ void prefetch(const GradientParameters& p, const Item& item, const Place& at, int value_head,
                                         bool stored) {
  constexpr int MOST = 4;  // blocks: those of all SMs together fill half of L2
  const int blocks = p.scratch.value_blocks < MOST ? p.scratch.value_blocks : MOST;
  const int64_t from = p.scratch.block(item.slot, value_head, 0);
  bulk_prefetch(p.scratch.r + from * TILE, blocks * TILE);
  if (stored && p.scratch.dv != nullptr) bulk_prefetch(p.scratch.dv + from * TILE, blocks * TILE);
  bulk_prefetch(p.scratch.s + from * STATE_TILE, blocks * STATE_TILE);
  if (stored) bulk_prefetch(p.scratch.ds + from * STATE_TILE, blocks * STATE_TILE);
#pragma unroll 1
  for (int b = 0; b < blocks; ++b) {
    const int value = b * VALUES;
    if (p.has_do != 0) tensor_prefetch(&p.do_, value, at.token, value_head, at.third, at.fourth);
    if (stored && p.scratch.dv == nullptr) tensor_prefetch(&p.dv, value, at.token, value_head, at.third, at.fourth);
  }
}

__device__ __forceinline__ void load(const GradientParameters& p, SharedMemory& shared) {
  Ring items, blocks, heads, keys;
  const int group = p.scratch.value_heads / p.heads, value_blocks = p.scratch.value_blocks;
  // Fewer than 2^32: each has more than 100 KB of scratch memory.
  const unsigned key_heads = static_cast<unsigned>(p.heads), all = static_cast<unsigned>(p.slots) * key_heads;
  const unsigned stored = 2 * static_cast<unsigned>(value_blocks);  // tiles of a chunk and value head
  bool ended = false;  // the chain: where cu_seqlens is garbage, it does not store all chunks that the table has
  unsigned index = atomicAdd(p.scratch.next_item, 1u);
  for (unsigned next; index < all; index = next) {
    next = atomicAdd(p.scratch.next_item, 1u);
    Item item;
    item.slot = slot_at(p, static_cast<int>(index));
    item.head = static_cast<int>(index % key_heads);
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
#pragma unroll 1
    for (int half = 0; half < KEYS; half += 64) {
      tensor_prefetch(&p.k, half, at.token, item.head, at.third, at.fourth);
      tensor_prefetch(&p.q, half, at.token, item.head, at.third, at.fourth);
    }
    for (int i = 0; i < group; ++i) {
      const int value_head = item.head * group + i;
      const unsigned* count = p.scratch.stored + p.scratch.head(item.slot, value_head);
      prefetch(p, item, at, value_head, is_written(count, stored));
      if (!ended && !wait_written(count, stored)) {
        wait_for_earlier_kernels();
        ended = true;
      }
      wait_free(shared, VECTORS_FREE, heads);
      const uint32_t vectors_full = barrier_address(shared, VECTORS_FULL, heads.stage);
      barrier_arrive_expect(vectors_full, sizeof(ChunkVectors));
      bulk_load(shared_address(&shared.vectors[heads.stage]), &p.scratch.vectors[p.scratch.head(item.slot, value_head)],
                sizeof(ChunkVectors), vectors_full);
      heads.next<HEADS>();
#pragma unroll 1
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
        if (p.scratch.dv != nullptr) {
          bulk_load(shared_address(to.dv), p.scratch.dv + from * TILE, TILE, full);
        } else {
          tensor_load(shared_address(to.dv), &p.dv, full, b * VALUES, at.token, value_head, at.third, at.fourth);
        }
        bulk_load(shared_address(to.s), p.scratch.s + from * STATE_TILE, STATE_TILE, full);
        bulk_load(shared_address(to.ds), p.scratch.ds + from * STATE_TILE, STATE_TILE, full);
        blocks.next<STAGES>();
        // K and Q, whose space the item before still uses, behind as many blocks as find room before it ends.
        if (i > 0 || b != (value_blocks < STAGES ? value_blocks : STAGES) - 1) continue;
        wait_free(shared, KQ_FREE, keys);
        const uint32_t kq_full = barrier_address(shared, KQ_FULL, 0);
        barrier_arrive_expect(kq_full, sizeof(shared.k) + sizeof(shared.q));
#pragma unroll 1
        for (int half = 0; half < 2; ++half) {
          tensor_load(shared_address(shared.k) + half * TILE, &p.k, kq_full, half * 64, at.token, item.head, at.third,
                      at.fourth);
          tensor_load(shared_address(shared.q) + half * TILE, &p.q, kq_full, half * 64, at.token, item.head, at.third,
                      at.fourth);
        }
        keys.next<1>();
      }
    }
  }
  wait_free(shared, ITEM_FREE, items);
  shared.items[items.stage].slot = -1;
  barrier_arrive(barrier_address(shared, ITEM_FULL, items.stage));
}

// --- states: <dS, S> of each value head

// The diagonal of dS^T S by blocks of 16 values, 16 keys at a time. A sixteenth of the sums is used; one by one on other
// units these take longer than everything else that a block of values waits for.
template <typename T>
__device__ __forceinline__ void sum_states(const GradientParameters& p, SharedMemory& shared, int lane) {
  Ring items, blocks, heads;
  const int group = p.scratch.value_heads / p.heads;
  while (true) {
    wait_full(shared, ITEM_FULL, items);
    const bool more = shared.items[items.stage].slot >= 0;
    arrive(shared, ITEM_FREE, items, lane);
    items.next<ITEMS>();
    if (!more) break;
    for (int i = 0; i < group; ++i) {
      float upper[4] = {}, lower[4] = {};  // 8 of the 16 values each
      for (int b = 0; b < p.scratch.value_blocks; ++b) {
        wait_full(shared, BLOCK_FULL, blocks);
        const uint32_t s = shared_address(shared.blocks[blocks.stage].s);
        const uint32_t ds = shared_address(shared.blocks[blocks.stage].ds);
#pragma unroll 2
        for (int piece = 0; piece < 32; ++piece) {
          const uint32_t at = piece / 16 * TILE + Lane(0).at(piece / 4 % 4, piece % 4);
          uint32_t x[4], y[4];
          load_matrices(x, ds + at);
          load_matrices(y, s + at);
          mma<T>(upper, x, y[0], y[2]);
          mma<T>(lower, x, y[1], y[3]);
        }
        arrive(shared, BLOCK_FREE, blocks, lane);
        blocks.next<STAGES>();
      }
      // Lanes with an element of the diagonal have one of each.
      const int right = 2 * (lane & 3) - (lane >> 2);
      const float total = warp_sum(right == 0 ? upper[0] + lower[2] : right == -1 ? upper[1] + lower[3] : 0.0f);
      wait_free(shared, SUMS_FREE, heads);
      if (lane == 0) shared.sums[heads.stage].state = total;
      arrive_each(shared, SUMS_FULL, heads);
      heads.next<HEADS>();
    }
  }
}

// --- gates: lane l has tokens l and l + 32. Two warps take turns: what each head waits for in global memory is longer than
// what a head may take.

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
    const float beta = vectors.beta[t], written = sums.written[t];
    a[i] = sums.read[0][t] + sums.read[1][t] + sums.row[t] - beta * (p - x);
    // dbeta is also <dv_i, R_i> / beta_i. Each rounding of dv counts there once over beta, in the sum once for every token
    // whose key resembles this one's.
    dbeta[i] = beta * beta * sums.overlap[t] > 1.0f ? sums.own[t] / beta : p + sums.diagonal[t] + written - x;
    w[i] = beta * written;
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
  const float last = vectors.rise[CHUNK - 1] * sums.state;
  dg[0] = a[0] + (lane > 0 ? before[0] : 0.0f) + last;
  dg[1] = a[1] + (half + (lane > 0 ? before[1] : 0.0f)) + last;
}

__device__ __forceinline__ void write_gates(const GradientParameters& p, SharedMemory& shared, int turn, int lane) {
  Ring items;
  uint32_t head_count = 0;  // so far
  const int group = p.scratch.value_heads / p.heads;
  while (true) {
    wait_full(shared, ITEM_FULL, items);
    const Item& item = shared.items[items.stage];  // read again where needed: registers are short
    if (item.slot < 0) break;
    for (int i = 0; i < group; ++i) {
      const Ring heads = ring_at<HEADS>(head_count++);
      if (heads.stage != turn) continue;
      const int value_head = item.head * group + i;
      float dg[2], dbeta[2];
      wait_full(shared, VECTORS_FULL, heads);
      wait_full(shared, SUMS_FULL, heads);
      gather(shared.sums[heads.stage], shared.vectors[heads.stage], dg, dbeta, lane);
      arrive(shared, VECTORS_FREE, heads, lane);
      arrive_each(shared, SUMS_FREE, heads);

      float2 sum = {0.0f, 0.0f};
#pragma unroll 1
      for (int half = 0; half < 2; ++half) {
        if (lane + 32 * half >= item.place.tokens) continue;
        const int64_t token = item.place.begin + lane + 32 * half;
        const GateGradient gate = gate_gradient(p.gates, item.batch, token, value_head, half == 0 ? dg[0] : dg[1]);
        sum.x += gate.A_log;
        sum.y += gate.dt_bias;
        if (p.dg.data != nullptr) store_element(p.dg.data, p.dg.type, p.dg.at(item.batch, token, value_head), gate.a);
        if (p.dbeta.data != nullptr) {
          store_element(p.dbeta.data, p.dbeta.type, p.dbeta.at(item.batch, token, value_head),
                        strength_gradient(p.gates, item.batch, token, value_head, half == 0 ? dbeta[0] : dbeta[1]));
        }
      }
      sum = make_float2(warp_sum(sum.x), warp_sum(sum.y));
      if (lane == 0 && p.gate_sums != nullptr) p.gate_sums[p.scratch.head(item.slot, value_head)] = sum;
    }
    arrive(shared, ITEM_FREE, items, lane);
    items.next<ITEMS>();
  }
}

// --- queries and keys: rows of dq or of dk

// d += r .* x; the thread's part of <y_i, x_i> for its two rows i, y being the tile, is added to `dot`.
template <typename T>
__device__ __forceinline__ void add_rows(float (&d)[64], float (&dot)[2], const float (&x)[64], uint32_t tile,
                                         const float (&r)[2], const Lane& lane) {
#pragma unroll
  for (int b = 0; b < 8; ++b) {
    uint32_t y[4];
    load_matrices(y, tile + (b / 4) * TILE + lane.at(lane.warp, b % 4));
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float2 y0 = unpack<T>(y[2 * h]), y1 = unpack<T>(y[2 * h + 1]);
      const float* u = x + 8 * b + 4 * h;
      float* v = d + 8 * b + 4 * h;
      dot[0] = fmaf(y0.x, u[0], fmaf(y0.y, u[1], dot[0]));
      dot[1] = fmaf(y1.x, u[2], fmaf(y1.y, u[3], dot[1]));
      v[0] = fmaf(r[0], u[0], v[0]);
      v[1] = fmaf(r[0], u[1], v[1]);
      v[2] = fmaf(r[1], u[2], v[2]);
      v[3] = fmaf(r[1], u[3], v[3]);
    }
  }
}

template <typename T>
__device__ __forceinline__ void multiply_triangle(float (&d)[64], uint32_t triangle, uint32_t rows) {
  wgmma_fence();
  multiply<T, false, 1>(d, triangle, rows);
  wgmma_commit();
  wgmma_wait<0>();
  accumulators_ready(d);
}

// One code for both warpgroups, so that a block's instructions stay in the cache. The products of a block of values are
// done one after another:  queries: dq += scale e^gam .* (do S^T);  keys: dk += -e^gam .* (dv S^T), then
// dk += e^(gam_C - gam) beta .* (R dS^T).
template <typename T>
__device__ __forceinline__ void run_rows(const GradientParameters& p, SharedMemory& shared, Side side, int warp) {
  uint32_t item_count = 0, head_count = 0, block_count = 0;  // so far
  const int group = p.scratch.value_heads / p.heads, products = p.scratch.value_blocks * (1 + side);
  const int wanted = side == OF_QUERIES ? p.has_dq : p.has_dk;
  const uint32_t tile = shared_address(side == OF_QUERIES ? shared.q : shared.k);
  float d[64];
  while (true) {
    const Ring items = ring_at<ITEMS>(item_count), keys = ring_at<1>(item_count);
    wait_full(shared, ITEM_FULL, items);
    const Item& item = shared.items[items.stage];  // read again where needed: registers are short
    if (item.slot < 0) break;
#pragma unroll
    for (int i = 0; i < 64; ++i) d[i] = 0.0f;
    float norm[2] = {1.0f, 1.0f};
    for (int i = 0; i < group; ++i) {
      const Ring heads = ring_at<HEADS>(head_count), tiles = ring_at<1>(head_count);
      ++head_count;
      const ChunkVectors& vectors = shared.vectors[heads.stage];
      float read[2] = {0.0f, 0.0f}, written[2] = {0.0f, 0.0f};
#pragma unroll 1
      for (int product = 0; product < products; ++product) {
        const int write = product & side;
        const Ring blocks = ring_at<STAGES>(block_count);
        if (write == 0) wait_full(shared, BLOCK_FULL, blocks);
        const Block& block = shared.blocks[blocks.stage];
        const uint32_t left = shared_address(side == OF_QUERIES ? block.do_ : write == 0 ? block.dv : block.r);
        float x[64];
        wgmma_fence();
        multiply<T, true, 1>(x, left, shared_address(write == 0 ? block.s : block.ds));
        wgmma_commit();
        if (product == 0) {
          wait_full(shared, VECTORS_FULL, heads);
          if (i == 0) {
            wait_full(shared, KQ_FULL, keys);
            if (thread_number() == 0) {  // the gradient of the item before has left
              stores_wait_read<0>();
              barrier_arrive(barrier_address(shared, PRODUCTS_FREE, 0));
            }
          }
        }
        const Lane lane(warp);
        const float* decay = write == 0 ? vectors.rise : vectors.end;
        float r[2], dot[2] = {0.0f, 0.0f};
        r[0] = decay[lane.row];
        r[1] = decay[lane.row + 8];
        float f[2];
        f[0] = write == 0 ? (side == OF_QUERIES ? p.scale : -1.0f) : vectors.beta[lane.row];
        f[1] = write == 0 ? f[0] : vectors.beta[lane.row + 8];
        wgmma_wait<0>();
        accumulators_ready(x);
        if (write == static_cast<int>(side)) {
          arrive(shared, BLOCK_FREE, blocks, lane_number());
          ++block_count;
        }
        const float factor[2] = {r[0] * f[0], r[1] * f[1]};
        add_rows<T>(d, dot, x, tile, factor, lane);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          if (write == 0) {
            read[h] = fmaf(dot[h], factor[h], read[h]);
          } else {
            written[h] = fmaf(dot[h], r[h], written[h]);
          }
        }
      }

      const Lane lane(warp);
      wait_free(shared, SUMS_FREE, heads);
      Sums& sums = shared.sums[heads.stage];
      const float* norms = side == OF_QUERIES ? vectors.query : vectors.key;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        norm[h] = norms[lane.row + 8 * h];
        read[h] = sum_row(read[h]) * norm[h];
        written[h] = sum_row(written[h]) * norm[h];
        if (lane.column == 0) {
          sums.read[side][lane.row + 8 * h] = read[h];
          if (side == OF_KEYS) sums.written[lane.row + 8 * h] = written[h];
        }
      }
      arrive(shared, VECTORS_FREE, heads, lane_number());
      arrive_each(shared, SUMS_FULL, heads);

      wait_full(shared, TILES_FULL, tiles);
      if (side == OF_QUERIES) {
        multiply_triangle<T>(d, shared_address(shared.dp), shared_address(shared.k));
      } else {
        multiply_triangle<T>(d, shared_address(shared.dp_transposed), shared_address(shared.q));
        multiply_triangle<T>(d, shared_address(shared.w), shared_address(shared.k));
      }
      arrive(shared, TILES_FREE, tiles, lane_number());
    }

    if (wanted != 0) {
      if (p.l2norm != 0) differentiate_norm<T>(d, tile, norm[0], norm[1], Lane(warp));
      // The triangles' warpgroup has read its products: the last tiles came after that.
      store_gradient<T>(side == OF_QUERIES ? p.dq : p.dk, d, shared_address(shared.products[side]), 1 + side, place(p, item),
                        item.head, Lane(warp));
    }
    arrive(shared, KQ_FREE, Ring{}, lane_number());
    arrive(shared, ITEM_FREE, items, lane_number());
    ++item_count;
  }
  if (thread_number() == 0) stores_wait();
}

// --- triangles: dP and X

template <typename T, bool FIRST>
__device__ __forceinline__ void multiply_block(float (&dr)[32], float (&xr)[32], SharedMemory& shared, const Ring& blocks) {
  wait_full(shared, BLOCK_FULL, blocks);
  const Block& block = shared.blocks[blocks.stage];
  const uint32_t r = shared_address(block.r);
  wgmma_fence();
  multiply<T, FIRST, 0>(dr, shared_address(block.do_), r);
  multiply<T, FIRST, 0>(xr, shared_address(block.dv), r);
  wgmma_commit();
  wgmma_wait<0>();
  accumulators_ready(dr);
  accumulators_ready(xr);
  arrive(shared, BLOCK_FREE, blocks, lane_number());
}

template <typename T>
__device__ __forceinline__ void run_triangles(const GradientParameters& p, SharedMemory& shared, int warp) {
  uint32_t item_count = 0, head_count = 0, block_count = 0;  // so far
  const int group = p.scratch.value_heads / p.heads;
  while (true) {
    const Ring items = ring_at<ITEMS>(item_count), keys = ring_at<1>(item_count);
    ++item_count;
    wait_full(shared, ITEM_FULL, items);
    const bool more = shared.items[items.stage].slot >= 0;
    arrive(shared, ITEM_FREE, items, lane_number());
    if (!more) break;
    RowProducts products = {};
    for (int i = 0; i < group; ++i) {
      const Ring heads = ring_at<HEADS>(head_count), tiles = ring_at<1>(head_count);
      ++head_count;
      const ChunkVectors& vectors = shared.vectors[heads.stage];
      float dr[32], xr[32];
      multiply_block<T, true>(dr, xr, shared, ring_at<STAGES>(block_count++));
      for (int b = 1; b < p.scratch.value_blocks; ++b) {
        multiply_block<T, false>(dr, xr, shared, ring_at<STAGES>(block_count++));
      }

      wait_full(shared, VECTORS_FULL, heads);
      if (i == 0) {
        wait_full(shared, KQ_FULL, keys);
        wait_full(shared, PRODUCTS_FREE, keys);
        products = make_products<T>(shared, vectors, p.scale, warp);
        arrive(shared, KQ_FREE, Ring{}, lane_number());
      }
      wait_free(shared, SUMS_FREE, heads);
      wait_free(shared, TILES_FREE, tiles);
      Sums& sums = shared.sums[heads.stage];
      make_triangles<T>(dr, xr, products, shared, vectors, sums, p.scale, warp);
      fence_async_shared();
      arrive(shared, TILES_FULL, tiles, lane_number());
      arrive(shared, VECTORS_FREE, heads, lane_number());
      arrive_each(shared, SUMS_FULL, heads);
    }
  }
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
    // Warps. Of the two for gates one has a head's vectors and sums.
    constexpr int rows = 8, triangles = 4, states = 1, gates = 2, vectors = rows + triangles + 1,
                  sums = rows + triangles + states;
    const int arrivals[BARRIERS] = {1,
                                    warps(sums + gates),
                                    1,
                                    warps(rows + triangles),
                                    1,
                                    warps(sums),
                                    1,
                                    warps(vectors),
                                    warps(triangles),
                                    warps(rows),
                                    32 * sums,
                                    32,
                                    2};
    init_barriers(shared, arrivals);
  }
  if (p.has_do == 0) {
    for (int i = static_cast<int>(threadIdx.x); i < STAGES * TILE / 16; i += THREADS) {
      uint8_t* tile = shared.blocks[i / (TILE / 16)].do_;
      reinterpret_cast<uint4*>(tile)[i % (TILE / 16)] = make_uint4(0, 0, 0, 0);
    }
  }
  for (int i = static_cast<int>(threadIdx.x); i < TILE / 16; i += THREADS) {
    reinterpret_cast<uint4*>(shared.dp)[i] = reinterpret_cast<uint4*>(shared.dp_transposed)[i] = make_uint4(0, 0, 0, 0);
  }
  fence_async_shared();
  __syncthreads();
  allow_later_kernels();

  if (warpgroup == 0) {
    fewer_registers<PRODUCER_REGISTERS>();
    if (warp == 0) {
      sum_states<T>(p, shared, lane);
    } else if (warp < 3) {
      write_gates(p, shared, warp - 1, lane);
    } else if (lane == 0) {
      load(p, shared);
    }
  } else if (warpgroup == 3) {
    more_registers<TRIANGLES_REGISTERS>();
    run_triangles<T>(p, shared, warp);
  } else {
    more_registers<ROWS_REGISTERS>();
    run_rows<T>(p, shared, static_cast<Side>(warpgroup - 1), warp);
  }
  // At last, so that kernels which wait for this one wait for those, too.
  __syncwarp();
  wait_for_earlier_kernels();
}

}  // namespace flashdelta::cuda
