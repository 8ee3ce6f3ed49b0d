// The gradient of one chunk of tokens, as tiles: what src/cpu/backward.cpp runs over sequences, heads and threads. The
// formulas are those of docs/math.md, "Backward"; docs/kernels/cpu.md draws the flow.
//
// A group is a query/key head with its G value heads. Work on a chunk comes at three levels, each with its struct of tiles:
//   KeyChunk    once per group: q and k, their products
//   HeadChunk   once per value head: decays and write strengths, the triangular matrices
//   value block columns [j, j + width) of v and of the state, which neither chain mixes with other columns: `advance` and
//               `reverse`. What a value head sums over its blocks is a Partial.
// All tiles are packed fp32 of the workspace. Rows of tokens past the end of a sequence are zero, with log decay 0 and write
// strength 0: they change nothing.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/cpu.hpp"
#include "cpu/sequences.hpp"
#include "cpu/vector.hpp"
#include "flashdelta/flashdelta.h"

namespace flashdelta {

constexpr std::int64_t kBackwardChunk = 32;        // C: tokens of a chunk
constexpr std::int64_t kBackwardValueBlock = 128;  // columns of v and of the state worked on at a time, at most

// Sizes that follow from the problem.
struct BackwardShape {
  std::int64_t K, V, G;
  std::int64_t K_row;   // K as a number of columns of a packed tile
  std::int64_t blocks;  // value blocks
  std::int64_t width;   // columns of a block (the last may have fewer), also their room in packed tiles

  explicit BackwardShape(const fd_problem&);
  std::int64_t units() const { return G * blocks; }  // of a group: value block u % blocks of its value head u / blocks
  std::int64_t columns(std::int64_t block) const;    // of the caller's tensors
  std::int64_t padded_columns(std::int64_t block) const { return round_up(columns(block), 16); }
  std::int64_t state() const { return K * width; }  // floats of one block's state
};

// One value block of one value head of one sequence.
struct ValueBlock {
  Sequence sequence;
  std::int64_t value_head;
  std::int64_t block;
};

struct KeyChunk {
  std::int64_t token, rows;  // first token in the batch entry, tokens
  float* qk;                 // [2C][K_row]: rows of q, then of k; normalised
  float* qk_t;               // [K][2C], its transpose
  float* gram;               // [2C][C]: Q K^T with a zero diagonal, then K K^T
  float* qk_diagonal;        // [C]: the diagonal of Q K^T
  float* rstd;               // [2C], of the l2 norm

  KeyChunk(const BackwardShape&, Arena&);
};

struct HeadChunk {
  float* log_decay;      // [C]
  float* beta;           // [C]
  float* read_decay;     // [2C]: scale e^gamma, then -e^gamma
  float* write_scale;    // [C]: beta e^(gamma_C - gamma); gamma: sum of log decays from the chunk's start, inclusive
  float* decay;          // [C][C], lower: e^(gamma_i - gamma_j); its last row is the decay to the chunk's end
  float* overlap;        // [C][C], strictly lower: decay .* K K^T
  float* write_overlap;  // [C][C]: overlap with beta on its columns
  float* read;           // [C][C], lower: scale decay .* Q K^T

  HeadChunk(const BackwardShape&, Arena&);
  float chunk_decay() const { return -read_decay[2 * kBackwardChunk - 1]; }                   // e^gamma_C
  const float* write_decay() const { return decay + (kBackwardChunk - 1) * kBackwardChunk; }  // e^(gamma_C - gamma)
};

// What value blocks contribute to the gradients of one value head, one contiguous array.
struct Partial {
  float* read_t;     // [K][2C]: (scale e^gamma .* do) S^T, then (-e^gamma .* dv) S^T, transposed
  float* write_t;    // [K][C]: dS R^T
  float* within;     // [2C][C]: do R^T, then dv R^T
  float* dbeta;      // [C]: <dV', R> per token
  float* state_dot;  // [16], the first counts: <dS, S>

  Partial(const BackwardShape&, Arena&);
  static std::int64_t size(const BackwardShape&);
  void add(const BackwardShape&, const Partial&) const;
};

// Sums over the value heads of a group.
struct KeyGradient {
  float* read_t;  // [K][2C]: dq^T, dk^T but for what stays within the chunk
  float* within;  // [2C][C]: sums of dP, and of -E
  float* dqk;     // [2C][K_row]

  KeyGradient(const BackwardShape&, Arena&);
};

// Scratch of a thread for one value block.
struct BlockScratch {
  float* block;     // [2C][width]
  float* scaled;    // [2C][width]
  float* scaled_t;  // [width][2C]
  float* r_t;       // [width][C]
  float* vectors;   // [8][2C + K]
  float* state;     // state_scratch()

  BlockScratch(const BackwardShape&, Arena&);
};

class BackwardKernels {
 public:
  BackwardKernels(const fd_backward_args& args) : args_(args), p_(*args.problem), shape_(p_), vector_(vector_kernels()) {}

  const BackwardShape& shape() const { return shape_; }

  // k of chunk `chunk` of a sequence and K K^T; with_q also q and Q K^T.
  void load_keys(const Sequence&, std::int64_t query_head, std::int64_t chunk, bool with_q, KeyChunk&) const;

  // Gates, write strengths and triangular matrices of one value head. for_reverse: all of them, else what `advance` needs.
  void load_head(const Sequence&, std::int64_t value_head, const KeyChunk&, bool for_reverse, HeadChunk&) const;

  // The block's part of a state tensor's row to a packed tile and back; row -1: zeros, nothing.
  void load_state(const ValueBlock&, const fd_tensor&, fd_dtype, std::int64_t row, float* state, const BlockScratch&) const;
  void store_state(const ValueBlock&, const fd_tensor&, fd_dtype, std::int64_t row, const float* state,
                   const BlockScratch&) const;

  // R of the chunk (math.md), [C][width]; and the state after it, unless `next` is null. next may be state.
  void advance(const ValueBlock&, const KeyChunk&, const HeadChunk&, const float* state, float* r, float* next,
               const BlockScratch&) const;

  // The chunk's dv (stored) and contributions to other gradients, from the state before it, R and the gradient of the state
  // after it; dstate becomes the gradient of the state before it.
  void reverse(const ValueBlock&, const KeyChunk&, const HeadChunk&, const float* state, const float* r, float* dstate,
               const Partial&, const BlockScratch&) const;

  // dg and dbeta (stored) of a value head from the sum of its blocks, which is overwritten; adds to the group's sums, or
  // starts them. parameter_sums: this chunk's contributions to dA_log and ddt_bias.
  void finish_head(const Sequence&, std::int64_t value_head, const KeyChunk&, const HeadChunk&, const Partial&, bool first,
                   const KeyGradient&, double* parameter_sums, const BlockScratch&) const;

  // dq and dk (stored).
  void finish_keys(const Sequence&, std::int64_t query_head, const KeyChunk&, const KeyGradient&, const BlockScratch&) const;

 private:
  const fd_backward_args& args_;
  const fd_problem& p_;
  BackwardShape shape_;
  const VectorKernels& vector_;
};

}  // namespace flashdelta
