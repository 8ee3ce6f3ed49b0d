#include "tests/emulation/chain_sm90.hpp"

#include <bit>
#include <cmath>
#include <limits>
#include <utility>

#include "cuda/chain_sm90.cu"
#include "cuda/tensor_map_sm90.hpp"

namespace flashdelta::emulation {

fd_status chain(const fd_backward_args& args, const cuda::Scratch& scratch, const std::vector<std::vector<cuda::Run>>& waves,
                int sm_count, Schedule schedule) {
  const fd_problem& problem = *args.problem;
  const bool packed = args.cu_seqlens != nullptr;
  cuda::ChainParameters p{
      .q = {},
      .k = {},
      .do_ = {},
      .dv = {},
      .has_do = args.do_.data != nullptr,
      .has_dv = args.dv.data != nullptr,
      .sequences = cuda::Sequences(args),
      .scratch = scratch,
      .runs = nullptr,
      .run_count = 0,
      .heads = static_cast<int>(problem.H),
      .full = false,
      .initial = cuda::Pool(args.initial_state, problem.initial_dtype, problem.initial_rows, args.initial_index,
                            problem.index_dtype, problem.initial_slots),
      .dfinal = cuda::Pool(args.dfinal_state, problem.final_dtype, problem.N, {}, problem.index_dtype, 0),
      .dinitial = cuda::Pool(args.dinitial_state, problem.initial_dtype, problem.N, {}, problem.index_dtype, 0),
      .state_v_first = problem.state_v_first,
      .starts = nullptr,
      .start_stride = 0,
      .carry_out = nullptr,
      .scale = static_cast<float>(problem.scale)};
  fd_status status = cuda::tensor_map(p.q, "q", args.q, problem, packed, problem.H, problem.K);
  if (status == FD_OK) status = cuda::tensor_map(p.k, "k", args.k, problem, packed, problem.H, problem.K);
  if (status == FD_OK && p.has_do != 0) {
    status = cuda::tensor_map(p.do_, "do", args.do_, problem, packed, problem.HV, problem.V);
  }
  if (status == FD_OK && p.has_dv != 0) {
    status = cuda::tensor_map(p.dv, "dv", args.dv, problem, packed, problem.HV, problem.V);
  }
  cuda::schedule = schedule;
  const auto state = static_cast<std::size_t>(problem.HV * problem.V * problem.K);
  std::vector<float> in(state, std::numeric_limits<float>::quiet_NaN()), out(in);
  for (auto wave = waves.rbegin(); status == FD_OK && wave != waves.rend(); ++wave) {
    p.runs = wave->data();
    p.run_count = static_cast<int>(wave->size());
    p.full = scratch.value_blocks % 2 == 0 && p.run_count * scratch.value_heads * scratch.value_blocks > sm_count;
    p.starts = in.data();
    p.carry_out = out.data();
    status = cuda::launch_chain(p, problem.dtype == FD_BFLOAT16, sm_count, nullptr);
    std::swap(in, out);
    out.assign(state, std::numeric_limits<float>::quiet_NaN());
  }
  return status;
}

}  // namespace flashdelta::emulation
