#include "tests/emulation/states_sm90.hpp"

#include <algorithm>
#include <bit>
#include <cmath>

#include "cuda/states_sm90.cu"
#include "cuda/tensor_map_sm90.hpp"

namespace flashdelta::emulation {

fd_status states(const fd_forward_args& args, const Wave& wave, const std::vector<cuda::Run>& runs,
                 const StatesSetting& setting) {
  const fd_problem& problem = *args.problem;
  const bool packed = args.cu_seqlens != nullptr;
  cuda::StatesParameters p{
      .k = {},
      .v = {},
      .sequences = cuda::Sequences(args),
      .scratch = wave.scratch,
      .runs = runs.data(),
      .run_count = static_cast<int>(runs.size()),
      .heads = static_cast<int>(problem.H),
      .row_blocks = wave.scratch.value_blocks + (setting.transitions != nullptr ? 2 : 0),
      .initial = cuda::Pool(args.initial_state, problem.initial_dtype, problem.initial_rows, args.initial_index,
                            problem.index_dtype, problem.initial_slots),
      .state_v_first = problem.state_v_first,
      .saved = setting.saved,
      .save = setting.save,
      .transitions = setting.transitions,
      .gradient_windows = setting.gradient_windows,
  };
  if (!setting.tiles) p.scratch.s = p.scratch.r = nullptr;
  fd_status status = cuda::tensor_map(p.k, "k", args.k, problem, packed, problem.H, problem.K);
  if (status == FD_OK) status = cuda::tensor_map(p.v, "v", args.v, problem, packed, problem.HV, problem.V);
  if (status != FD_OK) return status;
  cuda::schedule = setting.schedule;
  return cuda::launch_states(p, problem.dtype == FD_BFLOAT16, setting.sm_count, nullptr);
}

}  // namespace flashdelta::emulation
