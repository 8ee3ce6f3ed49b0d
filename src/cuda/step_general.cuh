// The decode step in general: any K and V, types and alignment of states, up to 8 tokens at once. See docs/kernels/step.md.
//
// Memory-bound: what counts is that each state is read once and written once, 16 bytes per access, with many bytes in
// flight. Value rows of a state are independent, so a block owns all keys and 128 bytes' worth of values (32 or 64) of one
// head of one sequence, and keeps them in registers from the first token to the last: 8 vectors of 16 bytes per thread.
//
//   state slice -> registers ---------------+-> S^T k_t, S^T q_t of all tokens ---+-> S = D S + sum k_t d_t^T -> memory
//   k, q, v, gates -> shared -> k.k, q.k ---'   (from the state before them) --> d_t, o_t, one value column per thread
//
// Tokens are taken up to 8 at a time; step.cu has the formulas.
#pragma once

#include <type_traits>

#include "cuda/ptx.cuh"
#include "cuda/step.cuh"

namespace flashdelta::cuda {

constexpr int MAX_TOKENS = 8;   // taken at once
constexpr int VECTORS = 8;      // of 16 bytes (8 where a state of 2-byte elements meets one of 4) per thread
constexpr int LANES_INNER = 8;  // threads side by side along the contiguous dimension of the state
// How a block of KEYS threads holds its slice. Thread groups of 8 lie along the contiguous ("inner") dimension of the state,
// the groups along the other ("outer") one. VECTOR: elements of a vector.
//   [K, V]: outer = key, 8 per thread; inner = value, one vector per thread
//   [V, K]: outer = value; inner = key, INNER vectors per thread
template <bool V_FIRST_, int VECTOR_, int KEYS_>
struct Shape {
  static constexpr bool V_FIRST = V_FIRST_;
  static constexpr int VECTOR = VECTOR_;
  static constexpr int KEYS = KEYS_;  // K, rounded up
  static constexpr int THREADS = KEYS;
  static constexpr int WARPS = THREADS / 32;
  static constexpr int VALUES = LANES_INNER * VECTOR;
  static constexpr int INNER = V_FIRST ? KEYS / VALUES : 1;
  static constexpr int OUTER = VECTORS / INNER;
  static constexpr int PARTS = V_FIRST ? 1 : WARPS;  // partial sums over the keys, one per warp that shares a value
  // 5 blocks of 128 threads per SM (96 registers) with 32 state elements per thread, 3 with 64 (4 would spill): 80 or 48 KB
  // of loads in flight, where some 25 KB cover the latency of the memory.
  static constexpr int BLOCKS_PER_SM = (VECTOR == 4 ? 5 : 3) * 128 / THREADS;
};

// Dynamic shared memory, in floats, for C = capacity tokens.
template <typename S>
struct SharedMemory {
  float* k;         // [C][KEYS], zero past K
  float* q;         // [C][KEYS]
  float* sums;      // [C][2][PARTS][VALUES]  S^T k_t and S^T q_t
  float* delta;     // [C][VALUES]  first v_t, then d_t
  float* products;  // [C][C]  [t][s] for s <= t: D_ts k_s . q_t; for s > t: D_st k_s . k_t
  float* decay;     // [C]  exp(g_t)
  float* strength;  // [C]  beta_t

  __device__ SharedMemory(float* base, int C) {
    k = base;
    q = k + C * S::KEYS;
    sums = q + C * S::KEYS;
    delta = sums + C * 2 * S::PARTS * S::VALUES;
    products = delta + C * S::VALUES;
    decay = products + C * C;
    strength = decay + C;
  }
  static std::size_t bytes(int C) {
    const int per_token = 2 * S::KEYS + 2 * S::PARTS * S::VALUES + S::VALUES + C + 2;
    return static_cast<std::size_t>(C * per_token) * sizeof(float);
  }
};

// A vector as it lies in memory, of `bytes` bytes (the rest is zero).
__device__ inline uint4 load_vector(const char* address, Access access, int bytes) {
  if (access == Access::whole16) return load_once(reinterpret_cast<const uint4*>(address));
  if (access == Access::whole8) {
    const uint2 x = load_once(reinterpret_cast<const uint2*>(address));
    return {x.x, x.y, 0, 0};
  }
  const auto* piece = reinterpret_cast<const uint16_t*>(address);
  uint32_t words[4] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (4 * i < bytes) words[i] = piece[2 * i] | static_cast<uint32_t>(piece[2 * i + 1]) << 16;
  }
  return {words[0], words[1], words[2], words[3]};
}

