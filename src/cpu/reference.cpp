// The reference backend: the definition of correct. One token after another, everything in float64, whatever the element
// types.
//
// A head's state S is a row-major [K][V] matrix. Token t with query q, key k, value v, log decay g, write strength beta:
//
//     S~ = e^g S              decay                 dS  += scale q do^T
//     u  = v - S~^T k         what k does not       dq   = scale S do         dbeta = k^T dS u
//                             yet recall            du   = beta dS^T k        dv    = du
//     S  = S~ + beta k u^T    write                 dk   = beta dS u - S~ du
//     o  = scale S^T q        read                  dS~  = dS - k du^T        dg    = <dS~, S~>
//                                                   dS   = e^g dS~
//
// On the left the recurrence, first line first; on the right its gradient, run over the tokens in reverse.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>
#include <string>

#include "backend.hpp"
#include "cpu/gates.hpp"
#include "cpu/sequences.hpp"
#include "dtype.hpp"

namespace flashdelta {
namespace {

// ---------------------------------------------------------------------------------------------- strided tensors, in double

// Where row (b, t, h) of a tensor [B, T, heads, ..] starts.
std::int64_t offset(const fd_tensor& x, std::int64_t b, std::int64_t t, std::int64_t h) {
  return b * x.stride[0] + t * x.stride[1] + h * x.stride[2];
}

void load_row(const fd_tensor& x, fd_dtype type, std::int64_t start, std::span<double> row) {
  for (std::size_t i = 0; i < row.size(); ++i) row[i] = load(x.data, type, start + static_cast<std::int64_t>(i));
}

void store_row(const fd_tensor& x, fd_dtype type, std::int64_t start, std::span<const double> row) {
  for (std::size_t i = 0; i < row.size(); ++i) store(x.data, type, start + static_cast<std::int64_t>(i), row[i]);
}

// Zeros in the rows of x [B, T, heads, width] that belong to no sequence.
void zero_unused_rows(const fd_problem& p, const void* cu_seqlens, const fd_tensor& x, fd_dtype type, std::int64_t heads,
                      std::int64_t width) {
  if (x.data == nullptr) return;
  for (std::int64_t t = used_tokens(p, cu_seqlens); t < p.T; ++t) {
    for (std::int64_t h = 0; h < heads; ++h) {
      for (std::int64_t i = 0; i < width; ++i) store(x.data, type, offset(x, 0, t, h) + i, 0);
    }
  }
}

// Calls visit(state element, element of the tensor) for all of the state in `row` of a tensor [P, HV, K, V] or [P, HV, V,
// K].
template <typename Visit>
void for_each_element(const fd_problem& p, const fd_tensor& states, std::int64_t row, std::int64_t value_head, Visit visit) {
  const std::int64_t start = row * states.stride[0] + value_head * states.stride[1];
  const std::int64_t k_stride = states.stride[p.state_v_first != 0 ? 3 : 2];
  const std::int64_t v_stride = states.stride[p.state_v_first != 0 ? 2 : 3];
  for (std::int64_t i = 0; i < p.K; ++i) {
    for (std::int64_t j = 0; j < p.V; ++j) visit(i * p.V + j, start + i * k_stride + j * v_stride);
  }
}

// A row below zero: zero.
void load_state(const fd_problem& p, const fd_tensor& states, fd_dtype type, std::int64_t row, std::int64_t value_head,
                double* S) {
  if (row < 0) {
    std::fill_n(S, p.K * p.V, 0.0);
  } else {
    for_each_element(p, states, row, value_head, [&](auto i, auto at) { S[i] = load(states.data, type, at); });
  }
}

// A row below zero: nothing is written.
void store_state(const fd_problem& p, const fd_tensor& states, fd_dtype type, std::int64_t row, std::int64_t value_head,
                 const double* S) {
  if (row < 0) return;
  for_each_element(p, states, row, value_head, [&](auto i, auto at) { store(states.data, type, at, S[i]); });
}

// --------------------------------------------------------------------------------------------------------------- workspace

// Takes arrays out of a block of memory, one after another; without memory it only counts.
class Workspace {
 public:
  explicit Workspace(void* memory) : memory_(static_cast<double*>(memory)) {}

