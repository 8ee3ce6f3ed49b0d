// The serial part of the backward for Hopper: a persistent block takes work items (run of chunks, value head, 64 STATE
// values) and walks the run's chunks from last to first, the gradient of the state in registers. See docs/kernels.md.
//
//   warpgroup 0   producer   one warp each: loads of K, Q; loads of do, P; stores, sums of <dV', R>; loads of T, R
//   next STATE    state      dS^T, 64 values each:  dV'^T = e^(gam_C - gam) (dS^T K^T) + do^T P,   dv^T = (beta dV')^T T,
//                                                   dS^T = e^gam_C dS^T + (scale e^gam do)^T Q - (e^gam dv)^T K
//
//        K, Q, vectors --+
//        do, P ----------+--> state --> dS after each chunk, dv, <dV', R>
//        T, R -----------+
//
// With OUTCOMES, the pre-pass of context parallelism, nothing is left but the gradient before each run.
#pragma once

#include "cuda/block_sm90.cuh"
#include "cuda/chain_sm90.hpp"
#include "cuda/ptx.cuh"

namespace flashdelta::cuda {
namespace chain {

// Barriers, each with its phase bit per stage. Who arrives -> who waits:
enum Barrier {
  KEYS_FULL,     // copy engine: K, Q, vectors -> state
  KEYS_FREE,     // state -> their loader
  OUTPUTS_FULL,  // copy engine: do, P -> state
  OUTPUTS_FREE,  // state -> their loader
  TILES_FULL,    // copy engine: T, R -> state
  TILES_FREE,    // state -> their loader
  DS_FULL,       // state -> storer
  DS_FREE,       // storer -> state
  DV_FULL,       // state: dv, sums of <dV', R> -> storer
  DV_FREE,       // storer -> state
  BARRIERS
};

template <int STATE>
struct Shape {
  static constexpr int THREADS = 128 * (1 + STATE);
  static constexpr int STAGES = STATE == 1 ? 3 : 2;  // of what is loaded; what is stored has one
  static constexpr int BYTES = STATE * TILE;         // of the item's values of a chunk
  // Registers per thread with two state warpgroups; one has all it wants.
  static constexpr int PRODUCER_REGISTERS = 24, STATE_REGISTERS = 240;
};

template <int STATE>
struct alignas(1024) SharedMemory {
  using S = Shape<STATE>;
  uint8_t k[S::STAGES][2 * TILE];  // two halves of 64 columns
  uint8_t q[S::STAGES][2 * TILE];
  uint8_t do_[S::STAGES][S::BYTES];  // [STATE] tiles
  uint8_t p[S::STAGES][TILE];
  uint8_t t[S::STAGES][TILE];
  uint8_t r[S::STAGES][S::BYTES];
  uint8_t ds[STATE * STATE_TILE];
  uint8_t dv[S::BYTES];
  ChunkVectors vectors[S::STAGES];
  float dbeta[STATE][4][CHUNK];  // <dV'_i, R_i> of 16 values: a warp each
  uint64_t barriers[BARRIERS][MAX_STAGES];
};

static_assert(sizeof(SharedMemory<1>) <= 227 * 1024 && sizeof(SharedMemory<2>) <= 227 * 1024);

// A work item. Each warp finds it by itself.
struct Item {
  int run;
  int sequence;  // -1: nothing to do
  int value_head, first_block;
  int64_t batch, begin;
  int tokens;  // of the sequence
  int first_chunk, chunks, slot;
  bool begins, ends;  // the run has the sequence's first, last chunk
};

template <int STATE>
__device__ __forceinline__ int item_count(const ChainParameters& p) {
  return p.run_count * p.scratch.value_heads * (p.scratch.value_blocks / STATE);
}

template <int STATE, bool OUTCOMES>
__device__ __forceinline__ Item item_at(const ChainParameters& p, int index) {
  const int groups = p.scratch.value_blocks / STATE, heads = p.scratch.value_heads;
  const int run_index = index / groups / heads;
  const Run run = p.runs[run_index];
  Item item{.run = run_index,
            .sequence = run.sequence,
            .value_head = index / groups % heads,
            .first_block = index % groups * STATE,
            .batch = 0,
            .begin = 0,
            .tokens = 0,
            .first_chunk = run.first_chunk,
            .chunks = 0,
            .slot = run.slot,
            .begins = false,
            .ends = false};
  if (OUTCOMES && run.first_chunk == 0) item.sequence = -1;
  if (item.sequence < 0) return item;
  const TokenRange range = p.sequences[run.sequence];
  item.batch = range.batch;
  item.begin = range.begin;
  item.tokens = static_cast<int>(range.end - range.begin);
  item.chunks = run.chunks;
  if (run.chunks == 0 && item.tokens > 0) item.sequence = -1;
  item.begins = run.first_chunk == 0;
  item.ends = run.first_chunk + run.chunks >= (item.tokens + CHUNK - 1) / CHUNK;
  if constexpr (OUTCOMES) {
    if (const int window = p.windows[run_index * heads + item.value_head]; window >= 0) {
      item.chunks = window;
      item.ends = false;
    }
  }
  return item;
}

__device__ __forceinline__ Place chunk_place(const ChainParameters& p, const Item& item, int chunk) {
  return place(p.sequences.cu_seqlens != nullptr, item.batch, item.begin, item.tokens, chunk * CHUNK);
}

// What the block does with each chunk of each of its items, in the order in which all its warps take them.
template <int STATE, bool OUTCOMES, typename Visit>
__device__ __forceinline__ void for_each_chunk(const ChainParameters& p, Visit visit) {
  const int items = item_count<STATE>(p);
  for (int index = static_cast<int>(blockIdx.x); index < items; index += static_cast<int>(gridDim.x)) {
    const Item item = item_at<STATE, OUTCOMES>(p, index);
    for (int i = item.chunks; i-- > 0;) visit(item, item.first_chunk + i, item.slot + i);
  }
}

// Warp 0, one lane: loads K, Q and the vectors.
template <int STATE, bool OUTCOMES>
__device__ __forceinline__ void load_keys(const ChainParameters& p, SharedMemory<STATE>& shared) {
  const int group = p.scratch.value_heads / p.heads;
  Ring ring;
  for_each_chunk<STATE, OUTCOMES>(p, [&](const Item& item, int chunk, int slot) {
    wait_free(shared, KEYS_FREE, ring);
    const uint32_t full = barrier_address(shared, KEYS_FULL, ring.stage);
    barrier_arrive_expect(full, 4 * TILE + static_cast<int>(sizeof(ChunkVectors)));
    const Place at = chunk_place(p, item, chunk);
    const int head = item.value_head / group;
    const uint32_t k = shared_address(shared.k[ring.stage]), q = shared_address(shared.q[ring.stage]);
    bulk_load(shared_address(&shared.vectors[ring.stage]), p.scratch.vectors + p.scratch.head(slot, item.value_head),
              sizeof(ChunkVectors), full);
    tensor_load(k, &p.k, full, 0, at.token, head, at.third, at.fourth);
    tensor_load(k + TILE, &p.k, full, 64, at.token, head, at.third, at.fourth);
    tensor_load(q, &p.q, full, 0, at.token, head, at.third, at.fourth);
    tensor_load(q + TILE, &p.q, full, 64, at.token, head, at.third, at.fourth);
    ring.template next<Shape<STATE>::STAGES>();
  });
}

// Warp 1, one lane: loads do and P. The state warpgroups are a chunk ahead with these; after the last chunk they get a
// stage with nothing in it.
template <int STATE, bool OUTCOMES>
__device__ __forceinline__ void load_outputs(const ChainParameters& p, SharedMemory<STATE>& shared) {
  Ring ring;
  for_each_chunk<STATE, OUTCOMES>(p, [&](const Item& item, int chunk, int slot) {
    wait_free(shared, OUTPUTS_FREE, ring);
    const uint32_t full = barrier_address(shared, OUTPUTS_FULL, ring.stage);
    barrier_arrive_expect(full, TILE + (p.has_do != 0 ? Shape<STATE>::BYTES : 0));
    bulk_load(shared_address(shared.p[ring.stage]), p.scratch.p + p.scratch.head(slot, item.value_head) * TILE, TILE, full);
    if (p.has_do != 0) {
      const Place at = chunk_place(p, item, chunk);
#pragma unroll
      for (int w = 0; w < STATE; ++w) {
        tensor_load(shared_address(shared.do_[ring.stage]) + w * TILE, &p.do_, full, (item.first_block + w) * VALUES,
                    at.token, item.value_head, at.third, at.fourth);
      }
    }
    ring.template next<Shape<STATE>::STAGES>();
  });
  wait_free(shared, OUTPUTS_FREE, ring);
  barrier_arrive(barrier_address(shared, OUTPUTS_FULL, ring.stage));
}

// Warp 3, one lane: loads T and R, which an outcome does not need.
template <int STATE, bool OUTCOMES>
__device__ __forceinline__ void load_tiles(const ChainParameters& p, SharedMemory<STATE>& shared) {
  Ring ring;
  for_each_chunk<STATE, OUTCOMES>(p, [&](const Item& item, int, int slot) {
    wait_free(shared, TILES_FREE, ring);
    const uint32_t full = barrier_address(shared, TILES_FULL, ring.stage);
    barrier_arrive_expect(full, TILE + (OUTCOMES ? 0 : Shape<STATE>::BYTES));
    bulk_load(shared_address(shared.t[ring.stage]), p.scratch.t + p.scratch.head(slot, item.value_head) * TILE, TILE, full);
    if constexpr (!OUTCOMES) {
      bulk_load(shared_address(shared.r[ring.stage]),
                p.scratch.r + p.scratch.block(slot, item.value_head, item.first_block) * TILE, Shape<STATE>::BYTES, full);
    }
    ring.template next<Shape<STATE>::STAGES>();
  });
}

// Warp 2: stores dS and dv; adds the state warps' sums of <dV', R>. Lane l has tokens l and l + 32.
template <int STATE>
__device__ __forceinline__ void store_results(const ChainParameters& p, SharedMemory<STATE>& shared, int lane) {
  Ring ring;
  for_each_chunk<STATE, false>(p, [&](const Item& item, int chunk, int slot) {
    const int64_t block = p.scratch.block(slot, item.value_head, item.first_block);
    wait_full(shared, DS_FULL, ring);
    if (lane == 0) {
      bulk_store(p.scratch.ds + block * STATE_TILE, shared_address(shared.ds), STATE * STATE_TILE);
      stores_commit();
      stores_wait_read<0>();
      barrier_arrive(barrier_address(shared, DS_FREE, ring.stage));
    }
    __syncwarp();
    wait_full(shared, DV_FULL, ring);
    if (lane == 0) {
      const uint32_t dv = shared_address(shared.dv);
      bulk_store(p.scratch.dv + block * TILE, dv, Shape<STATE>::BYTES);
      if (p.has_dv != 0) {
        const Place at = chunk_place(p, item, chunk);
#pragma unroll
        for (int w = 0; w < STATE; ++w) {
          tensor_store(&p.dv, dv + w * TILE, (item.first_block + w) * VALUES, at.token, item.value_head, at.third,
                       at.fourth);
        }
      }
      stores_commit();
    }
#pragma unroll
    for (int w = 0; w < STATE; ++w) {
      float* out = p.scratch.dbeta + (block + w) * CHUNK + lane;
#pragma unroll
      for (int i = 0; i < CHUNK; i += 32) {
        const float(&sums)[4][CHUNK] = shared.dbeta[w];
        out[i] = (sums[0][lane + i] + sums[1][lane + i]) + (sums[2][lane + i] + sums[3][lane + i]);
      }
    }
    if (lane == 0) stores_wait_read<0>();
    arrive(shared, DV_FREE, ring, lane);
    ring.next<1>();
  });
  if (lane == 0) stores_wait();
}

// Adds the elements of lanes that differ in bit 2 HALF; each of the two keeps half of its 2 HALF elements.
template <int HALF>
__device__ __forceinline__ void fold(float (&x)[16], int lane) {
  const bool upper = (lane & 2 * HALF) != 0;
#pragma unroll
  for (int i = 0; i < HALF; ++i) {
    const float keep = upper ? x[HALF + i] : x[i], give = upper ? x[i] : x[HALF + i];
    x[i] = keep + __shfl_sync(~0u, give, lane ^ 2 * HALF);
  }
}
// Sums over the lanes with the same lane % 4; a lane gets those of elements 2 (lane / 4) and 2 (lane / 4) + 1.
__device__ __forceinline__ float2 sum_columns(float (&x)[16], int lane) {
  fold<8>(x, lane);
  fold<4>(x, lane);
  fold<2>(x, lane);
  return {x[0], x[1]};
}

// Where values 64 `turn`.. of an item lie in [HV][V][K] states.
__device__ __forceinline__ int64_t state_at(const ChainParameters& p, const Item& item, int turn) {
  return (static_cast<int64_t>(item.value_head) * p.scratch.value_blocks + item.first_block + turn) * STATE_BLOCK;
}
// The gradient of the state after the item's chunks; returns how many these are.
template <int STATE, bool OUTCOMES>
__device__ __forceinline__ int start_item(const ChainParameters& p, int index, int turn, float (&s)[64], int value,
                                          int key) {
  const Item item = item_at<STATE, OUTCOMES>(p, index);
  if (!OUTCOMES && item.sequence >= 0 && !item.ends) {
    load_state(p.starts + item.run * p.start_stride + state_at(p, item, turn), s, value, key);
  } else {
    const int64_t row = item.sequence >= 0 && item.ends ? p.dfinal.row(item.sequence, 0) : -1;
    load_state(p.dfinal, p.state_v_first != 0, row, item.value_head, s, (item.first_block + turn) * VALUES + value, key);
  }
  return item.chunks;
}
// The gradient of the state before them goes where it belongs.
template <int STATE, bool OUTCOMES>
__device__ __forceinline__ void end_item(const ChainParameters& p, int index, int turn, float (&s)[64], int value, int key) {
  const Item item = item_at<STATE, OUTCOMES>(p, index);
  if (item.sequence < 0) return;
  if constexpr (OUTCOMES) {
    const int64_t head = static_cast<int64_t>(item.run) * p.scratch.value_heads + item.value_head;
    const int blocks = p.scratch.value_blocks + KEYS / VALUES;
    store_state(p.outcomes + (head * blocks + item.first_block + turn) * STATE_BLOCK, s, value, key);
  } else {
    if (!item.begins) {
      if (p.carry_out != nullptr) store_state(p.carry_out + state_at(p, item, turn), s, value, key);
      return;
    }
    if (p.initial.row(item.sequence, 0) < 0) {
#pragma unroll
      for (int i = 0; i < 64; ++i) s[i] = 0.0f;
    }
    store_state(p.dinitial, p.state_v_first != 0, p.dinitial.row(item.sequence, 0), item.value_head, s,
                (item.first_block + turn) * VALUES + value, key);
  }
}

// d = a b (FIRST) or d += a b, as a group of its own; a is 64 x 4 WORDS, in registers. TRANSPOSED_B: the rows of b lie as
// rows of 64 columns of the tile, or of two of them; else its columns do, two tiles for a depth of 128.
template <typename T, bool FIRST, bool TRANSPOSED_B, int COUNT, int WORDS>
__device__ __forceinline__ void multiply(float (&d)[COUNT], const uint32_t (&a)[WORDS], uint32_t tile) {
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < WORDS / 4; ++k) {
    const uint64_t b = TRANSPOSED_B ? matrix_descriptor(tile + k * 2048, TILE)
                                    : matrix_descriptor(tile + (k / 4) * TILE + (k % 4) * 32, 16);
    if (FIRST && k == 0) {
      wgmma<T, true, TRANSPOSED_B ? 1 : 0>(d, a[4 * k], a[4 * k + 1], a[4 * k + 2], a[4 * k + 3], b);
    } else {
      wgmma<T, false, TRANSPOSED_B ? 1 : 0>(d, a[4 * k], a[4 * k + 1], a[4 * k + 2], a[4 * k + 3], b);
    }
  }
  wgmma_commit();
}

// Byte offset, in a tile, of the lane's row in a transposing load or store of 16 tokens x the warp's 16 values; other tokens
// are 128 bytes each away.
__device__ __forceinline__ uint32_t transposed_row(int warp, int lane) {
  return swizzled((lane & 7) + 8 * (lane >> 4), 2 * warp + ((lane >> 3) & 1));
}

// Starts do^T P of a chunk: `x` is do^T, `dv` the product.
template <typename T, int STATE>
__device__ __forceinline__ void start_chunk(const ChainParameters& p, SharedMemory<STATE>& shared, const Ring& ring,
                                            int turn, uint32_t row, uint32_t (&x)[16], float (&dv)[32]) {
  wait_full(shared, OUTPUTS_FULL, ring);
  const uint32_t tile = shared_address(shared.do_[ring.stage]) + turn * TILE + row;
  const bool present = p.has_do != 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t y[4];
    load_matrices_transposed(y, tile + i * 2048);
#pragma unroll
    for (int j = 0; j < 4; ++j) x[4 * i + j] = present ? y[j] : 0;
  }
  multiply<T, true, true>(dv, x, shared_address(shared.p[ring.stage]));
}

