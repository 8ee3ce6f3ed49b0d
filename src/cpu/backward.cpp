// The chunked backward of the CPU backend: which chunk of which head is worked on when, by whom, in which memory. The tiles
// are in backward_chunk.hpp.
//
//   states   first chunk to last      advance: S and R of every chunk, kept
//   reverse  last chunk to first      reverse: dS, dv, and what the chunk adds to the other gradients
//
// A sequence is cut into segments; S and R are kept for one segment at a time, and computed again from the states at the
// segments' starts. Where a segment ends changes no bit of the results.
//
// A task is a group (query/key head with its value heads) of a sequence, all on one thread. Where that would leave threads
// without work, sequences are split further: every value block of every value head is a unit of its own that leaves its
// contributions in memory, and after each segment they are summed chunk by chunk, in the order in which one thread would
// have summed them. Either way gives the same bits.
#include <omp.h>

#include <algorithm>
#include <cmath>

#include "cpu/backward_chunk.hpp"
#include "cpu/cpu.hpp"
#include "cpu/sequences.hpp"
#include "cpu/tiles.hpp"
#include "dtype.hpp"

namespace flashdelta {
namespace {

constexpr std::int64_t C = kBackwardChunk;

// Memory for S and R of all threads together, in floats, if the call does not ask for less; more chunks than fit make more
// segments, each of which costs the forward chain once more (a sixth of the time).
constexpr std::int64_t kStoredFloats = 24 << 20;
constexpr std::int64_t kLeastChunks = 8;  // of a segment, whatever it takes

std::int64_t chunks_of(std::int64_t tokens) { return (tokens + C - 1) / C; }

std::int64_t floats_of(const Arena& counted) { return static_cast<std::int64_t>(counted.used() / sizeof(float)); }

// One thread's tiles.
struct Worker {
  KeyChunk keys;
  HeadChunk head;
  Partial sum, part;
  KeyGradient gradient;
  BlockScratch scratch;

  Worker(const BackwardShape& s, Arena& m) : keys(s, m), head(s, m), sum(s, m), part(s, m), gradient(s, m), scratch(s, m) {}

  static std::int64_t size(const BackwardShape& s) {
    Arena counted;
    const Worker worker(s, counted);
    return floats_of(counted);
  }
};

// What a value block keeps from chunk to chunk.
struct UnitMemory {
  float* dstate;    // [K][width]
  float* starts;    // [segments][K][width]: state at the start of each segment
  float* states;    // [chunks - 1][K][width]: state before each chunk of a segment but the first
  float* r;         // [chunks][C][width]
  float* partials;  // [chunks][Partial], only of split sequences

  UnitMemory(const BackwardShape& s, std::int64_t segments, std::int64_t chunks, bool split, Arena& m)
      : dstate(m.take<float>(s.state())),
        starts(m.take<float>(segments * s.state())),
        states(m.take<float>((chunks - 1) * s.state())),
        r(m.take<float>(chunks * C * s.width)),
        partials(m.take<float>(split ? chunks * Partial::size(s) : 0)) {}
};

// How the units of a call lie in memory: `count` of them at a time, segments of `chunks` chunks.
struct UnitPlan {
  std::int64_t count, chunks, segments, size;
  bool split;

  UnitPlan(const BackwardShape& s, std::int64_t units, const fd_problem& p, bool is_split) : count(units), split(is_split) {
    const std::int64_t all = std::max<std::int64_t>(1, chunks_of(p.T));
    const std::int64_t floats = s.state() + C * s.width + (split ? Partial::size(s) : 0);
    const std::int64_t stored = std::min(kStoredFloats, p.workspace_limit / static_cast<std::int64_t>(sizeof(float)));
    // Below the root of all chunks, the states at the segments' starts would take more than a segment does.
    const auto root = static_cast<std::int64_t>(std::sqrt(static_cast<double>(all)));
    const std::int64_t room = std::max({kLeastChunks, root, stored / std::max<std::int64_t>(1, count * floats)});
    segments = (all + room - 1) / room;
    chunks = (all + segments - 1) / segments;
    Arena counted;
    const UnitMemory unit(s, segments, chunks, split, counted);
    size = floats_of(counted);
  }