__device__ inline void store_vector(char* address, Access access, int bytes, const uint4& x) {
  if (access == Access::whole16) {
    __stcs(reinterpret_cast<uint4*>(address), x);
  } else if (access == Access::whole8) {
    __stcs(reinterpret_cast<uint2*>(address), make_uint2(x.x, x.y));
  } else {
    auto* piece = reinterpret_cast<uint16_t*>(address);
    const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (4 * i >= bytes) break;
      piece[2 * i] = static_cast<uint16_t>(words[i]);
      piece[2 * i + 1] = static_cast<uint16_t>(words[i] >> 16);
    }
  }
}

// Between a vector in memory and its elements.
template <int VECTOR>
__device__ void unpack_vector(float (&x)[VECTOR], const uint4& raw, fd_dtype type) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
  const bool fp32 = VECTOR == 4 && type == FD_FLOAT32;
#pragma unroll
  for (int i = 0; i < VECTOR / 2; ++i) {
    x[2 * i] = __uint_as_float(fp32 ? words[2 * i % 4] : words[i] << 16);
    x[2 * i + 1] = __uint_as_float(fp32 ? words[(2 * i + 1) % 4] : words[i] & 0xffff0000u);
  }
}

template <int VECTOR>
__device__ uint4 pack_vector(const float (&x)[VECTOR], fd_dtype type) {
  uint32_t words[4] = {};
  const bool fp32 = VECTOR == 4 && type == FD_FLOAT32;
#pragma unroll
  for (int i = 0; i < VECTOR / 2; ++i) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
    words[i] = static_cast<uint32_t>(__bfloat16_as_ushort(pair.y)) << 16 | __bfloat16_as_ushort(pair.x);
  }
  if (fp32) {
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = __float_as_uint(x[i]);
  }
  return {words[0], words[1], words[2], words[3]};
}

// The slice of one state that a block works on, spread over its threads' registers.
template <typename S>
struct Slice {
  float x[VECTORS][S::VECTOR];
  int thread, lane, warp;

  __device__ explicit Slice(int thread_index) : thread(thread_index), lane(thread_index % 32), warp(thread_index / 32) {}

  __device__ int outer(int i) const { return thread / LANES_INNER * S::OUTER + i / S::INNER; }
  __device__ int inner(int i) const { return (i % S::INNER) * S::VALUES + thread % LANES_INNER * S::VECTOR; }

