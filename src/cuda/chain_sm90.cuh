// The serial part of the backward for Hopper: a persistent block takes work items (run of chunks, value head, 64 STATE
// values) and walks the run's chunks from last to first, the gradient of the state in registers. See docs/kernels.md.
//
//   warpgroup 0   producer   one warp each: loads; factors of tokens; stores of dS; stores of dv
//   next STATE    state      dS^T, 64 values each:  dV'^T = e^(gam_C - gam) (dS^T K^T) + do^T P,   dv^T = (beta dV')^T T,
//                                                   dS^T = e^gam_C dS^T + (scale e^gam do)^T Q - (e^gam dv)^T K
//
//        vectors --> factors --+
//        K, Q, T, do, P -------+--> state --> dS after each chunk, dv
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
  VECTORS_FULL,  // copy engine: vectors -> factors
  INPUTS_FULL,   // copy engine: K, Q, T, do, P; factors -> state
  INPUTS_FREE,   // state, which has waited for the factors as well -> loader
  DS_FULL,       // state -> its storer
  DS_FREE,       // storer -> state
  DV_FULL,       // state -> its storer
  DV_FREE,       // storer -> state
  BARRIERS
};

template <int STATE>
struct Shape {
  static constexpr int THREADS = 128 * (1 + STATE);
  static constexpr int STAGES = STATE == 1 ? 3 : 2;   // of what is loaded
  static constexpr int OUTPUTS = STATE == 1 ? 2 : 1;  // of what is stored
  static constexpr int BYTES = STATE * TILE;          // of the item's values of a chunk
  // Registers per thread with two state warpgroups; one has all it wants.
  static constexpr int PRODUCER_REGISTERS = 24, STATE_REGISTERS = 240;
};

// What multiplies a token's column of a product or its part of an operand. fp16 lacks the exponents for strong decays: there
// the power of two of the first token's decay, the largest, is left out of `read`, `erase` and `decay` (they carry `up`) and
// comes after the sums.
struct Factors {
  float4 write[CHUNK / 2];  // of tokens 2 i, 2 i + 1: beta e^(gam_C - gam) |k|^-1 of both, beta of both
  float2 read[CHUNK / 2];   // up scale e^gam |q|^-1
  float2 erase[CHUNK / 2];  // -up e^gam |k|^-1
  float decay, down;        // up e^gam_C, 1 / up
  float padding[2];
};

