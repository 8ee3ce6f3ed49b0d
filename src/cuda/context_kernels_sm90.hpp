// The kernels of context parallelism: what they are given, what they leave for each other, and how to launch them.
#pragma once

#include <cuda.h>

#include "backend.hpp"
#include "cuda/context_cost_sm90.hpp"
#include "cuda/forward_sm90.hpp"

namespace flashdelta::cuda {

constexpr int MOST_SPLIT_HEADS = 256;  // more of them fill every GPU without cutting sequences
constexpr int MOST_RUNS = 64;          // of a sequence that is cut
constexpr int MOST_SMS = 132;  // of a Hopper GPU: whether sequences may be cut, and workspaces, do not depend on the device
constexpr int MOST_CHAINS = 3 * MOST_SMS;

// What the planner leaves on the device.
struct Plan {
  int runs[2];           // of the forward in its first shape and in its second; the one not chosen has none
  int pre_runs, chunks;  // of the pre-pass
  int chains;            // sequences that are cut
  int exact_heads;       // that seem to need transitions
  int value_blocks;      // of a head in the shape that was chosen
  unsigned next_item;    // of the forward
  unsigned next_walk;    // of the pre-pass
};

// A run of the pre-pass.
struct PreRun {
  int sequence;
  int first_chunk, chunks;  // of the sequence
  int start;                // row of its first state
};

// A sequence that is cut.
struct Chain {
  int sequence;
  int runs;
  int start;    // row of the first run's first state
  int pre_run;  // of the first run
};

// One block orders all runs, longest first, and cuts sequences where that pays.
struct PlanParameters {
  Sequences sequences;
  Gates gates;
  int64_t B;
  int value_heads;
  Machine shape[2];     // shapes of the forward
  int shapes;           // how many of them there are
  int may_split;        // whether sequences may be cut
  int forced;           // they are where there are enough chunks
  int64_t most_chunks;  // of all sequences that they may be cut
  int shortest;         // run, in chunks
  float log_bound;      // log2 of what the decay over a window must come down to
  Plan* plan;
  ForwardRun* runs;
  PreRun* pre_runs;
  Chain* chains;
  int* heads;  // value heads, those that decay least first
};

fd_status launch_plan(const PlanParameters&, void* stream);

// Finds where the runs of the pre-pass may start.
struct WindowParameters {
  Sequences sequences;
  Gates gates;
  View k;
  int heads, value_heads, l2norm;
  float l2norm_eps;
  float log_bound;  // -inf: nothing is skipped
  const Plan* plan;
  const PreRun* runs;
  int* windows;  // [pre_runs][HV]: where the run starts, from zero; -1: it starts at its beginning, from the state there
};

// `pre_runs`: that there may be.
fd_status launch_windows(const WindowParameters&, bool bfloat16, int64_t pre_runs, void* stream);

// Finds the last states of the pre-pass's runs and, where all chunks of a run count that does not begin its sequence, the
// transition. Where they do not, the last state is the next run's first.
struct WalkParameters {
  CUtensorMap k, v;
  Sequences sequences;
  Gates gates;
  Pool initial;
  int state_v_first;
  int heads, value_heads, value_blocks;
  float l2norm_eps;
  Plan* plan;
  const PreRun* runs;
  const int* windows;         // [pre_runs][HV]
  const int* heads_in_order;  // [HV]: those with most to do come first
  float* outcomes;            // [pre_runs][HV][V + K][K]: values' rows, then the transition's, each of K keys
  float* starts;              // [rows][HV][V][K]
};

fd_status launch_walk(const WalkParameters&, bool bfloat16, bool l2norm, int64_t pre_runs, int sm_count, void* stream);

// Finds the states before the other runs of cut sequences.
struct FoldParameters {
  int value_heads, values;
  const Plan* plan;
  const Chain* chains;
  const int* windows;         // [pre_runs][HV]
  const int* heads_in_order;  // [HV]
  const float* outcomes;      // [pre_runs][HV][V + K][K]
  float* starts;              // [rows][HV][V][K]
};

// `chains`: that there may be.
fd_status launch_fold(const FoldParameters&, int64_t chains, int sm_count, void* stream);

}  // namespace flashdelta::cuda
