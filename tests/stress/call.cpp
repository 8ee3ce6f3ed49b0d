#include "tests/stress/call.hpp"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <tuple>
#include <utility>

namespace flashdelta::stress {
namespace {

constexpr std::int64_t K = 128;

std::size_t bytes_of(std::int64_t elements, fd_dtype type) { return static_cast<std::size_t>(elements) * size_of(type); }

void must(fd_status status) {
  if (status != FD_OK) throw std::runtime_error(fd_last_error());
}

// visit(pointer) for every pointer to memory in the arguments of any operation.
template <typename Args, typename Visit>
void for_each_pointer(Args& a, Visit visit) {
  for (fd_tensor* t : {&a.q, &a.k, &a.v, &a.g, &a.beta, &a.A_log, &a.dt_bias, &a.initial_state}) visit(t->data);
  visit(a.cu_seqlens);
  visit(a.initial_index.data);
  if constexpr (requires { a.o; }) {
    visit(a.o.data);
    visit(a.final_state.data);
    visit(a.final_index.data);
  }
  if constexpr (requires { a.checkpoints; }) {
    visit(a.checkpoints.data);
    visit(a.checkpoint_index.data);
  }
  if constexpr (requires { a.do_; }) {
    for (fd_tensor* t :
         {&a.do_, &a.dfinal_state, &a.dq, &a.dk, &a.dv, &a.dg, &a.dbeta, &a.dA_log, &a.ddt_bias, &a.dinitial_state}) {
      visit(t->data);
    }
  }
}

}  // namespace

Call::Call(Machine& machine, Arena& arena, Noise& noise, const Batch& b, std::uint64_t seed)
    : machine_(machine), arena_(arena), b_(b), problem_(b.problem) {
  std::mt19937_64 random(seed);
  const fd_problem& p = problem_;
  const std::int64_t tokens = p.B * p.T, used = b.packed ? b.first_token(b.N()) : tokens;
  const auto filled = [&](std::int64_t elements, Kind kind, fd_dtype type) {
    const Buffer buffer = arena.take(bytes_of(elements, type));
    noise.fill(buffer, kind, type, random);
    return buffer;
  };
  // Rows of `width` elements per token; those past the last sequence stay poison.
  const auto rows = [&](std::int64_t width, Kind kind, fd_dtype type) {
    const Buffer buffer = arena.take(bytes_of(tokens * width, type));
    noise.fill({buffer.data, bytes_of(used * width, type)}, kind, type, random);
    return buffer;
  };
  const Kind keys = b.keys == Keys::unit ? Kind::unit : b.keys == Keys::correlated ? Kind::correlated : Kind::normal;
  const auto view = [&](unsigned char* data, std::int64_t row, std::int64_t width) {
    return fd_tensor{data, {p.T * row, row, width, 1}};
  };
  if (b.strided) {
    const std::int64_t row = 2 * b.H * K + b.HV * b.V;
    unsigned char* const data = rows(row, keys, p.dtype).data;
    q_ = view(data, row, K);
    k_ = view(data + bytes_of(b.H * K, p.dtype), row, K);
    v_ = view(data + bytes_of(2 * b.H * K, p.dtype), row, b.V);
  } else {
    q_ = view(rows(b.H * K, keys, p.dtype).data, b.H * K, K);
    k_ = view(rows(b.H * K, keys, p.dtype).data, b.H * K, K);
    v_ = view(rows(b.HV * b.V, Kind::normal, p.dtype).data, b.HV * b.V, b.V);
  }
  const auto gates = [&](Kind kind, fd_dtype type) {
    return fd_tensor{rows(b.HV, kind, type).data, {p.T * b.HV, b.HV, 1, 0}};
  };
  if (p.gate == FD_GATE_LOG) g_ = gates(b.gates == Gates::strong ? Kind::strong_gate : Kind::gate, p.gate_dtype);
  if (p.gate == FD_GATE_RAW) {
    g_ = gates(Kind::projection, p.gate_dtype);
    A_log_.data = filled(b.HV, Kind::A_log, p.A_log_dtype).data;
    dt_bias_.data = filled(b.HV, Kind::normal, p.dt_bias_dtype).data;
  }
  if (p.beta != FD_BETA_ONE) {
    beta_ = gates(p.beta == FD_BETA_VALUE ? Kind::strength : Kind::projection, p.beta_dtype);
  }

  rows_.resize(b.lengths.size());
  std::iota(rows_.begin(), rows_.end(), 0);
  const std::int64_t pool_rows = b.pool ? b.N() + 3 : b.N();
  if (b.pool) {
    std::vector<std::int64_t> order(static_cast<std::size_t>(pool_rows));
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random);
    for (std::size_t n = 0; n < rows_.size(); ++n) rows_[n] = random() % 5 == 0 ? -1 : order[n];
    initial_index_ = final_index_ = integers(rows_);
  }
  if (b.initial_state) {
    initial_ = filled(pool_rows * b.HV * K * b.V, Kind::normal, p.initial_dtype);
  }
  if (b.packed) {
    std::vector<std::int64_t> ends{0};
    for (const std::int64_t length : b.lengths) ends.push_back(ends.back() + length);
    cu_seqlens_ = integers(ends);
  }
  if (b.checkpoints) {
    for (std::int64_t n = 0; n < b.N(); ++n) {
      for (std::int64_t s = 0; s < p.checkpoint_slots; ++s) {
        checkpoint_rows_.push_back(random() % 4 == 0 ? -1 : n * p.checkpoint_slots + s);
      }
    }
    checkpoint_index_ = integers(checkpoint_rows_);
  }
  if (b.operation == Operation::backward) {
    do_ = view(rows(b.HV * b.V, Kind::normal, p.dtype).data, b.HV * b.V, b.V);
    if (b.final_state) dfinal_.data = filled(b.N() * b.HV * K * b.V, Kind::normal, p.final_dtype).data;
  }
}