// A state warpgroup: values 64 `turn`.. of the item. The products that do not depend on dS run while the others wait for
// conversions: do^T P of the next chunk under the rounding of dS, (scale e^gam do)^T Q under that of dV' and of dv.
template <typename T, int STATE, bool OUTCOMES>
__device__ __forceinline__ void run_state(const ChainParameters& p, SharedMemory<STATE>& shared, int turn, int warp,
                                          int lane_) {
  constexpr int STAGES = Shape<STATE>::STAGES;
  uint32_t count = 0;  // chunks so far
  const int items = item_count<STATE>(p);
  float s[64];     // dS^T
  uint32_t a[32];  // dS^T rounded
  uint32_t x[16];  // do^T
  float dv[32];    // do^T P, later dv^T
  start_chunk<T, STATE>(p, shared, ring_at<STAGES>(0), turn, transposed_row(warp, lane_), x, dv);
  wgmma_wait<0>();
  accumulators_ready(dv);
  arrive(shared, OUTPUTS_FREE, ring_at<STAGES>(0), lane_);
  for (int index = static_cast<int>(blockIdx.x); index < items; index += static_cast<int>(gridDim.x)) {
    const int chunks = start_item<STATE, OUTCOMES>(p, index, turn, s, 16 * warp + (lane_ >> 2), 2 * (lane_ & 3));
#pragma unroll
    for (int i = 0; i < 32; ++i) a[i] = pack<T>(s[2 * i], s[2 * i + 1]);
    for (int c = 0; c < chunks; ++c, ++count) {
      const int lane = opaque(lane_);  // what follows from it does not take registers all the time
      const int column = 2 * (lane & 3);
      const uint32_t row = transposed_row(warp, lane);
      const Ring ring = ring_at<STAGES>(count), stores = ring_at<1>(count);
      const ChunkVectors& vectors = shared.vectors[ring.stage];

      // The image of dS1, and dS1^T K^T
      if constexpr (!OUTCOMES) {
        wait_free(shared, DS_FREE, stores);
        const uint32_t tile = shared_address(shared.ds) + turn * STATE_TILE;
        const int value = 16 * warp + (lane & 15), right = lane >> 4;
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          store_matrices(tile + (k / 4) * TILE + swizzled(value, 2 * (k % 4) + right), a[4 * k], a[4 * k + 1], a[4 * k + 2],
                         a[4 * k + 3]);
        }
      }
      wait_full(shared, KEYS_FULL, ring);
      const uint32_t tile_k = shared_address(shared.k[ring.stage]), tile_q = shared_address(shared.q[ring.stage]);
      float u[32];
      multiply<T, true, false>(u, a, tile_k);
      if constexpr (!OUTCOMES) {
        fence_async_shared();
        arrive(shared, DS_FULL, stores, lane);
      }

      // (scale e^gam do)^T Q, the operand as the sum of two rounded ones: its error alone would be most of the error of the
      // initial state's gradient. fp16 lacks the exponents for strong decays: there the power of two of the first token's
      // decay, the largest, comes after the sums.
      float up = 1.0f, down = 1.0f;
      if constexpr (!IS_BFLOAT16<T>) {
        const float first = vectors.gam[0];
        if (first < -8.0f) {
          down = exp2_fast(fmaxf(ceilf(first), -126.0f));
          up = 1.0f / down;
        }
      }
      const float scale = p.scale * up;
      uint32_t high[16], low[16];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float2 rise = *reinterpret_cast<const float2*>(&vectors.rise[8 * j + column]);
        const float2 query = *reinterpret_cast<const float2*>(&vectors.query[8 * j + column]);
        const float f0 = scale * rise.x * query.x, f1 = scale * rise.y * query.y;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float2 y = unpack<T>(x[2 * j + h]);
          high[2 * j + h] = pack<T>(f0 * y.x, f1 * y.y);
          const float2 rounded = unpack<T>(high[2 * j + h]);
          low[2 * j + h] = pack<T>(f0 * y.x - rounded.x, f1 * y.y - rounded.y);
        }
      }
      const float decay = up * vectors.rise[CHUNK - 1];
