// Speed of the CPU backend: forward/<H>/<HV>/<lengths>, backward/.., step/<H>/<HV>/<sequences>/<layout>. K = V = 128, bf16
// in, fp32 states. Beside each row runs, turn by turn, what bounds it: for forward and backward the rate of our own fp32
// matrix product on the same threads, for the step a copy of as many bytes as the states have.
//
//     bench_cpu --threads=2 [--target=AVX2] [Google Benchmark's options]
//
// Medians of the repetitions count. A machine that is busy with other work is refused.
#include <benchmark/benchmark.h>
#include <omp.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cpu/vector.hpp"
#include "dtype.hpp"
#include "flashdelta/flashdelta.h"

namespace {

using namespace flashdelta;

constexpr std::int64_t K = 128, V = 128;
int threads = 0;

double seconds(const std::function<void()>& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void must(fd_status status) {
  if (status == FD_OK) return;
  std::fprintf(stderr, "bench_cpu: %s\n", fd_last_error());
  std::exit(1);
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<void, Free>;
Memory allocate(std::size_t bytes) { return Memory(std::aligned_alloc(256, (bytes + 255) / 256 * 256)); }

// Operands of one product per thread, in the cache: the shape of the chunked algorithm's own.
struct Gemms {
  std::vector<std::vector<float>> a, b, c;
  static constexpr std::int64_t kRepeat = 200;

  Gemms() : a(threads), b(threads), c(threads) {
    for (auto* matrices : {&a, &b, &c}) {
      for (auto& matrix : *matrices) matrix.assign(K * V, 0.25f);
    }
  }
  double flops() const { return 2.0 * K * V * K * kRepeat * threads; }
  void run() {
    const VectorKernels& vector = vector_kernels();
#pragma omp parallel num_threads(threads)
    {
      const auto i = static_cast<std::size_t>(omp_get_thread_num());
      for (std::int64_t r = 0; r < kRepeat; ++r) {
        vector.gemm({.m = K,
                     .n = V,
                     .k = K,
                     .a = a[i].data(),
                     .a_row = K,
                     .a_column = 1,
                     .b = b[i].data(),
                     .b_row = V,
                     .c = c[i].data(),
                     .c_row = V});
      }
    }
  }
};

// Tensors of a call, bf16 and fp32, normal or as benchmarks of the gated delta rule have them.
struct Inputs {
  std::vector<std::uint16_t> q, k, v;
  std::vector<float> g, beta;

  Inputs(std::int64_t T, std::int64_t H, std::int64_t HV) {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    const auto fill = [&](std::vector<std::uint16_t>& x, std::int64_t size, float scale) {
      x.resize(static_cast<std::size_t>(size));
      for (auto& element : x) element = float_to_bfloat16(scale * normal(random));
    };
    const float unit = 1.0f / std::sqrt(static_cast<float>(K));
    fill(q, T * H * K, unit);
    fill(k, T * H * K, unit);
    fill(v, T * HV * V, 1);
    for (std::int64_t i = 0; i < T * HV; ++i) {
      g.push_back(i % HV % 4 == 0 ? 0 : -std::log1p(std::exp(-normal(random))) / 16);
      beta.push_back(1 / (1 + std::exp(-normal(random))));
    }
  }
};

fd_problem problem(std::int64_t T, std::int64_t H, std::int64_t HV) {
  fd_problem p{};
  p.size = sizeof p;
  p.B = 1;
  p.T = T;
  p.H = H;
  p.HV = HV;
  p.K = K;
  p.V = V;
  p.backend = FD_BACKEND_CPU;
  p.dtype = FD_BFLOAT16;
  p.gate = FD_GATE_LOG;
  p.beta = FD_BETA_VALUE;
  p.threads = threads;
  return p;
}

template <typename Args>
void set_inputs(Args& args, const fd_problem& p, Inputs& x) {
  args.size = sizeof args;
  args.problem = &p;
  args.q.data = x.q.data();
  args.k.data = x.k.data();
  args.v.data = x.v.data();
  args.g.data = x.g.data();
  args.beta.data = x.beta.data();
}

// Runs `work` and `bound` in turn; `counters` adds rates from their mean times.
void measure(benchmark::State& state, const std::function<void()>& work, const std::function<void()>& bound,
             const std::function<void(double work_time, double bound_time)>& counters) {
  work();
  bound();
  double work_time = 0, bound_time = 0;
  std::int64_t n = 0;
  for ([[maybe_unused]] auto _ : state) {
    const double time = seconds(work);
    state.SetIterationTime(time);
    work_time += time;
    bound_time += seconds(bound);
    ++n;
  }
  counters(work_time / static_cast<double>(n), bound_time / static_cast<double>(n));
}

// What the three (forward) or nine (backward) products with the state take; the rest of the work counts as overhead.
void gemm_share(benchmark::State& state, const Gemms& gemms, double flops, double time, double gemm_time) {
  const double rate = flops / time, gemm_rate = gemms.flops() / gemm_time;
  state.counters["GFLOP/s"] = rate * 1e-9;
  state.counters["gemm_GFLOP/s"] = gemm_rate * 1e-9;
  state.counters["share_of_gemm"] = rate / gemm_rate;
}

struct Sequences {
  std::vector<std::int64_t> cu_seqlens{0};
  explicit Sequences(const std::vector<std::int64_t>& lengths) {
    for (const std::int64_t length : lengths) cu_seqlens.push_back(cu_seqlens.back() + length);
  }
  std::int64_t T() const { return cu_seqlens.back(); }
  std::int64_t N() const { return static_cast<std::int64_t>(cu_seqlens.size()) - 1; }
};

void forward(benchmark::State& state, std::int64_t H, std::int64_t HV, const std::vector<std::int64_t>& lengths) {
  const Sequences sequences(lengths);
  fd_problem p = problem(sequences.T(), H, HV);
  p.N = sequences.N();
  Inputs x(p.T, H, HV);
  std::vector<std::uint16_t> o(x.v.size());
  std::vector<float> initial(static_cast<std::size_t>(p.N * HV * K * V), 0.1f), final(initial.size());
  fd_forward_args args{};
  set_inputs(args, p, x);
  args.cu_seqlens = sequences.cu_seqlens.data();
  args.o.data = o.data();
  args.initial_state.data = initial.data();
  args.final_state.data = final.data();
  std::size_t bytes;
  must(fd_forward_workspace(&p, &bytes));
  const Memory workspace = allocate(bytes);
  Gemms gemms;
  measure(
      state, [&] { must(fd_forward(&args, workspace.get(), bytes, nullptr)); }, [&] { gemms.run(); },
      [&](double time, double gemm_time) {
        gemm_share(state, gemms, 6.0 * static_cast<double>(p.T * HV * K * V), time, gemm_time);
      });
}

void backward(benchmark::State& state, std::int64_t H, std::int64_t HV, const std::vector<std::int64_t>& lengths) {
  const Sequences sequences(lengths);
  fd_problem p = problem(sequences.T(), H, HV);
  p.N = sequences.N();
  Inputs x(p.T, H, HV);
  std::vector<std::uint16_t> dq(x.q.size()), dk(x.k.size()), dv(x.v.size());
  std::vector<float> dg(x.g.size()), dbeta(x.g.size());
  fd_backward_args args{};
  set_inputs(args, p, x);
  args.cu_seqlens = sequences.cu_seqlens.data();
  args.do_.data = x.v.data();
  args.dq.data = dq.data();
  args.dk.data = dk.data();
  args.dv.data = dv.data();
  args.dg.data = dg.data();
  args.dbeta.data = dbeta.data();
  std::size_t bytes;
  must(fd_backward_workspace(&p, &bytes));
  const Memory workspace = allocate(bytes);
  Gemms gemms;
  measure(
      state, [&] { must(fd_backward(&args, workspace.get(), bytes, nullptr)); }, [&] { gemms.run(); },
      [&](double time, double gemm_time) {
        gemm_share(state, gemms, 18.0 * static_cast<double>(p.T * HV * K * V), time, gemm_time);
      });
  state.counters["workspace_MB"] = static_cast<double>(bytes) * 1e-6;
}

// One token per sequence, on states that are not in the cache: rows of a pool of 256 MB, others each time.
void step(benchmark::State& state, std::int64_t H, std::int64_t HV, std::int64_t N, bool v_first) {
  fd_problem p = problem(1, H, HV);
  p.B = N;
  p.state_v_first = v_first ? 1 : 0;
  const std::int64_t row = HV * K * V, rows = std::max<std::int64_t>(2 * N, (64 << 20) / row);
  p.initial_rows = p.final_rows = rows;
  Inputs x(N, H, HV);
  std::vector<std::uint16_t> o(x.v.size());
  std::vector<float> pool(static_cast<std::size_t>(rows * row), 0.1f);
  std::vector<std::int64_t> index(static_cast<std::size_t>(N));
  std::int64_t next = 0;
  fd_step_args args{};
  set_inputs(args, p, x);
  args.o.data = o.data();
  args.initial_state.data = args.final_state.data = pool.data();
  args.initial_index.data = args.final_index.data = index.data();
  std::size_t bytes;
  must(fd_step_workspace(&p, &bytes));
  const Memory workspace = allocate(bytes);
  const auto take_rows = [&] {
    for (auto& i : index) i = next++ % rows;
  };
  measure(
      state,
      [&] {
        take_rows();
        must(fd_step(&args, workspace.get(), bytes, nullptr));
      },
      [&] {
        const std::int64_t blocks = N * HV, from = next % rows * HV;
        next += 2 * N;
#pragma omp parallel for num_threads(threads) schedule(static)
        for (std::int64_t i = 0; i < blocks; ++i) {
          std::memcpy(&pool[static_cast<std::size_t>((from + blocks + i) % (rows * HV) * K * V)],
                      &pool[static_cast<std::size_t>((from + i) % (rows * HV) * K * V)], K * V * sizeof(float));
        }
      },
      [&](double time, double copy_time) {
        state.counters["GB/s"] = 2e-9 * static_cast<double>(N * row * 4) / time;
        state.counters["share_of_copy"] = copy_time / time;
      });
}

// Another program on the cores shows as matrix products of unequal length.
bool machine_is_busy() {
  Gemms gemms;
  std::vector<double> times(40);
  for (double& time : times) time = seconds([&] { gemms.run(); });
  std::sort(times.begin(), times.end());
  return times[20] > 1.25 * times[0];
}

void add(const std::string& name, const std::function<void(benchmark::State&)>& run, benchmark::TimeUnit unit) {
  benchmark::RegisterBenchmark(name.c_str(), run)
      ->UseManualTime()
      ->Unit(unit)
      ->MinTime(0.05)
      ->Repetitions(9)
      ->ReportAggregatesOnly();
}

}  // namespace

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  threads = omp_get_max_threads();
  for (int i = 1; i < argc; ++i) {
    const std::string option = argv[i];
    if (option.rfind("--threads=", 0) == 0) {
      threads = std::max(1, std::atoi(option.c_str() + 10));
    } else if (option.rfind("--target=", 0) == 0) {
      const VectorKernels* const* target = vector_targets();
      while (*target != nullptr && option.substr(9) != (*target)->name) ++target;
      if (*target == nullptr) {
        std::fprintf(stderr, "bench_cpu: this machine has no target %s\n", option.c_str() + 9);
        return 1;
      }
      use_vector_target(*target);
    } else {
      std::fprintf(stderr, "bench_cpu: unknown option %s\n", argv[i]);
      return 1;
    }
  }
  if (machine_is_busy()) {
    std::fprintf(stderr, "bench_cpu: the machine is busy with other work; nothing measured\n");
    return 1;
  }
  benchmark::AddCustomContext("target", vector_kernels().name);
  benchmark::AddCustomContext("threads", std::to_string(threads));

  struct Shape {
    const char* name;
    std::int64_t H, HV;
    std::vector<std::int64_t> lengths;
  };
  const Shape shapes[] = {{"16/32/2048", 16, 32, {2048}},
                          {"16/32/8192", 16, 32, {8192}},
                          {"16/32/4x512", 16, 32, {512, 512, 512, 512}},
                          {"16/32/1500+40x16", 16, 32,
                           [] {
                             std::vector<std::int64_t> lengths(41, 16);
                             lengths[40] = 1500;
                             return lengths;
                           }()},
                          {"2/8/8192", 2, 8, {8192}}};
  for (const Shape& s : shapes) {
    add(
        std::string("forward/") + s.name, [s](benchmark::State& state) { forward(state, s.H, s.HV, s.lengths); },
        benchmark::kMillisecond);
  }
  for (const Shape& s : shapes) {
    add(
        std::string("backward/") + s.name, [s](benchmark::State& state) { backward(state, s.H, s.HV, s.lengths); },
        benchmark::kMillisecond);
  }
  for (const std::int64_t N : {1, 8}) {
    for (const bool v_first : {false, true}) {
      add(
          "step/16/32/" + std::to_string(N) + (v_first ? "/VK" : "/KV"),
          [=](benchmark::State& state) { step(state, 16, 32, N, v_first); }, benchmark::kMicrosecond);
    }
  }
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}
