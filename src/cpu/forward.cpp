// Chunked forward. One chunk of C tokens of one value head, its state S (K x n columns) in fp32 in the cache:
//
//     A  = strict_lower(Gam .* K K^T)        P = scale * lower(Gam .* Q K^T)
//     X  = V - e^gam .* (K S)                what S does not yet recall
//     V' = (I + diag(beta) A)^-1 diag(beta) X, by forward substitution
//     O  = scale * e^gam .* (Q S) + P V'
//     S  = e^gam_C S + K^T (e^(gam_C - gam) .* V')
//
// Substitution costs as much as multiplying by a ready inverse, so the inverse is never formed. Gam, e^gam and
// e^(gam_C - gam) are products of the tokens' decays: no exponent is ever positive, nothing cancels.
//
// A task is one sequence, some value heads of one key head (they share K K^T, Q K^T and the conversion of q and k), and some
// columns of V (which are independent of each other): how the work is cut changes no bit of the result. Tasks are cut until
// the largest is at most half of one thread's share, long sequences first.
#include <omp.h>

#include <algorithm>
#include <cstdint>

#include "cpu/cpu.hpp"
#include "cpu/tiles.hpp"

namespace flashdelta {
namespace {

constexpr std::int64_t kChunk = 32;
constexpr std::int64_t kMinColumns = 32;            // a task has at least this many columns of V
constexpr std::int64_t kStateFloats = 1 << 17;      // the states of one task, together, should fit a core's L2 cache
constexpr std::int64_t kFloatsPerThread = 1 << 15;  // elements of o worth a thread

// How the work of one sequence is cut.
struct Cut {
  std::int64_t n;           // sequence
  std::int64_t length;      // its tokens
  std::int64_t heads;       // value heads of a task, a divisor of HV / H
  std::int64_t columns;     // columns of V of a task
  std::int64_t first_task;  // its tasks are numbered from here

  std::int64_t tasks(const fd_problem& p) const { return p.HV / heads * column_tasks(p); }
  std::int64_t column_tasks(const fd_problem& p) const { return (p.V + columns - 1) / columns; }
};

// Most value heads of one task whose states fit the cache.
std::int64_t most_heads(const fd_problem& p) {
  std::int64_t heads = p.HV / p.H;
  const auto fits = [&] { return heads * p.K * round_up(p.V, 16) <= kStateFloats; };
  while (heads > 1 && (!fits() || (p.HV / p.H) % heads != 0)) --heads;
  return heads;
}

// One thread's memory.
struct Scratch {
  float *q = nullptr, *k = nullptr;                            // [C, K]
  float* kt = nullptr;                                         // [K, C]
  float *kk = nullptr, *qk = nullptr;                          // [C, C]
  float *gam = nullptr, *a = nullptr, *p = nullptr;            // [C, C]
  float *g = nullptr, *beta = nullptr, *from_start = nullptr;  // [C]
  float *x = nullptr, *o = nullptr;                            // [C, columns]
  float* transposed = nullptr;
  float* states = nullptr;  // [heads, K, columns]