template <int STATE>
struct alignas(1024) SharedMemory {
  using S = Shape<STATE>;
  uint8_t k[S::STAGES][2 * TILE];  // two halves of 64 columns
  uint8_t q[S::STAGES][2 * TILE];
  uint8_t do_[S::STAGES][S::BYTES];  // [STATE] tiles
  uint8_t p[S::STAGES][TILE];
  uint8_t t[S::STAGES][TILE];
  uint8_t ds[S::OUTPUTS][STATE * STATE_TILE];
  uint8_t dv[S::OUTPUTS][S::BYTES];
  ChunkVectors vectors[S::STAGES];
  Factors factors[S::STAGES];
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

// Warp 0, one lane: loads. After the block's last chunk a stage with nothing in it follows: the state warpgroups look a
// chunk ahead.
template <int STATE, bool OUTCOMES>
__device__ __forceinline__ void load(const ChainParameters& p, SharedMemory<STATE>& shared) {
  const int group = p.scratch.value_heads / p.heads;
  Ring ring;
  for_each_chunk<STATE, OUTCOMES>(p, [&](const Item& item, int chunk, int slot) {
    wait_free(shared, INPUTS_FREE, ring);
    const int64_t at_head = p.scratch.head(slot, item.value_head);
    const uint32_t vectors_full = barrier_address(shared, VECTORS_FULL, ring.stage);
    barrier_arrive_expect(vectors_full, sizeof(ChunkVectors));
    bulk_load(shared_address(&shared.vectors[ring.stage]), p.scratch.vectors + at_head, sizeof(ChunkVectors), vectors_full);

    const uint32_t full = barrier_address(shared, INPUTS_FULL, ring.stage);
    barrier_arrive_expect(full, 6 * TILE + (p.has_do != 0 ? Shape<STATE>::BYTES : 0));
    const Place at = chunk_place(p, item, chunk);
    if (p.has_do != 0) {
#pragma unroll
      for (int w = 0; w < STATE; ++w) {
        tensor_load(shared_address(shared.do_[ring.stage]) + w * TILE, &p.do_, full, (item.first_block + w) * VALUES,
                    at.token, item.value_head, at.third, at.fourth);
      }
    }
    bulk_load(shared_address(shared.p[ring.stage]), p.scratch.p + at_head * TILE, TILE, full);
    const int head = item.value_head / group;
    const uint32_t k = shared_address(shared.k[ring.stage]), q = shared_address(shared.q[ring.stage]);
    tensor_load(k, &p.k, full, 0, at.token, head, at.third, at.fourth);
    tensor_load(k + TILE, &p.k, full, 64, at.token, head, at.third, at.fourth);
    tensor_load(q, &p.q, full, 0, at.token, head, at.third, at.fourth);
    tensor_load(q + TILE, &p.q, full, 64, at.token, head, at.third, at.fourth);
    bulk_load(shared_address(shared.t[ring.stage]), p.scratch.t + at_head * TILE, TILE, full);
    ring.template next<Shape<STATE>::STAGES>();
  });
  wait_free(shared, INPUTS_FREE, ring);
  barrier_arrive(barrier_address(shared, INPUTS_FULL, ring.stage));
}

// Warp 1: the factors. Lane l has tokens 2 l and 2 l + 1.
template <typename T, int STATE, bool OUTCOMES>
__device__ __forceinline__ void make_factors(const ChainParameters& p, SharedMemory<STATE>& shared, int lane) {
  Ring ring;
  for_each_chunk<STATE, OUTCOMES>(p, [&](const Item&, int, int) {
    wait_full(shared, VECTORS_FULL, ring);
    const ChunkVectors& vectors = shared.vectors[ring.stage];
    Factors& factors = shared.factors[ring.stage];
    float up = 1.0f, down = 1.0f;
    if constexpr (!IS_BFLOAT16<T>) {
      const float first = vectors.gam[0];
      if (first < -8.0f) {
        const float power = fmaxf(ceilf(first), -126.0f);
        down = exp2_fast(power);
        up = exp2_fast(-power);
      }
    }
    const auto pair = [&](const float(&x)[CHUNK]) { return *reinterpret_cast<const float2*>(&x[2 * lane]); };
    const float2 rise = pair(vectors.rise), end = pair(vectors.end), beta = pair(vectors.beta), key = pair(vectors.key),
                 query = pair(vectors.query);
    const float scale = p.scale * up;
    factors.write[lane] = make_float4(end.x * key.x * beta.x, end.y * key.y * beta.y, beta.x, beta.y);
    factors.read[lane] = make_float2(scale * rise.x * query.x, scale * rise.y * query.y);
    factors.erase[lane] = make_float2(-up * rise.x * key.x, -up * rise.y * key.y);
    if (lane == 31) {
      factors.decay = up * rise.y;
      factors.down = down;
    }
    arrive(shared, INPUTS_FULL, ring, lane);
    ring.template next<Shape<STATE>::STAGES>();
  });
  wait_free(shared, INPUTS_FREE, ring);
  arrive(shared, INPUTS_FULL, ring, lane);
}

// A chunk's tiles are written, and the gradients may know, when its stores have ended. Where memory is busy this takes as
// long as half of the values do: with two places for what is stored, a chunk is counted when the next one's are on their
// way.
template <int STATE>
__device__ __forceinline__ void end_stores(const Scratch& scratch, const Item& item, int slot) {
  unsigned* count = scratch.stored + (slot * scratch.value_heads + item.value_head);
  constexpr bool LATER = Shape<STATE>::OUTPUTS > 1;
  if (LATER && slot + 1 < item.slot + item.chunks) {
    stores_wait<1>();
    count_written(count + scratch.value_heads, STATE);
  }
  if (!LATER || slot == item.slot) {
    stores_wait<0>();
    count_written(count, STATE);
  }
}

// Warp 2, one lane: stores dS.
template <int STATE>
__device__ __forceinline__ void store_states(const ChainParameters& p, SharedMemory<STATE>& shared) {
  Ring ring;
  for_each_chunk<STATE, false>(p, [&](const Item& item, int, int slot) {
    wait_full(shared, DS_FULL, ring);
    bulk_store(p.scratch.ds + p.scratch.block(slot, item.value_head, item.first_block) * STATE_TILE,
               shared_address(shared.ds[ring.stage]), STATE * STATE_TILE);
    stores_commit();
    stores_wait_read<0>();
    barrier_arrive(barrier_address(shared, DS_FREE, ring.stage));
    end_stores<STATE>(p.scratch, item, slot);
    ring.template next<Shape<STATE>::OUTPUTS>();
  });
}

// Warp 3, one lane: stores dv.
template <int STATE>
__device__ __forceinline__ void store_values(const ChainParameters& p, SharedMemory<STATE>& shared) {
  Ring ring;
  for_each_chunk<STATE, false>(p, [&](const Item& item, int, int slot) {
    wait_full(shared, DV_FULL, ring);
    const uint32_t dv = shared_address(shared.dv[ring.stage]);
    if (p.scratch.dv != nullptr) {
      bulk_store(p.scratch.dv + p.scratch.block(slot, item.value_head, item.first_block) * TILE, dv, Shape<STATE>::BYTES);
    }
    if (p.has_dv != 0) {
      const Place at = chunk_place(p, item, item.first_chunk + slot - item.slot);
#pragma unroll
      for (int w = 0; w < STATE; ++w) {
        tensor_store(&p.dv, dv + w * TILE, (item.first_block + w) * VALUES, at.token, item.value_head, at.third, at.fourth);
      }
    }
    stores_commit();
    stores_wait_read<0>();
    barrier_arrive(barrier_address(shared, DV_FREE, ring.stage));
    end_stores<STATE>(p.scratch, item, slot);
    ring.template next<Shape<STATE>::OUTPUTS>();
  });
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

// The operand b of `multiply` in a tile or two: its columns lie as rows of 64 elements, in two tiles for a depth of 128; or
// (TRANSPOSED_B) its rows lie as rows of 64 columns.
__device__ __forceinline__ uint64_t columns(uint32_t tile) { return matrix_descriptor(tile, 16); }
__device__ __forceinline__ uint64_t rows(uint32_t tile) { return matrix_descriptor(tile, TILE); }

// d = a b (FIRST) or d += a b, as a group of its own; a is 64 x 4 WORDS, in registers. At the end the warp meets: the
// compiler would move loads that follow between the instructions, whose start then waits.
template <typename T, bool FIRST, bool TRANSPOSED_B, int COUNT, int WORDS>
__device__ __forceinline__ void multiply(float (&d)[COUNT], uint32_t (&a)[WORDS], uint64_t matrix) {
  computed(a);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < WORDS / 4; ++k) {
    const uint64_t b = advance(matrix, TRANSPOSED_B ? k * 2048 : (k / 4) * TILE + (k % 4) * 32);
    if (FIRST && k == 0) {
      wgmma<T, true, TRANSPOSED_B ? 1 : 0>(d, a[4 * k], a[4 * k + 1], a[4 * k + 2], a[4 * k + 3], b);
    } else {
      wgmma<T, false, TRANSPOSED_B ? 1 : 0>(d, a[4 * k], a[4 * k + 1], a[4 * k + 2], a[4 * k + 3], b);
    }
  }
  wgmma_commit();
  __syncwarp();
}

// Byte offset, in a tile, of the lane's row in a transposing load or store of 16 tokens x the warp's 16 values; other tokens
// are 128 bytes each away.
__device__ __forceinline__ uint32_t transposed_row(int thread) {
  return swizzled((thread & 7) + 8 * ((thread >> 4) & 1), 2 * (thread >> 5) + ((thread >> 3) & 1));
}

// do^T of a chunk.
__device__ __forceinline__ void load_do(uint32_t (&x)[16], uint32_t tile) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t y[4];
    load_matrices_transposed(y, tile + i * 2048);
#pragma unroll
    for (int j = 0; j < 4; ++j) x[4 * i + j] = y[j];
  }
}