Buffer Call::integers(const std::vector<std::int64_t>& values) {
  const bool narrow = problem_.index_dtype == FD_INT32;
  const std::vector<std::int32_t> small(values.begin(), values.end());
  const Buffer buffer = arena_.take(values.size() * (narrow ? 4 : 8));
  const void* const from = narrow ? static_cast<const void*>(small.data()) : values.data();
  if (buffer.bytes > 0) machine_.upload(buffer.data, from, buffer.bytes);
  return buffer;
}

std::size_t Call::state_bytes(fd_dtype type) const { return bytes_of(b_.HV * K * b_.V, type); }

template <typename Args>
void Call::inputs(Args& args, Run& run) const {
  args.size = sizeof(args);
  args.problem = &problem_;
  args.q = q_, args.k = k_, args.v = v_, args.g = g_, args.beta = beta_, args.A_log = A_log_, args.dt_bias = dt_bias_;
  args.cu_seqlens = cu_seqlens_.data;
  args.initial_state.data = b_.in_place ? run.state.data : initial_.data;
  if (b_.initial_state) args.initial_index.data = initial_index_.data;
}

Output& Call::output(Run& run, const char* name, fd_dtype type, std::int64_t tokens, std::int64_t heads,
                     std::int64_t width) {
  run.outputs.push_back({name, arena_.take(bytes_of(tokens * heads * width, type)), type, heads, width, {}});
  return run.outputs.back();
}

fd_tensor Call::states(Run& run, const char* name, fd_dtype type, const Buffer& buffer, std::vector<std::int64_t> rows) {
  std::erase(rows, -1);
  run.outputs.push_back({name, buffer, type, b_.HV, K * b_.V, std::move(rows)});
  return {buffer.data, {}};
}