  Scratch(Arena& arena, const fd_problem& problem) {
    const std::int64_t K = round_up(problem.K, 16), V = round_up(problem.V, 16);
    q = arena.take<float>(kChunk * K);
    k = arena.take<float>(kChunk * K);
    kt = arena.take<float>(K * kChunk);
    for (float** square : {&kk, &qk, &gam, &a, &p}) *square = arena.take<float>(kChunk * kChunk);
    for (float** vector : {&g, &beta, &from_start}) *vector = arena.take<float>(kChunk);
    x = arena.take<float>(kChunk * V);
    o = arena.take<float>(kChunk * V);
    transposed = arena.take<float>(state_scratch(problem));
    states = arena.take<float>(most_heads(problem) * K * V);
  }
};

std::size_t scratch_bytes(const fd_problem& p) {
  Arena arena;
  Scratch(arena, p);
  return arena.used();
}

std::size_t cuts_bytes(const fd_problem& p) {
  Arena arena;
  arena.take<Cut>(p.N);
  return arena.used();
}

// Fills `cuts`, longest sequence first; returns the number of tasks.
std::int64_t cut(const fd_forward_args& args, int threads, Cut* cuts) {
  const fd_problem& p = *args.problem;
  std::int64_t total = 0;
  for (std::int64_t n = 0; n < p.N; ++n) {
    const std::int64_t length = sequence(p, args.cu_seqlens, n).length;
    cuts[n] = {n, length, most_heads(p), p.V, 0};
    total += length;
  }
  std::sort(cuts, cuts + p.N,
            [](const Cut& a, const Cut& b) { return a.length != b.length ? a.length > b.length : a.n < b.n; });
  const std::int64_t G = p.HV / p.H;
  std::int64_t tasks = 0;
  for (std::int64_t i = 0; i < p.N; ++i) {
    Cut& c = cuts[i];
    const auto too_large = [&] { return threads > 1 && c.length * c.heads * c.columns * 2 * threads > total * p.HV * p.V; };
    while (too_large() && c.heads > 1) {
      do --c.heads;
      while (G % c.heads != 0);
    }
    while (too_large() && c.columns > kMinColumns) c.columns = std::max(kMinColumns, round_up(c.columns / 2, kMinColumns));
    c.first_task = tasks;
    tasks += c.tasks(p);
  }
  return tasks;
}

class Task {
 public:
  Task(const fd_forward_args& args, const Cut& cut, std::int64_t i, const Scratch& scratch)
      : args_(args), p_(*args.problem), s_(scratch), n_(cut.n), sequence_(sequence(p_, args.cu_seqlens, cut.n)) {
    const std::int64_t column_tasks = cut.column_tasks(p_);
    first_head_ = i / column_tasks * cut.heads;
    heads_ = cut.heads;
    key_head_ = first_head_ / (p_.HV / p_.H);
    column_ = i % column_tasks * cut.columns;
    n_columns_ = std::min(cut.columns, p_.V - column_);
    width_ = round_up(n_columns_, 16);
  }

  void run() {
    for (std::int64_t j = 0; j < heads_; ++j) {
      load_state(vector_, p_, args_.initial_state, p_.initial_dtype, initial_row(args_, n_), first_head_ + j, column_,
                 n_columns_, state(j), width_, s_.transposed);
    }
    for (std::int64_t t = 0; t < sequence_.length; t += kChunk) {
      const std::int64_t tokens = std::min(kChunk, sequence_.length - t);
      keys(t, tokens);
      for (std::int64_t j = 0; j < heads_; ++j) values(t, tokens, first_head_ + j, state(j));
      const std::int64_t row = checkpoint_row(args_, n_, t + tokens);
      for (std::int64_t j = 0; j < heads_; ++j) save_state(j, args_.checkpoints, p_.checkpoint_dtype, row);
    }
    for (std::int64_t j = 0; j < heads_; ++j) save_state(j, args_.final_state, p_.final_dtype, final_row(args_, n_));
  }

 private:
  float* state(std::int64_t j) const { return s_.states + j * p_.K * width_; }

  void save_state(std::int64_t j, const fd_tensor& states, fd_dtype type, std::int64_t row) const {
    store_state(vector_, p_, state(j), width_, states, type, row, first_head_ + j, column_, n_columns_, s_.transposed);
  }

  // What the value heads share: q, k, k^T, K K^T and Q K^T of a chunk. Rows past the tokens are zero.
  void keys(std::int64_t t, std::int64_t tokens) {
    const std::int64_t K = p_.K, row = round_up(K, 16);
    rows_ = round_up(tokens, 16);
    const auto load = [&](const fd_tensor& x, float* tile) {
      load_tokens(vector_, x, p_.dtype, sequence_.batch, sequence_.begin + t, key_head_, tokens, 0, K, tile, row, rows_);
      if (p_.qk_l2norm != 0) vector_.normalise(tokens, K, tile, row, static_cast<float>(p_.l2norm_eps), nullptr);
    };
    load(args_.q, s_.q);
    load(args_.k, s_.k);
    vector_.transpose(rows_, K, s_.k, row, s_.kt, kChunk);
    Gemm g{.m = rows_,
           .n = rows_,
           .k = K,
           .a = s_.k,
           .a_row = row,
           .a_column = 1,
           .b = s_.kt,
           .b_row = kChunk,
           .c = s_.kk,
           .c_row = kChunk,
           .c_part = Part::lower};
    vector_.gemm(g);
    g.a = s_.q;
    g.c = s_.qk;
    vector_.gemm(g);
  }

