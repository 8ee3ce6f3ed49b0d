// Context parallelism: last states of runs. A block takes items (run of the pre-pass, value head, 64 rows of S^T) and walks
// the run's chunks as the forward with half of the values does, with its instructions in the same order, but without
// outputs. The rows are those of the values, from zero or from the sequence's initial state; where all chunks of the run
// count, 128 more have the transition: they start as the identity and have no values. See docs/kernels.md.
//
//   warp 0          hands out items, loads K and V
//   warps 1 and 2   gates, chunks in turn
//   warpgroup 1     state: U = S^T K^T, R = (V - e^gam U) T^T, S = e^gam_C S + (beta e^(gam_C - gam) R) K
//   warpgroups 2, 3 auxiliary: tile T (chunk.cuh), chunks in turn, ahead of the state
#include <algorithm>

#include "cuda/chunk.cuh"
#include "cuda/context_kernels_sm90.hpp"
#include "cuda/device.hpp"
#include "cuda/ptx.cuh"
#include "cuda/walk_sm90.cuh"

namespace flashdelta::cuda {
namespace {

constexpr int WALK_THREADS = 512, TILE_WARPGROUPS = 2;
constexpr int CHUNK_STAGES = 4, GATE_STAGES = 4, T_STAGES = 3, ITEM_STAGES = 2;
// Registers per thread, 512 in all.
constexpr int LOADER_REGISTERS = 56, WALKER_REGISTERS = 216, TILE_REGISTERS = 120;
static_assert(LOADER_REGISTERS + WALKER_REGISTERS + TILE_WARPGROUPS * TILE_REGISTERS <= 512);

// A work item as the roles see it.
struct WalkItem {
  int run;  // -1: no more
  int value_head;
  int block;       // of 64 rows: the values', then the transition's
  int begins;      // whether the run begins its sequence
  int exact;       // whether it has a transition
  int start;       // row of its first state
  int first, end;  // chunks of the sequence that are walked
  int sequence, tokens;
  int64_t batch, begin;
};

// Who arrives -> who waits:
enum WalkBarrier {
  CHUNK_FULL,  // copy engine -> state, auxiliary, (norms) gates
  CHUNK_FREE,  // state, auxiliary, gates -> loader
  GATES_FULL,  // gates -> state, auxiliary
  GATES_FREE,  // state, auxiliary -> gates
  T_FULL,      // auxiliary -> state
  T_FREE,      // state -> auxiliary
  ITEM_FULL,   // loader -> gates, state, auxiliary
  ITEM_FREE,   // gates, state, auxiliary -> loader
  WALK_BARRIERS
};

struct alignas(1024) WalkMemory {
  uint8_t k[CHUNK_STAGES][2 * TILE];  // two halves of 64 columns
  uint8_t v[CHUNK_STAGES][TILE];
  uint8_t t[T_STAGES][TILE];
  TileScratch scratch[TILE_WARPGROUPS];
  ChunkGates gates[GATE_STAGES];
  WalkItem items[ITEM_STAGES];
  uint64_t barriers[WALK_BARRIERS][MAX_STAGES];
};
static_assert(sizeof(WalkMemory) <= 227 * 1024);

// Item `index`; its `end` is 0 if there is nothing to do. Heads that decay least come first: theirs are the longest.
__device__ __forceinline__ WalkItem walk_item(const WalkParameters& p, int index, int runs) {
  WalkItem item = {};
  item.run = -1;
  const int row_blocks = p.value_blocks + KEYS / VALUES, per_head = runs * row_blocks;
  if (index >= per_head * p.value_heads) return item;
  item.value_head = p.heads_in_order[index / per_head];
  item.run = index % per_head / row_blocks;
  item.block = index % row_blocks;
  const PreRun run = p.runs[item.run];
  const int window = p.windows[item.run * p.value_heads + item.value_head];
  item.begins = run.first_chunk == 0 ? 1 : 0;
  item.exact = item.begins == 0 && window < 0 ? 1 : 0;
  if (item.block >= p.value_blocks && item.exact == 0) return item;
  item.start = run.start;
  item.first = run.first_chunk + (window > 0 ? window : 0);
  item.end = run.first_chunk + run.chunks;
  item.sequence = run.sequence;
  const TokenRange range = p.sequences[run.sequence];
  item.tokens = static_cast<int>(range.end - range.begin);
  item.batch = range.batch;
  item.begin = range.begin;
  return item;
}

// Warp 0, one lane.
__device__ __forceinline__ void load_chunks(const WalkParameters& p, WalkMemory& shared) {
  const bool packed = p.sequences.cu_seqlens != nullptr;
  const int group = p.value_heads / p.heads, runs = p.plan->pre_runs;
  Ring ring, items;
  for (auto index = static_cast<int>(blockIdx.x);; index = static_cast<int>(gridDim.x + atomicAdd(&p.plan->next_walk, 1u))) {
    const WalkItem item = walk_item(p, index, runs);
    if (item.run >= 0 && item.end == 0) continue;
    wait_free(shared, ITEM_FREE, items);
    shared.items[items.stage] = item;
    barrier_arrive(barrier_address(shared, ITEM_FULL, items.stage));
    items.next<ITEM_STAGES>();
    if (item.run < 0) break;
    for (int c = item.first; c < item.end; ++c) {
      wait_free(shared, CHUNK_FREE, ring);
      const uint32_t full = barrier_address(shared, CHUNK_FULL, ring.stage);
      barrier_arrive_expect(full, 3 * TILE);
      const Place at = place(packed, item.batch, item.begin, item.tokens, c * CHUNK);
      const uint32_t k = shared_address(shared.k[ring.stage]);
      const int head = item.value_head / group;
      tensor_load(k, &p.k, full, 0, at.token, head, at.third, at.fourth);
      tensor_load(k + TILE, &p.k, full, 64, at.token, head, at.third, at.fourth);
      // The transition's rows lie past the last column: zeros.
      tensor_load(shared_address(shared.v[ring.stage]), &p.v, full, item.block * VALUES, at.token, item.value_head, at.third,
                  at.fourth);
      ring.next<CHUNK_STAGES>();
    }
  }
}

// One of the gates' two warps: chunks `turn`, `turn` + 2, ... of all chunks of the block. Lane l has tokens l and l + 32.
template <typename T, bool NORM>
__device__ __forceinline__ void fill_walk_gates(const WalkParameters& p, WalkMemory& shared, uint32_t turn, int lane) {
  Ring items;
  uint32_t count = 0;  // chunks so far
  while (true) {
    wait_full<false>(shared, ITEM_FULL, items);
    const WalkItem& item = shared.items[items.stage];  // read again where needed: registers are short
    if (item.run < 0) break;
    const int first = item.first, end = item.end;
    int c = first + static_cast<int>((count ^ turn) & 1);
    count += static_cast<uint32_t>(c - first);
    // A chunk ahead: a load takes longer than anything else that is done here for a chunk.
    TokenBits bits = load_gates(p.gates, item, item.value_head, c * CHUNK + lane);
    for (; c < end; c += 2, count += 2) {
      TokenGates tokens = own_gates(p.gates, bits, item, item.value_head, c * CHUNK + lane);
      bits = load_gates(p.gates, item, item.value_head, (c + 2) * CHUNK + lane);
      add_gates(tokens, lane);
      const Ring gates = ring_at<GATE_STAGES>(count), chunks = ring_at<CHUNK_STAGES>(count);
      float2 key = {1.0f, 1.0f};
      if constexpr (NORM) {
        wait_full<false>(shared, CHUNK_FULL, chunks);
        key = inverse_norms<T>(shared_address(shared.k[chunks.stage]), p.l2norm_eps, lane);
        arrive(shared, CHUNK_FREE, chunks, lane);
      }
      wait_free<false>(shared, GATES_FREE, gates);
      fill_gates(shared.gates[gates.stage], tokens, key, {1.0f, 1.0f}, 1.0f, lane);
      arrive(shared, GATES_FULL, gates, lane);
    }
    count -= static_cast<uint32_t>(c - end);
    arrive(shared, ITEM_FREE, items, lane);
    items.next<ITEM_STAGES>();
  }
}

// An auxiliary warpgroup: T of chunks `turn`, `turn` + 2, ... of all chunks of the block.
template <typename T, bool NORM>
__device__ __forceinline__ void make_walk_tiles(WalkMemory& shared, int turn, int warp, int lane) {
  Ring items;
  uint32_t count = 0;  // chunks so far
  while (true) {
    wait_full(shared, ITEM_FULL, items);
    const WalkItem& item = shared.items[items.stage];
    const int chunks = item.run >= 0 ? item.end - item.first : -1;
    arrive(shared, ITEM_FREE, items, lane);
    items.next<ITEM_STAGES>();
    if (chunks < 0) break;
    for (const uint32_t end = count + static_cast<uint32_t>(chunks); count != end; ++count) {
      if (count % TILE_WARPGROUPS != static_cast<uint32_t>(turn)) continue;
      const Ring chunk = ring_at<CHUNK_STAGES>(count), gates = ring_at<GATE_STAGES>(count), tile = ring_at<T_STAGES>(count);
      wait_full(shared, CHUNK_FULL, chunk);
      make_tiles<T, NORM, false>(shared_address(shared.k[chunk.stage]), 0, shared_address(shared.t[tile.stage]), 0,
                                 shared.scratch[turn], shared.gates[gates.stage], 1 + turn, warp, lane, [&] {
                                   wait_full(shared, GATES_FULL, gates);
                                   wait_free(shared, T_FREE, tile);
                                 });
      fence_async_shared();
      arrive(shared, CHUNK_FREE, chunk, lane);
      arrive(shared, GATES_FREE, gates, lane);
      arrive(shared, T_FULL, tile, lane);
    }
  }
}

// The item's rows of the state before run `run` of a cut sequence, for the run's forward.
__device__ __forceinline__ float* start_of(const WalkParameters& p, const WalkItem& item, int row) {
  return p.starts +
         ((static_cast<int64_t>(row) * p.value_heads + item.value_head) * p.value_blocks + item.block) * STATE_BLOCK;
}

// The state before the item's first chunk: rows `value` and 8 below. Leaves that before the sequence for the forward, which
// may not find it in its pool any more.
__device__ __forceinline__ void first_state(const WalkParameters& p, const WalkItem& item, float (&s)[64], int value,
                                            int key) {
  if (item.block >= p.value_blocks) {
    const int row = (item.block - p.value_blocks) * VALUES + value;
#pragma unroll
    for (int i = 0; i < 64; ++i) s[i] = 8 * (i / 4) + key + (i & 1) == row + (i & 2) * 4 ? 1.0f : 0.0f;
    return;
  }
  const int64_t row = item.begins != 0 ? p.initial.row(item.sequence, 0) : -1;
  load_state(p.initial, p.state_v_first != 0, row, item.value_head, s, item.block * VALUES + value, key);
  if (item.begins == 0) return;
  store_state(start_of(p, item, item.start), s, value, key);
#pragma unroll
  for (int i = 0; i < 64; ++i) s[i] = item.first == 0 ? s[i] : 0.0f;
}

// The state warpgroup.
template <typename T>
__device__ __forceinline__ void walk_state(const WalkParameters& p, WalkMemory& shared, int warp, int lane) {
  Ring items;
  uint32_t count = 0;  // chunks so far
  const int column = 2 * (lane & 3), value = 16 * warp + (lane >> 2);
  // The lane's row and 16-byte block in a transposing load of 16 tokens x 16 values.
  const int token = (lane & 7) + 8 * (lane >> 4), block = 2 * warp + ((lane >> 3) & 1);
  float s[64];
  while (true) {
    wait_full(shared, ITEM_FULL, items);
    const WalkItem& item = shared.items[items.stage];  // read again where needed: registers are short
    if (item.run < 0) break;
    first_state(p, item, s, value, column);
    uint32_t a[32];  // S^T rounded: operand of U
    round_state<T>(a, s);

    bool keys_full = false;
    for (const uint32_t end = count + static_cast<uint32_t>(item.end - item.first); count != end; ++count) {
      const Ring chunk = ring_at<CHUNK_STAGES>(count), gate_ring = ring_at<GATE_STAGES>(count),
                 tile = ring_at<T_STAGES>(count);
      float u[32];
      if (!keys_full) wait_full(shared, CHUNK_FULL, chunk);
      const uint32_t tile_k = shared_address(shared.k[chunk.stage]), tile_v = shared_address(shared.v[chunk.stage]);
      begin_product_with_state<T>(u, a, tile_k);
      // What follows the product is loaded while it runs.
      wait_full(shared, GATES_FULL, gate_ring);
      const ChunkGates& gates = shared.gates[gate_ring.stage];
      uint32_t v[4][4];
      float2 read[8];
#pragma unroll
      for (int i = 0; i < 4; ++i) load_matrices_transposed(v[i], tile_v + swizzled(16 * i + token, block));
      load_factors(read, gates.read, lane);
      const float decay = gates.decay;
      const bool tile_full = is_full(shared, T_FULL, tile);
      const uint32_t tile_t = shared_address(shared.t[tile.stage]);
      wgmma_wait<0>();
      accumulators_ready(u);
      uint32_t x[16];  // V - e^gam U
      subtract_read<T>(x, v, read, u);
      if (!tile_full) wait_full(shared, T_FULL, tile);
      begin_solve<T>(u, x, tile_t);
      // The state decays while T's product runs: neither between its instructions, which ptxas does within a block of code,
      // nor beside U, where it would wait for U first.
      keys_full = count + 1 != end && is_full(shared, CHUNK_FULL, ring_at<CHUNK_STAGES>(count + 1));
#pragma unroll
      for (int i = 0; i < 64; ++i) s[i] *= decay;
      accumulators_ready(s);
      float2 write[8];
      load_factors(write, gates.write, lane);
      wgmma_wait<0>();
      accumulators_ready(u);
      uint32_t w[16];  // V' decayed to the chunk's end
      decay_writes<T>(w, u, write);
      begin_update<T>(s, w, tile_k);
      arrive(shared, GATES_FREE, gate_ring, lane);
      arrive(shared, T_FREE, tile, lane);
      wgmma_wait<0>();
      accumulators_ready(s);
      arrive(shared, CHUNK_FREE, chunk, lane);
      round_state<T>(a, s);
      computed(a);
    }
    const int64_t outcome = int64_t{item.run} * p.value_heads + item.value_head;
    float* last = item.exact != 0 ? p.outcomes + (outcome * (p.value_blocks + KEYS / VALUES) + item.block) * STATE_BLOCK
                                  : start_of(p, item, item.start + 1);
    store_state(last, s, value, column);
    arrive(shared, ITEM_FREE, items, lane);
    items.next<ITEM_STAGES>();
  }
}

}  // namespace

template <typename T, bool NORM>
__global__ void __launch_bounds__(WALK_THREADS, 1) walk_kernel(const __grid_constant__ WalkParameters p) {
  extern __shared__ __align__(1024) uint8_t raw[];
  auto& shared = *reinterpret_cast<WalkMemory*>(raw);
  const int warpgroup = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0);
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32 % 4, 0), lane = static_cast<int>(threadIdx.x) % 32;

  if (threadIdx.x == 0) {
    const int arrivals[WALK_BARRIERS] = {1, warps(8 + (NORM ? 1 : 0)),         warps(1), warps(8), warps(4), warps(4),
                                         1, warps(2 + 4 + 4 * TILE_WARPGROUPS)};
    init_barriers(shared, arrivals);
  }
  __syncthreads();
  allow_later_kernels();
  wait_for_earlier_kernels();

  if (warpgroup == 0) {
    fewer_registers<LOADER_REGISTERS>();
    if (warp == 0) {
      if (lane == 0) load_chunks(p, shared);
    } else if (warp <= 2) {
      fill_walk_gates<T, NORM>(p, shared, static_cast<uint32_t>(warp - 1), lane);
    }
  } else if (warpgroup == 1) {
    more_registers<WALKER_REGISTERS>();
    walk_state<T>(p, shared, warp, lane);
  } else {
    fewer_registers<TILE_REGISTERS>();
    if (warpgroup == 2) clear_tiles(shared_address(shared.t), sizeof(shared.t), 32 * warp + lane);
    named_barrier(TILE_WARPGROUPS + 1, TILE_WARPGROUPS * 128);
    make_walk_tiles<T, NORM>(shared, warpgroup - 2, warp, lane);
  }
}

namespace {

template <typename T, bool NORM>
fd_status launch_variant(const WalkParameters& p, int64_t items, int sm_count, void* stream) {
  const Launch config{.name = "walk_kernel",
                      .grid = dim3(static_cast<unsigned>(std::min<int64_t>(items, sm_count))),
                      .block = dim3(WALK_THREADS),
                      .shared = sizeof(WalkMemory),
                      .overlap = true};
  return launch(walk_kernel<T, NORM>, config, p, stream);
}

}  // namespace

fd_status launch_walk(const WalkParameters& p, bool bfloat16, bool l2norm, int64_t pre_runs, int sm_count, void* stream) {
  const int64_t items = pre_runs * p.value_heads * (p.value_blocks + KEYS / VALUES);
  if (bfloat16) {
    return l2norm ? launch_variant<__nv_bfloat16, true>(p, items, sm_count, stream)
                  : launch_variant<__nv_bfloat16, false>(p, items, sm_count, stream);
  }
  return l2norm ? launch_variant<__half, true>(p, items, sm_count, stream)
                : launch_variant<__half, false>(p, items, sm_count, stream);
}

}  // namespace flashdelta::cuda
