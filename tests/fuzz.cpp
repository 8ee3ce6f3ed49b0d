// Calls the C ABI with valid buffers and mutated fields for a given time: nothing may crash or write where it must not
// (build it with the sanitizers), a refused call must leave every byte as it was and have a message, and an accepted one
// must agree with the reference backend on the same memory.
//
// usage: fuzz [seconds [seed]]; exits 1 with the seed of the call that failed, or if fewer than 20 % of the calls were
// accepted.
#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "dtype.hpp"
#include "flashdelta/flashdelta.h"

namespace flashdelta {
namespace {

constexpr std::size_t buffer_bytes = 1 << 18;
constexpr std::int64_t max_index = 24;

enum class Operation { forward, backward, step };

// A tensor member of an argument struct: where it is, its shape and element type.
struct Member {
  fd_tensor* tensor;
  std::array<std::int64_t, 4> shape;
  std::size_t rank;
  fd_dtype dtype;
  std::size_t buffer;  // which buffer it points into; the state tensors may share one
};

struct Call {
  fd_problem problem{};
  fd_forward_args forward{};
  fd_backward_args backward{};
  fd_step_args step{};
  std::array<std::int64_t, max_index> cu_seqlens{}, initial_index{}, final_index{}, checkpoint_index{}, accepted{};
  bool in_place = false;
};

class Fuzz {
 public:
  Fuzz(Operation operation, std::uint64_t seed) : operation_(operation), random_(seed) {}

  enum class Outcome { refused, accepted, skipped, failed };

  Outcome run() {
    make_valid();
    for (std::int64_t n = pick({0, 0, 1, 1, 2}); n > 0; --n) mutate();
    if (!fits()) return Outcome::skipped;
    std::vector<std::vector<unsigned char>> ours = make_buffers(), theirs = ours;
    const std::vector<std::vector<unsigned char>> before = ours;
    const fd_status status = invoke(ours, call_.problem.backend);
    if (status != FD_OK) {
      if (ours != before) return failed("a refused call wrote");
      if (std::strlen(fd_last_error()) < 10) return failed("a refused call has no message");
      return Outcome::refused;
    }
    if (invoke(theirs, FD_BACKEND_REFERENCE) != FD_OK)
      return failed(std::string("only the reference refused: ") + fd_last_error());
    const std::array<fd_dtype, 18> types = buffer_types(call_.problem);
    for (std::size_t b = 0; b < ours.size(); ++b) {
      if (!close(ours[b], theirs[b], types[b])) return failed("buffer " + std::to_string(b) + " differs");
    }
    return Outcome::accepted;
  }

 private:
  std::int64_t pick(std::initializer_list<std::int64_t> values) {
    return values.begin()[std::uniform_int_distribution<std::size_t>(0, values.size() - 1)(random_)];
  }
  std::int64_t between(std::int64_t low, std::int64_t high) { return std::uniform_int_distribution(low, high)(random_); }
  bool coin() { return between(0, 1) == 1; }

