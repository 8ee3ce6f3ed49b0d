// Gradients of q, k, the gates and the write strengths for Hopper, chunk by chunk (docs/math.md): nothing here is serial. A
// persistent block takes work items (chunk, key head) and walks the value heads of the key head; dq and dk stay in registers
// over them. See docs/kernels.md.
//
//   warpgroup 0, warps 0, 1    states    <dS, S>; these warps share their schedulers with the shortest rows of triangles
//                warp 2        gates     sums of all roles -> dg, dbeta
//                warp 3        loads     items, all tiles
//   warpgroup 1                queries   dq; the triangles dP and X
//   warpgroup 2                keys      dk
//
//   per value head, from 64 values at a time     queries:  do S^T,  do R^T,  dv R^T
//                                                keys:     dv S^T,  R dS^T
//   then                                         queries:  dP, X -> dq += dP K;  tiles W, dP^T -> keys
//                                                keys:     dk += W K + dP^T Q
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
      total = warp_sum(total);
      wait_free(shared, SUMS_FREE, heads);
      if (lane == 0) shared.sums[heads.stage].state[turn] = total;
      arrive_each(shared, SUMS_FULL, heads);
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
      arrive_each(shared, SUMS_FREE, heads);
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
      sum = make_float2(warp_sum(sum.x), warp_sum(sum.y));
      if (lane == 0 && p.gate_sums != nullptr) p.gate_sums[p.scratch.head(item.slot, value_head)] = sum;
    }
    arrive(shared, ITEM_FREE, items, lane);
    items.next<ITEMS>();
  }
}

// --- queries: dq

template <typename T, bool FIRST>
__device__ __forceinline__ void multiply_block(float (&s)[64], float (&dr)[32], float (&xr)[32], SharedMemory& shared,
                                               const Ring& blocks) {
  wait_full(shared, BLOCK_FULL, blocks);
  const Block& block = shared.blocks[blocks.stage];
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
  arrive(shared, BLOCK_FREE, blocks, lane_number());
}

// dq += scale e^gam .* x, where x = do S^T. Returns the thread's part of its rows' scale e^gam_i <q_i, x_i>.
template <typename T>
__device__ __forceinline__ float2 add_read(float (&dq)[64], const float (&x)[64], SharedMemory& shared,
                                           const ChunkVectors& vectors, float scale, int warp) {
  const Lane lane(warp);
  const float r0 = scale * vectors.rise[lane.row], r1 = scale * vectors.rise[lane.row + 8];
  float dot0 = 0.0f, dot1 = 0.0f;
#pragma unroll
  for (int b = 0; b < 8; ++b) {
    uint32_t q[4];
    load_matrices(q, shared_address(shared.q) + (b / 4) * TILE + lane.at(warp, b % 4));
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float2 q0 = unpack<T>(q[2 * h]), q1 = unpack<T>(q[2 * h + 1]);
      const float* y = x + 8 * b + 4 * h;
      float* d = dq + 8 * b + 4 * h;
      dot0 = fmaf(q0.x, y[0], fmaf(q0.y, y[1], dot0));
      dot1 = fmaf(q1.x, y[2], fmaf(q1.y, y[3], dot1));
      d[0] = fmaf(r0, y[0], d[0]);
      d[1] = fmaf(r0, y[1], d[1]);
      d[2] = fmaf(r1, y[2], d[2]);
      d[3] = fmaf(r1, y[3], d[3]);
    }
  }
  return make_float2(dot0 * (r0 * vectors.query[lane.row]), dot1 * (r1 * vectors.query[lane.row + 8]));
}

