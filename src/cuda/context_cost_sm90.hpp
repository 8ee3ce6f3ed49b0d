// Whether it pays to cut sequences into runs, and into how many: the one place of that estimate. The planner on the device
// asks it with the real lengths and a sample of the gates, the host with what the problem says.
#pragma once

#include <cmath>
#include <cstdint>

namespace flashdelta::cuda {

// Cycles on one SM, fitted to an H200's times by bench/fit_context.py (docs/kernels.md); WALK_CHUNK and FOLD_STEP from
// profiles of the kernels; HEAD, PRE_PASS and EMPTY less by what the pre-pass's kernels are thought to have gained since;
// SHAPES from 8 x 1024 tokens of 64 heads, with the planner and without.
struct Costs {
  static constexpr float HALF_CHUNK = 2750;  // forward, a chunk, 64 values
  static constexpr float FULL_CHUNK = 4450;  // forward, a chunk, 128 values
  static constexpr float WALK_CHUNK = 2050;  // pre-pass, a chunk, 64 rows of values or transition
  static constexpr float RUN = 11500;        // until a run's first chunk is under way
  static constexpr float FOLD_STEP = 2000;   // from one run's first state to the next's
  static constexpr float HEAD = 50000;       // pre-pass, a run of a head: its window, states in and out
  static constexpr float PRE_PASS = 13000;   // start of the pre-pass's kernels
  static constexpr float EMPTY = 13000;      // likewise, where they find nothing to do
  static constexpr float SHAPES = 30000;     // where the planner does no more than to choose the forward's shape
};

// The planner cuts where that takes less than whole sequences even if it takes so many times what is estimated.
constexpr float DOUBT = 1.05f;

// The host asks the planner only where that can pay. It knows T, N and the heads, of packed sequences no lengths, and of no
// gates; it takes a quarter of the heads not to decay. Let `whole` be the cycles without any cut, all lengths equal.
//
//   cuts    known lengths: if a cut gains 10 % of `whole` even where nothing decays, they are cut, and the host chooses the
//           forward's shape. Else the planner is asked where (a) a cut gains 10 %, for packed sequences if one of them has
//           all tokens: the case that gains most, and (b) EMPTY is at most 3 % of `whole`, or nothing is lost anyway
//   shape   packed sequences that may not be cut: the planner chooses the forward's shape where (a) the shape for equal
//           lengths would take 10 % more for one sequence with all tokens than the other, and (b) SHAPES is at most 3 %
//   order   packed sequences with more items than SMs: longest first. Equal lengths need no order, and no planner

// What a call's work is divided into.
struct Machine {
  int sm_count;
  int value_heads;
  int blocks;       // forward, of one head of a run
  int walk_blocks;  // pre-pass, likewise, of 64 values
  float chunk;      // Costs::HALF_CHUNK or FULL_CHUNK
};

// A batch whose sequences of more than `length` chunks are cut into runs of the same length, as far as that goes.
struct Cut {
  unsigned chunks;                    // in all
  unsigned longest;                   // run
  unsigned large_runs, large_chunks;  // runs longer than half of `length`: at most one of them fits beside another
  unsigned pre_runs, pre_chunks;      // runs but the last of cut sequences
  unsigned steps;                     // of the longest fold
};

// A sequence's runs: `more` of `size` + 1 chunks, then others of `size`.
struct Pieces {
  int count, size, more;
  __host__ __device__ int first(int i) const { return i * size + (i < more ? i : more); }
  __host__ __device__ int longest() const { return size + (more > 0 ? 1 : 0); }
};
__host__ __device__ inline Pieces pieces(int chunks, int length) {
  const int count = chunks > length ? (chunks + length - 1) / length : 1;
  return {count, chunks / count, chunks % count};
}

// Calls add(member, x) for what one sequence adds to a cut, and raise(member, x) for what it raises it to.
template <typename Add, typename Raise>
__host__ __device__ void add_sequence(int chunks, int length, Add add, Raise raise) {
  const Pieces p = pieces(chunks, length);
  add(&Cut::chunks, chunks);
  raise(&Cut::longest, p.longest());
  if (2 * p.longest() > length) {
    add(&Cut::large_runs, p.count);
    add(&Cut::large_chunks, chunks);
  }
  add(&Cut::pre_runs, p.count - 1);
  add(&Cut::pre_chunks, p.first(p.count - 1));
  raise(&Cut::steps, p.count - 1);
}

// Heads by what the pre-pass has to do for a run of theirs.
struct Heads {
  int exact;      // all chunks, values and transition
  float windows;  // the others: chunks of all of them together, values alone
  float longest;  // of them
};

// Chunk times of the busiest SM: all work evenly, or the longest item, or rounds of large items.
__host__ __device__ inline float makespan(float even, float longest, float large_items, float large_length, int sm_count) {
  const float rounds = ceilf(large_items / static_cast<float>(sm_count));
  const float a = even / static_cast<float>(sm_count), b = rounds * large_length;
  return a > b ? (a > longest ? a : longest) : (b > longest ? b : longest);
}

// Cycles of the forward alone.
__host__ __device__ inline float forward_cost(const Machine& m, const Cut& cut) {
  const auto items = static_cast<float>(m.value_heads * m.blocks);
  const float large = cut.large_runs > 0 ? static_cast<float>(cut.large_chunks) / static_cast<float>(cut.large_runs) : 0.0f;
  const float extra = Costs::RUN / m.chunk;  // as chunks
  return m.chunk * makespan(items * static_cast<float>(cut.chunks), static_cast<float>(cut.longest) + extra,
                            items * static_cast<float>(cut.large_runs), large + extra, m.sm_count);
}

// Cycles of the pre-pass, also where it finds nothing to do. The transition's 128 rows are two more blocks of a walk.
__host__ __device__ inline float pre_pass_cost(const Machine& m, const Cut& cut, const Heads& heads) {
  if (cut.pre_runs == 0) return Costs::EMPTY;
  const auto runs = static_cast<float>(cut.pre_runs), chunks = static_cast<float>(cut.pre_chunks);
  const auto exact = static_cast<float>(heads.exact), blocks = static_cast<float>(m.walk_blocks);
  const float length = chunks / runs, extra = Costs::RUN / Costs::WALK_CHUNK;
  const float all = static_cast<float>(m.value_heads), items = exact * (blocks + 2) + (all - exact) * blocks;  // of a run
  const float walks = exact * (blocks + 2) * chunks + blocks * heads.windows * runs + items * runs * extra;
  const float longest = (heads.exact > 0 ? length : heads.longest) + extra;
  const float steps = heads.exact > 0 ? static_cast<float>(cut.steps) : 0.0f;
  return Costs::PRE_PASS + Costs::FOLD_STEP * steps + Costs::HEAD * all * runs / static_cast<float>(m.sm_count) +
         Costs::WALK_CHUNK * makespan(walks, longest, exact * (blocks + 2) * runs, length + extra, m.sm_count);
}

}  // namespace flashdelta::cuda