  void make_valid() {
    fd_problem& p = call_.problem;
    p.size = sizeof p;
    const bool packed = coin();
    p.H = between(1, 2);
    p.HV = p.H * between(1, 3);
    p.K = 8 * between(1, 3);
    p.V = 8 * between(1, 4);
    p.T = operation_ == Operation::step ? between(1, 4) : between(0, 70);
    p.N = packed ? between(1, 4) : 0;
    p.B = packed ? 1 : between(1, 3);
    const std::int64_t sequences = packed ? p.N : p.B;
    for (fd_dtype* type : {&p.dtype, &p.gate_dtype, &p.beta_dtype, &p.A_log_dtype, &p.dt_bias_dtype}) {
      *type = static_cast<fd_dtype>(pick({FD_FLOAT32, FD_FLOAT32, FD_BFLOAT16, FD_FLOAT16}));
    }
    p.initial_dtype = p.final_dtype = p.checkpoint_dtype =
        static_cast<fd_dtype>(pick({FD_FLOAT32, FD_FLOAT32, FD_BFLOAT16}));
    p.gate = static_cast<fd_gate>(pick({FD_GATE_NONE, FD_GATE_LOG, FD_GATE_RAW}));
    p.beta = static_cast<fd_beta>(pick({FD_BETA_ONE, FD_BETA_VALUE, FD_BETA_LOGIT}));
    p.allow_neg_eigval = p.beta == FD_BETA_LOGIT && coin() ? 1 : 0;
    p.qk_l2norm = 1;  // keeps every key inside the domain of the accuracy promise
    p.state_v_first = coin() ? 1 : 0;
    p.threads = static_cast<std::int32_t>(between(0, 3));
    p.initial_rows = p.final_rows = p.checkpoint_rows = max_index;
    if (operation_ == Operation::forward && coin()) {
      p.checkpoint_interval = 64;
      p.checkpoint_slots = 1;
    }
    if (operation_ == Operation::step && coin()) p.initial_slots = p.final_slots = 2;
    for (std::int64_t n = 0; n <= sequences; ++n)
      call_.cu_seqlens[static_cast<std::size_t>(n)] = n * p.T / std::max<std::int64_t>(sequences, 1);
    for (std::size_t i = 0; i < max_index; ++i) {
      const auto row = static_cast<std::int64_t>(i);
      call_.initial_index[i] = row;
      call_.final_index[i] = row;
      call_.checkpoint_index[i] = max_index - 1 - row;
      call_.accepted[i] = between(1, 2);
    }
    call_.in_place = operation_ != Operation::backward && coin();

    members_.clear();
    const std::int64_t K = p.K, V = p.V;
    const auto add = [this](fd_tensor& t, std::array<std::int64_t, 4> shape, std::size_t rank, fd_dtype type,
                            std::size_t buffer) {
      members_.push_back({&t, shape, rank, type, buffer});
      t.data = &t;  // given; the buffer's address is filled in for each run
    };
    const auto add_states = [&](fd_tensor& t, std::int64_t rows, fd_dtype type, std::size_t buffer) {
      add(t, {rows, p.HV, p.state_v_first != 0 ? V : K, p.state_v_first != 0 ? K : V}, 4, type, buffer);
    };
    const auto inputs = [&](auto& a) {
      a.size = sizeof a;
      add(a.q, {p.B, p.T, p.H, K}, 4, p.dtype, 0);
      add(a.k, {p.B, p.T, p.H, K}, 4, p.dtype, 1);
      add(a.v, {p.B, p.T, p.HV, V}, 4, p.dtype, 2);
      if (p.gate != FD_GATE_NONE) add(a.g, {p.B, p.T, p.HV}, 3, p.gate_dtype, 3);
      if (p.beta != FD_BETA_ONE) add(a.beta, {p.B, p.T, p.HV}, 3, p.beta_dtype, 4);
      if (p.gate == FD_GATE_RAW) add(a.A_log, {p.HV}, 1, p.A_log_dtype, 5);
      if (p.gate == FD_GATE_RAW) add(a.dt_bias, {p.HV}, 1, p.dt_bias_dtype, 6);
      if (packed) a.cu_seqlens = call_.cu_seqlens.data();
      add_states(a.initial_state, p.initial_rows, p.initial_dtype, 7);
      a.initial_index.data = call_.initial_index.data();
    };
    const auto results = [&](auto& a) {
      add(a.o, {p.B, p.T, p.HV, V}, 4, p.dtype, 8);
      add_states(a.final_state, p.final_rows, p.final_dtype, call_.in_place ? 7 : 9);
      a.final_index.data = call_.final_index.data();
    };
    if (operation_ == Operation::forward) {
      inputs(call_.forward);
      results(call_.forward);
      if (p.checkpoint_interval > 0) {
        add_states(call_.forward.checkpoints, p.checkpoint_rows, p.checkpoint_dtype, 10);
        call_.forward.checkpoint_index.data = call_.checkpoint_index.data();
      }
    } else if (operation_ == Operation::step) {
      inputs(call_.step);
      results(call_.step);
      if (p.initial_slots > 0) call_.step.accepted = call_.accepted.data();
    } else {
      fd_backward_args& a = call_.backward;
      inputs(a);
      add(a.do_, {p.B, p.T, p.HV, V}, 4, p.dtype, 8);
      add_states(a.dfinal_state, sequences, p.final_dtype, 9);
      add(a.dq, {p.B, p.T, p.H, K}, 4, p.dtype, 10);
      add(a.dk, {p.B, p.T, p.H, K}, 4, p.dtype, 11);
      add(a.dv, {p.B, p.T, p.HV, V}, 4, p.dtype, 12);
      if (p.gate != FD_GATE_NONE) add(a.dg, {p.B, p.T, p.HV}, 3, p.gate_dtype, 13);
      if (p.beta != FD_BETA_ONE) add(a.dbeta, {p.B, p.T, p.HV}, 3, p.beta_dtype, 14);
      if (p.gate == FD_GATE_RAW) add(a.dA_log, {p.HV}, 1, p.A_log_dtype, 15);
      if (p.gate == FD_GATE_RAW) add(a.ddt_bias, {p.HV}, 1, p.dt_bias_dtype, 16);
      add_states(a.dinitial_state, sequences, p.initial_dtype, 17);
    }
  }

