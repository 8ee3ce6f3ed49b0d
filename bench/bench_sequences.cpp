// Rows over whole sequences: forward, training_forward (which keeps what the backward can use) and backward.
// Modes of a forward row with a goal, besides the plain one (the same tensors in every replay, a quarter of the heads
// without decay, context parallelism as the planner chooses): /cold, tensors rotated over more than 256 MB; /cp_on and
// /cp_off, context parallelism by option; /exact, without the gates' shortcut; /flat and /decay, no head decays, every head
// does.
#include <memory>
#include <string>
#include <vector>

#include "bench/gpu_kernels.hpp"
#include "bench/gpu_timing.hpp"
#include "cuda/context_kernels_sm90.hpp"

namespace flashdelta::bench {
namespace {

struct Mode {
  const char* suffix;
  bool cold = false;
  fd_context_parallel context_parallel = FD_CONTEXT_AUTO;
  bool exact = false;
  Fill gates = Fill::gate;
};
constexpr Mode MODES[] = {
    {.suffix = ""},
    {.suffix = "/cold", .cold = true},
    {.suffix = "/cp_on", .context_parallel = FD_CONTEXT_ON},
    {.suffix = "/cp_off", .context_parallel = FD_CONTEXT_OFF},
    {.suffix = "/exact", .exact = true},
    {.suffix = "/flat", .gates = Fill::zero},
    {.suffix = "/flat/cp_off", .context_parallel = FD_CONTEXT_OFF, .gates = Fill::zero},
    {.suffix = "/decay", .gates = Fill::decay},
    {.suffix = "/decay/cp_off", .context_parallel = FD_CONTEXT_OFF, .gates = Fill::decay},
};

struct SequenceRow {
  Row row;
  Mode mode;
  const Machine* machine;
};

// Tensors of one call. Gradients and output gradients only for the backward.
struct Tensors {
  DeviceMemory q, k, v, g, beta, o, initial, final, saved;
  DeviceMemory do_, dfinal, dq, dk, dv, dg, dbeta, dinitial;
};

Tensors make_tensors(const Row& row, Fill gates, std::size_t saved_bytes, std::uint64_t seed, cudaStream_t stream) {
  const auto T = static_cast<std::size_t>(row.tokens()), N = static_cast<std::size_t>(row.sequences());
  const auto H = static_cast<std::size_t>(row.H), HV = static_cast<std::size_t>(row.HV), K = std::size_t{HEAD_DIM};
  const auto made = [&](std::size_t count, fd_dtype type, Fill what) {
    DeviceMemory memory(count * (type == FD_FLOAT32 ? 4 : 2));
    fill(memory.data(), type, count, what, row.HV, ++seed, stream);
    return memory;
  };
  Tensors t;
  t.q = made(T * H * K, FD_BFLOAT16, Fill::unit_rows);
  t.k = made(T * H * K, FD_BFLOAT16, Fill::unit_rows);
  t.v = made(T * HV * K, FD_BFLOAT16, Fill::normal);
  t.g = made(T * HV, FD_FLOAT32, gates);
  t.beta = made(T * HV, FD_FLOAT32, Fill::strength);
  t.initial = made(N * HV * K * K, FD_FLOAT32, Fill::normal);
  t.final = DeviceMemory(t.initial.bytes());
  t.o = DeviceMemory(t.v.bytes());
  t.saved = DeviceMemory(saved_bytes);
  if (row.operation == "backward") {
    t.do_ = made(T * HV * K, FD_BFLOAT16, Fill::normal);
    t.dfinal = made(N * HV * K * K, FD_FLOAT32, Fill::normal);
    t.dq = DeviceMemory(t.q.bytes());
    t.dk = DeviceMemory(t.k.bytes());
    t.dv = DeviceMemory(t.v.bytes());
    t.dg = DeviceMemory(t.g.bytes());
    t.dbeta = DeviceMemory(t.beta.bytes());
    t.dinitial = DeviceMemory(t.initial.bytes());
  }
  return t;
}

// The members that forward and backward share.
template <typename Args>
Args inputs(const fd_problem& problem, const Tensors& t, const DeviceMemory& cu_seqlens) {
  Args args{};
  args.size = sizeof(args);
  args.problem = &problem;
  args.q.data = t.q.data();
  args.k.data = t.k.data();
  args.v.data = t.v.data();
  args.g.data = t.g.data();
  args.beta.data = t.beta.data();
  args.cu_seqlens = cu_seqlens.data();
  args.initial_state.data = t.initial.data();
  if (t.saved.bytes() > 0) {
    args.saved = t.saved.data();
    args.saved_bytes = t.saved.bytes();
  }
  return args;
}

fd_forward_args forward_args(const fd_problem& problem, const Tensors& t, const DeviceMemory& cu_seqlens) {
  auto args = inputs<fd_forward_args>(problem, t, cu_seqlens);
  args.o.data = t.o.data();
  args.final_state.data = t.final.data();
  return args;
}

fd_backward_args backward_args(const fd_problem& problem, const Tensors& t, const DeviceMemory& cu_seqlens) {
  auto args = inputs<fd_backward_args>(problem, t, cu_seqlens);
  args.do_.data = t.do_.data();
  args.dfinal_state.data = t.dfinal.data();
  args.dq.data = t.dq.data();
  args.dk.data = t.dk.data();
  args.dv.data = t.dv.data();
  args.dg.data = t.dg.data();
  args.dbeta.data = t.dbeta.data();
  args.dinitial_state.data = t.dinitial.data();
  return args;
}

// What the forward's planner decided, for bench/fit_context.py: it lies first in the workspace, where there is one.
void count_runs(benchmark::State& state, const DeviceMemory& workspace) {
  cuda::Plan plan;
  if (workspace.bytes() < sizeof(plan)) return;
  must(cudaMemcpy(&plan, workspace.data(), sizeof(plan), cudaMemcpyDeviceToHost), "cudaMemcpy");
  state.counters["runs"] = plan.runs[0] + plan.runs[1];
  state.counters["pre_runs"] = plan.pre_runs;
  state.counters["pre_chunks"] = plan.chunks;
  state.counters["exact_heads"] = plan.exact_heads;
  state.counters["value_blocks"] = plan.value_blocks;
}

void run(benchmark::State& state, const SequenceRow& what) {
  const Row& row = what.row;
  const Machine& machine = *what.machine;
  const bool backward = row.operation == "backward", training = row.operation != "forward";
  std::vector<std::int32_t> bounds{0};
  for (const std::int64_t length : row.lengths) bounds.push_back(bounds.back() + static_cast<std::int32_t>(length));

  fd_problem problem{};
  problem.size = sizeof(problem);
  problem.B = 1, problem.T = row.tokens(), problem.N = row.sequences();
  problem.H = row.H, problem.HV = row.HV, problem.K = problem.V = HEAD_DIM;
  problem.device = FD_CUDA;
  problem.backend = FD_BACKEND_SM90;  // by name: no other may serve a row
  problem.dtype = FD_BFLOAT16;
  problem.gate = FD_GATE_LOG;
  problem.beta = FD_BETA_VALUE;
  problem.cu_seqlens_dtype = FD_INT32;
  problem.context_parallel = what.mode.context_parallel;
  if (what.mode.exact) problem.context_bound = -1;
  fd_backend backend;
  if (!served(state, fd_forward_backend(&problem, &backend))) return;
  if (training && !served(state, fd_backward_backend(&problem, &backend))) return;
  std::size_t forward_bytes = 0, backward_bytes = 0, saved_bytes = 0;
  must(fd_forward_workspace(&problem, &forward_bytes));
  if (backward) must(fd_backward_workspace(&problem, &backward_bytes));
  if (training) must(fd_forward_saved(&problem, &saved_bytes));
  const DeviceMemory forward_space(forward_bytes), backward_space(backward_bytes), cu_seqlens = upload(bounds);

  const Work needed = work(row);
  const std::size_t copies = what.mode.cold ? ROTATED_BYTES / static_cast<std::size_t>(needed.bytes) + 2 : 1;
  std::vector<Tensors> sets;
  for (std::size_t i = 0; i < copies; ++i)
    sets.push_back(make_tensors(row, what.mode.gates, saved_bytes, 100 * i, machine.stream));
  const auto call = [&](std::size_t i, cudaStream_t stream) {
    const Tensors& t = sets[i % sets.size()];
    if (backward) {
      const fd_backward_args args = backward_args(problem, t, cu_seqlens);
      must(fd_backward(&args, backward_space.data(), backward_bytes, stream));
    } else {
      const fd_forward_args args = forward_args(problem, t, cu_seqlens);
      must(fd_forward(&args, forward_space.data(), forward_bytes, stream));
    }
  };
  if (backward) {  // fills `saved`
    const fd_forward_args args = forward_args(problem, sets[0], cu_seqlens);
    must(fd_forward(&args, forward_space.data(), forward_bytes, machine.stream));
  }
  // Short calls: several in one graph, so that the time between replays counts for little.
  const double estimate = needed.flops / machine.rate;
  const int calls = what.mode.cold ? static_cast<int>(copies) : estimate < 2e-4 ? 8 : 1;
  Graph graph(machine.stream, calls, [&](int i, cudaStream_t s) { call(static_cast<std::size_t>(i), s); });
  measure(state, machine, row, graph, needed, [&] { call(0, machine.stream); });
  if (!backward) count_runs(state, forward_space);
  if (training) state.counters["saved_MB"] = static_cast<double>(saved_bytes) * 1e-6;
  state.counters["workspace_MB"] = static_cast<double>(backward ? backward_bytes : forward_bytes) * 1e-6;
}

}  // namespace

void register_sequences(const Machine& machine, const Row& row) {
  for (const Mode& mode : MODES) {
    if (&mode != MODES && (row.operation != "forward" || row.must_ms == 0)) break;
    benchmark::RegisterBenchmark((row.name + mode.suffix).c_str(), run, SequenceRow{row, mode, &machine})
        ->UseManualTime()
        ->Iterations(REPLAYS)
        ->Unit(benchmark::kMicrosecond);
  }
}

}  // namespace flashdelta::bench