// Half of (scale e^gam do)^T Q, of 32 tokens: their part `x` of do^T, their rows of Q, their factors. With PAIR the operand
// is the sum of two rounded ones: the error of one alone would be most of the error of the initial state's gradient. `a` is
// the operand.
template <typename T, bool PAIR>
__device__ __forceinline__ void add_do(float (&s)[64], uint32_t (&a)[PAIR ? 16 : 8], const uint32_t* x, uint64_t queries,
                                       const float2* read) {
  constexpr int WORDS = 8;
#pragma unroll
  for (int i = 0; i < WORDS; ++i) {
    const float2 f = read[4 * (i / 2)], y = unpack<T>(x[i]);
    a[i] = pack<T>(f.x * y.x, f.y * y.y);
    if constexpr (PAIR) {
      const float2 z = unpack<T>(a[i]);
      a[WORDS + i] = pack<T>(fmaf(f.x, y.x, -z.x), fmaf(f.y, y.y, -z.y));
    }
  }
  computed(a);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < (PAIR ? 4 : 2); ++k) {
    wgmma<T, false, 1>(s, a[4 * k], a[4 * k + 1], a[4 * k + 2], a[4 * k + 3], advance(queries, k % 2 * 2048));
  }
  wgmma_commit();
  __syncwarp();
}