#pragma unroll
      for (int i = 0; i < 64; ++i) s[i] *= decay;
      multiply<T, false, true>(s, high, tile_q);

      // dV', and (beta dV')^T T
      wgmma_wait<1>();
      accumulators_ready(u);
      uint32_t w[16];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float2 end = *reinterpret_cast<const float2*>(&vectors.end[8 * j + column]);
        const float2 key = *reinterpret_cast<const float2*>(&vectors.key[8 * j + column]);
        const float2 beta = *reinterpret_cast<const float2*>(&vectors.beta[8 * j + column]);
        const float f0 = end.x * key.x, f1 = end.y * key.y;
        float* y = u + 4 * j;
        y[0] = fmaf(f0, y[0], dv[4 * j]);
        y[1] = fmaf(f1, y[1], dv[4 * j + 1]);
        y[2] = fmaf(f0, y[2], dv[4 * j + 2]);
        y[3] = fmaf(f1, y[3], dv[4 * j + 3]);
        w[2 * j] = pack<T>(beta.x * y[0], beta.y * y[1]);
        w[2 * j + 1] = pack<T>(beta.x * y[2], beta.y * y[3]);
      }
      wait_full(shared, TILES_FULL, ring);
      multiply<T, true, false>(dv, w, shared_address(shared.t[ring.stage]));
      multiply<T, false, true>(s, low, tile_q);

      // <dV', R>
      if constexpr (!OUTCOMES) {
        float sums[16];
        const uint32_t tile = shared_address(shared.r[ring.stage]) + turn * TILE + row;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          uint32_t r[4];
          load_matrices_transposed(r, tile + i * 2048);
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const float2 r0 = unpack<T>(r[2 * h]), r1 = unpack<T>(r[2 * h + 1]);
            const float* y = u + 8 * i + 4 * h;
            sums[4 * i + 2 * h] = fmaf(y[0], r0.x, y[2] * r1.x);
            sums[4 * i + 2 * h + 1] = fmaf(y[1], r0.y, y[3] * r1.y);
          }
        }
        wait_free(shared, DV_FREE, stores);
        *reinterpret_cast<float2*>(&shared.dbeta[turn][warp][2 * lane]) = sum_columns(sums, lane);
      }

      wgmma_wait<1>();
      accumulators_ready(dv);
      arrive(shared, TILES_FREE, ring, lane);

      // -(e^gam dv)^T K, and the image of dv
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float2 rise = *reinterpret_cast<const float2*>(&vectors.rise[8 * j + column]);
        const float2 key = *reinterpret_cast<const float2*>(&vectors.key[8 * j + column]);
        const float f0 = -up * rise.x * key.x, f1 = -up * rise.y * key.y;
        w[2 * j] = pack<T>(f0 * dv[4 * j], f1 * dv[4 * j + 1]);
        w[2 * j + 1] = pack<T>(f0 * dv[4 * j + 2], f1 * dv[4 * j + 3]);
      }
      multiply<T, false, true>(s, w, tile_k);
      if constexpr (!OUTCOMES) {
        const uint32_t tile = shared_address(shared.dv) + turn * TILE + row;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* y = dv + 8 * i;
          store_matrices_transposed(tile + i * 2048, pack<T>(y[0], y[1]), pack<T>(y[2], y[3]), pack<T>(y[4], y[5]),
                                    pack<T>(y[6], y[7]));
        }
        fence_async_shared();
        arrive(shared, DV_FULL, stores, lane);
      }

      const Ring next = ring_at<STAGES>(count + 1);
      start_chunk<T, STATE>(p, shared, next, turn, row, x, dv);
      wgmma_wait<1>();
      accumulators_ready(s);
      arrive(shared, KEYS_FREE, ring, lane);
      if constexpr (!IS_BFLOAT16<T>) {
        if (down != 1.0f) {
#pragma unroll
          for (int i = 0; i < 64; ++i) s[i] *= down;
        }
      }