Run Call::prepare() {
  const fd_problem& p = problem_;
  const std::int64_t tokens = p.B * p.T, pool_rows = b_.pool ? b_.N() + 3 : b_.N();
  Run run;
  std::size_t bytes = 0;
  if (b_.operation == Operation::backward) {
    std::size_t saved = 0;
    if (b_.saved) must(fd_forward_saved(&p, &saved));
    if (saved > 0 && saved_.data == nullptr) {
      saved_ = arena_.take(saved);
      inputs(filling_.forward, filling_);
      filling_.forward.o.data = arena_.take(bytes_of(tokens * b_.HV * b_.V, p.dtype)).data;
      filling_.forward.saved = saved_.data;
      filling_.forward.saved_bytes = saved;
      must(fd_forward_workspace(&p, &bytes));
      filling_.workspace = arena_.take(bytes);
      must(fd_forward(&filling_.forward, filling_.workspace.data, bytes, machine_.stream()));
    }
    fd_backward_args& a = run.backward;
    inputs(a, run);
    a.do_ = do_, a.dfinal_state = dfinal_;
    a.saved = saved_.data, a.saved_bytes = saved;
    a.dq.data = output(run, "dq", p.dtype, tokens, b_.H, K).buffer.data;
    a.dk.data = output(run, "dk", p.dtype, tokens, b_.H, K).buffer.data;
    a.dv.data = output(run, "dv", p.dtype, tokens, b_.HV, b_.V).buffer.data;
    if (g_.data != nullptr) a.dg.data = output(run, "dg", p.gate_dtype, tokens, b_.HV, 1).buffer.data;
    if (beta_.data != nullptr) a.dbeta.data = output(run, "dbeta", p.beta_dtype, tokens, b_.HV, 1).buffer.data;
    if (A_log_.data != nullptr) {
      a.dA_log.data = output(run, "dA_log", p.A_log_dtype, 1, 1, b_.HV).buffer.data;
      a.ddt_bias.data = output(run, "ddt_bias", p.dt_bias_dtype, 1, 1, b_.HV).buffer.data;
    }
    if (b_.initial_state) {
      std::vector<std::int64_t> all(b_.lengths.size());
      std::iota(all.begin(), all.end(), 0);
      const Buffer d = arena_.take(static_cast<std::size_t>(b_.N()) * state_bytes(p.initial_dtype));
      a.dinitial_state = states(run, "dinitial_state", p.initial_dtype, d, all);
    }
    must(fd_backward_workspace(&p, &bytes));
    run.workspace = arena_.take(bytes);
    return run;
  }
  if (b_.in_place) run.state = arena_.take(initial_.bytes);
  const auto results = [&](auto& a) {
    inputs(a, run);
    a.o.data = output(run, "o", p.dtype, tokens, b_.HV, b_.V).buffer.data;
    if (b_.final_state) {
      const auto all = static_cast<std::size_t>(pool_rows) * state_bytes(p.final_dtype);
      a.final_state = states(run, "final_state", p.final_dtype, b_.in_place ? run.state : arena_.take(all), rows_);
      a.final_index.data = final_index_.data;
    }
  };
  if (b_.operation == Operation::step) {
    results(run.step);
    must(fd_step_workspace(&p, &bytes));
  } else {
    results(run.forward);
    if (b_.checkpoints) {
      std::vector<std::int64_t> written = checkpoint_rows_;
      for (std::size_t i = 0; i < written.size(); ++i) {
        const auto slots = static_cast<std::size_t>(p.checkpoint_slots);
        const auto needed = static_cast<std::int64_t>(i % slots + 1) * p.checkpoint_interval;
        if (b_.lengths[i / slots] < needed) written[i] = -1;
      }
      const auto all = static_cast<std::size_t>(p.checkpoint_rows) * state_bytes(p.checkpoint_dtype);
      run.forward.checkpoints = states(run, "checkpoints", p.checkpoint_dtype, arena_.take(all), written);
      run.forward.checkpoint_index.data = checkpoint_index_.data;
    }
    must(fd_forward_workspace(&p, &bytes));
  }
  run.workspace = arena_.take(bytes);
  return run;
}

fd_status Call::enqueue(Run& run) {
  if (b_.in_place) machine_.copy(run.state.data, initial_.data, initial_.bytes);
  void* const workspace = run.workspace.data;
  const std::size_t bytes = run.workspace.bytes;
  switch (b_.operation) {
    case Operation::forward: return fd_forward(&run.forward, workspace, bytes, machine_.stream());
    case Operation::backward: return fd_backward(&run.backward, workspace, bytes, machine_.stream());
    default: return fd_step(&run.step, workspace, bytes, machine_.stream());
  }
}