  // visit(i, address) for each vector i that lies inside the state; `first` is the address of the slice's first element.
  template <typename Visit>
  __device__ void visit(char* first, const View& states, int keys, int values, Visit visit) const {
    const int size = states.type == FD_FLOAT32 ? 4 : 2;
    char* address = first + (outer(0) * states.stride[2] + inner(0)) * size;
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
      const bool inside = outer(i) < (S::V_FIRST ? values : keys) && inner(i) < (S::V_FIRST ? keys : values);
      if (inside) visit(i, address + i % S::INNER * S::VALUES * size);
      if (i % S::INNER == S::INNER - 1) address += states.stride[2] * size;
    }
  }

  // Starts the loads; unpack() waits for them.
  __device__ void load(uint4 (&raw)[VECTORS], char* first, const View& states, Access access, int keys, int values) const {
    if (access == Access::whole16) {
      visit(first, states, keys, values, [&](int i, char* address) { raw[i] = load_vector(address, Access::whole16, 16); });
    } else if (S::VECTOR == 4 && access == Access::whole8) {
      visit(first, states, keys, values, [&](int i, char* address) { raw[i] = load_vector(address, Access::whole8, 8); });
    } else {
      const int bytes = S::VECTOR == 4 && states.type == FD_FLOAT32 ? 16 : 2 * S::VECTOR;
      visit(first, states, keys, values,
            [&](int i, char* address) { raw[i] = load_vector(address, Access::pieces, bytes); });
    }
  }

  __device__ void unpack(const uint4 (&raw)[VECTORS], fd_dtype type) {
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) unpack_vector<S::VECTOR>(x[i], raw[i], type);
  }

  __device__ void store(char* first, const View& states, Access access, int keys, int values) const {
    const auto whole = [&](auto kind) {
      visit(first, states, keys, values, [&](int i, char* address) {
        const fd_dtype type = kind == Access::whole16 && S::VECTOR == 4 ? FD_FLOAT32 : FD_BFLOAT16;
        store_vector(address, kind, 16, pack_vector<S::VECTOR>(x[i], type));
      });
    };
    if (access == Access::whole16) {
      whole(std::integral_constant<Access, Access::whole16>{});
    } else if (S::VECTOR == 4 && access == Access::whole8) {
      whole(std::integral_constant<Access, Access::whole8>{});
    } else {
      const int bytes = S::VECTOR == 4 && states.type == FD_FLOAT32 ? 16 : 2 * S::VECTOR;
      visit(first, states, keys, values, [&](int i, char* address) {
        store_vector(address, Access::pieces, bytes, pack_vector<S::VECTOR>(x[i], states.type));
      });
    }
  }

  // sums[0] and sums[1], [PARTS][VALUES] each: S^T k and S^T q, for k and q of KEYS elements in shared memory.
  __device__ void dot(float* sums, const float* k, const float* q) const {
    if constexpr (S::V_FIRST) {
      float dots[2 * S::OUTER] = {};
#pragma unroll
      for (int j = 0; j < S::INNER; ++j) {
#pragma unroll
        for (int e = 0; e < S::VECTOR; ++e) {
          const float key = k[inner(j) + e], query = q[inner(j) + e];
#pragma unroll
          for (int r = 0; r < S::OUTER; ++r) {
            dots[r] = fmaf(key, x[r * S::INNER + j][e], dots[r]);
            dots[S::OUTER + r] = fmaf(query, x[r * S::INNER + j][e], dots[S::OUTER + r]);
          }
        }
      }
      constexpr int SHARE = S::OUTER >= 4 ? S::OUTER / 4 : 1;
      const int position = sum_and_share<2 * S::OUTER, 4, 1>(dots, lane);
      constexpr int SPARE = S::OUTER < 4 ? 4 / S::OUTER - 1 : 0;  // lanes that differ in these bits hold the same sum
      if ((lane & SPARE) == 0) {
        float* row = sums + position / S::OUTER * S::VALUES + thread / LANES_INNER * S::OUTER + position % S::OUTER;
#pragma unroll
        for (int i = 0; i < SHARE; ++i) row[i] = dots[i];
      }
    } else {
      float dots[2 * S::VECTOR] = {};
#pragma unroll
      for (int i = 0; i < VECTORS; ++i) {
        const float key = k[outer(0) + i], query = q[outer(0) + i];
#pragma unroll
        for (int e = 0; e < S::VECTOR; ++e) {
          dots[e] = fmaf(key, x[i][e], dots[e]);
          dots[S::VECTOR + e] = fmaf(query, x[i][e], dots[S::VECTOR + e]);
        }
      }
      const int position = sum_and_share<2 * S::VECTOR, 16, 8>(dots, lane);
      float* row = sums + (position / S::VECTOR * S::PARTS + warp) * S::VALUES + inner(0) + position % S::VECTOR;
#pragma unroll
      for (int i = 0; i < S::VECTOR / 2; ++i) row[i] = dots[i];
    }
  }

  __device__ void decay(float factor) {
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
#pragma unroll
      for (int e = 0; e < S::VECTOR; ++e) x[i][e] *= factor;
    }
  }

  // S += k delta^T
  __device__ void add(const float* k, const float* delta) {
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
#pragma unroll
      for (int e = 0; e < S::VECTOR; ++e) {
        const float key = S::V_FIRST ? k[inner(i) + e] : k[outer(i)];
        x[i][e] = fmaf(key, S::V_FIRST ? delta[outer(i)] : delta[inner(i) + e], x[i][e]);
      }
    }
  }
};

// Address of value `first_value` of a head's state in a row of a pool.
template <typename S>
__device__ char* slice_address(const View& states, int64_t row, int value_head, int first_value) {
  const int64_t offset =
      row * states.stride[0] + value_head * states.stride[1] + first_value * (S::V_FIRST ? states.stride[2] : 1);
  return static_cast<char*>(states.data) + offset * (states.type == FD_FLOAT32 ? 4 : 2);
}

