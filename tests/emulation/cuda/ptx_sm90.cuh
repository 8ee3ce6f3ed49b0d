// Stands for src/cuda/ptx_sm90.cuh in the emulation: the same functions, after the layouts in the PTX manual. Copies and
// wgmma happen later (asynchrony.hpp).
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "cuda/device.hpp"
#include "dtype.hpp"
#include "tests/emulation/asynchrony.hpp"
#include "tests/emulation/emulator.hpp"

namespace flashdelta::cuda {

// --- what CUDA C++ has

#undef __launch_bounds__
#define __launch_bounds__(...)

inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
inline float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline unsigned atomicAdd(unsigned* address, unsigned x) { return std::exchange(*address, *address + x); }
inline unsigned atomicMax(unsigned* address, unsigned x) { return std::exchange(*address, *address < x ? x : *address); }

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
void store_shared_by(int thread, uint32_t address, T x) {
  if (address % sizeof(T) != 0 || address + sizeof(T) > sizeof(raw)) emulation::fault("a bad address in shared memory");
  std::memcpy(raw + address, &x, sizeof(T));
  emulation::written_by_thread(address, sizeof(T), thread);
}
template <typename T>
void store_shared(uint32_t address, T x) {
  store_shared_by(emulation::block.thread, address, x);
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
inline void barrier_arrive(uint32_t barrier) {
  emulation::arrive(emulation::barrier_at(barrier), 0);
  if (emulation::chance(4)) emulation::pause();
}
inline void barrier_arrive_expect(uint32_t barrier, int bytes) { emulation::arrive(emulation::barrier_at(barrier), bytes); }
template <bool HINT = true>
void barrier_wait(uint32_t barrier, uint32_t parity) {
  const unsigned& phase = emulation::barrier_at(barrier).phase;
  while ((phase & 1) == parity) emulation::wait_while(phase, phase);
}
inline bool barrier_test(uint32_t barrier, uint32_t parity) { return (emulation::barrier_at(barrier).phase & 1) != parity; }
inline void fence_async_shared() { emulation::fence_writes(); }
inline void fence_async_shared(uint32_t address, int bytes) {
  emulation::fence_writes_of_all(address, static_cast<uint32_t>(bytes));
}

// --- bulk copies

// visit(shared address, global address or 0 outside of the tensor) for every piece of 8 elements of a tile of 64 x 64.
template <typename Visit>
void for_each_in_tile(const TensorMap& map, uint32_t shared, const std::array<int, 5>& first, Visit visit) {
  if (shared % 1024 != 0) emulation::fault("a swizzled tile is not aligned to 1024 bytes");
  for (int row = 0; row < 64; ++row) {
    for (int column = 0; column < 64; column += 8) {
      const int64_t at[5] = {int64_t{first[0]} + column, int64_t{first[1]} + row, first[2], first[3], first[4]};
      uint64_t address = map.data;
      bool inside = true;
      for (int d = 0; d < 5; ++d) {
        inside = inside && at[d] >= 0 && static_cast<uint64_t>(at[d]) < map.size[d];
        address += static_cast<uint64_t>(at[d]) * map.stride[d];  // modulo 2^64
      }
      visit(swizzle(shared + static_cast<uint32_t>(row * 128 + column * 2)), inside ? address : 0);
    }
  }
}
constexpr uint32_t TILE_BYTES = 64 * 64 * 2;

// The same bytes from here to there, both aligned to 16.
struct Piece {
  uint64_t global;
  std::array<uint8_t, 16> bytes;
};
inline void poison_for_copy(uint32_t shared, uint32_t bytes) {
  std::memset(raw + shared, 0xff, bytes);
  emulation::written_by_copy(shared, bytes);
}

inline void tensor_prefetch(const CUtensorMap*, int, int, int, int, int) {}
// Reads what a load would read, so that an address outside of memory shows.
inline void bulk_prefetch(const void* global, int bytes) {
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0 || bytes % 16 != 0) emulation::fault("a misaligned prefetch");
  const auto* from = static_cast<const volatile char*>(global);
  for (int i = 0; i < bytes; i += 16) static_cast<void>(from[i]);
}
inline void tensor_load(uint32_t shared, const CUtensorMap* map, uint32_t barrier, int c0, int c1, int c2, int c3, int c4) {
  TensorMap tensor;
  std::memcpy(&tensor, map, sizeof(tensor));
  const std::array<int, 5> first = {c0, c1, c2, c3, c4};
  if (shared % 1024 != 0 || shared + TILE_BYTES > sizeof(raw)) emulation::fault("a tile at a bad address in shared memory");
  poison_for_copy(shared, TILE_BYTES);
  emulation::start_load([=] {
    for_each_in_tile(tensor, shared, first, [](uint32_t to, uint64_t from) {
      from == 0 ? std::memset(raw + to, 0, 16) : std::memcpy(raw + to, reinterpret_cast<const void*>(from), 16);
    });
    emulation::copied(emulation::barrier_at(barrier), TILE_BYTES);
  });
}
inline void tensor_store(const CUtensorMap* map, uint32_t shared, int c0, int c1, int c2, int c3, int c4) {
  TensorMap tensor;
  std::memcpy(&tensor, map, sizeof(tensor));
  const std::array<int, 5> first = {c0, c1, c2, c3, c4};
  if (shared % 1024 != 0 || shared + TILE_BYTES > sizeof(raw)) emulation::fault("a tile at a bad address in shared memory");
  emulation::check_visible(shared, TILE_BYTES);
  emulation::start_store([=] {
    emulation::check_visible(shared, TILE_BYTES);
    std::vector<Piece> pieces;
    for_each_in_tile(tensor, shared, first, [&](uint32_t from, uint64_t to) {
      if (to != 0) std::memcpy(pieces.emplace_back(Piece{to, {}}).bytes.data(), raw + from, 16);
    });
    return [pieces = std::move(pieces)] {
      for (const Piece& piece : pieces) std::memcpy(reinterpret_cast<void*>(piece.global), piece.bytes.data(), 16);
    };
  });
}
inline void check_bulk_copy(const void* global, uint32_t shared, int bytes) {
  if (shared % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0 || bytes <= 0 || bytes % 16 != 0 ||
      shared + static_cast<uint32_t>(bytes) > sizeof(raw)) {
    emulation::fault("a bulk copy is not aligned to 16 bytes, or leaves shared memory");
  }
}
inline void bulk_load(uint32_t shared, const void* global, int bytes, uint32_t barrier) {
  check_bulk_copy(global, shared, bytes);
  poison_for_copy(shared, static_cast<uint32_t>(bytes));
  emulation::start_load([=] {
    std::memcpy(raw + shared, global, static_cast<std::size_t>(bytes));
    emulation::copied(emulation::barrier_at(barrier), bytes);
  });
}
inline void bulk_store(void* global, uint32_t shared, int bytes) {
  check_bulk_copy(global, shared, bytes);
  emulation::check_visible(shared, static_cast<uint32_t>(bytes));
  emulation::start_store([=] {
    emulation::check_visible(shared, static_cast<uint32_t>(bytes));
    return [global, copy = std::vector<uint8_t>(raw + shared, raw + shared + bytes)] {
      std::memcpy(global, copy.data(), copy.size());
    };
  });
}
inline void stores_commit() { emulation::commit_stores(); }
template <int PENDING>
void stores_wait_read() {
  emulation::wait_for_stores(PENDING, false);
}
template <int PENDING = 0>
void stores_wait() {
  emulation::wait_for_stores(PENDING, true);
}

inline void count_written(unsigned* count, unsigned written) { *count += written; }
inline bool is_written(const unsigned* count, unsigned wanted) { return *count >= wanted; }
// Kernels run one after another here.
inline bool wait_written(const unsigned* count, unsigned wanted) { return is_written(count, wanted); }

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
            const int warp = emulation::block.thread / emulation::WARP;
            store_shared_by(warp * emulation::WARP + static_cast<int>(l), at,
                            static_cast<uint16_t>(lanes[l]->x[m] >> (16 * e)));
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

// --- matrix multiplication. One warp: d (16 x N) = c + a (16 x 16) b (16 x N). Fragments: of a, register i of lane l has
// row l / 4 + 8 (i % 2), columns 8 (i / 2) + 2 (l % 4) and the next; of d, row l / 4 + 8 (i / 2 % 2), column 8 (i / 4) + 2
// (l % 4) + i % 2.

template <typename T>
void unpack_fragment(float (&a)[16][16], int lane, int i, uint32_t x) {
  const float2 pair = unpack<T>(x);
  float* to = &a[lane / 4 + 8 * (i & 1)][2 * (lane % 4) + 8 * (i >> 1)];
  to[0] = pair.x;
  to[1] = pair.y;
}
template <int N>
void multiply(const float (&a)[16][16], const float (&b)[16][N], const emulation::Accumulators& d, bool first) {
  for (int row = 0; row < 16; ++row) {
    float sum[N] = {};
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < N; ++n) sum[n] += a[row][k] * b[k][n];
    }
    for (int n = 0; n < N; ++n) {
      float& x = d[static_cast<std::size_t>(row % 8 * 4 + n % 8 / 2)][n / 8 * 4 + row / 8 * 2 + n % 2];
      x = first ? sum[n] : x + sum[n];
    }
  }
}

