// Context parallelism: a sequence is cut into runs of chunks that several SMs walk at once. A run's last state is affine in
// its first, S_out = M S_in + B, so that the first states of all runs follow from a pre-pass:
//
//   plan      longest sequences into runs, on the device from cu_seqlens; all runs in order of length
//   windows   for each run of the pre-pass and head: do the last chunks alone decide its last state, the rest having
//             decayed below the bound? Then the run starts there, from zero, and M counts as zero
//   walk      B, and M where it counts, of every run but each sequence's last
//   fold      first states, run after run
//
// and the forward then walks the runs as if each was a sequence. See docs/kernels.md.
#pragma once

#include "backend.hpp"
#include "cuda/forward_sm90.hpp"

namespace flashdelta::cuda {

// State warpgroups of the forward's blocks, 1 or 2, where sequences are walked whole.
int shape_of_sequences(const fd_problem&, int sm_count);

// How much of everything a call may need at most. Pure.
struct RunLimits {
  int64_t runs;      // of the forward
  int64_t pre_runs;  // of the pre-pass; 0: no sequence is cut
  int64_t chunks;    // of all sequences
  int64_t chains;    // sequences that are cut
  int64_t starts;    // their runs
  int shape;         // of the forward, if it is certain that sequences are cut; 0: as the planner finds
  bool shapes;       // whether the planner chooses the forward's shape
  bool split() const { return pre_runs > 0; }
};
RunLimits run_limits(const fd_problem&);

// Whether the forward has to wait for `plan_runs`; else sequences come as they are. Pure.
bool needs_plan(const fd_problem&, const RunLimits&, int sm_count);

// Bytes of `plan_runs`'s workspace. Pure.
std::size_t runs_workspace(const fd_problem&);

// The forward's runs, on the device. It is launched in each shape (state warpgroups) that has a count; at most one count is
// not zero.
struct ForwardRuns {
  const ForwardRun* runs;
  int shape[2];
  const int* count[2];
  const float* starts;
  unsigned int* next_item;
};

// Enqueues what comes before the forward: puts the runs in order and, if sequences may be cut, finds their first states. `k`
// and `v`: tensor maps. The workspace may hold anything.
fd_status plan_runs(const fd_forward_args&, const RunLimits&, const CUtensorMap& k, const CUtensorMap& v, ForwardRuns&,
                    int sm_count, void* workspace, void* stream);

}  // namespace flashdelta::cuda
