// The kernels of context parallelism beside those of prepare_sm90.hpp and states_sm90.hpp: what they are given, what they
// leave for each other, and how to launch them.
#pragma once

#include "backend.hpp"
#include "cuda/context_cost_sm90.hpp"
#include "cuda/forward_sm90.hpp"

namespace flashdelta::cuda {

constexpr int MOST_SPLIT_HEADS = 256;  // more of them fill every GPU without cutting sequences
constexpr int MOST_RUNS = 64;          // of a sequence that is cut

// What the planner leaves on the device.
struct Plan {
  int runs[2];  // of the forward in the shape for whole sequences, and in that for runs; the shape not chosen has none
  int pre_runs, chunks;  // of the pre-pass
  int chains;            // sequences that are cut
  unsigned next_item;    // of the forward
  unsigned next_walk;    // of the pre-pass
};

// A sequence that is cut.
struct Chain {
  int sequence;
  int runs;
  int start;    // row of the first run's first state
  int pre_run;  // of the first run
  int slot;     // of the first chunk
};

// One block orders all runs, longest first, and cuts sequences where that pays.
struct PlanParameters {
  Sequences sequences;
  Gates gates;
  int64_t B;
  Machine plain, split;  // split.blocks = 0: no sequence is cut
  int forced;            // sequences are cut where there are enough chunks
  int shapes;            // 2: the forward of whole sequences has a shape of its own
  int64_t most_chunks;   // of all sequences that they may be cut
  int shortest;          // run, in chunks
  float log_bound;       // log2 of what the decay over a window must come down to
  Plan* plan;
  ForwardRun* runs;
  Run* pre_runs;
  Chain* chains;
};

fd_status launch_plan(const PlanParameters&, void* stream);

// Finds where the runs of the pre-pass may start, and lists their chunks.
struct WindowParameters {
  Sequences sequences;
  Gates gates;
  View k;
  int heads, value_heads, l2norm;
  float l2norm_eps;
  float log_bound;  // -inf: nothing is skipped
  const Plan* plan;
  const Run* runs;
  int* windows;     // [pre_runs][HV]: where the run starts, from zero; -1: it starts at its beginning, from the state there
  uint8_t* needed;  // [chunks][HV]: whether a chunk is walked
  ChunkPlace* chunks;  // of all runs
};

// `pre_runs`: that there may be.
fd_status launch_windows(const WindowParameters&, bool bfloat16, int64_t pre_runs, void* stream);

// Finds the states before all runs of cut sequences.
struct FoldParameters {
  Pool initial;
  int state_v_first;
  int value_heads, values;
  const Plan* plan;
  const Chain* chains;
  const int* windows;     // [pre_runs][HV]
  const float* outcomes;  // [pre_runs][HV][V + K][K]: values' rows, then the transition's, each of K keys
  float* starts;          // [rows][HV][V][K]
};

// `chains`: that there may be.
fd_status launch_fold(const FoldParameters&, int64_t chains, int sm_count, void* stream);

}  // namespace flashdelta::cuda
