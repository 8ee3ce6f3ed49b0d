#include "tests/support/call.hpp"

#include <algorithm>
#include <deque>
#include <limits>
#include <stdexcept>
#include <utility>
#include <vector>

namespace flashdelta::testing {
namespace {

using Shape = std::vector<std::int64_t>;

void require(bool condition, const std::string& message) {
  if (!condition) throw std::runtime_error(message);
}

// visit(pointer) for every pointer to memory in the arguments of a forward call or a step.
template <typename Args, typename Visit>
void for_each_pointer(Args& args, Visit visit) {
  for (fd_tensor* t : {&args.q, &args.k, &args.v, &args.g, &args.beta, &args.A_log, &args.dt_bias, &args.initial_state}) {
    visit(t->data);
  }
  visit(args.initial_index.data);
  visit(args.cu_seqlens);
  if constexpr (requires { args.o; }) {
    visit(args.o.data);
    visit(args.final_state.data);
    visit(args.final_index.data);
  }
  if constexpr (requires { args.accepted; }) visit(args.accepted);
  if constexpr (requires { args.checkpoints; }) {
    visit(args.checkpoints.data);
    visit(args.checkpoint_index.data);
  }
  if constexpr (requires { args.saved; }) visit(args.saved);
  if constexpr (requires { args.do_; }) {
    for (fd_tensor* t : {&args.do_, &args.dfinal_state, &args.dq, &args.dk, &args.dv, &args.dg, &args.dbeta, &args.dA_log,
                         &args.ddt_bias, &args.dinitial_state}) {
      visit(t->data);
    }
  }
}

// Tensors, indices and buffers of one call, filled and named as the case says.
class Call {
 public:
  Call(const Case& c, const Data& d, const Setting& setting) : c_(c), d_(d), setting_(setting) {
    problem.size = sizeof(problem);
    problem.B = c.B(), problem.T = c.T(), problem.N = c.packed ? c.N() : 0;
    problem.H = c.H, problem.HV = c.HV, problem.K = c.K, problem.V = c.V;
    problem.scale = c.scale;
    problem.backend = setting.backend;
    problem.device = setting.remote == nullptr ? FD_CPU : FD_CUDA;
    problem.dtype = type(c.dtype);
    problem.gate_dtype = problem.A_log_dtype = problem.dt_bias_dtype = type(c.gate_dtype);
    problem.beta_dtype = type(c.beta_dtype);
    problem.initial_dtype = type(c.initial_dtype);
    problem.final_dtype = problem.checkpoint_dtype = type(c.final_dtype);
    problem.cu_seqlens_dtype = problem.index_dtype = c.index_dtype;
    problem.gate = c.gates == Gates::none ? FD_GATE_NONE : c.gates == Gates::raw ? FD_GATE_RAW : FD_GATE_LOG;
    problem.beta = c.strengths == Strengths::none    ? FD_BETA_ONE
                   : c.strengths == Strengths::logit ? FD_BETA_LOGIT
                                                     : FD_BETA_VALUE;
    problem.qk_l2norm = c.l2norm ? 1 : 0;
    problem.allow_neg_eigval = c.allow_neg_eigval ? 1 : 0;
    problem.state_v_first = c.v_first ? 1 : 0;
    problem.threads = setting.threads;
    problem.context_parallel = setting.context_parallel;
    problem.context_bound = setting.context_bound;
    problem.workspace_limit = setting.workspace_limit;
  }

  // The members that all operations have.
  template <typename Args>
  void inputs(Args& args, bool step = false) {
    args.size = sizeof(args);
    args.problem = &problem;
    args.q = input("q", c_.dtype, d_.q);
    args.k = input("k", c_.dtype, d_.k);
    args.v = input("v", c_.dtype, d_.v);
    if (problem.gate != FD_GATE_NONE) args.g = input("g", c_.gate_dtype, d_.g);
    if (problem.beta != FD_BETA_ONE) args.beta = input("beta", c_.beta_dtype, d_.beta);
    if (problem.gate == FD_GATE_RAW) {
      args.A_log = input("A_log", c_.gate_dtype, d_.A_log);
      if (c_.dt_bias) args.dt_bias = input("dt_bias", c_.gate_dtype, d_.dt_bias);
    }
    if (c_.packed) args.cu_seqlens = integers(d_.cu_seqlens);
    if (c_.initial_state) initial_state(args, step && c_.slots > 0);
  }

