// What the Hopper forward kernel is given, and how to launch it.
#pragma once

#include <cuda.h>

#include "cuda/device.hpp"
#include "cuda/inputs.cuh"
#include "cuda/tiling_sm90.hpp"

namespace flashdelta::cuda {

// Consecutive chunks of one sequence that a block walks. The run that reaches the sequence's end writes its last state.
struct ForwardRun {
  int sequence;
  int first, end;  // chunks of the sequence; a sequence without tokens has a run without chunks
  int start;       // row of `starts` with the state before the run; -1: the call's initial state
};

struct ForwardParameters {
  CUtensorMap q, k, v, o;
  View output;  // o again, for its rows past the last sequence
  Gates gates;
  Sequences sequences;
  Pool initial, final, checkpoints;
  const ForwardRun* runs;  // [*run_count] on the device, longest first; null: each sequence is one run, as they come
  const int* run_count;
  const float* starts;      // [rows][HV][V][K]
  unsigned int* next_item;  // null: items are dealt out in turn
  int64_t checkpoint_interval;
  float* saved;  // [saved_rows][HV][V][K], states before every segment but a sequence's first; null: not wanted
  int heads, value_heads, values, value_blocks;
  int items;  // without `runs`
  int state_v_first;
  int initial_bytes;  // of a head's initial state, where its elements lie together on multiples of 16 bytes; else 0
  float scale, l2norm_eps;
};

// Launches the kernel whose blocks take 64 * `state_warpgroups` (1 or 2) values of a head.
fd_status launch_forward(const ForwardParameters&, int state_warpgroups, bool bfloat16, bool l2norm, dim3 grid,
                         void* stream);

}  // namespace flashdelta::cuda