  std::int64_t odd_value() {
    return pick(
        {-1, 0, 1, 2, 3, 7, 8, 16, 24, 63, 64, 65, 255, 4096, INT64_C(1) << 31, INT64_C(1) << 62, INT64_MAX, INT64_MIN});
  }

  // Breaks one field, or not: some changes leave the call valid.
  void mutate() {
    fd_problem& p = call_.problem;
    switch (between(0, 7)) {
      case 0: {
        std::int64_t* const dimensions[] = {&p.B,
                                            &p.T,
                                            &p.N,
                                            &p.H,
                                            &p.HV,
                                            &p.K,
                                            &p.V,
                                            &p.initial_rows,
                                            &p.final_rows,
                                            &p.checkpoint_rows,
                                            &p.initial_slots,
                                            &p.final_slots,
                                            &p.checkpoint_slots,
                                            &p.checkpoint_interval};
        *dimensions[between(0, std::size(dimensions) - 1)] = odd_value();
        break;
      }
      case 1: {
        std::int32_t* const options[] = {&p.dtype,
                                         &p.gate_dtype,
                                         &p.beta_dtype,
                                         &p.initial_dtype,
                                         &p.final_dtype,
                                         &p.cu_seqlens_dtype,
                                         &p.index_dtype,
                                         &p.gate,
                                         &p.beta,
                                         &p.qk_l2norm,
                                         &p.allow_neg_eigval,
                                         &p.state_v_first,
                                         &p.context_parallel,
                                         &p.threads,
                                         &p.device,
                                         &p.backend,
                                         &p.reserved};
        *options[between(0, std::size(options) - 1)] = static_cast<std::int32_t>(pick({-1, 0, 1, 2, 3, 9}));
        break;
      }
      case 2: {
        Member& m = members_[static_cast<std::size_t>(between(0, static_cast<std::int64_t>(members_.size()) - 1))];
        std::int64_t stride = 1;
        for (std::size_t i = m.rank; i-- > 0;) {
          m.tensor->stride[i] = stride;
          stride = stride * std::max<std::int64_t>(m.shape[i], 1) + (i == m.rank - 1 ? 8 : 0);
        }
        if (coin()) m.tensor->stride[between(0, 3)] = odd_value();
        break;
      }
      case 3: {
        Member& m = members_[static_cast<std::size_t>(between(0, static_cast<std::int64_t>(members_.size()) - 1))];
        m.tensor->data = nullptr;
        break;
      }
      case 4: call_.cu_seqlens[static_cast<std::size_t>(between(0, 4))] = between(-1, 5); break;
      case 5: {
        auto& index = coin() ? call_.initial_index : coin() ? call_.final_index : call_.checkpoint_index;
        index[static_cast<std::size_t>(between(0, 7))] = coin() ? -1 : odd_value();
        break;
      }
      case 6: call_.accepted[static_cast<std::size_t>(between(0, 3))] = odd_value(); break;
      default: {
        const double value = coin() ? 0.25 : std::nan("");
        (coin() ? p.scale : coin() ? p.l2norm_eps : p.context_bound) = value;
      }
    }
  }

