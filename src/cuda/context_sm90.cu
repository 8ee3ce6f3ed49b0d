#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "cuda/context_kernels_sm90.hpp"
#include "cuda/context_sm90.hpp"

namespace flashdelta::cuda {

// Two blocks of half the values double the SMs at work on a head; they lose once whole blocks alone fill the chip, because
// Q K^T and K K^T are then computed twice.
int shape_of_sequences(const fd_problem& p, int sm_count) {
  return p.V % (2 * VALUES) != 0 || p.N * p.HV * (p.V / VALUES) <= sm_count ? 1 : 2;
}

namespace {

constexpr int MIN_RUN = 2;  // chunks
constexpr int64_t MOST_SEQUENCES = 1 << 20;
constexpr int MOST_CHUNKS = 1 << 25;
constexpr int LIKELY_WINDOW = 5;  // chunks, where gates decay as in trained models: for the host, which sees no gates

// The workspace's arrays, one after another; from a null pointer on it only counts.
struct Workspace {
  Plan* plan;
  ForwardRun* runs;
  PreRun* pre_runs;
  Chain* chains;
  int* heads;       // [HV]
  int* windows;     // [pre_runs][HV]
  float* outcomes;  // [pre_runs][HV][V + K][K]
  float* starts;    // [starts][HV][V][K]
  std::size_t bytes;