template <typename T>
__device__ __forceinline__ void run_queries(const GradientParameters& p, SharedMemory& shared, int warp) {
  uint32_t item_count = 0, head_count = 0, block_count = 0;  // so far
  const int group = p.scratch.value_heads / p.heads;
  float dq[64];
  while (true) {
    const Ring items = ring_at<ITEMS>(item_count), keys = ring_at<1>(item_count);
    wait_full(shared, ITEM_FULL, items);
    const Item& item = shared.items[items.stage];  // read again where needed: registers are short
    if (item.slot < 0) break;
#pragma unroll
    for (int i = 0; i < 64; ++i) dq[i] = 0.0f;
    float f0 = 1.0f, f1 = 1.0f;
    float2 overlap = {0.0f, 0.0f};
    for (int i = 0; i < group; ++i) {
      float s[64], dr[32], xr[32];
      multiply_block<T, true>(s, dr, xr, shared, ring_at<STAGES>(block_count++));
      for (int b = 1; b < p.scratch.value_blocks; ++b) {
        multiply_block<T, false>(s, dr, xr, shared, ring_at<STAGES>(block_count++));
      }

      const Ring heads = ring_at<HEADS>(head_count), tiles = ring_at<1>(head_count);
      ++head_count;
      wait_full(shared, VECTORS_FULL, heads);
      const ChunkVectors& vectors = shared.vectors[heads.stage];
      if (i == 0) wait_full(shared, KQ_FULL, keys);
      const float2 read = add_read<T>(dq, s, shared, vectors, p.scale, warp);
      if (i == 0) {
        // Nobody needs the space of the products any more: the dq and the dk of the item before have left it.
        if (thread_number() == 0) {
          stores_wait_read<0>();
          wait_full(shared, PRODUCTS_FREE, keys);
        }
        named_barrier(QUERIES_BARRIER, 128);
        overlap = make_products<T>(shared, vectors, warp);
      }

      wait_free(shared, SUMS_FREE, heads);
      wait_free(shared, TILES_FREE, tiles);
      Sums& sums = shared.sums[heads.stage];
      uint32_t a[16];
      float sum[2] = {read.x, read.y};
      make_triangles<T>(a, sum, dr, xr, shared, vectors, sums, p.scale, warp);
      fence_async_shared();
      arrive(shared, TILES_FULL, tiles, lane_number());

      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        wgmma<T, false, 1>(dq, a[4 * k], a[4 * k + 1], a[4 * k + 2], a[4 * k + 3],
                           matrix_descriptor(shared_address(shared.k) + k * 2048, TILE));
      }
      wgmma_commit();
      const Lane lane(warp);
      f0 = vectors.query[lane.row];
      f1 = vectors.query[lane.row + 8];
      sum[0] = sum_row(sum[0]);
      sum[1] = sum_row(sum[1]);
      if (lane.column == 0) {
        sums.read[0][lane.row] = sum[0];
        sums.read[0][lane.row + 8] = sum[1];
        sums.overlap[lane.row] = overlap.x;
        sums.overlap[lane.row + 8] = overlap.y;
      }
      arrive(shared, VECTORS_FREE, heads, lane_number());
      arrive_each(shared, SUMS_FULL, heads);
      wgmma_wait<0>();
      accumulators_ready(dq);
    }

    if (p.has_dq != 0) {
      if (p.l2norm != 0) differentiate_norm<T>(dq, shared_address(shared.q), f0, f1, Lane(warp));
      named_barrier(QUERIES_BARRIER, 128);  // all have read their Q K^T
      store_gradient<T>(p.dq, dq, shared_address(shared.qk), QUERIES_BARRIER, place(p, item), item.head, Lane(warp));
    }
    arrive(shared, KQ_FREE, Ring{}, lane_number());
    arrive(shared, ITEM_FREE, items, lane_number());
    ++item_count;
  }
  if (thread_number() == 0) stores_wait();
}

// --- keys: dk

template <typename T, bool FIRST>
__device__ __forceinline__ void multiply_block(float (&read)[64], float (&written)[64], SharedMemory& shared,
                                               const Ring& blocks) {
  wait_full(shared, BLOCK_FULL, blocks);
  const Block& block = shared.blocks[blocks.stage];
  wgmma_fence();
  multiply<T, FIRST, 1>(read, shared_address(block.dv), shared_address(block.s));
  multiply<T, FIRST, 1>(written, shared_address(block.r), shared_address(block.ds));
  wgmma_commit();
  wgmma_wait<0>();
  accumulators_ready(read);
  accumulators_ready(written);
  arrive(shared, BLOCK_FREE, blocks, lane_number());
}

// dk += -e^gam .* x + e^(gam_C - gam) beta .* y, where x = dv S^T, y = R dS^T. Row dots of both with k go to `sums`.
template <typename T>
__device__ __forceinline__ void add_read_and_written(float (&dk)[64], const float (&x)[64], const float (&y)[64],
                                                     SharedMemory& shared, const ChunkVectors& vectors, Sums& sums,
                                                     int warp) {
  const Lane lane(warp);
  const int row = lane.row;
  const float r0 = -vectors.rise[row], r1 = -vectors.rise[row + 8];
  const float w0 = vectors.end[row] * vectors.beta[row], w1 = vectors.end[row + 8] * vectors.beta[row + 8];
  float read0 = 0.0f, read1 = 0.0f, written0 = 0.0f, written1 = 0.0f;
#pragma unroll
  for (int b = 0; b < 8; ++b) {
    uint32_t k[4];
    load_matrices(k, shared_address(shared.k) + (b / 4) * TILE + lane.at(warp, b % 4));
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float2 k0 = unpack<T>(k[2 * h]), k1 = unpack<T>(k[2 * h + 1]);
      const float* u = x + 8 * b + 4 * h;
      const float* v = y + 8 * b + 4 * h;
      float* d = dk + 8 * b + 4 * h;
      read0 = fmaf(k0.x, u[0], fmaf(k0.y, u[1], read0));
      read1 = fmaf(k1.x, u[2], fmaf(k1.y, u[3], read1));
      written0 = fmaf(k0.x, v[0], fmaf(k0.y, v[1], written0));
      written1 = fmaf(k1.x, v[2], fmaf(k1.y, v[3], written1));
      d[0] = fmaf(r0, u[0], fmaf(w0, v[0], d[0]));
      d[1] = fmaf(r0, u[1], fmaf(w0, v[1], d[1]));
      d[2] = fmaf(r1, u[2], fmaf(w1, v[2], d[2]));
      d[3] = fmaf(r1, u[3], fmaf(w1, v[3], d[3]));
    }
  }
  read0 = sum_row(read0);
  read1 = sum_row(read1);
  written0 = sum_row(written0);
  written1 = sum_row(written1);
  if (lane.column == 0) {
    sums.read[1][row] = read0 * (r0 * vectors.key[row]);
    sums.read[1][row + 8] = read1 * (r1 * vectors.key[row + 8]);
    sums.written[row] = written0 * (w0 * vectors.key[row]);
    sums.written[row + 8] = written1 * (w1 * vectors.key[row + 8]);
  }
}