  // Whether every tensor of the mutated call lies in its buffer and every index array is long enough: what no library can
  // check. Sizes that the library must refuse are left to it.
  bool fits() {
    const fd_problem& p = call_.problem;
    const auto small = [](std::int64_t x) { return x < 4096; };
    const std::int64_t sequences = p.N > 0 ? p.N : p.B;
    if (small(sequences) &&
        static_cast<__int128>(sequences) * std::max({p.initial_slots, p.final_slots, p.checkpoint_slots}) > max_index)
      return false;
    if (sequences >= max_index || p.initial_slots > 8 || p.final_slots > 8 || p.checkpoint_slots > 8) return false;
    for (const Member& m : members_) {
      // The shape as the mutated problem has it: every dimension is one of these.
      __int128 span = 1;
      for (std::size_t i = 0; i < m.rank; ++i) {
        const std::int64_t size = mutated_size(m, i);
        const std::int64_t stride = m.tensor->stride[i];
        if (size < 0 || stride < 0) return true;  // to be refused
        span += static_cast<__int128>(std::max<std::int64_t>(size - 1, 0)) * stride;
      }
      if (std::all_of(m.tensor->stride, m.tensor->stride + m.rank, [](std::int64_t s) { return s == 0; })) {
        span = 1;
        for (std::size_t i = 0; i < m.rank; ++i) span *= mutated_size(m, i);
      }
      if (span * 8 > static_cast<__int128>(buffer_bytes)) return false;
    }
    return true;
  }

  std::int64_t mutated_size(const Member& m, std::size_t i) const {
    const fd_problem& p = call_.problem;
    const std::int64_t sequences = p.N > 0 ? p.N : p.B;
    if (m.rank == 1) return p.HV;
    const bool states =
        m.buffer == 7 || (m.buffer == 9) || m.buffer == 17 || (m.buffer == 10 && operation_ == Operation::forward);
    if (states) {
      const std::int64_t pools = std::max({p.initial_rows, p.final_rows, p.checkpoint_rows, sequences});
      const std::int64_t larger = std::max(p.K, p.V);
      return i == 0 ? pools : i == 1 ? p.HV : larger;
    }
    return i == 0 ? p.B : i == 1 ? p.T : i == 2 ? std::max(p.H, p.HV) : std::max(p.K, p.V);
  }

  std::vector<std::vector<unsigned char>> make_buffers() {
    std::vector<std::vector<unsigned char>> buffers(18, std::vector<unsigned char>(buffer_bytes));
    std::normal_distribution<double> normal;
    const double gate_sign = call_.problem.gate == FD_GATE_LOG ? -1 : 1;
    const fd_problem& p = call_.problem;
    const std::array<fd_dtype, 18> types = buffer_types(p);
    for (std::size_t b = 0; b < buffers.size(); ++b) {
      const fd_dtype type = size_of(types[b]) == 0 ? FD_FLOAT32 : types[b];
      for (std::size_t i = 0; i < 4096; ++i) table_[i] = normal(random_);
      for (std::size_t i = 0; i < buffer_bytes / size_of(type); ++i) {
        double x = table_[(i * 31 + i / 4096) % 4096];
        if (b == 3) x = gate_sign * std::fabs(x);
        if (b == 4 && p.beta == FD_BETA_VALUE) x = 1 / (1 + std::exp(x));
        store(buffers[b].data(), type, static_cast<std::int64_t>(i), x);
      }
    }
    return buffers;
  }

  std::array<fd_dtype, 18> buffer_types(const fd_problem& p) const {
    const fd_dtype d = p.dtype;
    if (operation_ == Operation::backward) {
      return {d, d, d, p.gate_dtype, p.beta_dtype, p.A_log_dtype, p.dt_bias_dtype, p.initial_dtype, d, p.final_dtype,
              d, d, d, p.gate_dtype, p.beta_dtype, p.A_log_dtype, p.dt_bias_dtype, p.initial_dtype};
    }
    return {d,
            d,
            d,
            p.gate_dtype,
            p.beta_dtype,
            p.A_log_dtype,
            p.dt_bias_dtype,
            p.initial_dtype,
            d,
            p.final_dtype,
            p.checkpoint_dtype,
            d,
            d,
            d,
            d,
            d,
            d,
            d};
  }