  double* take(std::int64_t count) {
    double* const array = memory_ == nullptr ? nullptr : memory_ + taken_;
    taken_ += count;
    return array;
  }
  std::size_t bytes() const { return static_cast<std::size_t>(taken_) * sizeof(double); }

 private:
  double* memory_;
  std::int64_t taken_ = 0;
};

struct ForwardScratch {
  double *S, *q, *k, *v, *u, *o;

  ForwardScratch(const fd_problem& p, Workspace& w)
      : S(w.take(p.K * p.V)), q(w.take(p.K)), k(w.take(p.K)), v(w.take(p.V)), u(w.take(p.V)), o(w.take(p.V)) {}
};

// The reverse walk needs the state before every token. Kept are those at the start of every segment of `segment` tokens;
// within a segment they are computed again.
struct BackwardScratch {
  std::int64_t segment;
  double* starts;  // [segments][K][V], state before each segment
  double* inside;  // [segment][K][V], state before each token of the current segment
  double *S, *dS;  // [K][V]
  double *q, *k;   // [K]
  double *v, *u, *do_, *du;
  double *dq, *dk;  // [T][K], of the normalised q and k, summed over the value heads that share them

  BackwardScratch(const fd_problem& p, Workspace& w)
      : segment(std::max<std::int64_t>(1, std::llround(std::sqrt(static_cast<double>(p.T))))),
        starts(w.take((p.T + segment - 1) / segment * p.K * p.V)),
        inside(w.take(segment * p.K * p.V)),
        S(w.take(p.K * p.V)),
        dS(w.take(p.K * p.V)),
        q(w.take(p.K)),
        k(w.take(p.K)),
        v(w.take(p.V)),
        u(w.take(p.V)),
        do_(w.take(p.V)),
        du(w.take(p.V)),
        dq(w.take(p.T * p.K)),
        dk(w.take(p.T * p.K)) {}
};

// Gradients of A_log and dt_bias, one partial sum per sequence and value head.
struct ParameterSums {
  double *A_log, *dt_bias;  // [HV][N]

  ParameterSums(const fd_problem& p, Workspace& w) : A_log(w.take(p.HV * p.N)), dt_bias(w.take(p.HV * p.N)) {}
};

template <typename Arrays>
std::size_t bytes_of(const fd_problem& p) {
  Workspace w(nullptr);
  const Arrays counted(p, w);
  return w.bytes();
}

// One task is a sequence and a value head (backward: a query head with all its value heads). More threads have nothing to
// do.
int threads_for(const fd_problem& p, std::int64_t tasks) {
  return static_cast<int>(std::clamp<std::int64_t>(tasks, 1, p.threads));
}

template <typename Scratch>
Scratch scratch_of_this_thread(const fd_problem& p, void* memory) {
  Workspace w(static_cast<char*>(memory) + static_cast<std::size_t>(omp_get_thread_num()) * bytes_of<Scratch>(p));
  return Scratch(p, w);
}

std::size_t workspace(Operation operation, const fd_problem& p) {
  if (operation == Operation::backward) {
    return bytes_of<ParameterSums>(p) + static_cast<std::size_t>(threads_for(p, p.N * p.H)) * bytes_of<BackwardScratch>(p);
  }
  return static_cast<std::size_t>(threads_for(p, p.N * p.HV)) * bytes_of<ForwardScratch>(p);
}

// ------------------------------------------------------------------------------------------------------------------ tokens

double dot(std::span<const double> x, std::span<const double> y) {
  double sum = 0;
  for (std::size_t i = 0; i < x.size(); ++i) sum += x[i] * y[i];
  return sum;
}

// x becomes x / sqrt(sum of squares + eps) if the problem wants that; returns the factor.
double normalise_row(const fd_problem& p, std::span<double> x) {
  if (p.qk_l2norm == 0) return 1;
  const double factor = 1 / std::sqrt(dot(x, x) + p.l2norm_eps);
  for (double& value : x) value *= factor;
  return factor;
}

// dy, the gradient of y = factor x, becomes that of x.
void normalise_row_gradient(const fd_problem& p, std::span<const double> y, double factor, std::span<double> dy) {
  if (p.qk_l2norm == 0) return;
  const double along = dot(y, dy);
  for (std::size_t i = 0; i < dy.size(); ++i) dy[i] = factor * (dy[i] - y[i] * along);
}

// One token of one head: its row of every input, in double.
struct Token {
  std::span<double> q, k;             // [K], normalised
  double q_factor, k_factor;          // of the l2 norm
  std::span<double> v;                // [V]
  double gate_input, strength_input;  // elements of g and beta
  double log_decay, decay, beta;
};

template <typename Args>
class Tokens {
 public:
  Tokens(const Args& args, std::int64_t n, std::int64_t value_head)
      : args_(args),
        p_(*args.problem),
        sequence_(sequence(p_, args.cu_seqlens, n)),
        value_head_(value_head),
        log_decay_(log_decay<double>(args, value_head)),
        strength_(p_) {}