// Brings tokens begin .. begin + count into shared memory: k, q, v, decays, write strengths. One token per warp.
template <typename S>
__device__ void stage(const SharedMemory<S>& shared, const StepParameters& p, int batch, int begin, int count,
                      int value_head, int first_value, int thread) {
  const int lane = thread % 32;
#pragma unroll 1
  for (int i = thread; i < count * S::VALUES; i += S::THREADS) {
    const int t = i / S::VALUES, value = first_value + i % S::VALUES;
    shared.delta[i] = value < p.V ? p.v[p.v.at(batch, begin + t, value_head) + value] : 0.0f;
  }
#pragma unroll 1
  for (int t = thread / 32; t < count; t += S::WARPS) {
    float k[S::KEYS / 32], q[S::KEYS / 32];
    load_row(k, p.k, p.k.at(batch, begin + t, value_head / p.group), p.K, lane);
    load_row(q, p.q, p.q.at(batch, begin + t, value_head / p.group), p.K, lane);
    const float log_decay = p.gates.log_decay(batch, begin + t, value_head);
    const float strength = p.gates.write_strength(batch, begin + t, value_head);
    const float k_factor = p.l2norm ? l2norm_factor(k, p.l2norm_eps) : 1.0f;
    const float q_factor = p.l2norm ? l2norm_factor(q, p.l2norm_eps) : 1.0f;
#pragma unroll
    for (int i = 0; i < S::KEYS / 32; ++i) {
      shared.k[t * S::KEYS + lane + 32 * i] = k[i] * k_factor;
      shared.q[t * S::KEYS + lane + 32 * i] = q[i] * q_factor;
    }
    if (lane == 0) {
      shared.decay[t] = expf(log_decay);
      shared.strength[t] = strength;
    }
  }
}

// The table `products`: one pair of tokens per warp at a time.
template <typename S>
__device__ void multiply_tokens(const SharedMemory<S>& shared, int capacity, int count, int thread) {
  const int lane = thread % 32;
#pragma unroll 1
  for (int pair = thread / 32; pair < count * count; pair += S::WARPS) {
    const int t = pair / count, s = pair % count;
    const float* a = (s <= t ? shared.q : shared.k) + t * S::KEYS;
    const float* b = shared.k + s * S::KEYS;
    float sum = 0;
#pragma unroll
    for (int i = 0; i < S::KEYS / 32; ++i) sum = fmaf(a[lane + 32 * i], b[lane + 32 * i], sum);
    sum = sum_of_warp(sum);
#pragma unroll 1
    for (int i = min(s, t) + 1; i <= max(s, t); ++i) sum *= shared.decay[i];
    if (lane == 0) shared.products[t * capacity + s] = sum;
  }
}

// The recurrence between the tokens, for one value: leaves d_t in `delta` and writes o_t.
template <typename S>
__device__ void recur(const SharedMemory<S>& shared, const StepParameters& p, int batch, int begin, int count,
                      int value_head, int first_value, int column) {
  float total = 1;  // D_t
#pragma unroll 1
  for (int t = 0; t < count; ++t) {
    total *= shared.decay[t];
    float read = 0, output = 0;
#pragma unroll
    for (int part = 0; part < S::PARTS; ++part) {
      read += shared.sums[(2 * t * S::PARTS + part) * S::VALUES + column];
      output += shared.sums[((2 * t + 1) * S::PARTS + part) * S::VALUES + column];
    }
    read *= total;
    output *= total;
#pragma unroll 1
    for (int s = 0; s < t; ++s) {
      const float delta = shared.delta[s * S::VALUES + column];
      read = fmaf(shared.products[s * p.capacity + t], delta, read);
      output = fmaf(shared.products[t * p.capacity + s], delta, output);
    }
    const float delta = shared.strength[t] * (shared.delta[t * S::VALUES + column] - read);
    shared.delta[t * S::VALUES + column] = delta;
    output = fmaf(shared.products[t * p.capacity + t], delta, output);
    const int value = first_value + column;
    if (value < p.V) {
      store_element(p.o.data, p.o.type, p.o.at(batch, begin + t, value_head) + value, p.scale * output);
    }
  }
}

