// The decode step where it is fastest: 128 keys, states that can be loaded by 16 bytes, q and k in 16 bits. See
// docs/kernels/step.md.
//
// A warp has its part of a state in registers from the load to the store, in the places where the tensor cores want the
// elements of a matrix, and multiplies twice, for up to 4 tokens at once:
//
//   S^T [k_t, q_t]             [values x keys] [keys x 8]
//   S = D S + sum e_t k_t^T    [values x (part, token)] [(part, token) x keys]   e_t: d_t by the norm of k_t
//
// Products and sums are those of fp32, or as good. A state in bf16 is an operand as it is, with k and q in bf16; e_t is
// given in two parts of bf16. A state in fp32 is given in two parts of tf32, 22 bits together, as is e_t; 16-bit k and q are
// exact. Its decayed rest is added outside of the tensor cores, which round towards zero.
//
// Lane 4 g + c of the warp stands for rows g and g + 8 of each tile of 16 values, and for token c. It holds keys by pairs of
// neighbours: which ones is ours to choose as long as k and q are loaded alike, and so all vectors are loaded whole.
#pragma once

#include <type_traits>

#include "cuda/step_warp.cuh"

namespace flashdelta::cuda {

// Keeps the 8 exponent and the 10 upper mantissa bits.
__device__ inline float upper_part(float x) { return __uint_as_float(__float_as_uint(x) & 0xffffe000u); }

// The two numbers of a word.
template <typename T>
__device__ float2 numbers_of(uint32_t word) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
  } else {
    return {element_of(word & 0xffff, FD_FLOAT16), element_of(word >> 16, FD_FLOAT16)};
  }
}

template <typename T>
__device__ uint32_t pack_numbers(float x, float y) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return pack_bf16(x, y);
  } else {
    return static_cast<uint32_t>(__half_as_ushort(__float2half_rn(y))) << 16 | __half_as_ushort(__float2half_rn(x));
  }
}

// A warp's part of a state. Element: float, with q and k of type Token, or __nv_bfloat16 like them.
template <typename Element_, typename Token_, bool V_FIRST_>
struct StateTiles {
  using Element = Element_;
  using Token = Token_;
  static constexpr bool V_FIRST = V_FIRST_;
  static constexpr fd_dtype TOKEN = std::is_same_v<Token, __nv_bfloat16> ? FD_BFLOAT16 : FD_FLOAT16;
  static constexpr bool WIDE = sizeof(Element) == 4;
  static_assert(WIDE || TOKEN == FD_BFLOAT16);
  static constexpr int TILES = V_FIRST ? 1 : WIDE ? 2 : 4;  // of 16 values
  static constexpr int VALUES = 16 * TILES;
  static constexpr int SPLIT = V_FIRST ? 1 : 2;  // warps that share the keys
  static constexpr int PAIRS = 16 / SPLIT;       // of keys, of a lane
  static constexpr int VECTORS = TILES * 2 * PAIRS * 2 * static_cast<int>(sizeof(Element)) / 16;
  static constexpr int LINES = VECTORS * 16 * 32 / 128;  // of 128 bytes
  // Of vectors. [V, K]: those of row g, then of row g + 8: 64 bytes of the row in 4 lanes. [K, V]: one per key.
  uint4 x[VECTORS];

  // Value of a tile's row g + 8 half.
  static __device__ int value_of(int group, int tile, int half) {
    return V_FIRST ? group + 8 * half : 2 * TILES * group + 2 * tile + half;
  }
  // The key of a pair's first half is .. (+ 64 `part` for the second warp that shares the keys).
  static __device__ int key_of(int pair, int column) {
    return V_FIRST && WIDE ? 16 * (pair / 2) + 4 * column + 2 * (pair % 2) : 32 * (pair / 4) + 8 * column + 2 * (pair % 4);
  }