// A state warpgroup: values 64 `turn`.. of the item. Only K^T, T and K wait for each other; the products with do, of the
// chunk or the next, run while accumulators are made into operands. What is left for others is made while products run: a
// fence that follows its stores at once, or a barrier that is asked when it is needed, would add its time to the chain.
// Where barriers are waited for that have long been ready, the branch keeps the compiler from moving arithmetic across: to
// before the start of a product, or to after its end.
//
// The images of dS and dv are stored and fenced by all lanes, which __syncwarp in `arrive` puts before the one arrival of
// lane 0; the storer's wait puts that before its copy.
template <typename T, int STATE, bool OUTCOMES, bool PAIR>
__device__ __forceinline__ void run_state(const ChainParameters& p, SharedMemory<STATE>& shared, int turn, int thread_) {
  constexpr int STAGES = Shape<STATE>::STAGES;
  Ring ring, stores;
  uint64_t keys = columns(shared_address(shared.k[0]));  // of the chunk: known before it begins
  const int items = item_count<STATE>(p);
  float s[64];   // dS^T
  float dv[32];  // do^T P, later dv^T
  bool ds_free = true;
  wait_full(shared, INPUTS_FULL, ring);
  uint32_t x[16];  // do^T
  load_do(x, shared_address(shared.do_[0]) + turn * TILE + transposed_row(thread_));
  multiply<T, true, true>(dv, x, rows(shared_address(shared.p[0])));
  wgmma_wait<0>();
  accumulators_ready(dv);
  for (int index = static_cast<int>(blockIdx.x); index < items; index += static_cast<int>(gridDim.x)) {
    const int chunks =
        start_item<STATE, OUTCOMES>(p, index, turn, s, thread_ / 32 * 16 + thread_ % 32 / 4, 2 * (thread_ % 4));
    uint32_t a[32];  // dS^T rounded
#pragma unroll
    for (int i = 0; i < 32; ++i) a[i] = pack<T>(s[2 * i], s[2 * i + 1]);
    for (int c = 0; c < chunks; ++c) {
      const int thread = opaque(thread_), lane = thread % 32;  // what follows from it does not take registers all the time
      const uint32_t row = transposed_row(thread);
      Ring next = ring;
      next.next<STAGES>();
      const Factors& factors = shared.factors[ring.stage];
      const uint64_t queries = rows(shared_address(shared.q[ring.stage]));

      // dS1^T K^T and, once dS has decayed, the larger part of (scale e^gam do)^T Q
      wgmma_wait<0>();
      accumulators_ready(dv);
      float u[32];
      multiply<T, true, false>(u, a, keys);
      const bool dv_free = OUTCOMES || is_free(shared, DV_FREE, stores);
      if (!ds_free) wait_free(shared, DS_FREE, stores);
      const float decay = factors.decay;
#pragma unroll
      for (int i = 0; i < 64; ++i) s[i] *= decay;
      accumulators_ready(s);
      uint32_t first[PAIR ? 16 : 8], second[PAIR ? 16 : 8];  // scale e^gam do
      add_do<T, PAIR>(s, first, x, queries, factors.read + (lane & 3));

      // The image of dS1
      if constexpr (!OUTCOMES) {
        const uint32_t tile = shared_address(shared.ds[stores.stage]) + turn * STATE_TILE;
        const int value = thread / 32 * 16 + thread % 16, right = (thread >> 4) & 1;
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          store_matrices(tile + (k / 4) * TILE + swizzled(value, 2 * (k % 4) + right), a[4 * k], a[4 * k + 1], a[4 * k + 2],
                         a[4 * k + 3]);
        }
      }

      // beta dV', and (beta dV')^T T
      float2 write[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float4 f = factors.write[4 * j + (lane & 3)];
        write[j] = make_float2(f.x, f.y);
        dv[4 * j] *= f.z;
        dv[4 * j + 1] *= f.w;
        dv[4 * j + 2] *= f.z;
        dv[4 * j + 3] *= f.w;
      }
      if (!dv_free) wait_free(shared, DV_FREE, stores);  // for the image of dv, below
      wgmma_wait<1>();
      accumulators_ready(u);
      uint32_t w[16];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float2 f = write[j];
        const float *y = u + 4 * j, *z = dv + 4 * j;
        w[2 * j] = pack<T>(fmaf(f.x, y[0], z[0]), fmaf(f.y, y[1], z[1]));
        w[2 * j + 1] = pack<T>(fmaf(f.x, y[2], z[2]), fmaf(f.y, y[3], z[3]));
      }
      multiply<T, true, false>(dv, w, columns(shared_address(shared.t[ring.stage])));
      add_do<T, PAIR>(s, second, x + 8, advance(queries, 2 * 2048), factors.read + 16 + (lane & 3));
      const bool more = is_full(shared, INPUTS_FULL, next);
      if constexpr (!OUTCOMES) {
        fence_async_shared();
        arrive(shared, DS_FULL, stores, lane);
      }
      float2 erase[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) erase[j] = factors.erase[4 * j + (lane & 3)];
      const float down = IS_BFLOAT16<T> ? 1.0f : factors.down;

      // -(e^gam dv)^T K
      __syncwarp();
      wgmma_wait<1>();
      accumulators_ready(dv);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float2 f = erase[j];
        w[2 * j] = pack<T>(f.x * dv[4 * j], f.y * dv[4 * j + 1]);
        w[2 * j + 1] = pack<T>(f.x * dv[4 * j + 2], f.y * dv[4 * j + 3]);
      }
      multiply<T, false, true>(s, w, rows(shared_address(shared.k[ring.stage])));

      // do^T P of the next chunk, and the image of dv
      if (!more) wait_full(shared, INPUTS_FULL, next);
      keys = columns(shared_address(shared.k[next.stage]));
      load_do(x, shared_address(shared.do_[next.stage]) + turn * TILE + row);
      if constexpr (!OUTCOMES) {
        const uint32_t tile = shared_address(shared.dv[stores.stage]) + turn * TILE + row;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* y = dv + 8 * i;
          store_matrices_transposed(tile + i * 2048, pack<T>(y[0], y[1]), pack<T>(y[2], y[3]), pack<T>(y[4], y[5]),
                                    pack<T>(y[6], y[7]));
        }
      }
      multiply<T, true, true>(dv, x, rows(shared_address(shared.p[next.stage])));
      if constexpr (!OUTCOMES) {
        fence_async_shared();
        arrive(shared, DV_FULL, stores, lane);
      }
      stores.next<Shape<STATE>::OUTPUTS>();
      ds_free = OUTCOMES || is_free(shared, DS_FREE, stores);
      wgmma_wait<1>();
      accumulators_ready(s);
      arrive(shared, INPUTS_FREE, ring, lane);
      if constexpr (!IS_BFLOAT16<T>) {
        if (down != 1.0f) {
#pragma unroll
          for (int i = 0; i < 64; ++i) s[i] *= down;
        }
      }
