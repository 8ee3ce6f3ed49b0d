// Decode step: a few tokens per sequence, bound by the memory of the states. Per token and head, with the state S:
//
//     pass 1, from memory   S^T k and S^T q together
//     between               u = beta (v - e^g S^T k),  o = scale (e^g S^T q + (k . q) u)
//     pass 2, from cache    S = e^g S + k u^T, written where it belongs
//
// The output needs no third pass because the new state is never read for it. A task is one (sequence, value head), or some
// of its columns of V where those are fewer than the threads; their results are the same.
#include <omp.h>

#include <algorithm>
#include <cstdint>

#include "cpu/cpu.hpp"
#include "cpu/tiles.hpp"

namespace flashdelta {
namespace {

constexpr std::int64_t kMinColumns = 32;              // a task has at least this many columns of V
constexpr std::int64_t kElementsPerThread = 1 << 16;  // elements of states worth a thread

// States that go elsewhere and are too many for a core's cache to keep until the next token are written past the caches:
// ordinary stores read the memory first (docs/kernels/cpu.md).
constexpr std::int64_t kStreamedBytes = 1 << 20;

// One thread's memory. `state` is needed only where a sequence may have more than one token.
struct Scratch {
  float *q = nullptr, *k = nullptr;                                                        // [K]
  float *v = nullptr, *u = nullptr, *o = nullptr, *state_k = nullptr, *state_q = nullptr;  // [V]
  float* state = nullptr;                                                                  // [K, V], or [V, K]

  Scratch(Arena& arena, const fd_problem& p) {
    const std::int64_t K = round_up(p.K, 16), V = round_up(p.V, 16);
    for (float** x : {&q, &k}) *x = arena.take<float>(K);
    for (float** x : {&v, &u, &o, &state_k, &state_q}) *x = arena.take<float>(V);
    state = arena.take<float>(p.T > 1 ? K * V : 0);
  }
};

std::size_t scratch_bytes(const fd_problem& p) {
  Arena arena;
  Scratch(arena, p);
  return arena.used();
}

// Where a state lies: columns of V of one head in a pool's row, or in scratch memory. Null: zero.
struct State {
  char* data;
  fd_dtype type;
  std::int64_t row;
};

struct Task {
  const fd_step_args& args;
  const Scratch& s;
  std::int64_t n, value_head, column, columns;
  const void* next;  // the initial state of this thread's next task, null if unknown
  const VectorKernels& vector = vector_kernels();

  State initial() const { return in_pool(args.initial_state, args.problem->initial_dtype, initial_row(args, n)); }

  State in_pool(const fd_tensor& states, fd_dtype type, std::int64_t row) const {
    if (row < 0) return {nullptr, type, 0};
    const bool v_first = args.problem->state_v_first != 0;
    return {address(states, type, row, value_head, v_first ? column : 0, v_first ? 0 : column), type, states.stride[2]};
  }

  // out = decay * in + k u^T. `last`: this call does not read `out` again.
  void write(const State& in, const State& out, float decay, bool last, const void* prefetched = nullptr) const {
    const fd_problem& p = *args.problem;
    const bool stream = last && out.data != in.data && out.type == FD_FLOAT32 &&
                        reinterpret_cast<std::uintptr_t>(out.data) % 64 == 0 && out.row % 16 == 0 &&
                        p.N * p.HV * p.K * p.V * 4 >= kStreamedBytes;
    vector.step_write({.K = p.K,
                       .V = columns,
                       .state = in.data,
                       .dtype = in.type,
                       .row = in.row,
                       .out = out.data,
                       .out_dtype = out.type,
                       .out_row = out.row,
                       .v_first = p.state_v_first != 0,
                       .decay = decay,
                       .k = s.k,
                       .u = s.u,
                       .next = prefetched,
                       .stream = stream});
  }

  void run() const {
    const fd_problem& p = *args.problem;
    const Sequence q = sequence(p, args.cu_seqlens, n);
    const bool v_first = p.state_v_first != 0;
    const State scratch{reinterpret_cast<char*>(s.state), FD_FLOAT32, v_first ? round_up(p.K, 16) : round_up(columns, 16)};
    State current = initial();
    if (q.length == 0) {
      pass_through(current);
      return;
    }
    const LogDecay<float> gate = log_decay<float>(args, value_head);
    for (std::int64_t t = 0; t < q.length; ++t) {
      const float decay = token(q, gate, q.begin + t, current);
      const bool last = t == q.length - 1;
      std::int64_t row = -1;
      if (p.final_slots > 0)
        row = final_row(args, n, t);
      else if (last)
        row = final_row(args, n);
      const State wanted = in_pool(args.final_state, p.final_dtype, row);
      if (wanted.data != nullptr && (last || wanted.type == FD_FLOAT32)) {
        write(current, wanted, decay, last, last && q.length == 1 ? next : nullptr);
        current = wanted;
      } else if (!last) {
        write(current, scratch, decay, false);
        current = scratch;
        if (wanted.data != nullptr) copy(scratch, wanted);
      }
    }
  }

