// Tiles of all chunks of a wave: for each (chunk, value head) its vectors, T and P, left in scratch memory. Nothing waits
// for another chunk. A block takes items (chunk, key head), each with the value heads of that key head. See docs/kernels.md.
//
//   warp 0           loads K and Q of items
//   warps 1 to 3     gates and vectors, items in turn
//   warpgroups 1..4  tiles T and P (chunk.cuh), (chunk, value head) in turn, and their stores
#include <algorithm>

#include "cuda/chunk.cuh"
#include "cuda/device.hpp"
#include "cuda/prepare_sm90.hpp"
#include "cuda/ptx.cuh"

namespace flashdelta::cuda {
namespace {

constexpr int WARPGROUPS = 4;  // that make tiles
constexpr int GATE_WARPS = 3;
constexpr int THREADS = 128 * (1 + WARPGROUPS);
constexpr int KQ_STAGES = 4, GATE_STAGES = 8;

// A chunk of one key head.
struct Item {
  int slot;  // -1: no more
  int head;
  int64_t batch, begin;  // first token
  int tokens;
};

// Who arrives -> who waits:
enum Barrier {
  KQ_FULL,     // copy engine, after the item was written -> gates, tiles
  KQ_FREE,     // every warp of gates and tiles, whether the item was its own or not -> loader
  GATES_FULL,  // gates -> tiles
  GATES_FREE,  // tiles, and the gates' warps that do not fill the stage -> gates
  BARRIERS
};

struct alignas(1024) SharedMemory {
  uint8_t k[KQ_STAGES][CHUNK * KEYS * 2];  // two halves of 64 columns
  uint8_t q[KQ_STAGES][CHUNK * KEYS * 2];
  uint8_t t[WARPGROUPS][TILE];
  uint8_t p[WARPGROUPS][TILE];
  TileScratch scratch[WARPGROUPS];
  TileGates gates[GATE_STAGES];
  Item items[KQ_STAGES];
  uint64_t barriers[BARRIERS][GATE_STAGES];
};
static_assert(sizeof(SharedMemory) <= 227 * 1024);

// Warp 0, one lane.
__device__ __forceinline__ void load_items(const PrepareParameters& p, SharedMemory& shared) {
  const int64_t items = static_cast<int64_t>(p.slots) * p.heads;
  const bool packed = p.sequences.cu_seqlens != nullptr;
  const auto chunk_of = [&](int64_t i) { return i < items ? p.chunks[i / p.heads] : ChunkPlace{-1, 0, 0, 0}; };
  Ring ring;
  ChunkPlace coming = chunk_of(blockIdx.x);
  for (int64_t i = blockIdx.x; i < items; i += gridDim.x) {
    const ChunkPlace chunk = coming;
    coming = chunk_of(i + gridDim.x);  // on its way while this item waits
    if (chunk.sequence < 0) continue;
    wait_free(shared, KQ_FREE, ring);
    const int slot = static_cast<int>(i / p.heads), head = static_cast<int>(i % p.heads);
    const int batch = packed ? 0 : chunk.sequence;
    shared.items[ring.stage] = {slot, head, batch, chunk.begin, chunk.tokens};
    const uint32_t full = barrier_address(shared, KQ_FULL, ring.stage);
    barrier_arrive_expect(full, 2 * CHUNK * KEYS * 2);
    const Place at = packed ? place(true, 0, chunk.begin, chunk.tokens, 0) : place(false, batch, 0, 0, chunk.begin);
    const uint32_t k = shared_address(shared.k[ring.stage]), q = shared_address(shared.q[ring.stage]);
    tensor_load(k, &p.k, full, 0, at.token, head, at.third, at.fourth);
    tensor_load(k + TILE, &p.k, full, 64, at.token, head, at.third, at.fourth);
    tensor_load(q, &p.q, full, 0, at.token, head, at.third, at.fourth);
    tensor_load(q + TILE, &p.q, full, 64, at.token, head, at.third, at.fourth);
    ring.next<KQ_STAGES>();
  }
  wait_free(shared, KQ_FREE, ring);
  shared.items[ring.stage].slot = -1;
  barrier_arrive(barrier_address(shared, KQ_FULL, ring.stage));
}

// One of the gates' warps: items `turn`, `turn + GATE_WARPS`, ... of the block.
template <typename T, bool NORM>
__device__ __forceinline__ void make_gates(const PrepareParameters& p, SharedMemory& shared, int turn, int lane) {
  const int group = p.scratch.value_heads / p.heads;
  Ring ring;
  uint32_t unit = 0;  // (chunk, value head) so far
  for (int count = 0;; ++count) {
    wait_full(shared, KQ_FULL, ring);
    const Item item = shared.items[ring.stage];
    if (item.slot < 0) break;
    const bool mine = count % GATE_WARPS == turn;
    // A head ahead: a load takes longer than anything else that is done here for a head.
    const int first_head = item.head * group;
    TokenBits bits = {};
    if (mine) bits = load_gates(p.gates, item, first_head, lane);
    float2 key = {1.0f, 1.0f}, query = {1.0f, 1.0f};
    if (NORM && mine) {
      key = inverse_norms<T>(shared_address(shared.k[ring.stage]), p.l2norm_eps, lane);
      query = inverse_norms<T>(shared_address(shared.q[ring.stage]), p.l2norm_eps, lane);
    }
    for (int i = 0; i < group; ++i) {
      TokenGates tokens = {};
      if (mine) {
        tokens = own_gates(p.gates, bits, item, first_head + i, lane);
        if (i + 1 < group) bits = load_gates(p.gates, item, first_head + i + 1, lane);
      }
      if (mine) add_gates(tokens, lane);
      const Ring gates = ring_at<GATE_STAGES>(unit++);
      wait_free(shared, GATES_FREE, gates);  // of the others' stages too: a phase that is not waited for may pass twice
      if (!mine) {
        arrive(shared, GATES_FREE, gates, lane);
      } else {
        fill_tile_gates<false>(shared.gates[gates.stage], tokens, key, query, p.scale, lane);
        arrive(shared, GATES_FULL, gates, lane);
        fill_vectors(p.scratch.vectors[p.scratch.head(item.slot, first_head + i)], tokens, key, query, lane);
      }
    }
    arrive(shared, KQ_FREE, ring, lane);
    ring.next<KQ_STAGES>();
  }
}

// A warpgroup: (chunk, value head) number `turn`, `turn + WARPGROUPS`, ... of the block.
template <typename T, bool NORM>
__device__ __forceinline__ void make_all_tiles(const PrepareParameters& p, SharedMemory& shared, int turn, int warp,
                                               int lane) {
  const int group = p.scratch.value_heads / p.heads;
  const uint32_t tile_t = shared_address(shared.t[turn]), tile_p = shared_address(shared.p[turn]);
  const int barrier = 1 + turn;
  const bool stores = warp == 0 && lane == 0;
  clear_tiles(tile_t, TILE, 32 * warp + lane);
  clear_tiles(tile_p, TILE, 32 * warp + lane);
  Ring ring;
  uint32_t unit = 0;  // (chunk, value head) so far
  while (true) {
    wait_full(shared, KQ_FULL, ring);
    const Item& item = shared.items[ring.stage];
    if (item.slot < 0) break;
    for (int i = 0; i < group; ++i) {
      const Ring gates = ring_at<GATE_STAGES>(unit++);
      if (gates.stage % WARPGROUPS != turn) continue;
      wait_full(shared, GATES_FULL, gates);
      if (stores) stores_wait_read<0>();
      named_barrier(barrier, 128);  // the tiles of before are read
      make_tiles<T, NORM, true>(shared_address(shared.k[ring.stage]), shared_address(shared.q[ring.stage]), tile_t, tile_p,
                                shared.scratch[turn], shared.gates[gates.stage], barrier, warp, lane, [] {});
      fence_async_shared();
      arrive(shared, GATES_FREE, gates, lane);
      named_barrier(barrier, 128);  // the tiles are written and fenced
      if (stores) {
        const int64_t at = p.scratch.head(item.slot, item.head * group + i) * TILE;
        bulk_store(p.scratch.t + at, tile_t, TILE);
        bulk_store(p.scratch.p + at, tile_p, TILE);
        stores_commit();
      }
    }
    arrive(shared, KQ_FREE, ring, lane);
    ring.next<KQ_STAGES>();
  }
  if (stores) stores_wait();
}

}  // namespace

template <typename T, bool NORM>
__global__ void __launch_bounds__(THREADS, 1) prepare_kernel(const __grid_constant__ PrepareParameters p) {
  extern __shared__ __align__(1024) uint8_t raw[];
  auto& shared = *reinterpret_cast<SharedMemory*>(raw);
  const int warpgroup = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0);
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32 % 4, 0), lane = static_cast<int>(threadIdx.x) % 32;

  if (threadIdx.x == 0) {
    const int arrivals[BARRIERS] = {1, warps(GATE_WARPS + 4 * WARPGROUPS), warps(1), warps(4 + GATE_WARPS - 1)};
    init_barriers(shared, arrivals);
  }
  __syncthreads();
  allow_later_kernels();
  wait_for_earlier_kernels();
  if (p.scratch.next_run != nullptr && blockIdx.x == 0 && threadIdx.x == 0) *p.scratch.next_run = 0;

  if (warpgroup != 0) {
    make_all_tiles<T, NORM>(p, shared, warpgroup - 1, warp, lane);
  } else if (warp != 0) {
    make_gates<T, NORM>(p, shared, warp - 1, lane);
  } else if (lane == 0) {
    load_items(p, shared);
  }
}

namespace {

template <typename T, bool NORM>
fd_status launch_variant(const PrepareParameters& p, int sm_count, void* stream) {
  const int64_t items = static_cast<int64_t>(p.slots) * p.heads;
  if (items == 0) return FD_OK;
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(items, sm_count));
  const Launch config{.name = "prepare_kernel",
                      .grid = dim3(blocks),
                      .block = dim3(THREADS),
                      .shared = sizeof(SharedMemory),
                      .overlap = true};
  return launch(prepare_kernel<T, NORM>, config, p, stream);
}

template <typename T>
fd_status launch_type(const PrepareParameters& p, bool l2norm, int sm_count, void* stream) {
  return l2norm ? launch_variant<T, true>(p, sm_count, stream) : launch_variant<T, false>(p, sm_count, stream);
}

}  // namespace

fd_status launch_prepare(const PrepareParameters& p, bool bfloat16, bool l2norm, int sm_count, void* stream) {
  return bfloat16 ? launch_type<__nv_bfloat16>(p, l2norm, sm_count, stream)
                  : launch_type<__half>(p, l2norm, sm_count, stream);
}

}  // namespace flashdelta::cuda