template <typename S>
__global__ void __launch_bounds__(S::THREADS, S::BLOCKS_PER_SM) step_kernel(const __grid_constant__ StepParameters p) {
  extern __shared__ __align__(1024) uint8_t raw[];
  const SharedMemory<S> shared(reinterpret_cast<float*>(raw), p.capacity);
  const int thread = static_cast<int>(threadIdx.x);
  const int n = static_cast<int>(blockIdx.x / static_cast<unsigned>(p.value_blocks * p.HV));
  const int head_block = static_cast<int>(blockIdx.x % static_cast<unsigned>(p.value_blocks * p.HV));
  const int value_head = head_block / p.value_blocks, first_value = head_block % p.value_blocks * S::VALUES;
  const int values = p.V - first_value;  // of this block; at most VALUES count

  wait_for_earlier_kernels();
  allow_later_kernels();
  const int64_t slot = p.accepted == nullptr ? 0 : load_index_element(p.accepted, p.initial.type, n) - 1;
  const int64_t initial_row = p.initial.row(n, slot);
  Slice<S> slice(thread);
  uint4 loaded[VECTORS] = {};
  if (initial_row >= 0) {
    char* first = slice_address<S>(p.initial.states, initial_row, value_head, first_value);
    slice.load(loaded, first, p.initial.states, p.initial_access, p.K, values);
  }
  const TokenRange tokens = p.sequences[n];
  const int64_t final_row = p.state_per_token ? -1 : p.final.row(n, 0);  // where the last state goes; -1: nowhere

  const int batch = static_cast<int>(tokens.batch), end = static_cast<int>(tokens.end);
  int begin = static_cast<int>(tokens.begin);
  int count = min(end - begin, p.capacity);
  stage(shared, p, batch, begin, count, value_head, first_value, thread);
  __syncthreads();
  multiply_tokens(shared, p.capacity, count, thread);
  slice.unpack(loaded, p.initial.states.type);
  while (true) {
#pragma unroll 1
    for (int t = 0; t < count; ++t) {
      slice.dot(shared.sums + 2 * t * S::PARTS * S::VALUES, shared.k + t * S::KEYS, shared.q + t * S::KEYS);
    }
    __syncthreads();
    if (thread < S::VALUES) {
      recur(shared, p, batch, begin, count, value_head, first_value, thread);
      if (!p.state_per_token) {  // each token's contribution to the state after the last
        float rest = 1;
#pragma unroll 1
        for (int t = count - 1; t >= 0; --t) {
          shared.delta[t * S::VALUES + thread] *= rest;
          rest *= shared.decay[t];
        }
      }
    }
    __syncthreads();
    if (!p.state_per_token) {
      float total = 1;
#pragma unroll 1
      for (int t = 0; t < count; ++t) total *= shared.decay[t];
      slice.decay(total);
    }
#pragma unroll 1
    for (int t = 0; t == 0 || t < count; ++t) {  // once even without a token, to pass the state on
      if (t < count) {
        if (p.state_per_token) slice.decay(shared.decay[t]);
        slice.add(shared.k + t * S::KEYS, shared.delta + t * S::VALUES);
      }
      int64_t row = -1;
      if (p.state_per_token && t < count) row = p.final.row(n, begin - static_cast<int>(tokens.begin) + t);
      if (!p.state_per_token && begin + t + 1 >= end) row = final_row;
      if (row < 0) continue;
      char* first = slice_address<S>(p.final.states, row, value_head, first_value);
      slice.store(first, p.final.states, p.final_access, p.K, values);
    }
    begin += count;
    count = min(end - begin, p.capacity);
    if (count == 0) break;
    __syncthreads();
    stage(shared, p, batch, begin, count, value_head, first_value, thread);
    __syncthreads();
    multiply_tokens(shared, p.capacity, count, thread);
  }
  // Tokens of no sequence: the blocks of sequence n write zero to every N-th of them.
  for (int64_t token = p.sequences.used_tokens() + n; token < p.sequences.T; token += p.sequences.N) {
    if (thread < S::VALUES && thread < values) {
      store_element(p.o.data, p.o.type, p.o.at(batch, token, value_head) + first_value + thread, 0.0f);
    }
  }
}

}  // namespace flashdelta::cuda
