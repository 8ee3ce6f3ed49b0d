// What kernels read of a call besides the big tensors' tiles: elements of any type, gates, sequence bounds, rows of pools.
// Passed by value in kernel parameters; the host side of each struct is built from a call in normal form.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <bit>
#include <cstdint>

#include "dtype.hpp"
#include "flashdelta/flashdelta.h"

namespace flashdelta::cuda {

__device__ inline float load_element(const void* data, fd_dtype type, int64_t i) {
  if (type == FD_FLOAT32) return static_cast<const float*>(data)[i];
  if (type == FD_BFLOAT16) return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
  return __half2float(static_cast<const __half*>(data)[i]);
}
// An element as it lies in memory, and what it is: apart, so that nobody waits for one load before the next is under way.
__device__ inline uint32_t load_bits(const void* data, fd_dtype type, int64_t i) {
  return type == FD_FLOAT32 ? static_cast<const uint32_t*>(data)[i] : static_cast<const uint16_t*>(data)[i];
}
__device__ inline float element_of(uint32_t bits, fd_dtype type) {
  if (type == FD_FLOAT32) return std::bit_cast<float>(bits);
  if (type == FD_BFLOAT16) return std::bit_cast<float>(bits << 16);
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

__device__ inline void store_element(void* data, fd_dtype type, int64_t i, float x) {
  if (type == FD_FLOAT32) {
    static_cast<float*>(data)[i] = x;
  } else if (type == FD_BFLOAT16) {
    static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16_rn(x);
  } else {
    static_cast<__half*>(data)[i] = __float2half_rn(x);
  }
}

__device__ inline int64_t load_index_element(const void* data, fd_index_dtype type, int64_t i) {
  return type == FD_INT32 ? static_cast<const int32_t*>(data)[i] : static_cast<const int64_t*>(data)[i];
}

// A tensor of any element type.
struct View {
  void* data;  // null: absent
  fd_dtype type;
  int64_t stride[4];

  View(const fd_tensor& tensor, fd_dtype dtype) : data(tensor.data), type(dtype) {
    for (int i = 0; i < 4; ++i) stride[i] = tensor.stride[i];
  }
  __device__ float operator[](int64_t i) const { return load_element(data, type, i); }
  // Offset of [batch, token, head, 0] of a [B, T, heads, ..] tensor.
  __device__ int64_t at(int64_t batch, int64_t token, int64_t head) const {
    return batch * stride[0] + token * stride[1] + head * stride[2];
  }
};

// Log decay and write strength of each token.
struct Gates {
  View g, beta, A_log, dt_bias;
  fd_gate gate;
  fd_beta strength;
  float largest;  // factor of sigmoid(beta)

  template <typename Args>
  explicit Gates(const Args& args)
      : g(args.g, args.problem->gate_dtype),
        beta(args.beta, args.problem->beta_dtype),
        A_log(args.A_log, args.problem->A_log_dtype),
        dt_bias(args.dt_bias, args.problem->dt_bias_dtype),
        gate(args.problem->gate),
        strength(args.problem->beta),
        largest(args.problem->allow_neg_eigval != 0 ? 2.0f : 1.0f) {}

  // What a token's decay and write strength are computed from, as it lies in memory.
  struct Bits {
    uint32_t g, beta;
  };

  __device__ Bits bits(int64_t batch, int64_t token, int64_t value_head) const {
    Bits bits = gate_bits(batch, token, value_head);
    if (strength != FD_BETA_ONE) bits.beta = load_bits(beta.data, beta.type, beta.at(batch, token, value_head));
    return bits;
  }
  __device__ Bits gate_bits(int64_t batch, int64_t token, int64_t value_head) const {
    return {gate == FD_GATE_NONE ? 0 : load_bits(g.data, g.type, g.at(batch, token, value_head)), 0};
  }

  // Natural logarithm of the decay, <= 0.
  __device__ float log_decay(const Bits& bits, int64_t value_head) const {
    if (gate == FD_GATE_NONE) return 0.0f;
    const float x = element_of(bits.g, g.type);
    if (gate == FD_GATE_LOG) return x;
    const float bias = dt_bias.data == nullptr ? 0.0f : dt_bias[value_head * dt_bias.stride[0]];
    const float y = x + bias;
    const float softplus = fmaxf(y, 0.0f) + log1pf(expf(-fabsf(y)));
    return -expf(A_log[value_head * A_log.stride[0]]) * softplus;
  }
  __device__ float log_decay(int64_t batch, int64_t token, int64_t value_head) const {
    return log_decay(gate_bits(batch, token, value_head), value_head);
  }

  __device__ float write_strength(const Bits& bits) const {
    if (strength == FD_BETA_ONE) return 1.0f;
    const float x = element_of(bits.beta, beta.type);
    return strength == FD_BETA_VALUE ? x : largest / (1.0f + expf(-x));
  }
  __device__ float write_strength(int64_t batch, int64_t token, int64_t value_head) const {
    return write_strength(bits(batch, token, value_head));
  }
};

// Tokens [begin, end) of batch entry `batch`.
struct TokenRange {
  int64_t batch, begin, end;
};

// Where the sequences of a call lie. Bounds from the device are clamped to [0, T] and to non-decreasing pairs.
struct Sequences {
  const void* cu_seqlens;  // [N + 1]; null: sequence n is batch entry n
  fd_index_dtype type;
  int64_t N, T;

  template <typename Args>
  explicit Sequences(const Args& args)
      : cu_seqlens(args.cu_seqlens), type(args.problem->cu_seqlens_dtype), N(args.problem->N), T(args.problem->T) {}

  __device__ int64_t bound(int64_t i) const {
    const int64_t x = load_index_element(cu_seqlens, type, i);
    return x < 0 ? 0 : (x > T ? T : x);
  }
  __device__ TokenRange operator[](int64_t n) const {
    if (cu_seqlens == nullptr) return {n, 0, T};
    const int64_t begin = bound(n), end = bound(n + 1);
    return {0, begin, end > begin ? end : begin};
  }
  // Tokens from here on belong to no sequence: zero in outputs.
  __device__ int64_t used_tokens() const { return cu_seqlens == nullptr ? T : bound(N); }
};

// Rows of a tensor of states, picked by an index tensor. An index outside the rows counts as -1.
struct Pool {
  View states;  // [rows, HV, K, V] or [rows, HV, V, K]
  int64_t rows;
  const void* index;  // [N] or [N, slots]; null: sequence n has row n
  fd_index_dtype type;
  int64_t stride[2];
  int64_t slots;  // >= 1

  Pool(const fd_tensor& tensor, fd_dtype dtype, int64_t row_count, const fd_index& indices, fd_index_dtype index_dtype,
       int64_t slot_count)
      : states(tensor, dtype),
        rows(row_count),
        index(indices.data),
        type(index_dtype),
        stride{indices.stride[0], slot_count > 0 ? indices.stride[1] : 0},
        slots(slot_count > 0 ? slot_count : 1) {}

  // Row of sequence n, or -1: none.
  __device__ int64_t row(int64_t n, int64_t slot) const {
    if (states.data == nullptr || slot < 0 || slot >= slots) return -1;
    const int64_t row = index == nullptr ? n : load_index_element(index, type, n * stride[0] + slot * stride[1]);
    return row >= 0 && row < rows ? row : -1;
  }
};

}  // namespace flashdelta::cuda