  // S^T k, S^T q, u and o of token t; returns its decay.
  float token(const Sequence& q, const LogDecay<float>& gate, std::int64_t t, const State& current) const {
    const fd_problem& p = *args.problem;
    const std::int64_t key_head = value_head / (p.HV / p.H);
    const auto load_row = [&](const fd_tensor& x, std::int64_t head, std::int64_t from, std::int64_t width, float* row) {
      vector.load(1, width, address(x, p.dtype, q.batch, t, head, from), p.dtype, 0, row, 0);
    };
    load_row(args.q, key_head, 0, p.K, s.q);
    load_row(args.k, key_head, 0, p.K, s.k);
    load_row(args.v, value_head, column, columns, s.v);
    if (p.qk_l2norm != 0) {
      vector.normalise(1, p.K, s.q, 0, static_cast<float>(p.l2norm_eps), nullptr);
      vector.normalise(1, p.K, s.k, 0, static_cast<float>(p.l2norm_eps), nullptr);
    }
    float g, beta, kq;
    load_gates(args, gate, q.batch, t, value_head, 1, 1, &g, &beta);
    vector.row_dots(1, p.K, s.k, 0, s.q, 0, 0, &kq);
    vector.step_read({.K = p.K,
                      .V = columns,
                      .state = current.data,
                      .dtype = current.type,
                      .row = current.row,
                      .v_first = p.state_v_first != 0,
                      .k = s.k,
                      .q = s.q,
                      .state_k = s.state_k,
                      .state_q = s.state_q});
    const float decay = std::exp(g), scale = static_cast<float>(p.scale);
    for (std::int64_t j = 0; j < columns; ++j) {
      s.u[j] = beta * (s.v[j] - decay * s.state_k[j]);
      s.o[j] = scale * (decay * s.state_q[j] + kq * s.u[j]);
    }
    vector.store(1, columns, s.o, 0, address(args.o, p.dtype, q.batch, t, value_head, column), p.dtype, 0);
    return decay;
  }

  // A sequence without tokens: its state goes on unchanged.
  void pass_through(const State& from) const {
    const fd_problem& p = *args.problem;
    if (p.final_slots > 0) return;
    const State to = in_pool(args.final_state, p.final_dtype, final_row(args, n));
    if (to.data == nullptr || to.data == from.data) return;
    std::fill_n(s.k, p.K, 0.0f);
    std::fill_n(s.u, columns, 0.0f);
    write(from, to, 1, true);
  }

  // From fp32 scratch memory to a pool's row.
  void copy(const State& from, const State& to) const {
    const bool v_first = args.problem->state_v_first != 0;
    vector.store(v_first ? columns : args.problem->K, v_first ? args.problem->K : columns, s.state, from.row, to.data,
                 to.type, to.row);
  }
};

}  // namespace

std::size_t cpu_step_workspace(const fd_problem& p) { return static_cast<std::size_t>(p.threads) * scratch_bytes(p); }

fd_status cpu_step(const fd_step_args& args, void* workspace) {
  const fd_problem& p = *args.problem;
  const std::int64_t tokens = std::max(p.N, used_tokens(p, args.cu_seqlens) * p.B);
  const auto team = static_cast<int>(std::clamp<std::int64_t>(tokens * p.HV * p.K * p.V / kElementsPerThread, 1, p.threads));
  std::int64_t columns = p.V;
  const auto column_tasks = [&] { return (p.V + columns - 1) / columns; };
  while (p.N * p.HV * column_tasks() < team && columns > kMinColumns) {
    columns = std::max(kMinColumns, round_up(columns / 2, kMinColumns));
  }
  const std::int64_t tasks = p.N * p.HV * column_tasks();
  const std::size_t stride = scratch_bytes(p);

#pragma omp parallel num_threads(team)
  {
    Arena arena(static_cast<char*>(workspace) + static_cast<std::size_t>(omp_get_thread_num()) * stride);
    const Scratch scratch(arena, p);
#pragma omp for schedule(static)
    for (std::int64_t i = 0; i < tasks; ++i) {
      const auto task = [&](std::int64_t number, const void* next) {
        const std::int64_t head = number / column_tasks(), column = number % column_tasks() * columns;
        return Task{args, scratch, head / p.HV, head % p.HV, column, std::min(columns, p.V - column), next};
      };
      task(i, i + 1 < tasks ? task(i + 1, nullptr).initial().data : nullptr).run();
    }
  }
  zero_unused_tokens(p, args.cu_seqlens, args.o, p.dtype, p.HV, p.V);
  return FD_OK;
}

}  // namespace flashdelta
