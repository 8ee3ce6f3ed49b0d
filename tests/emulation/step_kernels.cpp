// The decode step's source, compiled for the CPU.
#include "tests/emulation/step_kernels.hpp"

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <string>

#include "backend.hpp"
#include "check.hpp"
#include "dtype.hpp"

// In a build with CUDA the real names are in the same program.
#define cuda emulated_cuda
#define cuda_backend emulated_cuda_backend
namespace flashdelta::cuda {
using std::max;
using std::min;
}  // namespace flashdelta::cuda
namespace flashdelta {
extern const Backend cuda_backend;
}
#include "cuda/ptx_sm90.cuh"
#include "cuda/step.cu"

namespace flashdelta::emulation {

fd_status step(const fd_step_args* call, void* workspace, std::size_t, void*) try {
  fd_step_args args = read(call);
  const fd_problem given = read(args.problem);
  const fd_problem problem = normalise(Operation::step, given);
  args.problem = &problem;
  const std::string reason = cuda_backend.unsupported(Operation::step, problem);
  if (!reason.empty()) return fail(FD_UNSUPPORTED, reason);
  check(args, given.N > 0, {"workspace", nullptr, 0, true});
  return cuda_backend.step(args, workspace, nullptr);
} catch (const Refusal& refusal) {
  return fail(refusal.status, refusal.message);
}

}  // namespace flashdelta::emulation
