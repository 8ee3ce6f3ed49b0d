// The Hopper backend's source, compiled for the CPU: the include path has tests/emulation in front of src, so that
// cuda/ptx.cuh, cuda/ptx_sm90.cuh and cuda/device.hpp are the ones here.
#include "tests/emulation/sm90.hpp"

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <stdexcept>
#include <string>

#include "backend.hpp"
#include "check.hpp"
#include "dtype.hpp"
#include "tests/support/tensor.hpp"

// In a build with CUDA the real namespace is in the same program.
#define cuda emulated_cuda
#include "cuda/backend_sm90.cu"
#include "cuda/forward_sm90.cu"

namespace flashdelta::emulation {

Hopper hopper;
ContextCounts context_counts;

fd_status forward(const fd_forward_args* call, void*, std::size_t, void*) try {
  fd_forward_args args = read(call);
  const fd_problem given = read(args.problem);
  const fd_problem problem = normalise(Operation::forward, given);
  args.problem = &problem;
  const std::string reason = sm90_backend.unsupported(Operation::forward, problem);
  if (!reason.empty()) return fail(FD_UNSUPPORTED, reason);
  check(args, given.N > 0, {"saved", args.saved, sm90_backend.saved(problem), true}, {"workspace", nullptr, 0, true});

  cuda::device.sm_count = hopper.sm_count;
  cuda::schedule = hopper.schedule;
  if (hopper.cu_seqlens != nullptr) args.cu_seqlens = hopper.cu_seqlens;
  testing::Memory workspace(sm90_backend.workspace(Operation::forward, problem));
  const fd_status status = sm90_backend.forward(args, workspace.data(), nullptr);
  if (!workspace.guards_intact()) throw std::runtime_error("the call wrote outside its workspace");
  context_counts = read_context_counts(problem, workspace.data());
  return status;
} catch (const Refusal& refusal) {
  return fail(refusal.status, refusal.message);
}

}  // namespace flashdelta::emulation
