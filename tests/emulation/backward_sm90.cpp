#include "tests/emulation/backward_sm90.hpp"

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>

#include "check.hpp"
#include "tests/emulation/sm90.hpp"
#include "tests/support/tensor.hpp"

#define cuda emulated_cuda
#include "cuda/backward_sm90.cu"
#include "cuda/device.hpp"

namespace flashdelta::emulation {
namespace {

fd_status run(const fd_backward_args* call, bool save) try {
  fd_backward_args args = read(call);
  const fd_problem given = read(args.problem);
  const fd_problem problem = normalise(Operation::backward, given);
  testing::Memory saved(cuda::saved_bytes(problem)),
      o(static_cast<std::size_t>(problem.B * problem.T * problem.HV * problem.V) * 2);
  if (save && cuda::saved_bytes(problem) > 0) {
    fd_forward_args forward_args{};
    forward_args.size = sizeof(forward_args);
    forward_args.problem = args.problem;
    forward_args.q = args.q, forward_args.k = args.k, forward_args.v = args.v;
    forward_args.g = args.g, forward_args.beta = args.beta;
    forward_args.A_log = args.A_log, forward_args.dt_bias = args.dt_bias;
    forward_args.cu_seqlens = args.cu_seqlens;
    forward_args.initial_state = args.initial_state, forward_args.initial_index = args.initial_index;
    forward_args.o.data = o.data();
    forward_args.saved = saved.data();
    forward_args.saved_bytes = cuda::saved_bytes(problem);
    const fd_status status = forward(&forward_args, nullptr, 0, nullptr);
    if (status != FD_OK) return status;
    args.saved = saved.data();
    args.saved_bytes = cuda::saved_bytes(problem);
  }
  args.problem = &problem;
  check(args, given.N > 0, {"saved", nullptr, 0, false}, {"workspace", nullptr, 0, true});
  cuda::device.sm_count = hopper.sm_count;
  cuda::schedule = hopper.schedule;
  if (hopper.cu_seqlens != nullptr) args.cu_seqlens = hopper.cu_seqlens;
  testing::Memory workspace(cuda::backward_workspace(problem));
  const fd_status status = cuda::run_backward(args, workspace.data(), hopper.sm_count, nullptr);
  if (!workspace.guards_intact()) throw std::runtime_error("the call wrote outside its workspace");
  return status;
} catch (const Refusal& refusal) {
  return fail(refusal.status, refusal.message);
}

}  // namespace

fd_status backward(const fd_backward_args* args, void*, std::size_t, void*) { return run(args, false); }
fd_status backward_from_saved(const fd_backward_args* args, void*, std::size_t, void*) { return run(args, true); }

}  // namespace flashdelta::emulation