  template <typename Visit>
  __device__ void visit(char* head, int pitch, int first_value, int part, int lane, Visit&& visit_vector) {
    const int group = lane / 4, column = lane % 4;
    if constexpr (V_FIRST) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        char* address = head + int64_t{first_value + group + 8 * half} * pitch + column * 16;
#pragma unroll
        for (int j = 0; j < VECTORS / 2; ++j)
          visit_vector(x[half * VECTORS / 2 + j], reinterpret_cast<uint4*>(address + 64 * j));
      }
    } else {
      char* address =
          head + int64_t{64 * part + 8 * column} * pitch + first_value * static_cast<int>(sizeof(Element)) + group * 16;
#pragma unroll
      for (int i = 0; i < VECTORS; ++i) {
        visit_vector(x[i], reinterpret_cast<uint4*>(address));
        address += i == 7 ? 25 * int64_t{pitch} : pitch;
      }
    }
  }
  __device__ void load(char* head, int pitch, int first_value, int part, int lane) {
    visit(head, pitch, first_value, part, lane, [](uint4& vector, const uint4* address) { vector = load_at_once(address); });
  }
  __device__ void store(char* head, int pitch, int first_value, int part, int lane) {
    visit(head, pitch, first_value, part, lane, [](const uint4& vector, uint4* address) { __stcs(address, vector); });
  }
  static __device__ void prefetch(const char* head, int pitch, int first_value, int part, int lines, int lane) {
    constexpr int ROW = !V_FIRST ? 1 : WIDE ? 4 : 2;  // lines of a row
#pragma unroll
    for (int i = 0; i < LINES; i += 32) {
      const int row = (V_FIRST ? first_value : 64 * part) + (lane + i) / ROW;
      const int first = V_FIRST ? lane % ROW * 128 : first_value * static_cast<int>(sizeof(Element));
      if (lane + i < lines) prefetch_line(head + int64_t{row} * pitch + first);
    }
  }

  __device__ uint32_t& word(int vector, int i) {
    uint4& v = x[vector];
    return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
  }
  // The word of an element of a state in fp32; of bf16, that of two keys ([V, K]) or of two halves of a tile ([K, V]).
  __device__ uint32_t& of(int tile, int half, int pair, int key) {
    if constexpr (V_FIRST && WIDE) return word(half * 8 + pair / 2, 2 * (pair % 2) + key);
    if constexpr (V_FIRST && !WIDE) return word(half * 4 + pair / 4, pair % 4);
    if constexpr (!V_FIRST && WIDE) return word(2 * pair + key, 2 * tile + half);
    return word(2 * pair + key, tile);
  }

  // sums += S^T [k, q] over one or two pairs of keys.
  __device__ void multiply(float (&sums)[4], float (&small)[4], int tile, int pair, const uint32_t (&operand)[PAIRS]) {
    if constexpr (WIDE) {
      const float2 b = numbers_of<Token>(operand[pair]);
      float a[4], upper[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a[i] = __uint_as_float(of(tile, i % 2, pair, i / 2));
        upper[i] = upper_part(a[i]);
        a[i] -= upper[i];
      }
      mma_tf32(sums, upper, b.x, b.y);
      mma_tf32(small, a, b.x, b.y);
    } else if (pair % 2 == 0) {
      uint32_t a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (V_FIRST) {
          a[i] = of(tile, i % 2, pair + i / 2, 0);
        } else {
          a[i] = __byte_perm(of(tile, 0, pair + i / 2, 0), of(tile, 0, pair + i / 2, 1), i % 2 == 0 ? 0x5410 : 0x7632);
        }
      }
      mma<Token>(sums, a, operand[pair], operand[pair + 1]);
    }
  }

  // S = factor S + written k^T at one pair of keys. `keys`: two k of this lane's token, of which it has the `second` one as
  // key `group` of the 8.
  __device__ void update(int tile, int pair, float factor, const float (&written)[2], uint32_t keys, bool second) {
    if constexpr (WIDE) {
      const float a[4] = {upper_part(written[0]), upper_part(written[1]), written[0] - upper_part(written[0]),
                          written[1] - upper_part(written[1])};
      const float2 both = numbers_of<Token>(keys);
      const float key = second ? both.y : both.x;
      float c[4] = {};
      mma_tf32(c, a, key, key);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t& bits = of(tile, i / 2, pair, i % 2);
        bits = __float_as_uint(fmaf(factor, __uint_as_float(bits), c[i]));
      }
    } else {
      float c[4];  // row g: both keys; row g + 8: both keys
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t bits = of(tile, i / 2, pair, i % 2);
        c[i] = factor * __uint_as_float((V_FIRST ? i % 2 : i / 2) == 0 ? bits << 16 : bits & 0xffff0000u);
      }
      uint32_t a[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t upper = pack_bf16(written[half], 0);
        a[half] = pack_bf16(__uint_as_float(upper << 16), written[half] - __uint_as_float(upper << 16));
      }
      mma_bf16(c, a[0], a[1], __byte_perm(keys, 0, second ? 0x3232 : 0x1010));
      if constexpr (V_FIRST) {
        of(tile, 0, pair, 0) = pack_bf16(c[0], c[1]);
        of(tile, 1, pair, 0) = pack_bf16(c[2], c[3]);
      } else {
        of(tile, 0, pair, 0) = pack_bf16(c[0], c[2]);
        of(tile, 0, pair, 1) = pack_bf16(c[1], c[3]);
      }
    }
  }
};

// How many of `blocks` an SM is to have at a time: 12 warps instead of 16 where the compiler needs more than 128 registers.
__host__ __device__ constexpr int blocks_of_tiles(int blocks) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
  return blocks * 3 / 4;
#else
  return blocks;
#endif
}

