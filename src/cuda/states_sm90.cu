// The forward's states without its outputs: a block takes items (run of chunks, value head, STATE blocks of 64 rows of S^T)
// and walks the run's chunks, with the instructions of forward_sm90.cuh in the same order, so that its states have the bits
// of the forward's. T and the vectors come from scratch memory (prepare_sm90.cu). See docs/kernels.md.
//
//   warp 0          loads K, T, vectors, V of each chunk, all into one stage
//   warps 1 and 2   store S and R
//   warpgroups 1..  state: U = S^T K^T, R = (V - e^gam U) T^T, S = e^gam_C S + (beta e^(gam_C - gam) R) K
#include <algorithm>

#include "cuda/device.hpp"
#include "cuda/ptx.cuh"
#include "cuda/states_sm90.hpp"
#include "cuda/walk_sm90.cuh"

namespace flashdelta::cuda {
namespace {

// A work item as the roles see it.
struct Item {
  int run;  // -1: no more
  int value_head;
  int block;   // first of its STATE blocks of rows
  int stores;  // whether its S and R go to scratch memory
  int first_chunk, chunks, slot;
  int sequence, tokens;  // of the sequence
  int64_t batch, begin;
};

// Who arrives -> who waits:
enum Barrier {
  CHUNK_FULL,  // copy engine -> state
  CHUNK_FREE,  // state -> loader
  S_FULL,      // state -> storer of S
  S_FREE,      // storer of S -> state
  R_FULL,      // state -> storer of R
  R_FREE,      // storer of R -> state
  ITEM_FULL,   // loader -> storers, state
  ITEM_FREE,   // storers, state -> loader
  BARRIERS
};

template <int STATE>
struct Shape {
  static constexpr int THREADS = 128 * (1 + STATE);
  static constexpr int CHUNKS = STATE == 1 ? 4 : 3, OUTPUTS = 2, ITEMS = 2;  // stages
};

// Registers per thread of blocks with two state warpgroups, which are launched with 168 each.
constexpr int PRODUCER_REGISTERS = 40, STATE_REGISTERS = 232;
static_assert(PRODUCER_REGISTERS + 2 * STATE_REGISTERS <= 504);

// What one chunk needs.
template <int STATE>
struct Stage {
  uint8_t k[2 * TILE];  // two halves of 64 columns
  uint8_t t[TILE];
  uint8_t v[STATE * TILE];
};

template <int STATE>
struct alignas(1024) SharedMemory {
  using S = Shape<STATE>;
  Stage<STATE> chunks[S::CHUNKS];
  uint8_t s[S::OUTPUTS][STATE * STATE_TILE];
  uint8_t r[S::OUTPUTS][STATE * TILE];
  ChunkVectors vectors[S::CHUNKS];
  Item items[S::ITEMS];
  uint64_t barriers[BARRIERS][MAX_STAGES];
};
static_assert(sizeof(SharedMemory<1>) <= 227 * 1024 && sizeof(SharedMemory<2>) <= 227 * 1024);

// Transitions come first, of which there are few: the blocks that have one get to their values when others are done with
// theirs, and memory is theirs alone.
template <int STATE>
__device__ __forceinline__ Item make_item(const StatesParameters& p, int index, int items) {
  Item item = {};
  item.run = -1;
  if (index >= items) return item;
  const int values = p.scratch.value_blocks,
            transitions = p.run_count * p.scratch.value_heads * (p.row_blocks - values) / STATE;
  const bool transition = index < transitions;
  const int groups = (transition ? p.row_blocks - values : values) / STATE, per_run = p.scratch.value_heads * groups;
  const int at = transition ? index : index - transitions;
  item.run = at / per_run;
  item.value_head = at % per_run / groups;
  item.block = (transition ? values : 0) + at % groups * STATE;
  const Run run = p.runs[item.run];
  item.sequence = run.sequence;
  if (run.sequence < 0) return item;
  item.stores = item.block < p.scratch.value_blocks;
  item.first_chunk = run.first_chunk;
  item.chunks = run.chunks;
  item.slot = run.slot;
  const TokenRange range = p.sequences[run.sequence];
  item.tokens = static_cast<int>(range.end - range.begin);
  if (p.transitions != nullptr && item.stores == 0 &&
      (run.first_chunk == 0 || (run.first_chunk + run.chunks) * CHUNK >= item.tokens ||
       p.gradient_windows[item.run * p.scratch.value_heads + item.value_head] >= 0)) {
    item.sequence = -1;
  }
  item.batch = range.batch;
  item.begin = range.begin;
  return item;
}

// Warp 0, one lane: hands out items, loads their chunks.
template <int STATE>
__device__ __forceinline__ void load_chunks(const StatesParameters& p, SharedMemory<STATE>& shared) {
  const bool packed = p.sequences.cu_seqlens != nullptr;
  const int group = p.scratch.value_heads / p.heads;
  const int items = p.run_count * p.scratch.value_heads * (p.row_blocks / STATE);
  Ring ring, item_ring;
  // Beside another kernel blocks start when it leaves them an SM: those that start first do more.
  const auto next = [&](int index) {
    return p.beside_earlier != 0 ? static_cast<int>(atomicAdd(p.scratch.next_run, 1u)) : index + static_cast<int>(gridDim.x);
  };
  for (int index = next(static_cast<int>(blockIdx.x) - static_cast<int>(gridDim.x));; index = next(index)) {
    const Item item = make_item<STATE>(p, index, items);
    if (item.run >= 0 && item.sequence < 0) continue;
    wait_free(shared, ITEM_FREE, item_ring);
    shared.items[item_ring.stage] = item;
    barrier_arrive(barrier_address(shared, ITEM_FULL, item_ring.stage));
    item_ring.next<Shape<STATE>::ITEMS>();
    if (item.run < 0) break;
    const int head = item.value_head / group;
    for (int c = 0; c < item.chunks; ++c) {
      wait_free(shared, CHUNK_FREE, ring);
      Stage<STATE>& stage = shared.chunks[ring.stage];
      const uint32_t full = barrier_address(shared, CHUNK_FULL, ring.stage);
      barrier_arrive_expect(full, static_cast<int>(sizeof(stage) + sizeof(ChunkVectors)));
      const Place at = place(packed, item.batch, item.begin, item.tokens, (item.first_chunk + c) * CHUNK);
      const int64_t tiles = p.scratch.head(item.slot + c, item.value_head);
      tensor_load(shared_address(stage.k), &p.k, full, 0, at.token, head, at.third, at.fourth);
      tensor_load(shared_address(stage.k) + TILE, &p.k, full, 64, at.token, head, at.third, at.fourth);
      bulk_load(shared_address(&shared.vectors[ring.stage]), p.scratch.vectors + tiles, sizeof(ChunkVectors), full);
#pragma unroll
      for (int w = 0; w < STATE; ++w) {  // the transition's rows lie past the last column: zeros
        tensor_load(shared_address(stage.v) + w * TILE, &p.v, full, (item.block + w) * VALUES, at.token, item.value_head,
                    at.third, at.fourth);
      }
      bulk_load(shared_address(stage.t), p.scratch.t + tiles * TILE, TILE, full);
      ring.next<Shape<STATE>::CHUNKS>();
    }
  }
}

// Warps 1 and 2: store the tiles of S or of R, whose images of the item's blocks lie one after another in both memories.
template <int STATE, int BYTES>
__device__ __forceinline__ void store_tiles(const StatesParameters& p, SharedMemory<STATE>& shared,
                                            const uint8_t (&tiles)[Shape<STATE>::OUTPUTS][STATE * BYTES], uint8_t* to,
                                            int full, int free, int lane) {
  Ring ring, items;
  while (true) {
    wait_full(shared, ITEM_FULL, items);
    const Item item = shared.items[items.stage];
    arrive(shared, ITEM_FREE, items, lane);
    items.next<Shape<STATE>::ITEMS>();
    if (item.run < 0) break;
    for (int c = 0; lane == 0 && c < item.chunks; ++c) {
      wait_full(shared, full, ring);
      if (to != nullptr && item.stores != 0) {
        bulk_store(to + p.scratch.block(item.slot + c, item.value_head, item.block) * BYTES,
                   shared_address(tiles[ring.stage]), STATE * BYTES);
        stores_commit();
        stores_wait_read<0>();
      }
      barrier_arrive(barrier_address(shared, free, ring.stage));
      ring.next<Shape<STATE>::OUTPUTS>();
    }
    __syncwarp();
  }
  if (lane == 0) stores_wait();
}

// The state before the item's first chunk: row `value` and 8 below of block `block`.
__device__ __forceinline__ void first_state(const StatesParameters& p, const Item& item, int block, float (&s)[64],
                                            int value, int key) {
  if (block >= p.scratch.value_blocks) {
    const int row = (block - p.scratch.value_blocks) * VALUES + value;
#pragma unroll
    for (int i = 0; i < 64; ++i) s[i] = 8 * (i / 4) + key + (i & 1) == row + (i & 2) * 4 ? 1.0f : 0.0f;
  } else if (item.first_chunk != 0) {
    const int64_t position = item.batch * p.sequences.T + item.begin + int64_t{item.first_chunk} * CHUNK;
    const int64_t state = saved_row(position) * p.scratch.value_heads + item.value_head;
    load_state(p.saved + (state * p.scratch.value_blocks + block) * STATE_BLOCK, s, value, key);
  } else {
    load_state(p.initial, p.state_v_first != 0, p.initial.row(item.sequence, 0), item.value_head, s, block * VALUES + value,
               key);
  }
}

// A state warpgroup: block `turn` of the item. TILES: S and R are wanted.
template <typename T, int STATE, bool TILES>
__device__ __forceinline__ void run_state(const StatesParameters& p, SharedMemory<STATE>& shared, int turn, int warp,
                                          int lane) {
  using S = Shape<STATE>;
  Ring ring, outputs, previous, items;
  const int column = 2 * (lane & 3), value = 16 * warp + (lane >> 2);
  // The lane's row and 16-byte block in a transposing load or store of 16 tokens x 16 values, and in a plain store of 16
  // values x 16 keys.
  const int token = (lane & 7) + 8 * (lane >> 4), block = 2 * warp + ((lane >> 3) & 1);
  const int image_row = 16 * warp + (lane & 15), image_block = lane >> 4;
  float s[64];
  while (true) {
    wait_full(shared, ITEM_FULL, items);
    const Item& item = shared.items[items.stage];  // read again where needed: registers are short
    if (item.run < 0) break;
    first_state(p, item, item.block + turn, s, value, column);
    uint32_t a[32];  // S^T rounded: operand of U
    round_state<T>(a, s);

    const int chunks = item.chunks;
    bool chunk_full = false, started = false;
    for (int c = 0; c < chunks; ++c, started = true) {
      float u[32];
      if (!chunk_full) wait_full(shared, CHUNK_FULL, ring);
      Stage<STATE>& stage = shared.chunks[ring.stage];
      const ChunkVectors& vectors = shared.vectors[ring.stage];
      const uint32_t tile_k = shared_address(stage.k), tile_t = shared_address(stage.t);
      const uint32_t tile_v = shared_address(stage.v) + turn * TILE;
      begin_product_with_state<T>(u, a, tile_k);
      if constexpr (TILES) {
        wait_free(shared, S_FREE, outputs);
        const uint32_t image = shared_address(shared.s[outputs.stage]) + turn * STATE_TILE;
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          store_matrices(image + (k / 4) * TILE + swizzled(image_row, 2 * (k % 4) + image_block), a[4 * k], a[4 * k + 1],
                         a[4 * k + 2], a[4 * k + 3]);
        }
      }
      // What follows the product is loaded while it runs.
      float2 read[8];
      uint32_t v[4][4];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float2 rise = *reinterpret_cast<const float2*>(&vectors.rise[8 * j + column]);
        const float2 key = *reinterpret_cast<const float2*>(&vectors.key[8 * j + column]);
        read[j] = {rise.x * key.x, rise.y * key.y};
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) load_matrices_transposed(v[i], tile_v + swizzled(16 * i + token, block));
      wgmma_wait<0>();
      accumulators_ready(u);
      uint32_t x[16];  // V - e^gam U
      subtract_read<T>(x, v, read, u);
      begin_solve<T>(u, x, tile_t);
      if constexpr (TILES) {
        // For S and for R of the chunk before: long after they were stored, the fence takes no time.
        fence_async_shared();
        arrive(shared, S_FULL, outputs, lane);
        if (started) arrive(shared, R_FULL, previous, lane);
      }
      Ring next = ring;
      next.template next<S::CHUNKS>();
      chunk_full = c + 1 < chunks && is_full(shared, CHUNK_FULL, next);
      // Here and not beside U: there ptxas would wait for U first. A wait that is hardly one comes in between, since within
      // a block of code ptxas would move the products behind that for T's.
      const float decay = vectors.rise[CHUNK - 1];
#pragma unroll
      for (int i = 0; i < 64; ++i) s[i] *= decay;
      accumulators_ready(s);
      if constexpr (TILES) {
        wait_free(shared, R_FREE, outputs);
      } else if (!chunk_full && c + 1 < chunks) {
        wait_full(shared, CHUNK_FULL, next);
        chunk_full = true;
      }
      float2 write[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int t = 8 * j + column;
        const float2 beta = *reinterpret_cast<const float2*>(&vectors.beta[t]);
        const float2 end = *reinterpret_cast<const float2*>(&vectors.end[t]);
        const float2 key = *reinterpret_cast<const float2*>(&vectors.key[t]);
        write[j] = {beta.x * end.x * key.x, beta.y * end.y * key.y};
      }
      wgmma_wait<0>();
      accumulators_ready(u);
      uint32_t w[16];  // V' decayed to the chunk's end
      decay_writes<T>(w, u, write);
      begin_update<T>(s, w, tile_k);
      if constexpr (TILES) {
        const uint32_t image = shared_address(shared.r[outputs.stage]) + turn * TILE;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* y = u + 8 * i;
          store_matrices_transposed(image + swizzled(16 * i + token, block), pack<T>(y[0], y[1]), pack<T>(y[2], y[3]),
                                    pack<T>(y[4], y[5]), pack<T>(y[6], y[7]));
        }
        previous = outputs;
        outputs.next<S::OUTPUTS>();
      }
      wgmma_wait<0>();
      accumulators_ready(s);
      arrive(shared, CHUNK_FREE, ring, lane);
      ring = next;
      round_state<T>(a, s);
      computed(a);

