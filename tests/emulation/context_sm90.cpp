// The kernels of the Hopper forward's context parallelism, as they are, compiled for the CPU.
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>

#include "backend.hpp"
#include "tests/emulation/sm90.hpp"

#define cuda emulated_cuda
namespace flashdelta::cuda {
using std::max;
using std::min;
}  // namespace flashdelta::cuda
#include "cuda/context_fold_sm90.cu"
#include "cuda/context_plan_sm90.cu"
#include "cuda/context_sm90.cu"

namespace flashdelta::emulation {

ContextCounts read_context_counts(const fd_problem& p, void* workspace) {
  if (!cuda::may_split(p)) return {};
  const cuda::Workspace w(p, workspace);
  ContextCounts counts;
  counts.runs = w.plan->runs[0] + w.plan->runs[1];
  counts.pre_runs = w.plan->pre_runs;
  counts.pre_chunks = w.plan->chunks;
  counts.chains = w.plan->chains;
  for (std::int64_t i = 0; i < w.plan->pre_runs * p.HV; ++i) {
    counts.windows += w.windows[i] >= 0 ? 1 : 0;
    counts.skipped += std::max(w.windows[i], 0);
  }
  return counts;
}

}  // namespace flashdelta::emulation