  // One value head's chunk: writes o, updates S [K x width].
  void values(std::int64_t t, std::int64_t tokens, std::int64_t value_head, float* S) {
    const std::int64_t K = p_.K, row = round_up(K, 16), begin = sequence_.begin + t;
    const auto scale = static_cast<float>(p_.scale);
    load_gates(args_, log_decay<float>(args_, value_head), sequence_.batch, begin, value_head, tokens, rows_, s_.g, s_.beta);
    vector_.exp(rows_, s_.g, s_.g);
    vector_.decay_products(rows_, s_.g, s_.gam, kChunk, s_.from_start);
    vector_.multiply_lower(rows_, 1, false, s_.gam, kChunk, s_.kk, kChunk, s_.a, kChunk);
    vector_.multiply_lower(rows_, scale, true, s_.gam, kChunk, s_.qk, kChunk, s_.p, kChunk);

    load_tokens(vector_, args_.v, p_.dtype, sequence_.batch, begin, value_head, tokens, column_, n_columns_, s_.x, width_,
                rows_);
    vector_.gemm({.m = rows_,
                  .n = width_,
                  .k = K,
                  .a = s_.k,
                  .a_row = row,
                  .a_column = 1,
                  .b = S,
                  .b_row = width_,
                  .c = s_.x,
                  .c_row = width_,
                  .alpha = -1,
                  .keep = 1,
                  .row_scale = s_.from_start});
    vector_.solve({.m = rows_,
                   .n = width_,
                   .a = s_.a,
                   .a_row = kChunk,
                   .a_column = 1,
                   .x = s_.x,
                   .x_row = width_,
                   .row_scale = s_.beta});

    vector_.gemm({.m = rows_,
                  .n = width_,
                  .k = K,
                  .a = s_.q,
                  .a_row = row,
                  .a_column = 1,
                  .b = S,
                  .b_row = width_,
                  .c = s_.o,
                  .c_row = width_,
                  .alpha = scale,
                  .row_scale = s_.from_start});
    vector_.gemm({.m = rows_,
                  .n = width_,
                  .k = rows_,
                  .a = s_.p,
                  .a_row = kChunk,
                  .a_column = 1,
                  .b = s_.x,
                  .b_row = width_,
                  .c = s_.o,
                  .c_row = width_,
                  .keep = 1,
                  .a_part = Part::lower});
    store_tokens(vector_, s_.o, width_, args_.o, p_.dtype, sequence_.batch, begin, value_head, tokens, column_, n_columns_);

    const float* to_end = s_.gam + (rows_ - 1) * kChunk;
    vector_.scale_rows(rows_, width_, to_end, s_.x, width_, nullptr, 0, s_.x, width_);
    vector_.gemm({.m = K,
                  .n = width_,
                  .k = rows_,
                  .a = s_.kt,
                  .a_row = kChunk,
                  .a_column = 1,
                  .b = s_.x,
                  .b_row = width_,
                  .c = S,
                  .c_row = width_,
                  .keep = s_.from_start[rows_ - 1]});
  }

  const VectorKernels& vector_ = vector_kernels();
  const fd_forward_args& args_;
  const fd_problem& p_;
  const Scratch& s_;
  std::int64_t n_;
  Sequence sequence_;
  std::int64_t first_head_, heads_, key_head_;
  std::int64_t column_, n_columns_, width_;  // columns of V; width: rounded up to 16
  std::int64_t rows_ = 0;                    // of the current chunk, rounded up to 16
};

}  // namespace

std::size_t cpu_forward_workspace(const fd_problem& p) {
  return cuts_bytes(p) + static_cast<std::size_t>(p.threads) * scratch_bytes(p);
}

fd_status cpu_forward(const fd_forward_args& args, void* workspace) {
  const fd_problem& p = *args.problem;
  auto* cuts = static_cast<Cut*>(workspace);
  const std::int64_t elements = used_tokens(p, args.cu_seqlens) * p.B * p.HV * p.V;
  const int team = static_cast<int>(std::clamp<std::int64_t>(elements / kFloatsPerThread, 1, p.threads));
  const std::int64_t tasks = cut(args, team, cuts);
  char* scratches = static_cast<char*>(workspace) + cuts_bytes(p);
  const std::size_t stride = scratch_bytes(p);

#pragma omp parallel num_threads(team)
  {
    Arena arena(scratches + static_cast<std::size_t>(omp_get_thread_num()) * stride);
    const Scratch scratch(arena, p);
#pragma omp for schedule(dynamic, 1)
    for (std::int64_t i = 0; i < tasks; ++i) {
      const Cut* c =
          std::upper_bound(cuts, cuts + p.N, i, [](std::int64_t task, const Cut& x) { return task < x.first_task; }) - 1;
      Task(args, *c, i - c->first_task, scratch).run();
    }
  }
  zero_unused_tokens(p, args.cu_seqlens, args.o, p.dtype, p.HV, p.V);
  return FD_OK;
}

}  // namespace flashdelta