  std::int64_t length() const { return sequence_.length; }
  const LogDecay<double>& gate() const { return log_decay_; }
  const WriteStrength<double>& strength() const { return strength_; }

  // Where token t's row of a tensor with value heads, or with query heads, starts.
  std::int64_t value_row(const fd_tensor& x, std::int64_t t) const {
    return offset(x, sequence_.batch, sequence_.begin + t, value_head_);
  }
  std::int64_t query_row(const fd_tensor& x, std::int64_t t) const {
    return offset(x, sequence_.batch, sequence_.begin + t, value_head_ / (p_.HV / p_.H));
  }

  // Token t, its rows in the scratch arrays q, k, v.
  template <typename Scratch>
  Token read(std::int64_t t, const Scratch& scratch) const {
    Token x{};
    x.q = {scratch.q, static_cast<std::size_t>(p_.K)};
    x.k = {scratch.k, static_cast<std::size_t>(p_.K)};
    x.v = {scratch.v, static_cast<std::size_t>(p_.V)};
    load_row(args_.q, p_.dtype, query_row(args_.q, t), x.q);
    load_row(args_.k, p_.dtype, query_row(args_.k, t), x.k);
    load_row(args_.v, p_.dtype, value_row(args_.v, t), x.v);
    x.q_factor = normalise_row(p_, x.q);
    x.k_factor = normalise_row(p_, x.k);
    if (args_.g.data != nullptr) x.gate_input = load(args_.g.data, p_.gate_dtype, value_row(args_.g, t));
    if (args_.beta.data != nullptr) x.strength_input = load(args_.beta.data, p_.beta_dtype, value_row(args_.beta, t));
    x.log_decay = log_decay_(x.gate_input);
    x.decay = std::exp(x.log_decay);
    x.beta = strength_(x.strength_input);
    return x;
  }

