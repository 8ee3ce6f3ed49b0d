// Stands for src/cuda/ptx_sm90.cuh in the emulation: the same functions, each doing at once what the instruction does in
// the end, after the layouts in the PTX manual.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "cuda/device.hpp"
#include "dtype.hpp"
#include "tests/emulation/emulator.hpp"

namespace flashdelta::cuda {

// --- what CUDA C++ has

#undef __launch_bounds__
#define __launch_bounds__(...)

inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline unsigned atomicAdd(unsigned* address, unsigned x) { return std::exchange(*address, *address + x); }

inline void __syncthreads() { emulation::gather(emulation::block.named[0], emulation::block.threads); }
inline void __syncwarp() {
  char nothing = 0;
  emulation::together(nothing, [](const auto&) {});
}
// `source`: the lane whose value this one gets; a lane that does not exist gives its own.
template <typename T>
T shuffle(T x, int source) {
  struct Lane {
    T in, out;
    int source;
  } mine{x, x, source};
  emulation::together(mine, [](const auto& lanes) {
    for (Lane* lane : lanes) {
      if (lane->source >= 0) lane->out = lanes[static_cast<std::size_t>(lane->source)]->in;
    }
  });
  return mine.out;
}
template <typename T>
T __shfl_sync(unsigned, T x, int source) {
  return shuffle(x, source);
}
template <typename T>
T __shfl_up_sync(unsigned, T x, int distance) {
  return shuffle(x, emulation::block.lane() - distance);
}
template <typename T>
T __shfl_down_sync(unsigned, T x, int distance) {
  const int source = emulation::block.lane() + distance;
  return shuffle(x, source < emulation::WARP ? source : -1);
}
template <typename T>
T __shfl_xor_sync(unsigned, T x, int mask) {
  return shuffle(x, emulation::block.lane() ^ mask);
}

// --- shared memory by address

inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const uint8_t*>(pointer) - raw);
}
template <typename T>
T load_shared(uint32_t address) {
  if (address % sizeof(T) != 0 || address + sizeof(T) > sizeof(raw)) emulation::fault("a bad address in shared memory");
  T x;
  std::memcpy(&x, raw + address, sizeof(T));
  return x;
}
template <typename T>
void store_shared(uint32_t address, T x) {
  if (address % sizeof(T) != 0 || address + sizeof(T) > sizeof(raw)) emulation::fault("a bad address in shared memory");
  std::memcpy(raw + address, &x, sizeof(T));
}
inline float4 load_shared_float4(uint32_t address) { return load_shared<float4>(address); }

// The 128-byte swizzle: bits 4 to 6 of an address are changed by bits 7 to 9.
inline uint32_t swizzle(uint32_t address) { return address ^ ((address >> 7 & 7) << 4); }

// --- registers, barriers

template <int REGISTERS>
void more_registers() {}
template <int REGISTERS>
void fewer_registers() {}
inline int opaque(int x) { return x; }

inline void named_barrier(int id, int threads) {
  emulation::gather(emulation::block.named[static_cast<std::size_t>(id)], threads);
}

inline void barrier_init(uint32_t barrier, int arrivals) { emulation::barrier_at(barrier) = {arrivals, arrivals, 0, 0}; }
inline void barrier_init_fence() {}
inline void barrier_arrive(uint32_t barrier) { emulation::arrive(emulation::barrier_at(barrier), 0); }
inline void barrier_arrive_expect(uint32_t barrier, int bytes) { emulation::arrive(emulation::barrier_at(barrier), bytes); }
inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  const unsigned& phase = emulation::barrier_at(barrier).phase;
  while ((phase & 1) == parity) emulation::wait_while(phase, phase);
}
inline void fence_async_shared() {}

// --- bulk copies

// visit(shared address, global address or 0 outside of the tensor) for every element of a tile of 64 x 64.
template <typename Visit>
void for_each_in_tile(const CUtensorMap* map, uint32_t shared, const int (&first)[5], Visit visit) {
  TensorMap t;
  std::memcpy(&t, map, sizeof(t));
  if (shared % 1024 != 0) emulation::fault("a swizzled tile is not aligned to 1024 bytes");
  for (int row = 0; row < 64; ++row) {
    for (int column = 0; column < 64; ++column) {
      const int64_t at[5] = {int64_t{first[0]} + column, int64_t{first[1]} + row, first[2], first[3], first[4]};
      uint64_t address = t.data;
      bool inside = true;
      for (int d = 0; d < 5; ++d) {
        inside = inside && at[d] >= 0 && static_cast<uint64_t>(at[d]) < t.size[d];
        address += static_cast<uint64_t>(at[d]) * t.stride[d];  // modulo 2^64
      }
      visit(swizzle(shared + static_cast<uint32_t>(row * 128 + column * 2)), inside ? address : 0);
    }
  }
}

