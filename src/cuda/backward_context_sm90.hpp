// The backward's context parallelism: segments of a sequence are walked back by several SMs at once. A segment's gradient of
// the state before it is affine in that after it, dS_in = M^T dS_out + C, so that all of them follow from a pre-pass:
//
//   windows  for each segment and head: do the first chunks alone decide dS_in, the rest having decayed below the bound?
//   Then
//            C is found from them, and M counts as zero
//   states   beside S and R, M of every segment that neither begins nor ends its sequence nor has a window (states_sm90.hpp)
//   chain    C of every segment that does not begin its sequence, from zero; where it ends it, dS_in itself
//            (chain_sm90.hpp)
//   fold     gradients after all segments but the last, from segment to segment
//
// and the chain then walks the segments as if each was a sequence. See docs/kernels.md.
#pragma once

#include "backend.hpp"
#include "cuda/tiling_sm90.hpp"

namespace flashdelta::cuda {

// Whether the segments of such a call are walked at once. Pure, and no function of the limit on the workspace, on which no
// result may depend.
bool splits_backward(const fd_problem&);

// Finds windows.
struct GradientWindowParameters {
  Sequences sequences;
  Gates gates;
  View k;
  int heads, value_heads, l2norm;
  float l2norm_eps;
  float log_bound;      // log2 of what the decay over a window must come down to; -inf: there are no windows
  const Run* segments;  // [segment_count]
  int segment_count;
  int* windows;  // [segment_count][HV]: the first chunks that decide the segment's outcome, from zero; -1: all do
};

fd_status launch_gradient_windows(const GradientWindowParameters&, bool bfloat16, void* stream);

// The fold of a wave's pieces, each from its last segment to its first.
struct GradientFoldParameters {
  Sequences sequences;
  const Run* pieces;    // [piece_count]
  const Run* segments;  // [segment_count]
  int piece_count, segment_count;
  int value_heads, values;
  const int* windows;     // [segment_count][HV]
  const float* outcomes;  // [segment_count][HV][V + K][K]: C, then M, which takes the gradient's rows from the left
  float* starts;          // [segment_count][HV][V][K]: the gradient after every segment that does not end its sequence
  const float* carry_in;  // [HV][V][K]: after a piece that does not end its sequence
  float* carry_out;       // [HV][V][K]: before a piece that does not begin its sequence
};

fd_status launch_gradient_fold(const GradientFoldParameters&, void* stream);

}  // namespace flashdelta::cuda