// ONCE: every sequence has call.T tokens, WARP_TOKENS at most; else they take turns (states in fp32).
template <typename State, bool ONCE, int WARPS, int BLOCKS>
__global__ void __launch_bounds__(32 * WARPS, blocks_of_tiles(BLOCKS)) tiles_kernel(const __grid_constant__ WarpCall call) {
  constexpr int TOKENS = WARP_TOKENS, TILES = State::TILES, SPLIT = State::SPLIT, PAIRS = State::PAIRS;
  extern __shared__ __align__(1024) uint8_t raw[];
  const int lane = static_cast<int>(threadIdx.x % 32), group = lane / 4, token = lane % 4;
  const WarpPlace place(call, State::VALUES, SPLIT);
  const int value_head = place.value_head;

  wait_for_earlier_kernels();
  if (call.early) allow_later_kernels();
  const int from = initial_row(call, place.n);
  State state;
  if (from >= 0) {
    state.load(call.initial.at(from, value_head), call.initial.pitch, place.first_value, place.part, lane);
  } else {
    state = {};
  }
  int batch = place.n, begin = 0, end = call.T;
  if constexpr (!ONCE) place.find(call, batch, begin, end);
  const int start = begin;

  while (true) {
    const int count = ONCE ? call.T : min(end - begin, call.state_per_token ? 1 : TOKENS);
    const bool last = ONCE || begin + count >= end;
    uint32_t operand[SPLIT][PAIRS] =
        {};  // column `group` of the products: k or q of token group / 2; first at this warp's keys
    if (group / 2 < count) {
      const char* row = (group % 2 == 0 ? call.k : call.q).at(batch, begin + group / 2, place.key_head);
#pragma unroll
      for (int part = 0; part < SPLIT; ++part) {
        constexpr int KEYS = State::V_FIRST && State::WIDE ? 4 : 8;  // of a vector
#pragma unroll
        for (int i = 0; i < PAIRS; i += KEYS / 2) {
          const char* address = row + 2 * (State::key_of(i, token) + 64 * (SPLIT == 1 ? 0 : part ^ place.part));
          if constexpr (KEYS == 4) {
            const uint2 vector = *reinterpret_cast<const uint2*>(address);
            operand[part][i] = vector.x, operand[part][i + 1] = vector.y;
          } else {
            const uint4 vector = *reinterpret_cast<const uint4*>(address);
            operand[part][i] = vector.x, operand[part][i + 1] = vector.y;
            operand[part][i + 2] = vector.z, operand[part][i + 3] = vector.w;
          }
        }
      }
    }
    Gates::Bits gates = {};
    // v of this lane's token: of rows g and g + 8 a number each ([V, K]), or of all its rows, two to a word.
    uint32_t v[State::V_FIRST ? 2 : TILES] = {};
    if (token < count) {
      gates = call.gate_bits(batch, begin + token, value_head);
      const char* row = call.v.at(batch, begin + token, value_head) + 2 * (place.first_value + State::value_of(group, 0, 0));
      if constexpr (State::V_FIRST) {
        v[0] = *reinterpret_cast<const uint16_t*>(row);
        v[1] = *reinterpret_cast<const uint16_t*>(row + 2 * State::value_of(0, 0, 1));
      } else if constexpr (TILES == 2) {
        const uint2 vector = *reinterpret_cast<const uint2*>(row);
        v[0] = vector.x, v[1] = vector.y;
      } else {
        const uint4 vector = *reinterpret_cast<const uint4*>(row);
        v[0] = vector.x, v[1] = vector.y, v[2] = vector.z, v[3] = vector.w;
      }
    }
#pragma unroll
    for (uint32_t& word : v) pin(word);
    int to = -1;  // row where the state after these tokens goes
    if (call.state_per_token ? count > 0 : last) {
      to = call.final.row_of(place.n, call.state_per_token ? begin - start : 0, call.index_type);
    }
    if constexpr (ONCE) {
      const char* head = state_ahead(call, place);
      if (head != nullptr) {
        State::prefetch(head, call.initial.pitch, place.first_value, place.part, call.lines_ahead, lane);
      }
    }

    // Products between the tokens: row g and columns 2 c (k_c) and 2 c + 1 (q_c) of the same operand with itself.
    float gram[SPLIT][4] = {};
#pragma unroll
    for (int part = 0; part < SPLIT; ++part) {
#pragma unroll
      for (int i = 0; i < PAIRS; i += 2) {
        const uint32_t rows[4] = {operand[part][i], 0, operand[part][i + 1], 0};
        mma<typename State::Token>(gram[part], rows, operand[part][i], operand[part][i + 1]);
      }
    }
    const float with_k = SPLIT == 1 ? gram[0][0] : gram[0][0] + gram[SPLIT - 1][0];
    const float with_q = SPLIT == 1 ? gram[0][1] : gram[0][1] + gram[SPLIT - 1][1];
    float key_factor = 1, query_factor = call.scale;
    const float k_k = __shfl_sync(ALL_LANES, with_k, 9 * token), q_q = __shfl_sync(ALL_LANES, with_q, 9 * token + 4);
    if (call.l2norm) {
      key_factor = rsqrtf(k_k + call.l2norm_eps);
      query_factor *= rsqrtf(q_q + call.l2norm_eps);
    }
    const float own_decay = token < count ? expf(call.gates.log_decay(gates, value_head)) : 1.0f;
    const float strength = token < count ? key_factor * call.gates.write_strength(gates) : 0.0f;
    float decay[TOKENS], key_products[TOKENS], query_products[TOKENS];  // of this lane's token with token t
    float total = 1;
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
      decay[t] = __shfl_sync(ALL_LANES, own_decay, t);
      key_products[t] = key_factor * __shfl_sync(ALL_LANES, with_k, 8 * t + token);
      query_products[t] = query_factor * __shfl_sync(ALL_LANES, with_q, 8 * t + token);
      total *= decay[t];
    }

    float sums[TILES][4] = {};  // S^T k_c, S^T q_c of row g; of row g + 8
#pragma unroll
    for (int m = 0; m < TILES; ++m) {
      float small[4] = {};
#pragma unroll
      for (int i = 0; i < PAIRS; ++i) state.multiply(sums[m], small, m, i, operand[0]);
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[m][i] += small[i];
    }
    if constexpr (SPLIT == 2) {
      auto* shared = reinterpret_cast<float4*>(raw) + threadIdx.x / 64 * (2 * TILES * 32) + lane;
#pragma unroll
      for (int m = 0; m < TILES; ++m) {
        shared[(place.part * TILES + m) * 32] = {sums[m][0], sums[m][1], sums[m][2], sums[m][3]};
      }
      __syncthreads();
#pragma unroll
      for (int m = 0; m < TILES; ++m) {
        const float4 other = shared[((place.part ^ 1) * TILES + m) * 32];
        sums[m][0] += other.x, sums[m][1] += other.y, sums[m][2] += other.z, sums[m][3] += other.w;
      }
    }

    // The recurrence: lanes of token t say what it writes, e_t, to those of the later ones.
    float written[TILES][2];  // e_t of this lane's token, with its decay up to the last one
    float outputs[TILES][2];
#pragma unroll
    for (int m = 0; m < TILES; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float read = key_factor * sums[m][2 * half], output = query_factor * sums[m][2 * half + 1], mine = 0;
        const float2 values = numbers_of<typename State::Token>(v[State::V_FIRST ? half : m]);
        const float value = State::V_FIRST || half == 0 ? values.x : values.y;
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) {
          if (token >= t) read *= decay[t], output *= decay[t];
          const float e = __shfl_sync(ALL_LANES, strength * (value - read), lane - token + t);
          if (token > t) read = fmaf(key_products[t], e, read);
          if (token >= t) output = fmaf(query_products[t], e, output);
          mine = token == t ? e : mine * decay[t];
        }
        written[m][half] = token < count ? mine : 0.0f;
        outputs[m][half] = output;
      }
    }
    if (token < count && (SPLIT == 1 || token % SPLIT == place.part)) {
      char* row = call.o.at(batch, begin + token, value_head) + 2 * (place.first_value + State::value_of(group, 0, 0));
      if constexpr (State::V_FIRST) {
        store_element(row, State::TOKEN, 0, outputs[0][0]);
        store_element(row, State::TOKEN, State::value_of(0, 0, 1), outputs[0][1]);
      } else {
        uint32_t words[TILES];
#pragma unroll
        for (int m = 0; m < TILES; ++m) words[m] = pack_numbers<typename State::Token>(outputs[m][0], outputs[m][1]);
        if constexpr (TILES == 2) {
          *reinterpret_cast<uint2*>(row) = {words[0], words[1]};
        } else {
          *reinterpret_cast<uint4*>(row) = {words[0], words[1], words[2], words[3]};
        }
      }
    }
    if (to >= 0 || !last) {
#pragma unroll
      for (int i = 0; i < PAIRS; ++i) {
        // Key `group` of the 8 in pair i of 4 lanes, of this lane's token: lanes of column 2 token have it.
        const uint32_t word = __shfl_sync(ALL_LANES, operand[0][i], 8 * token + group / 2);
#pragma unroll
        for (int m = 0; m < TILES; ++m) state.update(m, i, total, written[m], word, group % 2 != 0);
      }
    }
    if (to >= 0) state.store(call.final.at(to, value_head), call.final.pitch, place.first_value, place.part, lane);
    if (last) break;
    begin += count;
    if constexpr (SPLIT == 2) __syncthreads();
  }
  if constexpr (!ONCE) clear_unused_tokens(call, place, State::VALUES, lane);
}

}  // namespace flashdelta::cuda
