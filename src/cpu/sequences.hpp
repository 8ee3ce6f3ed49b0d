// Where the sequences of a call lie, and which rows of the state pools belong to them. Reads the host arrays of a call in
// normal form: cu_seqlens, the index tensors, accepted.
#pragma once

#include <cstdint>

#include "dtype.hpp"
#include "flashdelta/flashdelta.h"

namespace flashdelta {

struct Sequence {
  std::int64_t batch;   // entry of the B dimension
  std::int64_t begin;   // its first token
  std::int64_t length;  // tokens, may be 0
};

inline Sequence sequence(const fd_problem& p, const void* cu_seqlens, std::int64_t n) {
  if (cu_seqlens == nullptr) return {n, 0, p.T};
  const std::int64_t begin = load_index(cu_seqlens, p.cu_seqlens_dtype, n);
  return {0, begin, load_index(cu_seqlens, p.cu_seqlens_dtype, n + 1) - begin};
}

// Tokens [used_tokens, T) belong to no sequence: they are never read, and zero in what is written.
inline std::int64_t used_tokens(const fd_problem& p, const void* cu_seqlens) {
  return cu_seqlens == nullptr ? p.T : load_index(cu_seqlens, p.cu_seqlens_dtype, p.N);
}

// Row of `states` for sequence n (slot: column of an [N, S] index); -1 if there is none.
inline std::int64_t state_row(const fd_tensor& states, const fd_index& index, fd_index_dtype type, std::int64_t n,
                              std::int64_t slot = 0) {
  if (states.data == nullptr) return -1;
  return index.data == nullptr ? n : load_index(index.data, type, n * index.stride[0] + slot * index.stride[1]);
}

// Row of initial_state that sequence n starts from; -1: from zero. Args: fd_forward_args or fd_backward_args.
template <typename Args>
std::int64_t initial_row(const Args& args, std::int64_t n) {
  return state_row(args.initial_state, args.initial_index, args.problem->index_dtype, n);
}

inline std::int64_t initial_row(const fd_step_args& args, std::int64_t n) {
  const fd_index_dtype type = args.problem->index_dtype;
  const std::int64_t slot = args.accepted == nullptr ? 0 : load_index(args.accepted, type, n) - 1;
  return state_row(args.initial_state, args.initial_index, type, n, slot);
}

// Row of final_state that takes sequence n's last state; -1: nowhere. Not for fd_step with final_slots > 0.
template <typename Args>
std::int64_t final_row(const Args& args, std::int64_t n) {
  return state_row(args.final_state, args.final_index, args.problem->index_dtype, n);
}

// fd_step with final_slots > 0: row that takes the state after token t of sequence n; -1: nowhere.
inline std::int64_t final_row(const fd_step_args& args, std::int64_t n, std::int64_t t) {
  if (t >= args.problem->final_slots) return -1;
  return state_row(args.final_state, args.final_index, args.problem->index_dtype, n, t);
}

// Row of checkpoints that takes sequence n's state after its first `tokens` tokens; -1: nowhere.
inline std::int64_t checkpoint_row(const fd_forward_args& args, std::int64_t n, std::int64_t tokens) {
  const fd_problem& p = *args.problem;
  if (p.checkpoint_interval == 0 || tokens == 0 || tokens % p.checkpoint_interval != 0) return -1;
  const std::int64_t slot = tokens / p.checkpoint_interval - 1;
  return slot < p.checkpoint_slots ? state_row(args.checkpoints, args.checkpoint_index, p.index_dtype, n, slot) : -1;
}

}  // namespace flashdelta