  UnitMemory unit(const BackwardShape& s, float* memory, std::int64_t i) const {
    Arena m(memory + i * size);
    return {s, segments, chunks, split, m};
  }
};

// Whether tasks of `length` tokens per sequence, the longest that are left, keep the threads less busy than they should be,
// when all that is left are `tokens` tokens of as many heads.
bool leaves_threads_idle(const fd_problem& p, std::int64_t tokens, std::int64_t length) {
  if (p.threads < 2 || length == 0) return false;
  const double rounds = static_cast<double>(tokens) * static_cast<double>(p.H) /
                        (static_cast<double>(p.threads) * static_cast<double>(length));
  return rounds < 4 && rounds < 0.8 * std::ceil(rounds);
}

// Sequences split at a time.
std::int64_t split_sequences(const fd_problem& p, const BackwardShape& s) {
  const std::int64_t units = p.H * s.units();
  return std::clamp<std::int64_t>(4 * p.threads / units, 1, std::max<std::int64_t>(1, p.N));
}

// Everything in the workspace.
struct Layout {
  BackwardShape shape;
  std::int64_t workers;
  UnitPlan whole, split;
  std::int64_t slots;      // of parameter sums: at least one for every chunk
  double* parameter_sums;  // [slots][HV][2]
  std::int64_t* order;     // [N]: sequences, longest first
  float *worker_memory, *unit_memory;
  std::size_t bytes;

  Layout(const fd_problem& p, void* memory)
      : shape(p),
        workers(std::clamp<std::int64_t>(p.N * p.H * (may_split(p) ? std::max(shape.units(), chunks_of(p.T)) : 1), 1,
                                         p.threads)),
        whole(shape, std::clamp<std::int64_t>(p.N * p.H, 1, p.threads) * shape.units(), p, false),
        split(shape, may_split(p) ? split_sequences(p, shape) * p.H * shape.units() : 0, p, true),
        slots(p.B == 1 ? p.T / C + p.N : p.N * chunks_of(p.T)) {
    Arena m(memory);
    parameter_sums = m.take<double>(2 * slots * p.HV);
    order = m.take<std::int64_t>(p.N);
    worker_memory = m.take<float>(workers * Worker::size(shape));
    unit_memory = m.take<float>(std::max(whole.count * whole.size, split.count * split.size));
    bytes = m.used();
  }

  // Lengths of packed sequences are not known to the workspace query; a sequence alone decides least often.
  static bool may_split(const fd_problem& p) {
    return p.B == 1 ? p.threads > 1 && p.H < 4 * p.threads : leaves_threads_idle(p, p.N * p.T, p.T);
  }

  double* sums_of(const fd_problem& p, const Sequence& q, std::int64_t n, std::int64_t chunk,
                  std::int64_t value_head) const {
    const std::int64_t first = p.B == 1 ? q.begin / C + n : n * chunks_of(p.T);
    return parameter_sums + ((first + chunk) * p.HV + value_head) * 2;
  }
};

class Backward {
 public:
  Backward(const fd_backward_args& args, void* workspace)
      : args_(args), p_(*args.problem), kernels_(args), layout_(p_, workspace), shape_(layout_.shape) {}