template <typename T>
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Lane {
    const uint32_t* a;
    uint32_t b[2];
    float* d;
  } mine{a, {b0, b1}, d};
  emulation::together(mine, [](const auto& lanes) {
    float a[16][16], b[16][8];
    emulation::Accumulators d;
    for (int l = 0; l < emulation::WARP; ++l) {
      const Lane& lane = *lanes[static_cast<std::size_t>(l)];
      for (int i = 0; i < 4; ++i) unpack_fragment<T>(a, l, i, lane.a[i]);
      for (int i = 0; i < 2; ++i) {
        const float2 pair = unpack<T>(lane.b[i]);
        b[8 * i + 2 * (l % 4)][l / 4] = pair.x;
        b[8 * i + 2 * (l % 4) + 1][l / 4] = pair.y;
      }
      d[static_cast<std::size_t>(l)] = lane.d;
    }
    multiply<8>(a, b, d, false);
  });
}
inline void mma_bf16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
  const uint32_t a[4] = {a0, a1, 0, 0};
  mma<__nv_bfloat16>(d, a, b0, 0);
}
// d (16 x 8) += a (16 x 8) b (8 x 8) in tf32.
inline void mma_tf32(float (&d)[4], const float (&a)[4], float b0, float b1) {
  struct Lane {
    const float* a;
    float b[2];
    float* d;
  } mine{a, {b0, b1}, d};
  emulation::together(mine, [](const auto& lanes) {
    const auto tf32 = [](float x) { return __uint_as_float(__float_as_uint(x) & 0xffffe000u); };
    float a[16][16] = {}, b[16][8] = {};
    emulation::Accumulators d;
    for (std::size_t l = 0; l < emulation::WARP; ++l) {
      for (std::size_t i = 0; i < 4; ++i) a[l / 4 + 8 * (i % 2)][l % 4 + 4 * (i / 2)] = tf32(lanes[l]->a[i]);
      for (std::size_t i = 0; i < 2; ++i) b[l % 4 + 4 * i][l / 4] = tf32(lanes[l]->b[i]);
      d[l] = lanes[l]->d;
    }
    multiply<8>(a, b, d, false);
  });
}
inline void mma_half(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { mma<__half>(d, a, b0, b1); }

inline void wgmma_fence() { emulation::fence_multiplications(); }
inline void wgmma_commit() { emulation::commit_multiplications(); }
template <int PENDING>
void wgmma_wait() {
  emulation::wait_for_multiplications(PENDING);
}
template <int COUNT>
void accumulators_ready(float (&d)[COUNT]) {
  emulation::check_accumulators(d);
}

template <int COUNT>
void computed(uint32_t (&)[COUNT]) {}

inline uint64_t matrix_descriptor(uint32_t address, uint32_t leading) {
  return (address & 0x3ffff) >> 4 | uint64_t{leading >> 4} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}
// A matrix in shared memory, 16 deep: visit(address of 8 elements, along, k). `along` runs along M or N, k along the depth;
// the 8 elements lie along M or N (transposed) or along the depth.
template <typename Visit>
void for_each_in_matrix(uint64_t descriptor, bool transposed, uint32_t first, uint32_t count, Visit visit) {
  const auto field = [&](int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4; };
  const uint32_t start = field(0), leading = field(16), stride = field(32);
  if (transposed) {
    for (uint32_t k = 0; k < 16; ++k) {
      for (uint32_t m = first; m < first + count; m += 8)
        visit(swizzle(start + m / 64 * leading + k / 8 * stride + k % 8 * 128 + m % 64 * 2), m - first, k);
    }
  } else {
    for (uint32_t m = first; m < first + count; ++m) {
      for (uint32_t k = 0; k < 16; k += 8) visit(swizzle(start + m / 8 * stride + m % 8 * 128 + k * 2), m - first, k);
    }
  }
}
// put(along, k, value) for every element.
template <typename T, typename Put>
void read_matrix(uint64_t descriptor, bool transposed, uint32_t first, uint32_t count, Put put) {
  for_each_in_matrix(descriptor, transposed, first, count, [&](uint32_t address, uint32_t along, uint32_t k) {
    const auto x = load_shared<std::array<uint16_t, 8>>(address);
    for (uint32_t i = 0; i < 8; ++i)
      transposed ? put(along + i, k, value_of<T>(x[i])) : put(along, k + i, value_of<T>(x[i]));
  });
}

// The operand a of one lane: in registers, or a matrix in shared memory.
struct WgmmaLane {
  float* d;
  std::array<emulation::RegisterOperand, 4> a;
  uint64_t a_matrix, b_matrix;
};
template <typename T, bool FIRST, bool A_IN_REGISTERS, bool TRANSPOSED_A, bool TRANSPOSED_B, int COUNT>
void issue_wgmma(WgmmaLane mine) {
  emulation::together(mine, [](const auto& lanes) {
    constexpr uint32_t N = 2 * COUNT;
    const uint64_t a_matrix = lanes[0]->a_matrix, b_matrix = lanes[0]->b_matrix;
    const auto row = static_cast<uint32_t>(emulation::block.thread / emulation::WARP % 4 * 16);
    emulation::Multiplication m;
    for (std::size_t l = 0; l < emulation::WARP; ++l) {
      if (lanes[l]->a_matrix != a_matrix || lanes[l]->b_matrix != b_matrix)
        emulation::fault("lanes of a warp have different matrix descriptors");
      m.d[l] = lanes[l]->d;
      m.a[l] = lanes[l]->a;
    }
    m.count = COUNT;
    m.first = FIRST;
    m.matrices = (a_matrix * 3 + b_matrix) * 8 + N / 16 + (TRANSPOSED_A ? 2 : 0) + (TRANSPOSED_B ? 1 : 0);
    m.operands = [=](emulation::VisitShared* visit) {
      const auto each = [&](uint32_t address, uint32_t, uint32_t) { visit(address, 16); };
      if (!A_IN_REGISTERS) for_each_in_matrix(a_matrix, TRANSPOSED_A, row, 16, each);
      for_each_in_matrix(b_matrix, TRANSPOSED_B, 0, N, each);
    };
    m.finish = [=, fragments = m.a](const emulation::Accumulators& d) {
      float a[16][16], b[16][N];
      if (A_IN_REGISTERS) {
        for (int l = 0; l < emulation::WARP; ++l) {
          for (int i = 0; i < 4; ++i)
            unpack_fragment<T>(a, l, i, fragments[static_cast<std::size_t>(l)][static_cast<std::size_t>(i)].value);
        }
      } else {
        read_matrix<T>(a_matrix, TRANSPOSED_A, row, 16, [&](uint32_t along, uint32_t k, float x) { a[along][k] = x; });
      }
      read_matrix<T>(b_matrix, TRANSPOSED_B, 0, N, [&](uint32_t along, uint32_t k, float x) { b[k][along] = x; });
      multiply<N>(a, b, d, FIRST);
    };
    emulation::issue(std::move(m));
  });
}

template <typename A>
emulation::RegisterOperand register_operand(A&& a) {
  return {a, std::is_lvalue_reference_v<A> ? &a : nullptr};
}
template <typename T, bool FIRST, int TRANSPOSED_B, int COUNT, typename A0, typename A1, typename A2, typename A3>
void wgmma(float (&d)[COUNT], A0&& a0, A1&& a1, A2&& a2, A3&& a3, uint64_t b) {
  issue_wgmma<T, FIRST, true, false, TRANSPOSED_B != 0, COUNT>(
      {d,
       {register_operand(std::forward<A0>(a0)), register_operand(std::forward<A1>(a1)),
        register_operand(std::forward<A2>(a2)), register_operand(std::forward<A3>(a3))},
       0,
       b});
}
template <typename T, bool FIRST, int TRANSPOSED_A = 0, int TRANSPOSED_B = 0, int COUNT>
void wgmma(float (&d)[COUNT], uint64_t a, uint64_t b) {
  issue_wgmma<T, FIRST, false, TRANSPOSED_A != 0, TRANSPOSED_B != 0, COUNT>({d, {}, a, b});
}

}  // namespace flashdelta::cuda