 private:
  const Args& args_;
  const fd_problem& p_;
  Sequence sequence_;
  std::int64_t value_head_;
  LogDecay<double> log_decay_;
  WriteStrength<double> strength_;
};

// S becomes S~; u = v - S~^T k.
void decay_and_recall(const Token& x, double* S, double* u) {
  const std::size_t V = x.v.size();
  std::copy(x.v.begin(), x.v.end(), u);
  for (std::size_t i = 0; i < x.k.size(); ++i) {
    double* const row = S + i * V;
    for (std::size_t j = 0; j < V; ++j) {
      row[j] *= x.decay;
      u[j] -= row[j] * x.k[i];
    }
  }
}

// S becomes the state after the token.
void advance(const Token& x, double* S, double* u) {
  decay_and_recall(x, S, u);
  const std::size_t V = x.v.size();
  for (std::size_t i = 0; i < x.k.size(); ++i) {
    for (std::size_t j = 0; j < V; ++j) S[i * V + j] += x.beta * x.k[i] * u[j];
  }
}

void read_out(const Token& x, double scale, const double* S, double* o) {
  const std::size_t V = x.v.size();
  std::fill_n(o, V, 0.0);
  for (std::size_t i = 0; i < x.q.size(); ++i) {
    for (std::size_t j = 0; j < V; ++j) o[j] += scale * x.q[i] * S[i * V + j];
  }
}

struct TokenGradient {
  double log_decay, beta;
};

// In: S the state before the token, dS the gradient of the state after it. Out: dS of the state before it, du (also dv);
// dq and dk are added to. S is overwritten.
TokenGradient reverse(const Token& x, double scale, double* S, double* u, const double* do_, double* dS, double* du,
                      double* dq, double* dk) {
  const std::size_t K = x.k.size(), V = x.v.size();
  TokenGradient d{0, 0};
  decay_and_recall(x, S, u);
  std::fill_n(du, V, 0.0);
  for (std::size_t i = 0; i < K; ++i) {
    double dS_u = 0;
    for (std::size_t j = 0; j < V; ++j) {
      double& dS_ij = dS[i * V + j];
      dS_ij += scale * x.q[i] * do_[j];
      dq[i] += scale * (S[i * V + j] + x.beta * x.k[i] * u[j]) * do_[j];
      dS_u += dS_ij * u[j];
      du[j] += x.beta * dS_ij * x.k[i];
    }
    dk[i] += x.beta * dS_u;
    d.beta += x.k[i] * dS_u;
  }
  for (std::size_t i = 0; i < K; ++i) {
    for (std::size_t j = 0; j < V; ++j) {
      double& dS_ij = dS[i * V + j];
      dk[i] -= S[i * V + j] * du[j];
      dS_ij -= x.k[i] * du[j];
      d.log_decay += dS_ij * S[i * V + j];
      dS_ij *= x.decay;
    }
  }
  return d;
}

// -------------------------------------------------------------------------------------------------------------- operations

// What fd_forward and fd_step share: every value head of every sequence, token by token, writing o. Every state on the way
// goes to visit(n, value head, tokens, state): after `tokens` tokens of sequence n, beginning with the initial state after
// none.
template <typename Args, typename Visit>
void recurrence(const Args& args, void* workspace, Visit visit) {
  const fd_problem& p = *args.problem;
  const std::int64_t tasks = p.N * p.HV;
#pragma omp parallel num_threads(threads_for(p, tasks))
  {
    const auto scratch = scratch_of_this_thread<ForwardScratch>(p, workspace);
#pragma omp for schedule(dynamic)
    for (std::int64_t task = 0; task < tasks; ++task) {
      const std::int64_t n = task / p.HV, value_head = task % p.HV;
      const Tokens<Args> tokens(args, n, value_head);
      load_state(p, args.initial_state, p.initial_dtype, initial_row(args, n), value_head, scratch.S);
      visit(n, value_head, std::int64_t{0}, scratch.S);
      for (std::int64_t t = 0; t < tokens.length(); ++t) {
        const Token x = tokens.read(t, scratch);
        advance(x, scratch.S, scratch.u);
        read_out(x, p.scale, scratch.S, scratch.o);
        store_row(args.o, p.dtype, tokens.value_row(args.o, t), {scratch.o, static_cast<std::size_t>(p.V)});
        visit(n, value_head, t + 1, scratch.S);
      }
    }
  }
  zero_unused_rows(p, args.cu_seqlens, args.o, p.dtype, p.HV, p.V);
}

fd_status forward(const fd_forward_args& args, void* workspace, void* /*stream*/) {
  const fd_problem& p = *args.problem;
  recurrence(args, workspace, [&](std::int64_t n, std::int64_t value_head, std::int64_t tokens, const double* S) {
    store_state(p, args.checkpoints, p.checkpoint_dtype, checkpoint_row(args, n, tokens), value_head, S);
    if (tokens == sequence(p, args.cu_seqlens, n).length) {
      store_state(p, args.final_state, p.final_dtype, final_row(args, n), value_head, S);
    }
  });
  return FD_OK;
}

fd_status step(const fd_step_args& args, void* workspace, void* /*stream*/) {
  const fd_problem& p = *args.problem;
  recurrence(args, workspace, [&](std::int64_t n, std::int64_t value_head, std::int64_t tokens, const double* S) {
    std::int64_t row = -1;
    if (p.final_slots > 0) {
      if (tokens > 0) row = final_row(args, n, tokens - 1);
    } else if (tokens == sequence(p, args.cu_seqlens, n).length) {
      row = final_row(args, n);
    }
    store_state(p, args.final_state, p.final_dtype, row, value_head, S);
  });
  return FD_OK;
}

// Gradients of one value head of one sequence. Written: dv, dg, dbeta, dinitial_state, the partial sums; s.dq and s.dk are
// added to.
void backward_of_head(const fd_backward_args& args, std::int64_t n, std::int64_t value_head, const BackwardScratch& s,
                      const ParameterSums& sums) {
  const fd_problem& p = *args.problem;
  const std::int64_t state = p.K * p.V;
  const Tokens<fd_backward_args> tokens(args, n, value_head);

  load_state(p, args.initial_state, p.initial_dtype, initial_row(args, n), value_head, s.S);
  for (std::int64_t t = 0; t < tokens.length(); ++t) {
    if (t % s.segment == 0) std::copy_n(s.S, state, s.starts + t / s.segment * state);
    advance(tokens.read(t, s), s.S, s.u);
  }

  load_state(p, args.dfinal_state, p.final_dtype, args.dfinal_state.data == nullptr ? -1 : n, value_head, s.dS);
  double& dA_log = sums.A_log[value_head * p.N + n] = 0;
  double& ddt_bias = sums.dt_bias[value_head * p.N + n] = 0;
  std::fill_n(s.do_, p.V, 0.0);
  for (std::int64_t t = tokens.length() - 1; t >= 0; --t) {
    const std::int64_t begin = t / s.segment * s.segment;
    if (t == tokens.length() - 1 || t + 1 == begin + s.segment) {  // the walk enters the segment: its states, once more
      std::copy_n(s.starts + begin / s.segment * state, state, s.inside);
      for (std::int64_t i = 0; begin + i < t; ++i) {
        std::copy_n(s.inside + i * state, state, s.inside + (i + 1) * state);
        advance(tokens.read(begin + i, s), s.inside + (i + 1) * state, s.u);
      }
    }
    const Token x = tokens.read(t, s);
    if (args.do_.data != nullptr) {
      load_row(args.do_, p.dtype, tokens.value_row(args.do_, t), {s.do_, static_cast<std::size_t>(p.V)});
    }
    const TokenGradient d =
        reverse(x, p.scale, s.inside + (t - begin) * state, s.u, s.do_, s.dS, s.du, s.dq + t * p.K, s.dk + t * p.K);

    const double dgate_input = d.log_decay * tokens.gate().derivative(x.gate_input);
    const double dstrength_input = d.beta * tokens.strength().derivative(x.strength_input);
    dA_log += d.log_decay * x.log_decay;
    ddt_bias += dgate_input;
    if (args.dv.data != nullptr) {
      store_row(args.dv, p.dtype, tokens.value_row(args.dv, t), {s.du, static_cast<std::size_t>(p.V)});
    }
    if (args.dg.data != nullptr) store(args.dg.data, p.gate_dtype, tokens.value_row(args.dg, t), dgate_input);
    if (args.dbeta.data != nullptr) store(args.dbeta.data, p.beta_dtype, tokens.value_row(args.dbeta, t), dstrength_input);
  }

  if (args.dinitial_state.data == nullptr) return;
  if (initial_row(args, n) < 0) std::fill_n(s.dS, state, 0.0);
  store_state(p, args.dinitial_state, p.initial_dtype, n, value_head, s.dS);
}

// Gradients of one query head of one sequence: those of its value heads, and dq and dk summed over them.
void backward_of_group(const fd_backward_args& args, std::int64_t n, std::int64_t query_head, const BackwardScratch& s,
                       const ParameterSums& sums) {
  const fd_problem& p = *args.problem;
  const std::int64_t G = p.HV / p.H;
  const Tokens<fd_backward_args> tokens(args, n, query_head * G);
  std::fill_n(s.dq, tokens.length() * p.K, 0.0);
  std::fill_n(s.dk, tokens.length() * p.K, 0.0);
  for (std::int64_t i = 0; i < G; ++i) backward_of_head(args, n, query_head * G + i, s, sums);

  for (std::int64_t t = 0; t < tokens.length(); ++t) {
    const Token x = tokens.read(t, s);
    const std::span<double> dq(s.dq + t * p.K, x.q.size()), dk(s.dk + t * p.K, x.k.size());
    normalise_row_gradient(p, x.q, x.q_factor, dq);
    normalise_row_gradient(p, x.k, x.k_factor, dk);
    if (args.dq.data != nullptr) store_row(args.dq, p.dtype, tokens.query_row(args.dq, t), dq);
    if (args.dk.data != nullptr) store_row(args.dk, p.dtype, tokens.query_row(args.dk, t), dk);
  }
}

// The gradient of a vector [HV]: each head's partial sums, first sequence first.
void store_parameter_gradient(const fd_problem& p, const fd_tensor& x, fd_dtype type, const double* partial_sums) {
  if (x.data == nullptr) return;
  for (std::int64_t value_head = 0; value_head < p.HV; ++value_head) {
    double sum = 0;
    for (std::int64_t n = 0; n < p.N; ++n) sum += partial_sums[value_head * p.N + n];
    store(x.data, type, value_head * x.stride[0], sum);
  }
}

fd_status backward(const fd_backward_args& args, void* workspace, void* /*stream*/) {
  const fd_problem& p = *args.problem;
  Workspace shared(workspace);
  const ParameterSums sums(p, shared);
  void* const scratch_memory = static_cast<char*>(workspace) + shared.bytes();
  const std::int64_t tasks = p.N * p.H;
#pragma omp parallel num_threads(threads_for(p, tasks))
  {
    const auto scratch = scratch_of_this_thread<BackwardScratch>(p, scratch_memory);
#pragma omp for schedule(dynamic)
    for (std::int64_t task = 0; task < tasks; ++task) backward_of_group(args, task / p.H, task % p.H, scratch, sums);
  }
  store_parameter_gradient(p, args.dA_log, p.A_log_dtype, sums.A_log);
  store_parameter_gradient(p, args.ddt_bias, p.dt_bias_dtype, sums.dt_bias);
  zero_unused_rows(p, args.cu_seqlens, args.dq, p.dtype, p.H, p.K);
  zero_unused_rows(p, args.cu_seqlens, args.dk, p.dtype, p.H, p.K);
  zero_unused_rows(p, args.cu_seqlens, args.dv, p.dtype, p.HV, p.V);
  zero_unused_rows(p, args.cu_seqlens, args.dg, p.gate_dtype, p.HV, 1);
  zero_unused_rows(p, args.cu_seqlens, args.dbeta, p.beta_dtype, p.HV, 1);
  return FD_OK;
}

// ---------------------------------------------------------------------------------------------------------------- contract

std::string unavailable() { return ""; }

std::string description() { return "float64, one token after another"; }

std::string unsupported(Operation, const fd_problem& p) {
  if (p.gate == FD_GATE_LOG_PER_KEY) return "gate is FD_GATE_LOG_PER_KEY; reference has one gate per token and value head";
  return "";
}

std::size_t saved(const fd_problem&) { return 0; }

}  // namespace

const Backend reference_backend = {FD_BACKEND_REFERENCE,
                                   FD_CPU,
                                   "reference",
                                   unavailable,
                                   description,
                                   unsupported,
                                   workspace,
                                   saved,
                                   forward,
                                   backward,
                                   step};

}  // namespace flashdelta