#pragma unroll
      for (int i = 0; i < 32; ++i) a[i] = pack<T>(s[2 * i], s[2 * i + 1]);
      wgmma_wait<0>();
      accumulators_ready(dv);
      arrive(shared, OUTPUTS_FREE, next, lane);
    }
    end_item<STATE, OUTCOMES>(p, index, turn, s, 16 * warp + (lane_ >> 2), 2 * (lane_ & 3));
  }
}

}  // namespace chain

template <typename T, int STATE, bool OUTCOMES>
__global__ void __launch_bounds__(chain::Shape<STATE>::THREADS, 1) chain_kernel(const __grid_constant__ ChainParameters p) {
  using namespace chain;
  using S = Shape<STATE>;
  extern __shared__ __align__(1024) uint8_t raw[];
  auto& shared = *reinterpret_cast<SharedMemory<STATE>*>(raw);
  const int warpgroup = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0);
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32 % 4, 0), lane = static_cast<int>(threadIdx.x) % 32;

  if (threadIdx.x == 0) {
    constexpr int state = 4 * STATE;
    const int arrivals[BARRIERS] = {1, state, 1, state, 1, state, state, 1, state, 1};
    init_barriers(shared, arrivals);
  }
  __syncthreads();
  wait_for_earlier_kernels();

  if (warpgroup == 0) {
    if constexpr (STATE == 2) fewer_registers<S::PRODUCER_REGISTERS>();
    if (warp == 0) {
      if (lane == 0) load_keys<STATE, OUTCOMES>(p, shared);
    } else if (warp == 1) {
      if (lane == 0) load_outputs<STATE, OUTCOMES>(p, shared);
    } else if (warp == 2) {
      if constexpr (!OUTCOMES) store_results(p, shared, lane);
    } else {
      if (lane == 0) load_tiles<STATE, OUTCOMES>(p, shared);
    }
  } else {
    if constexpr (STATE == 2) more_registers<S::STATE_REGISTERS>();
    run_state<T, STATE, OUTCOMES>(p, shared, warpgroup - 1, warp, lane);
  }
}

}  // namespace flashdelta::cuda
