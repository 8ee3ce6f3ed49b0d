// Forward for Hopper: a persistent block takes work items (run, value head, block of 64 STATE values) and walks the run's
// chunks of 64 tokens, the state in registers from the first to the last. A run is a sequence, or a part of one whose first
// state is known (context_sm90.hpp). See docs/kernels.md.
//
//   warpgroup 0         producer   a warp each for loads and stores of O, two for gates
//   next STATE          state      S^T, 64 values each: U = S^T K^T, R = (V - e^gam U) T^T, O = S^T Q^T + V' P^T, S += V' K
//   the others          auxiliary  tiles T and P (chunk.cuh), chunks taken in turn, ahead of the state
//
//        K, Q --------------------+---------------+
//                                 v               v
//        g, beta -> gates -> auxiliary -> T, P -> state -> O
//                        +------------------------^
//        V ---------------------------------------^
#pragma once

#include "cuda/chunk.cuh"
#include "cuda/forward_sm90.hpp"
#include "cuda/ptx.cuh"
#include "cuda/walk_sm90.cuh"

namespace flashdelta::cuda {

constexpr int THREADS = 512;

// A work item as the roles see it.
struct Item {
  int sequence;  // -1: no more
  int value_head, first_value;
  int tokens;  // of the sequence
  int64_t batch, begin;
  int first, end;  // chunks of the sequence
  int start;       // row of ForwardParameters::starts, or -1
};

// Barriers, each with its phase bit per stage. Who arrives -> who waits:
enum Barrier {
  KQ_FULL,     // copy engine -> auxiliary, (norms) gates
  V_FULL,      // copy engine -> auxiliary
  GATES_FULL,  // gates -> auxiliary
  TILES_FULL,  // auxiliary, when K, Q, V and gates are there, too -> state
  CHUNK_DONE,  // state, when nobody needs the chunk's K, Q, V, gates and tiles any more -> loader, gates, auxiliary
  O_FULL,      // state -> storer of O
  O_FREE,      // storer of O -> state
  ITEM_FULL,   // loader -> every other warp
  ITEM_FREE,   // every other warp -> loader
  BARRIERS
};

template <int STATE>
struct Shape {
  static constexpr int AUXILIARY = 3 - STATE;
  // Stages of each ring.
  static constexpr int KQ = 4, V = 2, GATES = 4, O = 1, TILES = STATE == 1 ? 3 : 2, ITEMS = 2;
  static constexpr int V_BYTES = STATE * CHUNK * VALUES * 2;
  // Registers per thread; they sum to at most 512.
  static constexpr int PRODUCER_REGISTERS = STATE == 1 ? 56 : 40, STATE_REGISTERS = STATE == 1 ? 216 : 192,
                       AUXILIARY_REGISTERS = STATE == 1 ? 120 : 88;
  static_assert(PRODUCER_REGISTERS + STATE * STATE_REGISTERS + AUXILIARY * AUXILIARY_REGISTERS <= 512);
};

template <int STATE>
struct alignas(1024) SharedMemory {
  using S = Shape<STATE>;
  uint8_t k[S::KQ][CHUNK * KEYS * 2];  // two halves of 64 columns, each [64][64] swizzled
  uint8_t q[S::KQ][CHUNK * KEYS * 2];
  uint8_t v[S::V][S::V_BYTES];  // [STATE][64 tokens][64 values]
  uint8_t o[S::O][S::V_BYTES];
  uint8_t t[S::TILES][CHUNK * CHUNK * 2];
  uint8_t p[S::TILES][CHUNK * CHUNK * 2];
  TileScratch scratch[S::AUXILIARY];
  ChunkGates gates[S::GATES];
  Item items[S::ITEMS];
  uint64_t barriers[BARRIERS][MAX_STAGES];
};

static_assert(sizeof(SharedMemory<1>) <= 227 * 1024 && sizeof(SharedMemory<2>) <= 227 * 1024);

// Waits until the block is done with chunk `count - stages`, whose place in a ring chunk `count` takes. CHUNK_DONE has
// MAX_STAGES stages, as many as the longest ring.
template <int STAGES, int STATE>
__device__ __forceinline__ void wait_for_place(SharedMemory<STATE>& shared, uint32_t count) {
  static_assert(STAGES <= MAX_STAGES);
  if (count < STAGES) return;
  const Ring done = ring_at<MAX_STAGES>(count - STAGES);
  wait_full(shared, CHUNK_DONE, done);
}

// The next item, for every warp but the one that hands them out.
template <int STATE>
__device__ __forceinline__ Item take_item(SharedMemory<STATE>& shared, Ring& ring, int lane) {
  wait_full(shared, ITEM_FULL, ring);
  const Item item = shared.items[ring.stage];
  arrive(shared, ITEM_FREE, ring, lane);
  ring.template next<Shape<STATE>::ITEMS>();
  return item;
}

__device__ __forceinline__ Place place(const ForwardParameters& p, const Item& item, int token) {
  return place(p.sequences.cu_seqlens != nullptr, item.batch, item.begin, item.tokens, token);
}

// Warp 0, one lane: hands out items, loads K, Q and V. Its ring of V is shorter, so V comes LAG chunks after K and Q, which
// the auxiliary warpgroups need earlier.
template <int STATE>
__device__ __forceinline__ void load_inputs(const ForwardParameters& p, SharedMemory<STATE>& shared) {
  using S = Shape<STATE>;
  constexpr int LAG = S::KQ - S::V;
  Ring items;
  uint32_t keys_count = 0, values_count = 0;  // chunks loaded so far
  int index = blockIdx.x;
  const int group = p.value_heads / p.heads, per_run = p.value_heads * p.value_blocks;
  const int item_count = p.runs == nullptr ? p.items : *p.run_count * per_run;
  while (true) {
    wait_free(shared, ITEM_FREE, items);
    Item& item = shared.items[items.stage];  // read again where needed: registers are short
    item.sequence = -1;
    if (index < item_count) {
      const int i = index / per_run, rest = index % per_run;
      const ForwardRun run = p.runs == nullptr ? ForwardRun{i, 0, -1, -1} : p.runs[i];
      const TokenRange range = p.sequences[run.sequence];
      const int tokens = static_cast<int>(range.end - range.begin);
      item = {.sequence = run.sequence,
              .value_head = rest / p.value_blocks,
              .first_value = rest % p.value_blocks * (STATE * VALUES),
              .tokens = tokens,
              .batch = range.batch,
              .begin = range.begin,
              .first = run.first,
              .end = run.end < 0 ? (tokens + CHUNK - 1) / CHUNK : run.end,
              .start = run.start};
    }
    barrier_arrive(barrier_address(shared, ITEM_FULL, items.stage));
    items.next<S::ITEMS>();
    if (item.sequence < 0) break;
    // Other warps load the state as soon as they are done with the item before.
    if (p.initial_bytes > 0 && item.start < 0) {
      const int64_t row = p.initial.row(item.sequence, 0);
      const View& states = p.initial.states;
      const int64_t at = row * states.stride[0] + item.value_head * states.stride[1];
      const int size = states.type == FD_FLOAT32 ? 4 : 2;
      if (row >= 0) bulk_prefetch(static_cast<const char*>(states.data) + at * size, p.initial_bytes);
    }
    const int head = item.value_head / group;
    for (int c = item.first; c < item.end + LAG; ++c) {
      if (c < item.end) {
        const Ring ring = ring_at<S::KQ>(keys_count);
        wait_for_place<S::KQ>(shared, keys_count++);
        const uint32_t full = barrier_address(shared, KQ_FULL, ring.stage);
        barrier_arrive_expect(full, 2 * CHUNK * KEYS * 2);
        const Place at = place(p, item, c * CHUNK);
        const uint32_t k = shared_address(shared.k[ring.stage]), q = shared_address(shared.q[ring.stage]);
        tensor_load(k, &p.k, full, 0, at.token, head, at.third, at.fourth);
        tensor_load(k + 8192, &p.k, full, 64, at.token, head, at.third, at.fourth);
        tensor_load(q, &p.q, full, 0, at.token, head, at.third, at.fourth);
        tensor_load(q + 8192, &p.q, full, 64, at.token, head, at.third, at.fourth);
      }
      if (c - LAG >= item.first) {
        const Ring values = ring_at<S::V>(values_count);
        wait_for_place<S::V>(shared, values_count++);
        const uint32_t full = barrier_address(shared, V_FULL, values.stage);
        barrier_arrive_expect(full, S::V_BYTES);
        const Place at = place(p, item, (c - LAG) * CHUNK);
#pragma unroll
        for (int w = 0; w < STATE; ++w) {
          tensor_load(shared_address(shared.v[values.stage]) + w * 8192, &p.v, full, item.first_value + w * VALUES, at.token,
                      item.value_head, at.third, at.fourth);
        }
      }
    }
    index = static_cast<int>(gridDim.x + (p.next_item == nullptr ? index : atomicAdd(p.next_item, 1u)));
  }
}

// Warp 1: stores O.
template <int STATE>
__device__ __forceinline__ void store_outputs(const ForwardParameters& p, SharedMemory<STATE>& shared, int lane) {
  Ring ring, items;
  for (Item item = take_item(shared, items, lane); item.sequence >= 0; item = take_item(shared, items, lane)) {
    for (int c = item.first; lane == 0 && c < item.end; ++c) {
      wait_full(shared, O_FULL, ring);
      // Here for all that wrote the tile: each of them would wait for it.
      fence_async_shared(shared_address(shared.o[ring.stage]), sizeof(shared.o[ring.stage]));
      const Place at = place(p, item, c * CHUNK);
#pragma unroll
      for (int w = 0; w < STATE; ++w) {
        tensor_store(&p.o, shared_address(shared.o[ring.stage]) + w * 8192, item.first_value + w * VALUES, at.token,
                     item.value_head, at.third, at.fourth);
      }
      stores_commit();
      stores_wait_read<0>();
      barrier_arrive(barrier_address(shared, O_FREE, ring.stage));
      ring.next<Shape<STATE>::O>();
    }
    __syncwarp();
  }
  if (lane == 0) stores_wait();
}

// One of the gates' two warps: everything that a chunk's tokens bring besides q, k, v, for chunks `turn`, `turn + 2`, ... of
// all chunks of the block. Lane l has tokens l and l + 32.
template <typename T, int STATE, bool NORM>
__device__ __forceinline__ void make_gates(const ForwardParameters& p, SharedMemory<STATE>& shared, uint32_t turn,
                                           int lane) {
  Ring items;
  uint32_t count = 0;  // chunks so far
  while (true) {
    wait_full<false>(shared, ITEM_FULL, items);
    const Item& item = shared.items[items.stage];  // read again where needed: registers are short
    if (item.sequence < 0) break;
    const int first = item.first, end = item.end;
    int c = first + static_cast<int>((count ^ turn) & 1);
    count += static_cast<uint32_t>(c - first);
    // A chunk ahead: a load takes longer than anything else that is done here for a chunk.
    TokenBits bits = load_gates(p.gates, item, item.value_head, c * CHUNK + lane);
    for (; c < end; c += 2, count += 2) {
      TokenGates tokens = own_gates(p.gates, bits, item, item.value_head, c * CHUNK + lane);
      bits = load_gates(p.gates, item, item.value_head, (c + 2) * CHUNK + lane);
      add_gates(tokens, lane);
      const Ring ring = ring_at<Shape<STATE>::GATES>(count), keys = ring_at<Shape<STATE>::KQ>(count);
      float2 nk = {1.0f, 1.0f}, nq = {1.0f, 1.0f};
      if constexpr (NORM) {
        wait_full<false>(shared, KQ_FULL, keys);
        nk = inverse_norms<T>(shared_address(shared.k[keys.stage]), p.l2norm_eps, lane);
        nq = inverse_norms<T>(shared_address(shared.q[keys.stage]), p.l2norm_eps, lane);
      }
      wait_for_place<Shape<STATE>::GATES>(shared, count);
      fill_gates(shared.gates[ring.stage], tokens, nk, nq, p.scale, lane);
      arrive(shared, GATES_FULL, ring, lane);
    }
    count -= static_cast<uint32_t>(c - end);
    arrive(shared, ITEM_FREE, items, lane);
    items.next<Shape<STATE>::ITEMS>();
  }
}

// An auxiliary warpgroup: the tiles of chunks `turn`, `turn + AUXILIARY`, ... of all chunks of the block.
template <typename T, int STATE, bool NORM>
__device__ __forceinline__ void make_all_tiles(SharedMemory<STATE>& shared, int turn, int warp, int lane) {
  using S = Shape<STATE>;
  constexpr uint32_t NONE = ~0u;
  uint32_t item_count = 0;
  uint32_t count = 0;  // chunks so far
  while (true) {
    const Ring items = ring_at<S::ITEMS>(item_count++);
    wait_full(shared, ITEM_FULL, items);
    const Item& item = shared.items[items.stage];
    const int chunks = item.sequence >= 0 ? item.end - item.first : -1;
    arrive(shared, ITEM_FREE, items, lane);
    if (chunks < 0) break;
    // A chunk's tiles are fenced and handed over under the next one's first product: the fence takes a while.
    uint32_t written = NONE;  // chunk whose tiles are not yet handed over
    const auto hand_over = [&] {
      if (written == NONE) return;
      fence_async_shared();
      wait_full(shared, V_FULL, ring_at<S::V>(written));
      arrive(shared, TILES_FULL, ring_at<S::TILES>(written), lane);
    };
    for (const uint32_t end = count + static_cast<uint32_t>(chunks); count != end; ++count) {
      if (S::AUXILIARY == 1 || count % S::AUXILIARY == static_cast<uint32_t>(turn)) {
        const Ring keys = ring_at<S::KQ>(count), gates = ring_at<S::GATES>(count), tiles = ring_at<S::TILES>(count);
        wait_full(shared, KQ_FULL, keys);
        make_tiles<T, NORM, true, STATE == 1>(shared_address(shared.k[keys.stage]), shared_address(shared.q[keys.stage]),
                                              shared_address(shared.t[tiles.stage]), shared_address(shared.p[tiles.stage]),
                                              shared.scratch[turn], shared.gates[gates.stage], 1 + turn, warp, lane, [&] {
                                                hand_over();
                                                wait_for_place<S::TILES>(shared, count);
                                                wait_full(shared, GATES_FULL, gates);
                                              });
        written = count;
      }
    }
    hand_over();
  }
}

// The warpgroup's O of a chunk, rounded, into its tile.
__device__ __forceinline__ void write_output(uint32_t tile, const uint32_t (&y)[16], int token, int block) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    store_matrices_transposed(tile + swizzled(16 * i + token, block), y[4 * i], y[4 * i + 1], y[4 * i + 2], y[4 * i + 3]);
  }
}

