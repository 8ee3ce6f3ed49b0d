// What the two kernels of the decode step for 128 keys share: a warp owns all keys of some values of one head's state, has
// them in registers from the load to the store, and waits for no other warp. See docs/kernels/step.md.
//
// A warp has some hundred instructions of work on 4 or 8 KB of a state, and in a small call nothing to do but wait for them
// in turn: addresses are made of 32-bit factors, and the state is on its way before anything else is looked at.
#pragma once

#include <limits>

#include "cuda/ptx.cuh"
#include "cuda/step.cuh"

namespace flashdelta::cuda {

constexpr int WARP_KEYS = 128;
constexpr int WARP_TOKENS = 4;  // at most, at once

// A tensor [B, T, heads, ..]. Strides in bytes.
struct TokenTensor {
  char* data;
  fd_dtype type;
  int32_t batch, token, head;

  __device__ char* at(int b, int t, int h) const {
    return data + int64_t{b} * batch + int64_t{t} * token + int64_t{h} * head;
  }
};

// States [rows, HV, .., ..] and who has which row.
struct StatePool {
  char* data;         // null: absent
  const void* index;  // null: sequence n has row n
  uint32_t row;       // strides in bytes
  int32_t head, pitch;
  int32_t index_n, index_slot;  // strides in elements
  int32_t rows, slots;

  // -1: none
  __device__ int row_of(int n, int slot, fd_index_dtype type) const {
    if (data == nullptr || slot < 0 || slot >= slots) return -1;
    if (index == nullptr) return n < rows ? n : -1;
    const int64_t i = int64_t{n} * index_n + int64_t{slot} * index_slot;
    if (type == FD_INT32) {
      const int found = static_cast<const int32_t*>(index)[i];
      return found < rows ? found : -1;  // a negative one is none, too
    }
    const int64_t found = static_cast<const int64_t*>(index)[i];
    return found >= 0 && found < rows ? static_cast<int>(found) : -1;
  }
  __device__ char* at(int r, int value_head) const {
    return data + uint64_t{static_cast<uint32_t>(r)} * row + int64_t{value_head} * head;
  }
};

struct WarpCall {
  TokenTensor q, k, v, o, g, beta;
  StatePool initial, final;
  Gates gates;
  const void *accepted, *cu_seqlens;  // as in StepParameters and Sequences
  fd_index_dtype index_type, cu_seqlens_type;
  int32_t N, T;
  int32_t ahead;           // how many sequences lie between a block and the one that follows when it ends
  int32_t lines_ahead;     // how many lines of 128 bytes of that one's state a warp brings into L2 meanwhile
  bool early;              // the next call's blocks are set up as soon as this one's run, else as they end
  uint32_t group_inverse;  // 2^32 / group, rounded up; 0: group is 1
  bool state_per_token, l2norm;
  float l2norm_eps, scale;

  __device__ int bound(int i) const {
    const int64_t x = load_index_element(cu_seqlens, cu_seqlens_type, i);
    return static_cast<int>(x < 0 ? 0 : x > T ? T : x);
  }
  __device__ Gates::Bits gate_bits(int b, int t, int h) const {
    Gates::Bits bits = {};
    if (gates.gate != FD_GATE_NONE) bits.g = load_bits(g.at(b, t, h), g.type, 0);
    if (gates.strength != FD_BETA_ONE) bits.beta = load_bits(beta.at(b, t, h), beta.type, 0);
    return bits;
  }
};

// Which part of a call a warp works on. The grid: value blocks, value heads, sequences.
struct WarpPlace {
  int n, value_head, key_head, first_value;
  int part;  // of the keys

  // `split` warps share the keys of `values` values.
  __device__ WarpPlace(const WarpCall& call, int values, int split)
      : n(static_cast<int>(blockIdx.z)), value_head(static_cast<int>(blockIdx.y)) {
    key_head = call.group_inverse == 0 ? value_head : static_cast<int>(uint64_t{blockIdx.y} * call.group_inverse >> 32);
    const int warp = static_cast<int>((blockIdx.x * blockDim.x + threadIdx.x) / 32);
    first_value = warp / split * values;
    part = warp % split;
  }
  // The tokens of the sequence.
  __device__ void find(const WarpCall& call, int& batch, int& begin, int& end) const {
    batch = n, begin = 0, end = call.T;
    if (call.cu_seqlens == nullptr) return;
    batch = 0, begin = call.bound(n), end = max(begin, call.bound(n + 1));
  }
};

// Row of the pool where the state of a sequence comes from. -1: none.
__device__ inline int initial_row(const WarpCall& call, int n) {
  int slot = 0;
  if (call.accepted != nullptr) {
    const int64_t accepted = load_index_element(call.accepted, call.index_type, n);
    slot = accepted >= 1 && accepted <= call.initial.slots ? static_cast<int>(accepted) - 1 : -1;
  }
  return call.initial.row_of(n, slot, call.index_type);
}

// Tokens of no sequence: zero, every N-th of them by the warps of sequence n.
__device__ inline void clear_unused_tokens(const WarpCall& call, const WarpPlace& place, int values, int lane) {
  if (call.cu_seqlens == nullptr) return;
  for (int token = call.bound(call.N) + place.n; token < call.T; token += call.N) {
    for (int i = lane; i < values; i += 32) {
      store_element(call.o.at(0, token, place.value_head), call.o.type, place.first_value + i, 0.0f);
    }
  }
}

// Of the sequence whose warps follow those that run now: where its state comes from. Null: there is none.
__device__ inline const char* state_ahead(const WarpCall& call, const WarpPlace& place) {
  const int n = place.n + call.ahead;
  if (n >= call.N) return nullptr;
  const int row = initial_row(call, n);
  return row >= 0 ? call.initial.at(row, place.value_head) : nullptr;
}

}  // namespace flashdelta::cuda