  fd_tensor input(const char* name, fd_dtype dtype, const Array& values) {
    Tensor& t = make(name, dtype, values.shape);
    t.fill(values);
    return t.view();
  }

  fd_tensor output(const char* name, fd_dtype dtype, const Shape& shape) {
    Tensor& t = make(name, dtype, shape);
    outputs_.push_back({name, &t});
    return t.view();
  }

  // Sequence n's last state goes to a row of a pool, or to row n; with slots every token's state has its own row.
  template <typename Args>
  void final_state(Args& args, bool slots) {
    const std::int64_t S = slots ? c_.slots : 1;
    Tensor& states = c_.in_place ? *initial_ : make("final_state", c_.final_dtype, state_shape(pool_rows(S)));
    args.final_state = states.view();
    problem.final_rows = c_.pool ? pool_rows(S) : 0;
    problem.final_slots = slots ? S : 0;
    if (c_.pool) args.final_index = index(S, slots);
    final_ = {"final_state", &states, {}};
    for (std::int64_t n = 0; n < c_.N(); ++n) {
      for (std::int64_t s = 0; s < S; ++s) {
        const bool written = has_row(n) && (!slots || s < length(n));
        final_.rows.push_back(written ? row(n, s, S) : -1);
      }
    }
  }

  void checkpoints(fd_forward_args& args) {
    std::int64_t slots = 1;
    for (const std::int64_t length : c_.lengths) slots = std::max(slots, length / c_.checkpoint_interval);
    Tensor& states = make("checkpoints", c_.final_dtype, state_shape(2 * c_.N() * slots + 1));
    args.checkpoints = states.view();
    problem.checkpoint_interval = c_.checkpoint_interval;
    problem.checkpoint_slots = slots;
    problem.checkpoint_rows = states.shape()[0];
    checkpoints_ = {"checkpoints", &states, {}};
    std::vector<std::int64_t> rows;
    for (std::int64_t n = 0; n < c_.N(); ++n) {
      for (std::int64_t s = 0; s < slots; ++s) {
        rows.push_back(n % 3 == 2 ? -1 : 2 * (slots * (c_.N() - 1 - n) + s) + 1);  // one of three sequences wants none
        checkpoints_.rows.push_back((s + 1) * c_.checkpoint_interval <= length(n) ? rows.back() : -1);
      }
    }
    args.checkpoint_index = {integers(rows), {}};
  }

  const void* accepted() const { return accepted_; }

  // Calls operation(args, workspace, bytes, stream), on the setting's device. `saved`: memory that the arguments point to
  // besides their tensors.
  template <typename Args, typename Query>
  Results run_operation(Args args, Query query, fd_status (*operation)(const Args*, void*, std::size_t, void*),
                        Memory* saved = nullptr) {
    if (setting_.remote == nullptr) {
      return run(query, [&](Memory& workspace) { return operation(&args, workspace.data(), workspace.size(), nullptr); });
    }
    Remote& remote = *setting_.remote;
    return run(query, [&](Memory& workspace) {
      std::vector<std::span<unsigned char>> blocks = {workspace.block()};
      if (saved != nullptr) blocks.push_back(saved->block());
      for (auto& [name, t] : tensors_) blocks.push_back(t.memory().block());
      const auto bytes_of = [](auto& v) {
        return std::span(reinterpret_cast<unsigned char*>(v.data()), std::span(v).size_bytes());
      };
      for (auto& v : wide_) blocks.push_back(bytes_of(v));
      for (auto& v : narrow_) blocks.push_back(bytes_of(v));
      remote.upload(blocks);
      for_each_pointer(args, [&](auto*& pointer) { pointer = remote.translate(pointer); });
      void* const moved = remote.translate(workspace.data());
      return remote.run([&](void* stream) { return operation(&args, moved, workspace.size(), stream); });
    });
  }