fd_status Call::enqueue_alone(const Run& run, std::int64_t n, unsigned counter) {
  const std::int64_t T = b_.lengths[static_cast<std::size_t>(n)], first = b_.first_token(n);
  const std::int64_t row = rows_[static_cast<std::size_t>(n)];
  fd_problem p = problem_;
  p.B = p.N = 1, p.T = T;
  p.initial_rows = p.final_rows = p.checkpoint_rows = p.checkpoint_slots = p.checkpoint_interval = 0;
  const auto moved = [&](fd_tensor t, fd_dtype type) {
    if (t.data != nullptr) t.data = static_cast<unsigned char*>(t.data) + bytes_of(first * t.stride[1], type);
    return t;
  };
  fd_forward_args a{};
  a.size = sizeof(a);
  a.problem = &p;
  a.q = moved(q_, p.dtype), a.k = moved(k_, p.dtype), a.v = moved(v_, p.dtype);
  a.g = moved(g_, p.gate_dtype), a.beta = moved(beta_, p.beta_dtype), a.A_log = A_log_, a.dt_bias = dt_bias_;
  a.cu_seqlens = integers({0, T}).data;
  if (b_.initial_state && row >= 0) {
    a.initial_state.data = initial_.data + static_cast<std::size_t>(row) * state_bytes(p.initial_dtype);
  }
  const Buffer o = arena_.take(bytes_of(T * b_.HV * b_.V, p.dtype)), state = arena_.take(state_bytes(p.final_dtype));
  a.o.data = o.data;
  if (b_.final_state) a.final_state.data = state.data;
  std::size_t bytes = 0;
  must(fd_forward_workspace(&p, &bytes));
  const Buffer workspace = arena_.take(bytes);
  const fd_status status = fd_forward(&a, workspace.data, bytes, machine_.stream());
  if (status != FD_OK) return status;
  for (const Output& output : run.outputs) {
    if (output.name == "o") {
      machine_.count_different(output.buffer.data + bytes_of(first * b_.HV * b_.V, p.dtype), o.data, o.bytes, counter);
    } else if (output.name == "final_state" && row >= 0) {
      const auto offset = static_cast<std::size_t>(row) * state.bytes;
      machine_.count_different(output.buffer.data + offset, state.data, state.bytes, counter);
    }
  }
  return FD_OK;
}

void Call::move_inputs(std::vector<unsigned char>& mirror, std::uint64_t seed) const {
  std::mt19937_64 random(seed);
  const auto flip = [&](const void* data, std::int64_t element, fd_dtype type) {
    const std::ptrdiff_t at = static_cast<const unsigned char*>(data) - arena_.base();
    const std::size_t bit = type == FD_FLOAT32 ? 2 : 0;  // the byte that holds it, of little-endian elements
    if (random() % 2 == 0) mirror[static_cast<std::size_t>(at) + bytes_of(element, type) + bit] ^= 1;
  };
  const fd_problem& p = problem_;
  for (const auto& [t, heads, width] : {std::tuple{&q_, p.H, K}, {&k_, p.H, K}, {&v_, p.HV, p.V}, {&do_, p.HV, p.V}}) {
    for (std::int64_t row = 0; t->data != nullptr && row < p.B * p.T; ++row) {
      const std::int64_t first = row / p.T * t->stride[0] + row % p.T * t->stride[1];
      for (std::int64_t i = 0; i < heads * width; ++i) flip(t->data, first + i / width * t->stride[2] + i % width, p.dtype);
    }
  }
  const std::int64_t state = b_.HV * K * b_.V;
  const auto initial = static_cast<std::int64_t>(initial_.bytes / size_of(p.initial_dtype));
  for (std::int64_t i = 0; i < initial; ++i) flip(initial_.data, i, p.initial_dtype);
  for (std::int64_t i = 0; dfinal_.data != nullptr && i < b_.N() * state; ++i) flip(dfinal_.data, i, p.final_dtype);
}

fd_status Call::run_on_host(const Run& run, std::vector<unsigned char>& mirror, fd_backend backend) const {
  const auto translate = [&](auto*& pointer) {
    if (pointer == nullptr) return;
    pointer = mirror.data() + (static_cast<const unsigned char*>(pointer) - arena_.base());
  };
  fd_problem p = problem_;
  p.device = FD_CPU;
  p.backend = backend;
  p.context_parallel = FD_CONTEXT_AUTO;
  std::size_t bytes = 0;
  const auto start = [&](auto args, auto query, auto operation) {
    for_each_pointer(args, translate);
    args.problem = &p;
    if constexpr (requires { args.saved; }) {
      args.saved = nullptr;
      args.saved_bytes = 0;
    }
    must(query(&p, &bytes));
    std::vector<unsigned char> workspace(bytes + 256);
    unsigned char* const aligned = workspace.data() + (256 - reinterpret_cast<std::uintptr_t>(workspace.data()) % 256) % 256;
    return operation(&args, aligned, bytes, nullptr);
  };
  if (b_.in_place) {
    const std::ptrdiff_t to = run.state.data - arena_.base(), from = initial_.data - arena_.base();
    std::copy_n(mirror.begin() + from, initial_.bytes, mirror.begin() + to);
  }
  switch (b_.operation) {
    case Operation::forward: return start(run.forward, fd_forward_workspace, fd_forward);
    case Operation::backward: return start(run.backward, fd_backward_workspace, fd_backward);
    default: return start(run.step, fd_step_workspace, fd_step);
  }
}

}  // namespace flashdelta::stress