  Workspace(const fd_problem& p, const RunLimits& most, void* memory)
      : pre_runs(), chains(), heads(), windows(), outcomes(), starts(), bytes(0) {
    const auto take = [&](auto*& array, int64_t count) {
      array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(reinterpret_cast<uintptr_t>(memory) + bytes);
      bytes += (static_cast<std::size_t>(count) * sizeof(*array) + 255) / 256 * 256;
    };
    take(plan, 1);
    take(runs, most.runs);
    if (!most.split()) return;
    take(pre_runs, most.pre_runs);
    take(chains, most.chains);
    take(heads, p.HV);
    take(windows, most.pre_runs * p.HV);
    take(outcomes, most.pre_runs * p.HV * (p.V + p.K) * p.K);
    take(starts, most.starts * p.HV * p.V * p.K);
  }
};

// The machine in which the planner compares forwards of whole sequences, or of runs.
Machine machine(const fd_problem& p, int sm_count, int state_warpgroups) {
  return {.sm_count = sm_count,
          .value_heads = static_cast<int>(p.HV),
          .blocks = static_cast<int>(p.V / (VALUES * state_warpgroups)),
          .walk_blocks = static_cast<int>(p.V / VALUES),
          .chunk = state_warpgroups == 1 ? Costs::HALF_CHUNK : Costs::FULL_CHUNK};
}

Cut cut_equally(int64_t sequences, int chunks, int length) {
  Cut cut = {};
  add_sequence(
      chunks, length, [&](unsigned Cut::*m, int x) { cut.*m += static_cast<unsigned>(sequences * x); },
      [&](unsigned Cut::*m, int x) { cut.*m = static_cast<unsigned>(x); });
  return cut;
}

// Cycles of a good way to cut `sequences` of as many chunks each, with these heads: into runs that fill the device once,
// twice, ..., or fewer. Infinite if they are too short.
float best_split(const Machine& m, int64_t sequences, int chunks, const Heads& heads) {
  float best = std::numeric_limits<float>::infinity();
  const int64_t most = std::min(MOST_RUNS, chunks / MIN_RUN);
  const auto consider = [&](int64_t runs) {
    const Cut cut = cut_equally(sequences, chunks, static_cast<int>((chunks + runs - 1) / runs));
    best = std::min(best, forward_cost(m, cut) + pre_pass_cost(m, cut, heads));
  };
  if (most < 2) return best;
  for (int rounds = 1; rounds <= 4; ++rounds) {
    consider(std::clamp<int64_t>(rounds * m.sm_count / (sequences * m.value_heads * m.blocks), 2, most));
  }
  for (int64_t runs = 2; runs <= most; runs += (runs + 2) / 3) consider(runs);
  return best;
}

// What the planner is asked, as context_cost_sm90.hpp says.
struct Decision {
  bool may_split;  // whether sequences are cut if what lies on the device makes it worth while
  int shape;       // as in RunLimits
  bool shapes;     // whether the planner chooses the forward's, though nothing is cut
};
Decision decide(const fd_problem& p) {
  constexpr float PAYS = 0.9f, LOSS = 0.03f;  // of the time that whole sequences take
  const int64_t longest = (p.T + CHUNK - 1) / CHUNK;
  if (p.context_parallel == FD_CONTEXT_OFF || longest < 2 * MIN_RUN || p.N == 0 || p.N > MOST_SEQUENCES ||
      p.HV > MOST_SPLIT_HEADS || longest * p.B + p.N > MOST_CHUNKS) {
    return {false, 0, false};
  }
  const bool forced = p.context_parallel == FD_CONTEXT_ON, known = p.N == p.B;  // lengths
  if (forced && !known) return {true, 0, false};
  const int shapes = p.V % (2 * VALUES) != 0 ? 1 : 2, whole_shape = shape_of_sequences(p, MOST_SMS);
  const auto plain = [&](int64_t sequences, int length, int shape) {
    return forward_cost(machine(p, MOST_SMS, shape), cut_equally(sequences, length, length));
  };
  const auto chunks = static_cast<int>(longest), HV = static_cast<int>(p.HV);
  const Heads constant{HV, 0.0f, 0.0f};
  const int decaying = HV - HV / 4;
  const Heads usual{HV - decaying, static_cast<float>(decaying * LIKELY_WINDOW), float{LIKELY_WINDOW}};
  // In the better shape, which is left in `shape`.
  int shape = 1;
  const auto split = [&](int64_t sequences, int length, const Heads& heads) {
    float best = std::numeric_limits<float>::infinity();
    for (int i = 1; i <= shapes; ++i) {
      const float cost = best_split(machine(p, MOST_SMS, i), sequences, length, heads);
      if (cost < best) {
        best = cost;
        shape = i;
      }
    }
    return best;
  };
  const int equal = known ? chunks : std::max(1, static_cast<int>(longest / p.N));
  const float whole = plain(p.N, equal, whole_shape), exact = split(p.N, equal, constant);
  if (known && (forced || exact <= PAYS * whole)) {
    split(p.N, chunks, usual);
    return {true, shape, false};
  }
  const int64_t most_uneven = known ? p.N : 1;  // sequences
  const float uneven = plain(most_uneven, chunks, whole_shape);
  const float other = shapes == 2 ? plain(most_uneven, chunks, 3 - whole_shape) : uneven;
  const float loss = std::min(exact - whole, float{Costs::EMPTY});  // the planner takes the lesser
  if (split(most_uneven, chunks, usual) <= PAYS * std::min(uneven, other) && loss <= LOSS * whole) return {true, 0, false};
  return {false, 0, !known && other <= PAYS * uneven && Costs::SHAPES <= LOSS * whole};
}

}  // namespace

RunLimits run_limits(const fd_problem& p) {
  const int64_t chunks = p.N == p.B ? p.B * ((p.T + CHUNK - 1) / CHUNK) : p.T / CHUNK + p.N;
  const auto [may_split, shape, shapes] = decide(p);
  if (!may_split) return {p.N, 0, chunks, 0, 0, 0, shapes};
  // Runs that fill the largest GPU three times are as many as can be useful.
  const int64_t blocks = p.HV * ((p.V + 2 * VALUES - 1) / (2 * VALUES));
  const int64_t pre_runs = std::min((MOST_CHAINS + blocks - 1) / blocks, chunks / MIN_RUN);
  const int64_t chains = std::min(p.N, pre_runs);
  return {p.N + pre_runs, pre_runs, chunks, chains, chains + pre_runs, shape, shape == 0};
}

bool needs_plan(const fd_problem& p, const RunLimits& most, int sm_count) {
  if (most.split() || most.shapes) return true;
  return p.N != p.B && p.N * p.HV * (p.V / (VALUES * shape_of_sequences(p, sm_count))) > sm_count;
}

std::size_t runs_workspace(const fd_problem& p) {
  const RunLimits most = run_limits(p);
  return p.N != p.B || most.split() ? Workspace(p, most, nullptr).bytes : 0;
}

namespace {

PlanParameters plan_parameters(const fd_forward_args& args, const RunLimits& most, const Workspace& w, int sm_count) {
  const fd_problem& p = *args.problem;
  const bool split = most.split();
  const int whole = shape_of_sequences(p, sm_count);
  const bool both = most.shapes && p.V % (2 * VALUES) == 0;
  const int first = most.shape == 0 ? whole : most.shape;
  // Each run of the pre-pass has its room where runs have at least so many chunks.
  const int64_t shortest = split ? std::max<int64_t>(MIN_RUN, (most.chunks + most.pre_runs - 1) / most.pre_runs) : 1;
  return {
      .sequences = Sequences(args),
      .gates = Gates(args),
      .B = p.B,
      .value_heads = static_cast<int>(p.HV),
      .shape = {machine(p, sm_count, first), both ? machine(p, sm_count, 3 - first) : Machine{}},
      .shapes = both ? 2 : 1,
      .may_split = split ? 1 : 0,
      .forced = p.context_parallel == FD_CONTEXT_ON ? 1 : 0,
      .most_chunks = most.chunks,
      .shortest = static_cast<int>(shortest),
      .log_bound = static_cast<float>(std::log2(p.context_bound)),
      .plan = w.plan,
      .runs = w.runs,
      .pre_runs = w.pre_runs,
      .chains = w.chains,
      .heads = w.heads,
  };
}

}  // namespace

fd_status plan_runs(const fd_forward_args& args, const RunLimits& most, const CUtensorMap& k, const CUtensorMap& v,
                    ForwardRuns& runs, int sm_count, void* workspace, void* stream) {
  const fd_problem& p = *args.problem;
  const Workspace w(p, most, workspace);
  const PlanParameters plan = plan_parameters(args, most, w, sm_count);
  const auto shape = [&](const Machine& m) { return static_cast<int>(p.V / VALUES / std::max(m.blocks, 1)); };
  runs = {w.runs,
          {shape(plan.shape[0]), shape(plan.shape[1])},
          {&w.plan->runs[0], plan.shapes == 2 ? &w.plan->runs[1] : nullptr},
          w.starts,
          &w.plan->next_item};
  fd_status status = launch_plan(plan, stream);
  if (status != FD_OK || !most.split()) return status;

  const bool bfloat16 = p.dtype == FD_BFLOAT16, l2norm = p.qk_l2norm != 0;
  const auto heads = static_cast<int>(p.H), value_heads = static_cast<int>(p.HV), values = static_cast<int>(p.V);
  const WindowParameters window{
      .sequences = plan.sequences,
      .gates = plan.gates,
      .k = View(args.k, p.dtype),
      .heads = heads,
      .value_heads = value_heads,
      .l2norm = p.qk_l2norm,
      .l2norm_eps = static_cast<float>(p.l2norm_eps),
      .log_bound = plan.log_bound,
      .plan = w.plan,
      .runs = w.pre_runs,
      .windows = w.windows,
  };
  status = launch_windows(window, bfloat16, most.pre_runs, stream);
  if (status != FD_OK) return status;

  const Pool initial(args.initial_state, p.initial_dtype, p.initial_rows, args.initial_index, p.index_dtype,
                     p.initial_slots);
  const WalkParameters walk{
      .k = k,
      .v = v,
      .sequences = plan.sequences,
      .gates = plan.gates,
      .initial = initial,
      .state_v_first = p.state_v_first,
      .heads = heads,
      .value_heads = value_heads,
      .value_blocks = values / VALUES,
      .l2norm_eps = window.l2norm_eps,
      .plan = w.plan,
      .runs = w.pre_runs,
      .windows = w.windows,
      .heads_in_order = w.heads,
      .outcomes = w.outcomes,
      .starts = w.starts,
  };
  status = launch_walk(walk, bfloat16, l2norm, most.pre_runs, sm_count, stream);
  if (status != FD_OK) return status;

  const FoldParameters fold{
      .value_heads = value_heads,
      .values = values,
      .plan = w.plan,
      .chains = w.chains,
      .windows = w.windows,
      .heads_in_order = w.heads,
      .outcomes = w.outcomes,
      .starts = w.starts,
  };
  return launch_fold(fold, most.chains, sm_count, stream);
}

}  // namespace flashdelta::cuda