  void run() {
    std::int64_t left = 0;  // tokens
    for (std::int64_t n = 0; n < p_.N; ++n) {
      layout_.order[n] = n;
      left += sequence_of(n).length;
    }
    std::sort(layout_.order, layout_.order + p_.N, [&](std::int64_t x, std::int64_t y) {
      const std::int64_t a = sequence_of(x).length, b = sequence_of(y).length;
      return a != b ? a > b : x < y;
    });
    std::int64_t done = 0;
    while (done < p_.N && layout_.split.count > 0) {
      std::int64_t end = done;
      while (end < p_.N && end - done < split_sequences(p_, shape_)) {
        const std::int64_t length = sequence_of(layout_.order[end]).length;
        if (!leaves_threads_idle(p_, left, length)) break;
        left -= length;
        ++end;
      }
      if (end == done) break;
      run_split(done, end);
      done = end;
    }
    run_whole(done, p_.N);
    store_parameters(args_.dA_log, p_.A_log_dtype, 0);
    store_parameters(args_.ddt_bias, p_.dt_bias_dtype, 1);
    zero_unused_tokens(p_, args_.cu_seqlens, args_.dq, p_.dtype, p_.H, p_.K);
    zero_unused_tokens(p_, args_.cu_seqlens, args_.dk, p_.dtype, p_.H, p_.K);
    zero_unused_tokens(p_, args_.cu_seqlens, args_.dv, p_.dtype, p_.HV, p_.V);
    zero_unused_tokens(p_, args_.cu_seqlens, args_.dg, p_.gate_dtype, p_.HV, 1);
    zero_unused_tokens(p_, args_.cu_seqlens, args_.dbeta, p_.beta_dtype, p_.HV, 1);
  }

 private:
  // A range of units of one group of one sequence.
  struct Units {
    std::int64_t n;
    Sequence sequence;
    std::int64_t query_head, begin, end;
    const UnitPlan* plan;
    float* memory;  // of unit `begin`
    std::int64_t chunks, segments;
  };

  Sequence sequence_of(std::int64_t n) const { return sequence(p_, args_.cu_seqlens, n); }

  Units units_of(std::int64_t n, std::int64_t query_head, std::int64_t begin, std::int64_t end, const UnitPlan& plan,
                 std::int64_t first_unit) const {
    const Sequence q = sequence_of(n);
    const std::int64_t chunks = chunks_of(q.length);
    return {n,
            q,
            query_head,
            begin,
            end,
            &plan,
            layout_.unit_memory + first_unit * plan.size,
            chunks,
            (chunks + plan.chunks - 1) / plan.chunks};
  }

  UnitMemory memory_of(const Units& x, std::int64_t unit) const { return x.plan->unit(shape_, x.memory, unit - x.begin); }

  std::int64_t value_head(const Units& x, std::int64_t unit) const { return x.query_head * shape_.G + unit / shape_.blocks; }

  ValueBlock block_of(const Units& x, std::int64_t unit) const {
    return {x.sequence, value_head(x, unit), unit % shape_.blocks};
  }

  Worker worker() const {
    Arena m(layout_.worker_memory + omp_get_thread_num() * Worker::size(shape_));
    return {shape_, m};
  }

  // Loads the states at both ends, and finds those at the segments' starts.
  void enter(const Units& x, Worker& w) const {
    for (std::int64_t u = x.begin; u < x.end; ++u) {
      const UnitMemory m = memory_of(x, u);
      const std::int64_t last = args_.dfinal_state.data == nullptr ? -1 : x.n;
      kernels_.load_state(block_of(x, u), args_.dfinal_state, p_.final_dtype, last, m.dstate, w.scratch);
      kernels_.load_state(block_of(x, u), args_.initial_state, p_.initial_dtype, initial_row(args_, x.n), m.starts,
                          w.scratch);
    }
    for (std::int64_t segment = 0; segment + 1 < x.segments; ++segment) {
      for (std::int64_t i = 0; i < x.plan->chunks; ++i) {
        advance(x, segment * x.plan->chunks + i, w, [&](const UnitMemory& m) {
          float* const start = m.starts + segment * shape_.state();
          float* const next = start + shape_.state();
          return Step{i == 0 ? start : next, m.r, next};
        });
      }
    }
  }

  // S and R of every chunk of a segment.
  void keep_states(const Units& x, std::int64_t segment, Worker& w) const {
    const std::int64_t chunks = chunks_of_segment(x, segment);
    for (std::int64_t i = 0; i < chunks; ++i) {
      advance(x, segment * x.plan->chunks + i, w, [&](const UnitMemory& m) {
        float* const next = i + 1 < chunks ? m.states + i * shape_.state() : nullptr;
        return Step{state_of(m, segment, i), m.r + i * C * shape_.width, next};
      });
    }
  }

  // What `advance` works on for one unit: see BackwardKernels.
  struct Step {
    const float* state;
    float *r, *next;
  };