  // Calls run(workspace), as large as asked for, and hands out what was written.
  template <typename Query, typename Run>
  Results run(Query query, Run run) {
    std::size_t bytes = 0;
    const fd_status queried = query(&problem, &bytes);
    require(queried == FD_OK, std::string("workspace query: ") + fd_last_error());
    Memory workspace(bytes);
    for (auto& [name, t] : tensors_) t.remember();
    for (const Output& output : outputs_) output.tensor->allow_all();
    for (const States* states : {&final_, &checkpoints_}) {
      for (const std::int64_t row : states->rows) {
        if (row >= 0) states->tensor->allow_row(row);
      }
    }
    const fd_status status = run(workspace);
    require(status == FD_OK, std::string("the call failed: ") + fd_last_error());
    require(workspace.guards_intact(), "the call wrote outside its workspace");
    for (const auto& [name, t] : tensors_) require(t.intact(), "the call wrote where it must not, at or around " + name);

    Results results;
    for (const Output& output : outputs_) results[output.name] = {output.tensor->read(), output.tensor->dtype()};
    for (const States* states : {&final_, &checkpoints_}) {
      if (states->tensor != nullptr) results[states->name] = {read_states(*states), states->tensor->dtype()};
    }
    return results;
  }

  fd_problem problem{};

 private:
  struct Output {
    std::string name;
    Tensor* tensor;
  };
  struct States {
    std::string name;
    Tensor* tensor = nullptr;
    std::vector<std::int64_t> rows;  // where each logical state lies; -1: not written
  };

  fd_dtype type(fd_dtype dtype) const { return setting_.float64 ? FD_FLOAT64 : dtype; }
  std::int64_t length(std::int64_t n) const { return c_.lengths[static_cast<std::size_t>(n)]; }
  bool has_row(std::int64_t n) const { return !c_.pool || d_.has_row[static_cast<std::size_t>(n)]; }

  Shape state_shape(std::int64_t rows) const {
    return c_.v_first ? Shape{rows, c_.HV, c_.V, c_.K} : Shape{rows, c_.HV, c_.K, c_.V};
  }
  std::int64_t pool_rows(std::int64_t S) const { return c_.pool ? 2 * c_.N() * S + 1 : c_.N(); }
  std::int64_t row(std::int64_t n, std::int64_t slot, std::int64_t S) const {
    return c_.pool ? 2 * (S * (c_.N() - 1 - n) + slot) + 1 : n;
  }

  fd_index index(std::int64_t S, bool slots) {
    std::vector<std::int64_t> rows;
    for (std::int64_t n = 0; n < c_.N(); ++n) {
      for (std::int64_t s = 0; s < S; ++s) rows.push_back(has_row(n) ? row(n, s, S) : -1);
    }
    return {integers(rows), {slots ? S : 0, slots ? 1 : 0}};
  }

  template <typename Args>
  void initial_state(Args& args, bool slots) {
    const std::int64_t S = slots ? c_.slots : 1;
    Tensor& states = make("initial_state", c_.initial_dtype, state_shape(pool_rows(S)));
    initial_ = &states;
    args.initial_state = states.view();
    problem.initial_rows = c_.pool ? pool_rows(S) : 0;
    problem.initial_slots = slots ? S : 0;
    if (c_.pool) args.initial_index = index(S, slots);
    std::vector<std::int64_t> accepted;
    for (std::int64_t n = 0; n < c_.N(); ++n) {
      const std::int64_t slot = slots ? (3 * n + 1) % S : 0;
      accepted.push_back(slot + 1);
      const auto inner = d_.initial_state.inner(1);
      if (has_row(n)) {
        states.fill_row(row(n, slot, S), {d_.initial_state.x.data() + n * inner, static_cast<std::size_t>(inner)});
      }
    }
    if (slots) accepted_ = integers(accepted);
  }

  Tensor& make(const char* name, fd_dtype dtype, const Shape& shape) {
    const bool gates = shape.size() == 3;
    const Shape strides = !c_.strided || shape.size() == 1 ? Tensor::contiguous(shape)
                          : gates                          ? Tensor::transposed(shape)
                                                           : Tensor::gapped(shape);
    tensors_.emplace_back(name, Tensor(type(dtype), shape, strides, c_.strided ? 1 : 0));
    return tensors_.back().second;
  }

