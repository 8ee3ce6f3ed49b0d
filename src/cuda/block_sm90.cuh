// What the blocks of all Hopper kernels do alike: rings of stages with their barriers, and states between memory and the
// registers of a warpgroup. A block's shared memory has `uint64_t barriers[BARRIERS][stages]`, MAX_STAGES of them or more.
#pragma once

#include <type_traits>

#include "cuda/inputs.cuh"
#include "cuda/ptx_sm90.cuh"
#include "cuda/tiling_sm90.hpp"

namespace flashdelta::cuda {

constexpr int MAX_STAGES = 4;

// A place in a ring of stages, and how often the ring has been passed (mod 2).
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  template <int STAGES>
  __device__ __forceinline__ void next() {
    if (++stage == STAGES) {
      stage = 0;
      parity ^= 1;
    }
  }
};
// Place number `count` of a ring: for roles that are short of registers.
template <int STAGES>
__device__ __forceinline__ Ring ring_at(uint32_t count) {
  return {static_cast<int>(count % STAGES), count / STAGES & 1};
}

template <typename Shared>
__device__ __forceinline__ uint32_t barrier_address(Shared& shared, int barrier, int stage) {
  return shared_address(&shared.barriers[barrier][stage]);
}
template <bool HINT = true, typename Shared>
__device__ __forceinline__ void wait_full(Shared& shared, int barrier, const Ring& ring) {
  barrier_wait<HINT>(barrier_address(shared, barrier, ring.stage), ring.parity);
}
template <bool HINT = true, typename Shared>
__device__ __forceinline__ void wait_free(Shared& shared, int barrier, const Ring& ring) {
  barrier_wait<HINT>(barrier_address(shared, barrier, ring.stage), ring.parity ^ 1);
}
// Asked early, and again only if the answer was no: a wait that is over still takes a while to say so.
template <typename Shared>
__device__ __forceinline__ bool is_full(Shared& shared, int barrier, const Ring& ring) {
  return barrier_test(barrier_address(shared, barrier, ring.stage), ring.parity);
}
template <typename Shared>
__device__ __forceinline__ bool is_free(Shared& shared, int barrier, const Ring& ring) {
  return barrier_test(barrier_address(shared, barrier, ring.stage), ring.parity ^ 1);
}
// How a warp arrives: one lane, after all came here; with FLASHDELTA_ARRIVE_BY_LANES each by itself, which takes longer. The
// sanitizer's race check knows no order between what the other lanes did and the arrival of the one, although __syncwarp
// lies between: programs for it are built in the other way.
#if defined(FLASHDELTA_ARRIVE_BY_LANES)
constexpr bool ARRIVE_BY_LANES = true;
#else
constexpr bool ARRIVE_BY_LANES = false;
#endif
constexpr int warps(int count) { return ARRIVE_BY_LANES ? 32 * count : count; }  // their arrivals
template <typename Shared>
__device__ __forceinline__ void arrive(Shared& shared, int barrier, const Ring& ring, int lane) {
  if constexpr (!ARRIVE_BY_LANES) __syncwarp();
  if (ARRIVE_BY_LANES || lane == 0) barrier_arrive(barrier_address(shared, barrier, ring.stage));
}

// By one thread, before any other touches a barrier; all threads meet afterwards.
template <typename Shared, int BARRIERS>
__device__ __forceinline__ void init_barriers(Shared& shared, const int (&arrivals)[BARRIERS]) {
  constexpr int STAGES = std::extent_v<decltype(Shared::barriers), 1>;
  for (int b = 0; b < BARRIERS; ++b) {
    for (int i = 0; i < STAGES; ++i) barrier_init(barrier_address(shared, b, i), arrivals[b]);
  }
  barrier_init_fence();
  fence_async_shared();
}

// Sum over a warp's lanes, for each of them.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

// Byte offset of 16-byte block `block` of row `row` in a tile with rows of 128 bytes, swizzled by 128 bytes.
__device__ __forceinline__ uint32_t swizzled(int row, int block) {
  return static_cast<uint32_t>(row * 128 + ((block ^ (row & 7)) << 4));
}

// The descriptor of a matrix `bytes` further on, a constant: one instruction. Addresses in shared memory never overflow
// their field.
__device__ __forceinline__ uint64_t advance(uint64_t descriptor, int bytes) {
  const uint32_t low = static_cast<uint32_t>(descriptor) + static_cast<uint32_t>(bytes >> 4);
  return (descriptor & 0xffffffff00000000u) | low;
}