// dk += dP^T Q + W K of a value head, once its tiles are there.
template <typename T>
__device__ __forceinline__ void add_triangles(float (&dk)[64], SharedMemory& shared, const Ring& tiles) {
  wait_full(shared, TILES_FULL, tiles);
  wgmma_fence();
  multiply<T, false, 1>(dk, shared_address(shared.dp), shared_address(shared.q));
  multiply<T, false, 1>(dk, shared_address(shared.w), shared_address(shared.k));
  wgmma_commit();
  wgmma_wait<0>();
  accumulators_ready(dk);
  arrive(shared, TILES_FREE, tiles, lane_number());
}

// The triangles of a value head are added after the first products of the next one: the tensor cores have those to do while
// the queries' warpgroup makes the triangles.
template <typename T>
__device__ __forceinline__ void run_keys(const GradientParameters& p, SharedMemory& shared, int warp) {
  uint32_t item_count = 0, head_count = 0, block_count = 0;  // so far
  const int group = p.scratch.value_heads / p.heads;
  float dk[64];
  while (true) {
    const Ring items = ring_at<ITEMS>(item_count), keys = ring_at<1>(item_count);
    wait_full(shared, ITEM_FULL, items);
    const Item& item = shared.items[items.stage];  // read again where needed: registers are short
    if (item.slot < 0) break;
#pragma unroll
    for (int i = 0; i < 64; ++i) dk[i] = 0.0f;
    float f0 = 1.0f, f1 = 1.0f;
    for (int i = 0; i < group; ++i) {
      float read[64], written[64];
      multiply_block<T, true>(read, written, shared, ring_at<STAGES>(block_count++));
      for (int b = 1; b < p.scratch.value_blocks; ++b) {
        multiply_block<T, false>(read, written, shared, ring_at<STAGES>(block_count++));
      }
      if (i > 0) add_triangles<T>(dk, shared, ring_at<1>(head_count - 1));

      const Ring heads = ring_at<HEADS>(head_count++);
      if (i == 0) wait_full(shared, KQ_FULL, keys);
      wait_full(shared, VECTORS_FULL, heads);
      wait_free(shared, SUMS_FREE, heads);
      const ChunkVectors& vectors = shared.vectors[heads.stage];
      add_read_and_written<T>(dk, read, written, shared, vectors, shared.sums[heads.stage], warp);
      const Lane lane(warp);
      f0 = vectors.key[lane.row];
      f1 = vectors.key[lane.row + 8];
      arrive(shared, VECTORS_FREE, heads, lane_number());
      arrive_each(shared, SUMS_FULL, heads);
      if (i == 0 && thread_number() == 0) {  // the dk of the item before has left
        stores_wait_read<0>();
        barrier_arrive(barrier_address(shared, PRODUCTS_FREE, 0));
      }
    }
    add_triangles<T>(dk, shared, ring_at<1>(head_count - 1));

    if (p.has_dk != 0) {
      if (p.l2norm != 0) differentiate_norm<T>(dk, shared_address(shared.k), f0, f1, Lane(warp));
      // The queries' warpgroup has read its K K^T: the last tiles came after that.
      store_gradient<T>(p.dk, dk, shared_address(shared.kk), KEYS_BARRIER, place(p, item), item.head, Lane(warp));
    }
    arrive(shared, KQ_FREE, Ring{}, lane_number());
    arrive(shared, ITEM_FREE, items, lane_number());
    ++item_count;
  }
  if (thread_number() == 0) stores_wait();
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
    constexpr int queries = 4, keys = 4, both = queries + keys, states = 2, gates = 1;  // warps
    const int arrivals[BARRIERS] = {
        1,    both + states + gates, 1,          both, 1, both + states, 1, both + gates, queries,
        keys, 32 * (both + states),  32 * gates, 1};
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
    if (warp < 2) {
      sum_states<T>(p, shared, warp, lane);
    } else if (warp == 2) {
      write_gates(p, shared, lane);
    } else if (lane == 0) {
      load(p, shared);
    }
  } else if (warpgroup == 1) {
    more_registers<CONSUMER_REGISTERS>();
    run_queries<T>(p, shared, warp);
  } else {
    more_registers<CONSUMER_REGISTERS>();
    run_keys<T>(p, shared, warp);
  }
}

}  // namespace flashdelta::cuda