  const void* integers(const std::vector<std::int64_t>& values) {
    wide_.push_back(values);
    if (c_.index_dtype == FD_INT64) return wide_.back().data();
    narrow_.emplace_back(values.begin(), values.end());
    return narrow_.back().data();
  }

  Array read_states(const States& states) const {
    Array result(state_shape(static_cast<std::int64_t>(states.rows.size())), std::numeric_limits<double>::quiet_NaN());
    for (std::size_t i = 0; i < states.rows.size(); ++i) {
      if (states.rows[i] < 0) continue;
      const std::vector<double> state = states.tensor->read_row(states.rows[i]);
      std::copy(state.begin(), state.end(), result.x.begin() + static_cast<std::ptrdiff_t>(i * state.size()));
    }
    return result;
  }

  const Case& c_;
  const Data& d_;
  const Setting& setting_;
  std::deque<std::pair<std::string, Tensor>> tensors_;  // deques: references stay good
  std::deque<std::vector<std::int64_t>> wide_;
  std::deque<std::vector<std::int32_t>> narrow_;
  std::vector<Output> outputs_;
  Tensor* initial_ = nullptr;
  States final_, checkpoints_;
  const void* accepted_ = nullptr;
};

// A forward call that leaves `saved` filled.
void fill_saved(const Case& c, const Data& d, const Setting& setting, Memory& saved) {
  Call call(c, d, setting);
  fd_forward_args args{};
  call.inputs(args);
  args.o = call.output("o", c.dtype, d.v.shape);
  args.saved = saved.data();
  args.saved_bytes = saved.size();
  call.run_operation(args, fd_forward_workspace, setting.forward, &saved);
  require(saved.guards_intact(), "the call wrote outside `saved`");
}

}  // namespace

Results forward(const Case& c, const Data& d, const Setting& setting) {
  Call call(c, d, setting);
  fd_forward_args args{};
  call.inputs(args);
  args.o = call.output("o", c.dtype, d.v.shape);
  if (c.final_state) call.final_state(args, false);
  if (c.checkpoint_interval > 0) call.checkpoints(args);
  return call.run_operation(args, fd_forward_workspace, setting.forward);
}

Results step(const Case& c, const Data& d, const Setting& setting) {
  Call call(c, d, setting);
  fd_step_args args{};
  call.inputs(args, true);
  args.accepted = call.accepted();
  args.o = call.output("o", c.dtype, d.v.shape);
  if (c.final_state) call.final_state(args, c.slots > 0);
  return call.run_operation(args, fd_step_workspace, setting.step);
}

Results backward(const Case& c, const Data& d, const Setting& setting) {
  Call call(c, d, setting);
  fd_backward_args args{};
  call.inputs(args);
  if (c.do_) args.do_ = call.input("do", c.dtype, d.do_);
  if (c.dfinal_state) args.dfinal_state = call.input("dfinal_state", c.final_dtype, d.dfinal_state);
  args.dq = call.output("dq", c.dtype, d.q.shape);
  args.dk = call.output("dk", c.dtype, d.k.shape);
  args.dv = call.output("dv", c.dtype, d.v.shape);
  if (args.g.data != nullptr) args.dg = call.output("dg", c.gate_dtype, d.g.shape);
  if (args.beta.data != nullptr) args.dbeta = call.output("dbeta", c.beta_dtype, d.beta.shape);
  if (args.A_log.data != nullptr) args.dA_log = call.output("dA_log", c.gate_dtype, d.A_log.shape);
  if (args.dt_bias.data != nullptr) args.ddt_bias = call.output("ddt_bias", c.gate_dtype, d.dt_bias.shape);
  if (c.initial_state) args.dinitial_state = call.output("dinitial_state", c.initial_dtype, d.initial_state.shape);

  std::size_t saved_bytes = 0;
  require(fd_forward_saved(&call.problem, &saved_bytes) == FD_OK, fd_last_error());
  Memory saved(setting.saved ? saved_bytes : 0);
  if (saved.size() == 0) return call.run_operation(args, fd_backward_workspace, setting.backward);
  fill_saved(c, d, setting, saved);
  args.saved = saved.data();
  args.saved_bytes = saved.size();
  return call.run_operation(args, fd_backward_workspace, setting.backward, &saved);
}

}  // namespace flashdelta::testing