inline void prefetch_tensor_map(const CUtensorMap*) {}
inline void tensor_load(uint32_t shared, const CUtensorMap* map, uint32_t barrier, int c0, int c1, int c2, int c3, int c4) {
  for_each_in_tile(map, shared, {c0, c1, c2, c3, c4}, [](uint32_t to, uint64_t from) {
    store_shared(to, from == 0 ? uint16_t{0} : *reinterpret_cast<const uint16_t*>(from));
  });
  emulation::copied(emulation::barrier_at(barrier), 64 * 64 * 2);
}
inline void tensor_store(const CUtensorMap* map, uint32_t shared, int c0, int c1, int c2, int c3, int c4) {
  for_each_in_tile(map, shared, {c0, c1, c2, c3, c4}, [](uint32_t from, uint64_t to) {
    if (to != 0) *reinterpret_cast<uint16_t*>(to) = load_shared<uint16_t>(from);
  });
}
inline void bulk_load(uint32_t shared, const void* global, int bytes, uint32_t barrier) {
  if (shared % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0 || bytes % 16 != 0 ||
      shared + static_cast<uint32_t>(bytes) > sizeof(raw)) {
    emulation::fault("a bulk copy is not aligned to 16 bytes, or leaves shared memory");
  }
  std::memcpy(raw + shared, global, static_cast<std::size_t>(bytes));
  emulation::copied(emulation::barrier_at(barrier), bytes);
}
inline void bulk_store(void* global, uint32_t shared, int bytes) {
  if (shared % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0 || bytes % 16 != 0 ||
      shared + static_cast<uint32_t>(bytes) > sizeof(raw)) {
    emulation::fault("a bulk copy is not aligned to 16 bytes, or leaves shared memory");
  }
  std::memcpy(global, raw + shared, static_cast<std::size_t>(bytes));
}
inline void stores_commit() {}
template <int PENDING>
void stores_wait_read() {}
inline void stores_wait() {}

// --- arithmetic

template <typename T>
constexpr bool IS_BFLOAT16 = false;
template <>
inline constexpr bool IS_BFLOAT16<__nv_bfloat16> = true;

template <typename T>
uint32_t bits_of(float x) {
  return IS_BFLOAT16<T> ? float_to_bfloat16(x) : float_to_float16(x);
}
template <typename T>
float value_of(uint32_t bits) {
  return IS_BFLOAT16<T> ? bfloat16_to_float(static_cast<uint16_t>(bits)) : float16_to_float(static_cast<uint16_t>(bits));
}
template <typename T>
uint32_t pack(float low, float high) {
  return bits_of<T>(low) | bits_of<T>(high) << 16;
}
template <typename T>
float2 unpack(uint32_t x) {
  return {value_of<T>(x & 0xffff), value_of<T>(x >> 16)};
}
inline float exp2_fast(float x) { return std::exp2(x); }

// --- 8 x 8 matrices of 16-bit elements between shared memory and fragments. Lane l has elements (l / 4, 2 (l % 4)) and the
// one to its right (transposed: below) of each of four matrices; lane 8 m + r brings the address of row r of matrix m.

struct MatrixLane {
  uint32_t address;
  uint32_t x[4];
};
template <bool TRANSPOSED, bool STORE>
void move_matrices(MatrixLane& mine) {
  emulation::together(mine, [](const auto& lanes) {
    for (uint32_t m = 0; m < 4; ++m) {
      for (uint32_t l = 0; l < emulation::WARP; ++l) {
        uint32_t word = 0;
        for (uint32_t e = 0; e < 2; ++e) {
          uint32_t row = l / 4, column = 2 * (l % 4) + e;
          if (TRANSPOSED) std::swap(row, column);
          if (lanes[8 * m + row]->address % 16 != 0) emulation::fault("a matrix row is not aligned to 16 bytes");
          const uint32_t at = lanes[8 * m + row]->address + 2 * column;
          if (STORE) {
            store_shared(at, static_cast<uint16_t>(lanes[l]->x[m] >> (16 * e)));
          } else {
            word |= uint32_t{load_shared<uint16_t>(at)} << (16 * e);
          }
        }
        if (!STORE) lanes[l]->x[m] = word;
      }
    }
  });
}
template <bool TRANSPOSED>
void load_matrices_any(uint32_t (&x)[4], uint32_t address) {
  MatrixLane mine{address, {}};
  move_matrices<TRANSPOSED, false>(mine);
  for (int i = 0; i < 4; ++i) x[i] = mine.x[i];
}
inline void load_matrices(uint32_t (&x)[4], uint32_t address) { load_matrices_any<false>(x, address); }
inline void load_matrices_transposed(uint32_t (&x)[4], uint32_t address) { load_matrices_any<true>(x, address); }
inline void store_matrices(uint32_t address, uint32_t x0, uint32_t x1, uint32_t x2, uint32_t x3) {
  MatrixLane mine{address, {x0, x1, x2, x3}};
  move_matrices<false, true>(mine);
}
inline void store_matrices_transposed(uint32_t address, uint32_t x0, uint32_t x1, uint32_t x2, uint32_t x3) {
  MatrixLane mine{address, {x0, x1, x2, x3}};
  move_matrices<true, true>(mine);
}