// Coordinates of a token in the tensor maps of tensor_map_sm90.hpp, after the column and before/after the head: packed
// sequences are ragged, so that the copy engine fills with zeros, or skips in a store, what lies past the sequence's end.
struct Place {
  int token, third, fourth;
};
__device__ __forceinline__ Place place(bool packed, int64_t batch, int64_t begin, int tokens, int token) {
  if (!packed) return {token, static_cast<int>(batch), 0};
  return {RAGGED - tokens + token, static_cast<int>(begin) + tokens, RAGGED};
}

// --- states. In accumulator layout: register 4 j + 2 h + e of a warpgroup's thread has value `value` + 8 h, key 8 j + `key`
// + e, with value = 16 warp + lane / 4 and key = 2 (lane % 4).

// Where a state's element (key, value) lies in its row of a pool.
struct StateLayout {
  int64_t base, key, value;
};
__device__ __forceinline__ StateLayout state_layout(const Pool& pool, bool v_first, int64_t row, int value_head) {
  const int64_t base = row * pool.states.stride[0] + value_head * pool.states.stride[1];
  return v_first ? StateLayout{base, pool.states.stride[3], pool.states.stride[2]}
                 : StateLayout{base, pool.states.stride[2], pool.states.stride[3]};
}

// Calls visit(element, register) for the thread's elements, of which the first is `at`. What is added to addresses is found
// once, and the type is asked once: either takes longer than a load or store itself.
template <typename Element, typename Visit>
__device__ __forceinline__ void visit_elements(Element* at, const StateLayout& layout, Visit visit) {
  const int64_t right = layout.key, down = 8 * layout.value, both = right + down, next = 8 * layout.key;
#pragma unroll
  for (int i = 0; i < 64; i += 4, at += next) {
    visit(at[0], i);
    visit(at[right], i + 1);
    visit(at[down], i + 2);
    visit(at[both], i + 3);
  }
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ void round_to(float& to, float x) { to = x; }
__device__ __forceinline__ void round_to(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }
__device__ __forceinline__ void round_to(__half& to, float x) { to = __float2half_rn(x); }

// Row < 0: zeros.
__device__ __forceinline__ void load_state(const Pool& pool, bool v_first, int64_t row, int value_head, float (&s)[64],
                                           int value, int key) {
#pragma unroll
  for (int i = 0; i < 64; ++i) s[i] = 0.0f;
  if (row < 0) return;
  const StateLayout at = state_layout(pool, v_first, row, value_head);
  const int64_t first = at.base + value * at.value + key * at.key;
  const auto load = [&](auto* states) {
    visit_elements(states + first, at, [&](const auto& x, int i) { s[i] = to_float(x); });
  };
  if (pool.states.type == FD_FLOAT32) {
    load(static_cast<const float*>(pool.states.data));
  } else if (pool.states.type == FD_BFLOAT16) {
    load(static_cast<const __nv_bfloat16*>(pool.states.data));
  } else {
    load(static_cast<const __half*>(pool.states.data));
  }
}
// Row < 0: nothing is written.
__device__ __forceinline__ void store_state(const Pool& pool, bool v_first, int64_t row, int value_head,
                                            const float (&s)[64], int value, int key) {
  if (row < 0) return;
  const StateLayout at = state_layout(pool, v_first, row, value_head);
  const int64_t first = at.base + value * at.value + key * at.key;
  const auto store = [&](auto* states) { visit_elements(states + first, at, [&](auto& x, int i) { round_to(x, s[i]); }); };
  if (pool.states.type == FD_FLOAT32) {
    store(static_cast<float*>(pool.states.data));
  } else if (pool.states.type == FD_BFLOAT16) {
    store(static_cast<__nv_bfloat16*>(pool.states.data));
  } else {
    store(static_cast<__half*>(pool.states.data));
  }
}

// The library's own states in memory: fp32, 64 values of a head after each other, each with its 128 keys. `states` points to
// the block of values.
constexpr int STATE_BLOCK = VALUES * KEYS;  // floats
__device__ __forceinline__ void load_state(const float* states, float (&s)[64], int value, int key) {
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    const float2 x = *reinterpret_cast<const float2*>(states + (value + (i & 1) * 8) * KEYS + key + 8 * (i / 2));
    s[2 * i] = x.x;
    s[2 * i + 1] = x.y;
  }
}
__device__ __forceinline__ void store_state(float* states, const float (&s)[64], int value, int key) {
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    *reinterpret_cast<float2*>(states + (value + (i & 1) * 8) * KEYS + key + 8 * (i / 2)) =
        make_float2(s[2 * i], s[2 * i + 1]);
  }
}

}  // namespace flashdelta::cuda
