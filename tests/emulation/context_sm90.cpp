// The kernels of the Hopper forward's context parallelism, as they are, compiled for the CPU.
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <stdexcept>

#include "backend.hpp"
#include "check.hpp"
#include "tests/emulation/sm90.hpp"

#define cuda emulated_cuda
namespace flashdelta::cuda {
using std::max;
using std::min;
}  // namespace flashdelta::cuda
#include "cuda/context_fold_sm90.cu"
#include "cuda/context_plan_sm90.cu"
#include "cuda/context_sm90.cu"
#include "cuda/context_walk_sm90.cu"

namespace flashdelta::emulation {

ContextCounts read_context_counts(const fd_problem& p, void* workspace) {
  const cuda::RunLimits most = cuda::run_limits(p);
  if (!most.split() && !most.shapes) return {};
  const cuda::Workspace w(p, most, workspace);
  ContextCounts counts;
  counts.runs = w.plan->runs[0] + w.plan->runs[1];
  counts.pre_runs = w.plan->pre_runs;
  counts.pre_chunks = w.plan->chunks;
  counts.chains = w.plan->chains;
  counts.shape = static_cast<int>(p.V / cuda::VALUES / w.plan->value_blocks);
  counts.may_cut = most.split();
  for (std::int64_t i = 0; i < w.plan->pre_runs * p.HV; ++i) {
    counts.windows += w.windows[i] >= 0 ? 1 : 0;
    counts.skipped += std::max(w.windows[i], 0);
  }
  return counts;
}

std::optional<ContextCounts> plan(const std::vector<std::int64_t>& lengths, std::int64_t H, std::int64_t HV, bool constant,
                                  int sm_count) {
  std::vector<std::int64_t> cu_seqlens = {0};
  for (const std::int64_t length : lengths) cu_seqlens.push_back(cu_seqlens.back() + length);
  std::vector<float> g(static_cast<std::size_t>(cu_seqlens.back() * HV));
  for (std::size_t i = 0; i < g.size(); ++i) g[i] = constant || i % 4 == 3 ? 0.0f : -0.05f;
  fd_problem given = {};
  given.size = sizeof(given);
  given.B = 1, given.T = cu_seqlens.back(), given.N = static_cast<std::int64_t>(lengths.size());
  given.H = H, given.HV = HV, given.K = given.V = 128;
  given.dtype = FD_BFLOAT16;
  given.gate = FD_GATE_LOG;
  const fd_problem problem = normalise(Operation::forward, given);
  const cuda::RunLimits most = cuda::run_limits(problem);
  if (!most.split() && !most.shapes) return std::nullopt;
  fd_forward_args args = {};
  args.problem = &problem;
  args.g = {g.data(), {0, HV, 1, 0}};
  args.cu_seqlens = cu_seqlens.data();
  // As large as the query says, but never touched where only later kernels write.
  const std::unique_ptr<unsigned char[]> memory(new unsigned char[cuda::runs_workspace(problem)]);
  const cuda::Workspace w(problem, most, memory.get());
  if (cuda::launch_plan(cuda::plan_parameters(args, most, w, sm_count), nullptr) != FD_OK)
    throw std::runtime_error(fd_last_error());
  if (most.split()) std::fill_n(w.windows, w.plan->pre_runs * HV, -1);
  return read_context_counts(problem, memory.get());
}

}  // namespace flashdelta::emulation