#pragma unroll
      for (int i = 0; i < 32; ++i) a[i] = pack<T>(s[2 * i], s[2 * i + 1]);
      ring = next;
    }
    wgmma_wait<0>();
    accumulators_ready(dv);
    end_item<STATE, OUTCOMES>(p, index, turn, s, thread_ / 32 * 16 + thread_ % 32 / 4, 2 * (thread_ % 4));
  }
}

}  // namespace chain

template <typename T, int STATE, bool OUTCOMES, bool PAIR>
__global__ void __launch_bounds__(chain::Shape<STATE>::THREADS, 1) chain_kernel(const __grid_constant__ ChainParameters p) {
  using namespace chain;
  using S = Shape<STATE>;
  extern __shared__ __align__(1024) uint8_t raw[];
  auto& shared = *reinterpret_cast<SharedMemory<STATE>*>(raw);
  const int warpgroup = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0);
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32 % 4, 0), lane = static_cast<int>(threadIdx.x) % 32;

  if (threadIdx.x == 0) {
    constexpr int state = warps(4 * STATE);
    const int arrivals[BARRIERS] = {1, 1 + warps(1), state, state, 1, state, 1};
    init_barriers(shared, arrivals);
  }
  if (p.has_do == 0) {
    for (int i = static_cast<int>(threadIdx.x); i < static_cast<int>(sizeof(shared.do_)) / 16; i += S::THREADS) {
      reinterpret_cast<uint4*>(shared.do_)[i] = make_uint4(0, 0, 0, 0);
    }
  }
  __syncthreads();
  wait_for_earlier_kernels();
  allow_later_kernels();  // the gradients do not wait for this kernel as a whole: what came before it has ended by now

  if (warpgroup == 0) {
    if constexpr (STATE == 2) fewer_registers<S::PRODUCER_REGISTERS>();
    if (warp == 0) {
      if (lane == 0) load<STATE, OUTCOMES>(p, shared);
    } else if (warp == 1) {
      make_factors<T, STATE, OUTCOMES>(p, shared, lane);
    } else if constexpr (!OUTCOMES) {
      if (lane == 0 && warp == 2) store_states(p, shared);
      if (lane == 0 && warp == 3) store_values(p, shared);
    }
  } else {
    if constexpr (STATE == 2) more_registers<S::STATE_REGISTERS>();
    run_state<T, STATE, OUTCOMES, PAIR>(p, shared, warpgroup - 1, static_cast<int>(threadIdx.x) % 128);
  }
}

}  // namespace flashdelta::cuda