      const int done = (item.first_chunk + c + 1) * CHUNK;
      if (p.save != nullptr && done < item.tokens && done % SEGMENT == 0) [[unlikely]] {
        const int64_t state =
            saved_row(item.batch * p.sequences.T + item.begin + done) * p.scratch.value_heads + item.value_head;
        store_state(p.save + (state * p.scratch.value_blocks + item.block + turn) * STATE_BLOCK, s, value, column);
      }
    }
    if constexpr (TILES) {
      if (started) {
        fence_async_shared();
        arrive(shared, R_FULL, previous, lane);
      }
    }
    if (p.transitions != nullptr && item.stores == 0) {
      const int64_t state = int64_t{item.run} * p.scratch.value_heads + item.value_head;
      const int row = (item.block + turn - p.scratch.value_blocks) * VALUES + value;
      float* transition =
          p.transitions + (state * p.row_blocks + p.scratch.value_blocks) * STATE_BLOCK + column * KEYS + row;
#pragma unroll
      for (int i = 0; i < 64; ++i) transition[(8 * (i / 4) + (i & 1)) * KEYS + (i & 2) * 4] = s[i];
    }
    arrive(shared, ITEM_FREE, items, lane);
    items.next<S::ITEMS>();
  }
}

}  // namespace

template <typename T, int STATE, bool TILES>
__global__ void __launch_bounds__(Shape<STATE>::THREADS, 1) states_kernel(const __grid_constant__ StatesParameters p) {
  extern __shared__ __align__(1024) uint8_t raw[];
  auto& shared = *reinterpret_cast<SharedMemory<STATE>*>(raw);
  const int warpgroup = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0);
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32 % 4, 0), lane = static_cast<int>(threadIdx.x) % 32;

  if (threadIdx.x == 0) {
    constexpr int state = 4 * STATE;
    const int arrivals[BARRIERS] = {1, warps(state), warps(state), 1, warps(state), 1, 1, warps(state + (TILES ? 2 : 0))};
    init_barriers(shared, arrivals);
  }
  __syncthreads();
  allow_later_kernels();
  if (p.beside_earlier == 0) wait_for_earlier_kernels();
  for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; p.counts != nullptr && i < static_cast<unsigned>(p.counts_size);
       i += gridDim.x * blockDim.x) {
    p.counts[i] = 0;
  }

  if (warpgroup == 0) {
    if constexpr (STATE == 2) fewer_registers<PRODUCER_REGISTERS>();
    if (warp == 0) {
      if (lane == 0) load_chunks(p, shared);
    } else if (TILES && warp == 1) {
      store_tiles<STATE, STATE_TILE>(p, shared, shared.s, p.scratch.s, S_FULL, S_FREE, lane);
    } else if (TILES && warp == 2) {
      store_tiles<STATE, TILE>(p, shared, shared.r, p.scratch.r, R_FULL, R_FREE, lane);
    }
  } else {
    if constexpr (STATE == 2) more_registers<STATE_REGISTERS>();
    run_state<T, STATE, TILES>(p, shared, warpgroup - 1, warp, lane);
  }
  if (p.beside_earlier != 0) {
    __syncwarp();
    wait_for_earlier_kernels();
  }
}