  template <typename StepOf>
  void advance(const Units& x, std::int64_t chunk, Worker& w, StepOf step_of) const {
    kernels_.load_keys(x.sequence, x.query_head, chunk, false, w.keys);
    for (std::int64_t u = x.begin; u < x.end; ++u) {
      if (u == x.begin || u % shape_.blocks == 0) kernels_.load_head(x.sequence, value_head(x, u), w.keys, false, w.head);
      const Step step = step_of(memory_of(x, u));
      kernels_.advance(block_of(x, u), w.keys, w.head, step.state, step.r, step.next, w.scratch);
    }
  }

  // One unit's dv and dS of a chunk, with w's keys and head loaded; its other contributions go to `out`.
  void reverse(const Units& x, std::int64_t unit, std::int64_t segment, std::int64_t i, const Worker& w,
               const Partial& out) const {
    const UnitMemory m = memory_of(x, unit);
    kernels_.reverse(block_of(x, unit), w.keys, w.head, state_of(m, segment, i), m.r + i * C * shape_.width, m.dstate, out,
                     w.scratch);
  }

  // All gradients of a chunk of a group; partial_of(unit) gives what the unit contributes, with w's keys and head loaded.
  template <typename PartialOf>
  void gradients(const Units& x, std::int64_t chunk, Worker& w, PartialOf partial_of) const {
    kernels_.load_keys(x.sequence, x.query_head, chunk, true, w.keys);
    for (std::int64_t head = 0; head < shape_.G; ++head) {
      const std::int64_t unit = head * shape_.blocks;
      kernels_.load_head(x.sequence, value_head(x, unit), w.keys, true, w.head);
      const Partial sum = partial_of(unit);
      for (std::int64_t block = 1; block < shape_.blocks; ++block) sum.add(shape_, partial_of(unit + block));
      kernels_.finish_head(x.sequence, value_head(x, unit), w.keys, w.head, sum, head == 0, w.gradient,
                           layout_.sums_of(p_, x.sequence, x.n, chunk, value_head(x, unit)), w.scratch);
    }
    kernels_.finish_keys(x.sequence, x.query_head, w.keys, w.gradient, w.scratch);
  }

  void leave(const Units& x, const Worker& w) const {
    if (args_.dinitial_state.data == nullptr) return;
    for (std::int64_t u = x.begin; u < x.end; ++u) {
      const UnitMemory m = memory_of(x, u);
      if (initial_row(args_, x.n) < 0) std::fill_n(m.dstate, shape_.state(), 0.0f);
      kernels_.store_state(block_of(x, u), args_.dinitial_state, p_.initial_dtype, x.n, m.dstate, w.scratch);
    }
  }

  // Sequences order[begin, end), a group at a time on one thread.
  void run_whole(std::int64_t begin, std::int64_t end) const {
    const std::int64_t tasks = (end - begin) * p_.H;
    if (tasks == 0) return;
#pragma omp parallel num_threads(static_cast <int>(std::min <std::int64_t>(tasks, p_.threads)))
    {
      Worker w = worker();
      const std::int64_t first_unit = omp_get_thread_num() * shape_.units();
#pragma omp for schedule(dynamic)
      for (std::int64_t task = 0; task < tasks; ++task) {
        const std::int64_t n = layout_.order[begin + task / p_.H];
        const Units x = units_of(n, task % p_.H, 0, shape_.units(), layout_.whole, first_unit);
        enter(x, w);
        for (std::int64_t segment = x.segments - 1; segment >= 0; --segment) {
          keep_states(x, segment, w);
          for (std::int64_t i = chunks_of_segment(x, segment) - 1; i >= 0; --i) {
            gradients(x, segment * x.plan->chunks + i, w, [&](std::int64_t unit) {
              const Partial& out = unit % shape_.blocks == 0 ? w.sum : w.part;
              reverse(x, unit, segment, i, w, out);
              return out;
            });
          }
        }
        leave(x, w);
      }
    }
  }