// A state warpgroup: values 64 `turn`.. of the item. What a chunk needs in a row is S -> U -> R -> S; everything else, O
// above all, is done while the tensor cores work on that, and O of a chunk is stored under the next one's first product.
template <typename T, int STATE>
__device__ __forceinline__ void run_state(const ForwardParameters& p, SharedMemory<STATE>& shared, int turn, int warp,
                                          int lane) {
  using S = Shape<STATE>;
  uint32_t count = 0, item_count = 0;  // chunks and items so far
  const int column = 2 * (lane & 3);
  const bool v_first = p.state_v_first != 0, keeps_states = p.checkpoint_interval != 0 || p.saved != nullptr;
  // The lane's row and 16-byte block in a transposing load or store of 16 tokens x 16 values.
  const int token = (lane & 7) + 8 * (lane >> 4), block = 2 * warp + ((lane >> 3) & 1);
  float s[64];
  while (true) {
    const Ring items = ring_at<S::ITEMS>(item_count);
    wait_full(shared, ITEM_FULL, items);
    const Item& item = shared.items[items.stage];  // read again where needed: registers are short
    if (item.sequence < 0) break;
    const int value = turn * VALUES + 16 * warp + (lane >> 2);
    if (item.start >= 0) {
      const int64_t row = static_cast<int64_t>(item.start) * p.value_heads + item.value_head;
      load_state(p.starts + (row * p.values + item.first_value) * KEYS, s, value, column);
    } else {
      load_state(p.initial, v_first, p.initial.row(item.sequence, 0), item.value_head, s, item.first_value + value, column);
    }
    uint32_t a[32];  // S^T rounded: operand of U and O
    round_state<T>(a, s);

    const int end = item.end;
    uint32_t y[16] = {};  // O of the chunk before, rounded
    bool output_free = false, started = false, tiles_full = false;
    for (int c = item.first; c < end;) {
      const int stop = keeps_states ? c + 1 : end;  // the states are kept outside of the loop that has to be fast
      for (; c < stop; ++c, ++count, started = true) {
        const Ring keys = ring_at<S::KQ>(count), values = ring_at<S::V>(count), gate_ring = ring_at<S::GATES>(count),
                   outputs = ring_at<S::O>(count - 1), tiles = ring_at<S::TILES>(count);
        float u[32], o[32];
        if (!tiles_full) wait_full(shared, TILES_FULL, tiles);
        const uint32_t tile_k = shared_address(shared.k[keys.stage]), tile_q = shared_address(shared.q[keys.stage]);
        begin_product_with_state<T>(u, a, tile_k);
        const auto write_last_output = [&] {
          if (!started) return;
          if (!output_free) wait_free(shared, O_FREE, outputs);
          write_output(shared_address(shared.o[outputs.stage]) + turn * 8192, y, token, block);
        };
        if constexpr (STATE == 2) write_last_output();  // its registers are needed for Q S
        begin_product_with_state<T>(o, a, tile_q);

        if constexpr (STATE == 1) write_last_output();  // wgmma_fence would wait for it
        const ChunkGates& gates = shared.gates[gate_ring.stage];
        const uint32_t tile_v = shared_address(shared.v[values.stage]) + turn * 8192;
        // With one state warpgroup U goes on while Q S is still computed, and what R needs is loaded meanwhile; with two,
        // the other one fills the tensor cores, and the registers of the operand are free sooner.
        uint32_t v[4][4];
        float2 read[8];
        const auto load = [&] {
#pragma unroll
          for (int i = 0; i < 4; ++i) load_matrices_transposed(v[i], tile_v + swizzled(16 * i + token, block));
          load_factors(read, gates.read, lane);
        };
        if constexpr (STATE == 1) load();
        wgmma_wait<STATE == 1 ? 1 : 0>();
        accumulators_ready(u);
        if constexpr (STATE == 2) load();
        uint32_t x[16];  // V - e^gam U, later R
        subtract_read<T>(x, v, read, u);
        const uint32_t tile_t = shared_address(shared.t[tiles.stage]), tile_p = shared_address(shared.p[tiles.stage]);
        begin_solve<T>(u, x, tile_t);
        if (started) {
          arrive(shared, O_FULL, outputs, lane);
        }
        const float decay = gates.decay;
#pragma unroll
        for (int i = 0; i < 64; ++i) s[i] *= decay;
        accumulators_ready(s);
        wgmma_wait<1>();  // Q S: the operand's registers are free
        float2 write[8];
        load_factors(write, gates.write, lane);
        wgmma_wait<0>();
        accumulators_ready(u);
        accumulators_ready(o);
        uint32_t w[16];  // V' decayed to the chunk's end
        decay_writes<T>(w, u, write);
        float2 emit[8];
        load_factors(emit, gates.emit, lane);
        begin_update<T>(s, w, tile_k);
        output_free = is_free(shared, O_FREE, ring_at<S::O>(count));
        tiles_full = is_full(shared, TILES_FULL, ring_at<S::TILES>(count + 1));
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          x[2 * j] = pack<T>(u[4 * j], u[4 * j + 1]);
          x[2 * j + 1] = pack<T>(u[4 * j + 2], u[4 * j + 3]);
          o[4 * j] *= emit[j].x;
          o[4 * j + 1] *= emit[j].y;
          o[4 * j + 2] *= emit[j].x;
          o[4 * j + 3] *= emit[j].y;
        }
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          wgmma<T, false, 0>(o, x[4 * k], x[4 * k + 1], x[4 * k + 2], x[4 * k + 3],
                             advance(matrix_descriptor(tile_p, 16), k * 32));
        }
        wgmma_commit();
        wgmma_wait<1>();
        accumulators_ready(s);
        round_state<T>(a, s);
        computed(a);
        wgmma_wait<0>();
        accumulators_ready(o);
        arrive(shared, CHUNK_DONE, ring_at<MAX_STAGES>(count), lane);
#pragma unroll
        for (int i = 0; i < 16; ++i) y[i] = pack<T>(o[2 * i], o[2 * i + 1]);
      }
      if (!keeps_states) continue;
      const int done = c * CHUNK;
      if (p.checkpoint_interval != 0 && done <= item.tokens && done % p.checkpoint_interval == 0) {
        const int64_t row = p.checkpoints.row(item.sequence, done / p.checkpoint_interval - 1);
        store_state(p.checkpoints, v_first, row, item.value_head, s, item.first_value + value, column);
      }
      if (p.saved != nullptr && done < item.tokens && done % SEGMENT == 0) {
        const int64_t row = saved_row(item.batch * p.sequences.T + item.begin + done) * p.value_heads + item.value_head;
        store_state(p.saved + (row * p.values + item.first_value) * KEYS, s, value, column);
      }
    }
    if (started) {
      const Ring outputs = ring_at<S::O>(count - 1);
      wait_free(shared, O_FREE, outputs);
      write_output(shared_address(shared.o[outputs.stage]) + turn * 8192, y, token, block);
      arrive(shared, O_FULL, outputs, lane);
    }
    if (end * CHUNK >= item.tokens) {
      store_state(p.final, v_first, p.final.row(item.sequence, 0), item.value_head, s, item.first_value + value, column);
    }
    arrive(shared, ITEM_FREE, items, lane);
    ++item_count;
  }
}