namespace {

template <typename T, int STATE, bool TILES>
fd_status launch_variant(const StatesParameters& p, int sm_count, void* stream) {
  const int items = p.run_count * p.scratch.value_heads * (p.row_blocks / STATE);
  if (items == 0) return FD_OK;
  const Launch config{.name = "states_kernel",
                      .grid = dim3(static_cast<unsigned>(std::min(items, sm_count))),
                      .block = dim3(Shape<STATE>::THREADS),
                      .shared = sizeof(SharedMemory<STATE>),
                      .overlap = true};
  return launch(states_kernel<T, STATE, TILES>, config, p, stream);
}

template <typename T, int STATE>
fd_status launch_shape(const StatesParameters& p, int sm_count, void* stream) {
  return p.scratch.s == nullptr && p.scratch.r == nullptr ? launch_variant<T, STATE, false>(p, sm_count, stream)
                                                          : launch_variant<T, STATE, true>(p, sm_count, stream);
}

// Pairs of blocks share K and T, but blocks of one take twice the SMs: better where all values find one.
template <typename T>
fd_status launch_type(const StatesParameters& p, int sm_count, void* stream) {
  const int64_t blocks = int64_t{p.run_count} * p.scratch.value_heads * p.scratch.value_blocks;
  return p.row_blocks % 2 != 0 || blocks <= sm_count ? launch_shape<T, 1>(p, sm_count, stream)
                                                     : launch_shape<T, 2>(p, sm_count, stream);
}

}  // namespace

fd_status launch_states(const StatesParameters& p, bool bfloat16, int sm_count, void* stream) {
  return bfloat16 ? launch_type<__nv_bfloat16>(p, sm_count, stream) : launch_type<__half>(p, sm_count, stream);
}

}  // namespace flashdelta::cuda