  // Sequences order[begin, end), every unit for itself, segment by segment.
  void run_split(std::int64_t begin, std::int64_t end) const {
    const std::int64_t per_sequence = p_.H * shape_.units(), units = (end - begin) * per_sequence;
    const std::int64_t rounds = units_of(layout_.order[begin], 0, 0, 1, layout_.split, 0).segments;
    const auto unit_of = [&](std::int64_t i) {
      const std::int64_t unit = i % shape_.units();
      return units_of(layout_.order[begin + i / per_sequence], i % per_sequence / shape_.units(), unit, unit + 1,
                      layout_.split, i);
    };
#pragma omp parallel num_threads(static_cast <int>(layout_.workers))
    {
      Worker w = worker();
#pragma omp for schedule(dynamic)
      for (std::int64_t i = 0; i < units; ++i) enter(unit_of(i), w);

      for (std::int64_t round = 0; round < rounds; ++round) {
#pragma omp for schedule(dynamic)
        for (std::int64_t i = 0; i < units; ++i) {
          const Units x = unit_of(i);
          const std::int64_t segment = x.segments - 1 - round;
          if (segment >= 0) keep_contributions(x, segment, w);
        }
        const std::int64_t tasks = (end - begin) * p_.H * layout_.split.chunks;
#pragma omp for schedule(dynamic)
        for (std::int64_t task = 0; task < tasks; ++task) {
          const std::int64_t group = task / layout_.split.chunks, i = task % layout_.split.chunks;
          const Units x = units_of(layout_.order[begin + group / p_.H], group % p_.H, 0, shape_.units(), layout_.split,
                                   group * shape_.units());
          const std::int64_t segment = x.segments - 1 - round;
          if (segment < 0 || i >= chunks_of_segment(x, segment)) continue;
          gradients(x, segment * x.plan->chunks + i, w, [&](std::int64_t unit) { return stored_partial(x, unit, i); });
        }
      }
#pragma omp for schedule(dynamic)
      for (std::int64_t i = 0; i < units; ++i) leave(unit_of(i), w);
    }
  }

  // The reverse chain of one unit through a segment.
  void keep_contributions(const Units& x, std::int64_t segment, Worker& w) const {
    keep_states(x, segment, w);
    for (std::int64_t i = chunks_of_segment(x, segment) - 1; i >= 0; --i) {
      kernels_.load_keys(x.sequence, x.query_head, segment * x.plan->chunks + i, true, w.keys);
      kernels_.load_head(x.sequence, value_head(x, x.begin), w.keys, true, w.head);
      reverse(x, x.begin, segment, i, w, stored_partial(x, x.begin, i));
    }
  }

  Partial stored_partial(const Units& x, std::int64_t unit, std::int64_t i) const {
    Arena m(memory_of(x, unit).partials + i * Partial::size(shape_));
    return {shape_, m};
  }

  float* state_of(const UnitMemory& m, std::int64_t segment, std::int64_t i) const {
    return i == 0 ? m.starts + segment * shape_.state() : m.states + (i - 1) * shape_.state();
  }

  std::int64_t chunks_of_segment(const Units& x, std::int64_t segment) const {
    return std::min(x.plan->chunks, x.chunks - segment * x.plan->chunks);
  }

  // A gradient [HV] from the parameter sums, first token first.
  void store_parameters(const fd_tensor& x, fd_dtype type, int which) const {
    if (x.data == nullptr) return;
    for (std::int64_t head = 0; head < p_.HV; ++head) {
      double sum = 0;
      for (std::int64_t n = 0; n < p_.N; ++n) {
        const Sequence q = sequence_of(n);
        for (std::int64_t i = 0; i < chunks_of(q.length); ++i) sum += layout_.sums_of(p_, q, n, i, head)[which];
      }
      store(x.data, type, head * x.stride[0], sum);
    }
  }

 private:
  const fd_backward_args& args_;
  const fd_problem& p_;
  BackwardKernels kernels_;
  Layout layout_;
  const BackwardShape& shape_;
};

}  // namespace

std::size_t cpu_backward_workspace(const fd_problem& p) { return Layout(p, nullptr).bytes; }

fd_status cpu_backward(const fd_backward_args& args, void* workspace) {
  Backward(args, workspace).run();
  return FD_OK;
}

}  // namespace flashdelta