  fd_status invoke(std::vector<std::vector<unsigned char>>& buffers, fd_backend backend) {
    for (const Member& m : members_) {
      if (m.tensor->data != nullptr) m.tensor->data = buffers[m.buffer].data();
    }
    fd_problem problem = call_.problem;
    problem.backend = backend;
    std::size_t bytes = 0;
    fd_status status = FD_OK;
    switch (operation_) {
      case Operation::forward: status = fd_forward_workspace(&problem, &bytes); break;
      case Operation::backward: status = fd_backward_workspace(&problem, &bytes); break;
      case Operation::step: status = fd_step_workspace(&problem, &bytes); break;
    }
    if (status != FD_OK) return status;
    if (bytes > (std::size_t{1} << 28)) return FD_INVALID;  // cannot happen with tensors this small, but do not allocate it
    std::vector<unsigned char> workspace(bytes + 256, 0xff);
    unsigned char* aligned = workspace.data() + (256 - reinterpret_cast<std::uintptr_t>(workspace.data()) % 256) % 256;
    call_.forward.problem = call_.backward.problem = call_.step.problem = &problem;
    switch (operation_) {
      case Operation::forward: return fd_forward(&call_.forward, aligned, bytes, nullptr);
      case Operation::backward: return fd_backward(&call_.backward, aligned, bytes, nullptr);
      default: return fd_step(&call_.step, aligned, bytes, nullptr);
    }
  }

  // Rounding of the element type, and ten times that where fp32 sums cancel; NaN and infinities must stand in both or in
  // none.
  static bool close(const std::vector<unsigned char>& a, const std::vector<unsigned char>& b, fd_dtype type) {
    double error = 0, norm = 0;
    for (std::size_t i = 0; i < a.size() / size_of(type); ++i) {
      const double x = load(a.data(), type, static_cast<std::int64_t>(i)),
                   y = load(b.data(), type, static_cast<std::int64_t>(i));
      if (std::isnan(x) != std::isnan(y)) return false;
      if (!std::isfinite(x) || !std::isfinite(y)) continue;
      error += (x - y) * (x - y);
      norm += y * y;
    }
    const double limit = type == FD_FLOAT64 ? 1e-9 : type == FD_FLOAT32 ? 1e-3 : 2e-2;
    return std::sqrt(error) <= limit * std::sqrt(norm) + 1e-6;
  }

  static Outcome failed(const std::string& why) {
    std::fprintf(stderr, "%s\n", why.c_str());
    return Outcome::failed;
  }

  Operation operation_;
  std::mt19937_64 random_;
  Call call_;
  std::vector<Member> members_;
  std::array<double, 4096> table_{};
};

int run(double seconds, std::uint64_t first_seed) {
  using Clock = std::chrono::steady_clock;
  const auto end = Clock::now() + std::chrono::duration<double>(seconds);
  std::array<std::int64_t, 4> outcomes{};
  for (std::uint64_t seed = first_seed; Clock::now() < end; ++seed) {
    const auto outcome = Fuzz(static_cast<Operation>(seed % 3), seed).run();
    if (outcome == Fuzz::Outcome::failed) {
      std::fprintf(stderr, "failed: fuzz 1 %llu\n", static_cast<unsigned long long>(seed));
      return 1;
    }
    ++outcomes[static_cast<std::size_t>(outcome)];
  }
  const std::int64_t calls = outcomes[0] + outcomes[1];
  const double share = calls == 0 ? 0 : 100.0 * static_cast<double>(outcomes[1]) / static_cast<double>(calls);
  std::printf("%lld calls from seed %llu: %.0f %% accepted and equal to the reference, the rest refused\n",
              static_cast<long long>(calls), static_cast<unsigned long long>(first_seed), share);
  return share >= 20 ? 0 : 1;
}

}  // namespace
}  // namespace flashdelta

int main(int argc, char** argv) {
  const double seconds = argc > 1 ? std::atof(argv[1]) : 10;
  const std::uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : std::random_device{}();
  return flashdelta::run(seconds, seed);
}