// --- matrix multiplication. One warp: d (16 x N) = c + a (16 x 16) b (16 x N).

struct MultiplyLane {
  uint32_t a[4];
  uint64_t b;  // two registers, or the descriptor of a matrix in shared memory
  float* d;    // [N / 2]: (row l / 4 + 8 (i / 2 % 2), column 8 (i / 4) + 2 (l % 4) + i % 2)
};
template <typename T, int N, bool FIRST, typename ReadB>
void multiply(const std::array<MultiplyLane*, emulation::WARP>& lanes, ReadB read_b) {
  float a[16][16], b[16][N];
  for (int l = 0; l < emulation::WARP; ++l) {
    for (int i = 0; i < 4; ++i) {
      const float2 pair = unpack<T>(lanes[static_cast<std::size_t>(l)]->a[i]);
      float* to = &a[l / 4 + 8 * (i & 1)][2 * (l % 4) + 8 * (i >> 1)];
      to[0] = pair.x;
      to[1] = pair.y;
    }
  }
  for (int k = 0; k < 16; ++k) {
    for (int n = 0; n < N; ++n) b[k][n] = read_b(k, n);
  }
  for (int row = 0; row < 16; ++row) {
    float sum[N] = {};
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < N; ++n) sum[n] += a[row][k] * b[k][n];
    }
    for (int n = 0; n < N; ++n) {
      float& d = lanes[static_cast<std::size_t>(row % 8 * 4 + n % 8 / 2)]->d[n / 8 * 4 + row / 8 * 2 + n % 2];
      d = FIRST ? sum[n] : d + sum[n];
    }
  }
}

inline void mma_half(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MultiplyLane mine{{a[0], a[1], a[2], a[3]}, b0 | uint64_t{b1} << 32, d};
  emulation::together(mine, [](const auto& lanes) {
    multiply<__half, 8, false>(lanes, [&](int k, int n) {
      return value_of<__half>(
          static_cast<uint16_t>(lanes[static_cast<std::size_t>(4 * n + k % 8 / 2)]->b >> (32 * (k / 8) + 16 * (k % 2))));
    });
  });
}

inline void wgmma_fence() {}
inline void wgmma_commit() {}
template <int PENDING>
void wgmma_wait() {}
template <int COUNT>
void accumulators_ready(float (&)[COUNT]) {}

inline uint64_t matrix_descriptor(uint32_t address, uint32_t leading) {
  return (address & 0x3ffff) >> 4 | uint64_t{leading >> 4} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}
// Element of a matrix in shared memory, rows of 128 bytes: `along` runs along M or N, k along the depth.
template <typename T>
float element(uint64_t descriptor, int along, int k, bool transposed) {
  const auto field = [&](int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4; };
  const auto m = static_cast<uint32_t>(along), depth = static_cast<uint32_t>(k);
  const uint32_t start = field(0), leading = field(16), stride = field(32);
  const uint32_t at = transposed ? start + m / 64 * leading + depth / 8 * stride + depth % 8 * 128 + m % 64 * 2
                                 : start + m / 8 * stride + m % 8 * 128 + depth * 2;
  return value_of<T>(load_shared<uint16_t>(swizzle(at)));
}

template <typename T, bool FIRST, int TRANSPOSED, int COUNT>
void wgmma(float (&d)[COUNT], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b) {
  MultiplyLane mine{{a0, a1, a2, a3}, b, d};
  emulation::together(mine, [](const auto& lanes) {
    for (const MultiplyLane* lane : lanes) {
      if (lane->b != lanes[0]->b) emulation::fault("lanes of a warp have different matrix descriptors");
    }
    multiply<T, 2 * COUNT, FIRST>(lanes, [&](int k, int n) { return element<T>(lanes[0]->b, n, k, TRANSPOSED != 0); });
  });
}
template <typename T, bool FIRST, int TRANSPOSED_A = 0, int TRANSPOSED_B = 0, int COUNT>
void wgmma(float (&d)[COUNT], uint64_t a, uint64_t b) {
  const int warp = emulation::block.thread / emulation::WARP % 4, lane = emulation::block.lane();
  uint32_t fragment[4];
  for (int i = 0; i < 4; ++i) {
    const int row = 16 * warp + lane / 4 + 8 * (i & 1), k = 2 * (lane % 4) + 8 * (i >> 1);
    fragment[i] = pack<T>(element<T>(a, row, k, TRANSPOSED_A != 0), element<T>(a, row, k + 1, TRANSPOSED_A != 0));
  }
  wgmma<T, FIRST, TRANSPOSED_B>(d, fragment[0], fragment[1], fragment[2], fragment[3], b);
}

}  // namespace flashdelta::cuda
