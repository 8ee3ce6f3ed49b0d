// Rows of the decode step: a few tokens per sequence, states updated in place in a pool that is rotated over more than 256
// MB, rows in mixed order; q and k normalised inside.
#include <algorithm>
#include <numeric>
#include <random>
#include <vector>

#include "bench/gpu_kernels.hpp"
#include "bench/gpu_timing.hpp"

namespace flashdelta::bench {
namespace {

struct StepRow {
  Row row;
  const Machine* machine;
};

void run(benchmark::State& state, const StepRow& what) {
  const Row& row = what.row;
  const Machine& machine = *what.machine;
  const std::int64_t N = row.sequences(), T = row.lengths[0];
  const fd_dtype type = row.state_type == "bfloat16" ? FD_BFLOAT16 : FD_FLOAT32;
  const Work needed = work(row);
  const std::int64_t copies = static_cast<std::int64_t>(ROTATED_BYTES) / static_cast<std::int64_t>(needed.bytes / 2) + 2;
  const std::int64_t rows = copies * N;

  fd_problem problem{};
  problem.size = sizeof(problem);
  problem.B = N, problem.T = T, problem.H = row.H, problem.HV = row.HV, problem.K = problem.V = HEAD_DIM;
  problem.device = FD_CUDA;
  problem.backend = FD_BACKEND_CUDA;  // by name: no other may serve a row
  problem.dtype = FD_BFLOAT16;
  problem.initial_dtype = problem.final_dtype = type;
  problem.gate = FD_GATE_LOG;
  problem.beta = FD_BETA_VALUE;
  problem.qk_l2norm = 1;
  problem.state_v_first = row.layout == "v_first" ? 1 : 0;
  problem.initial_rows = problem.final_rows = rows;
  problem.index_dtype = FD_INT32;
  fd_backend backend;
  if (!served(state, fd_step_backend(&problem, &backend))) return;
  std::size_t workspace_bytes = 0;
  must(fd_step_workspace(&problem, &workspace_bytes));
  const DeviceMemory workspace(workspace_bytes);

  std::uint64_t seed = 0;
  const auto made = [&](std::int64_t count, fd_dtype element, Fill fill_with) {
    DeviceMemory memory(static_cast<std::size_t>(count) * (element == FD_FLOAT32 ? 4 : 2));
    fill(memory.data(), element, static_cast<std::size_t>(count), fill_with, row.HV, ++seed, machine.stream);
    return memory;
  };
  const std::int64_t keys = N * T * row.H * HEAD_DIM, values = N * T * row.HV * HEAD_DIM, gates = N * T * row.HV;
  const DeviceMemory q = made(keys, FD_BFLOAT16, Fill::normal), k = made(keys, FD_BFLOAT16, Fill::normal);
  const DeviceMemory v = made(values, FD_BFLOAT16, Fill::normal), o(v.bytes());
  const DeviceMemory g = made(gates, FD_FLOAT32, Fill::gate), beta = made(gates, FD_FLOAT32, Fill::strength);
  const DeviceMemory pool = made(rows * row.HV * HEAD_DIM * HEAD_DIM, type, Fill::normal);
  std::vector<std::int32_t> order(static_cast<std::size_t>(rows));  // each call has its own rows
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), std::mt19937_64(7));
  const DeviceMemory index = upload(order);

  fd_step_args args{};
  args.size = sizeof(args);
  args.problem = &problem;
  args.q.data = q.data();
  args.k.data = k.data();
  args.v.data = v.data();
  args.g.data = g.data();
  args.beta.data = beta.data();
  args.o.data = o.data();
  args.initial_state.data = args.final_state.data = pool.data();
  const auto call = [&](std::int64_t i, cudaStream_t stream) {
    args.initial_index.data = args.final_index.data = static_cast<const std::int32_t*>(index.data()) + i % copies * N;
    must(fd_step(&args, workspace.data(), workspace_bytes, stream));
  };
  Graph graph(machine.stream, static_cast<int>(std::max<std::int64_t>(copies, 8)), call);
  measure(state, machine, row, graph, needed, [&] { call(0, machine.stream); });
}

}  // namespace

void register_step(const Machine& machine, const Row& row) {
  benchmark::RegisterBenchmark(row.name.c_str(), run, StepRow{row, &machine})
      ->UseManualTime()
      ->Iterations(REPLAYS)
      ->Unit(benchmark::kMicrosecond);
}

}  // namespace flashdelta::bench
