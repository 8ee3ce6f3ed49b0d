#include "tests/emulation/prepare_sm90.hpp"

#include <algorithm>
#include <bit>
#include <cmath>

#include "cuda/prepare_sm90.cu"
#include "cuda/tensor_map_sm90.hpp"

namespace flashdelta::emulation {

fd_status prepare(const fd_forward_args& args, Wave& wave, int sm_count, Schedule schedule) {
  const fd_problem& problem = *args.problem;
  const bool packed = args.cu_seqlens != nullptr;
  cuda::PrepareParameters parameters{.q = {},
                                     .k = {},
                                     .gates = cuda::Gates(args),
                                     .sequences = cuda::Sequences(args),
                                     .chunks = wave.chunks.data(),
                                     .scratch = wave.scratch,
                                     .slots = static_cast<int>(wave.chunks.size()),
                                     .heads = static_cast<int>(problem.H),
                                     .scale = static_cast<float>(problem.scale),
                                     .l2norm_eps = static_cast<float>(problem.l2norm_eps)};
  fd_status status = cuda::tensor_map(parameters.q, "q", args.q, problem, packed, problem.H, problem.K);
  if (status == FD_OK) status = cuda::tensor_map(parameters.k, "k", args.k, problem, packed, problem.H, problem.K);
  if (status != FD_OK) return status;
  cuda::schedule = schedule;
  return cuda::launch_prepare(parameters, problem.dtype == FD_BFLOAT16, problem.qk_l2norm != 0, sm_count, nullptr);
}

}  // namespace flashdelta::emulation