// Zeros in the rows of o that belong to no sequence, by the auxiliary warpgroups of all blocks; `thread` counts theirs.
template <int STATE>
__device__ __forceinline__ void clear_padding(const ForwardParameters& p, int thread) {
  if (p.sequences.cu_seqlens == nullptr) return;
  constexpr int THREADS_PER_BLOCK = Shape<STATE>::AUXILIARY * 128, PIECE = 8;  // 16 bytes
  const int values = p.value_blocks * STATE * VALUES;
  const int64_t first = p.sequences.used_tokens(), pieces = static_cast<int64_t>(p.value_heads) * values / PIECE;
  const int64_t total = (p.sequences.T - first) * pieces, step = static_cast<int64_t>(gridDim.x) * THREADS_PER_BLOCK;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS_PER_BLOCK + thread; i < total; i += step) {
    const int64_t piece = i % pieces, head = piece / (values / PIECE), value = piece % (values / PIECE) * PIECE;
    const int64_t at = p.output.at(0, first + i / pieces, head) + value;
    *reinterpret_cast<uint4*>(static_cast<uint16_t*>(p.output.data) + at) = make_uint4(0, 0, 0, 0);
  }
}

template <typename T, int STATE, bool NORM>
__global__ void __launch_bounds__(THREADS, 1) forward_kernel(const __grid_constant__ ForwardParameters p) {
  using S = Shape<STATE>;
  extern __shared__ __align__(1024) uint8_t raw[];
  auto& shared = *reinterpret_cast<SharedMemory<STATE>*>(raw);
  const int warpgroup = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0);
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32 % 4, 0), lane = static_cast<int>(threadIdx.x) % 32;

  if (threadIdx.x == 0) {
    constexpr int state = warps(4 * STATE), auxiliary = warps(4), others = warps(15);
    const int arrivals[BARRIERS] = {1, 1, warps(1), auxiliary, state, state, 1, 1, others};
    init_barriers(shared, arrivals);
  }
  __syncthreads();
  allow_later_kernels();
  wait_for_earlier_kernels();

  if (warpgroup == 0) {
    fewer_registers<S::PRODUCER_REGISTERS>();
    if (warp == 0) {
      if (lane == 0) load_inputs(p, shared);
    } else if (warp == 1) {
      store_outputs(p, shared, lane);
    } else {
      make_gates<T, STATE, NORM>(p, shared, static_cast<uint32_t>(warp - 2), lane);
    }
  } else if (warpgroup <= STATE) {
    more_registers<S::STATE_REGISTERS>();
    run_state<T>(p, shared, warpgroup - 1, warp, lane);
  } else {
    if constexpr (S::AUXILIARY_REGISTERS <= 128) {
      fewer_registers<S::AUXILIARY_REGISTERS>();
    } else {
      more_registers<S::AUXILIARY_REGISTERS>();
    }
    const int thread = static_cast<int>(threadIdx.x) - (1 + STATE) * 128;
    if (warpgroup == 1 + STATE) {
      clear_tiles(shared_address(shared.t), sizeof(shared.t), thread);
      clear_tiles(shared_address(shared.p), sizeof(shared.p), thread);
    }
    named_barrier(S::AUXILIARY + 1, S::AUXILIARY * 128);
    make_all_tiles<T, STATE, NORM>(shared, S::AUXILIARY == 1 ? 0 : warpgroup - 1 - STATE, warp, lane);
    clear_padding<STATE>(p, thread);
  }
}

}  // namespace flashdelta::cuda
