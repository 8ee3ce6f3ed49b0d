// Speed of the CUDA backends, from replays of CUDA graphs. Rows:
//   step/<H>/<HV>/<sequences>x<tokens>/<state type>/<layout>   K = V = 128, bf16 in, states updated in place in pools that
//                                                              are rotated over more than 256 MB
// Counters: median, p10 and p90 in microseconds per call, GB/s and the share of the copy bandwidth that was measured in the
// same run (states counted once read, once written), the SM clock while it ran.
//
//     bench --benchmark_out=bench/results/h200.json --benchmark_out_format=json [Google Benchmark's options]
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "bench/gpu_timing.hpp"
#include "dtype.hpp"
#include "flashdelta/flashdelta.h"

#ifndef FLASHDELTA_COMMIT
#define FLASHDELTA_COMMIT "unknown"
#endif

namespace {

using namespace flashdelta;
using namespace flashdelta::bench;

constexpr std::int64_t HEAD_DIM = 128;
constexpr std::size_t ROTATED_BYTES = std::size_t{256} << 20;  // well above any L2
constexpr int REPLAYS = 40;

cudaStream_t stream;
double bandwidth;  // of a copy, bytes per second

void must(fd_status status) {
  if (status == FD_OK) return;
  std::fprintf(stderr, "bench: %s\n", fd_last_error());
  std::exit(1);
}

// `count` random elements of a type on the device: deviation * normal + mean.
DeviceMemory normal(std::size_t count, fd_dtype type, double deviation, double mean, std::uint64_t seed) {
  constexpr std::size_t period = 1000003;  // a prime: repeats fall on other rows
  std::mt19937_64 random(seed);
  std::normal_distribution<double> draw(mean, deviation);
  std::vector<double> values(std::min(count, period));
  for (double& x : values) x = draw(random);
  std::vector<unsigned char> host(count * size_of(type));
  for (std::size_t i = 0; i < count; ++i) store(host.data(), type, static_cast<std::int64_t>(i), values[i % period]);
  DeviceMemory device(host.size());
  bench::must(cudaMemcpy(device.data(), host.data(), host.size(), cudaMemcpyHostToDevice), "cudaMemcpy");
  return device;
}

struct StepRow {
  std::int64_t H, HV, N, T;
  fd_dtype state;
  bool v_first;

  std::string name() const {
    return "step/" + std::to_string(H) + "/" + std::to_string(HV) + "/" + std::to_string(N) + "x" + std::to_string(T) + "/" +
           name_of(state) + (v_first ? "/v_first" : "/k_first");
  }
  std::size_t state_bytes() const { return static_cast<std::size_t>(N * HV * HEAD_DIM * HEAD_DIM) * size_of(state); }
};

// Times a graph and reports per call; `bytes`: what a call has to move.
void measure(benchmark::State& state, Graph& graph, double bytes) {
  for (int i = 0; i < 3; ++i) graph.replay();
  std::vector<double> samples;
  for (auto _ : state) {
    samples.push_back(graph.replay());
    state.SetIterationTime(samples.back());
  }
  for (int i = 0; i < 4; ++i) graph.launch();
  const double clock = sm_clock();
  bench::must(cudaStreamSynchronize(stream), "replays");
  const double median = quantile(samples, 0.5);
  state.counters["median_us"] = median * 1e6;
  state.counters["p10_us"] = quantile(samples, 0.1) * 1e6;
  state.counters["p90_us"] = quantile(samples, 0.9) * 1e6;
  state.counters["GB_per_s"] = bytes / median * 1e-9;
  state.counters["share_of_copy"] = bytes / median / bandwidth;
  state.counters["sm_MHz"] = clock;
}

void step_row(benchmark::State& state, const StepRow& row) {
  const auto copies = static_cast<std::int64_t>(ROTATED_BYTES / row.state_bytes()) + 2;
  const std::int64_t rows = copies * row.N;
  fd_problem p{};
  p.size = sizeof(p);
  p.B = row.N, p.T = row.T, p.H = row.H, p.HV = row.HV, p.K = p.V = HEAD_DIM;
  p.device = FD_CUDA;
  p.dtype = FD_BFLOAT16;
  p.initial_dtype = p.final_dtype = row.state;
  p.gate = FD_GATE_LOG;
  p.beta = FD_BETA_VALUE;
  p.qk_l2norm = 1;
  p.state_v_first = row.v_first ? 1 : 0;
  p.initial_rows = p.final_rows = rows;
  p.index_dtype = FD_INT32;

  const auto tokens = static_cast<std::size_t>(row.N * row.T);
  const auto key_elements = tokens * static_cast<std::size_t>(row.H * HEAD_DIM);
  const auto value_elements = tokens * static_cast<std::size_t>(row.HV * HEAD_DIM);
  const auto gate_elements = tokens * static_cast<std::size_t>(row.HV);
  const DeviceMemory q = normal(key_elements, FD_BFLOAT16, 1, 0, 1), k = normal(key_elements, FD_BFLOAT16, 1, 0, 2);
  const DeviceMemory v = normal(value_elements, FD_BFLOAT16, 1, 0, 3), o(value_elements * 2);
  const DeviceMemory g = normal(gate_elements, FD_FLOAT32, 0.005, -0.05, 4),
                     beta = normal(gate_elements, FD_FLOAT32, 0.1, 0.5, 5);
  const auto state_elements = static_cast<std::size_t>(rows * row.HV * HEAD_DIM * HEAD_DIM);
  const DeviceMemory pool = normal(state_elements, row.state, 1, 0, 6);

  std::vector<std::int32_t> order(static_cast<std::size_t>(rows));  // rows in mixed order, each call has its own
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), std::mt19937_64(7));
  const DeviceMemory index(order.size() * sizeof(std::int32_t));
  bench::must(cudaMemcpy(index.data(), order.data(), index.bytes(), cudaMemcpyHostToDevice), "cudaMemcpy");

  fd_step_args args{};
  args.size = sizeof(args);
  args.problem = &p;
  args.q.data = q.data();
  args.k.data = k.data();
  args.v.data = v.data();
  args.g.data = g.data();
  args.beta.data = beta.data();
  args.o.data = o.data();
  args.initial_state.data = args.final_state.data = pool.data();
  const int calls = static_cast<int>(std::max<std::int64_t>(copies, 8));
  Graph graph(stream, calls, [&](int call, cudaStream_t s) {
    args.initial_index.data = args.final_index.data = static_cast<const std::int32_t*>(index.data()) + call % copies * row.N;
    must(fd_step(&args, nullptr, 0, s));
  });
  measure(state, graph, 2.0 * static_cast<double>(row.state_bytes()));
}

void register_steps() {
  for (const std::int64_t T : {1, 4}) {
    for (const fd_dtype type : {FD_FLOAT32, FD_BFLOAT16}) {
      for (const bool v_first : {false, true}) {
        for (const std::int64_t N : {1, 8, 32, 64, 128, 256}) {
          const StepRow row{16, 32, N, T, type, v_first};
          benchmark::RegisterBenchmark(row.name().c_str(), step_row, row)
              ->UseManualTime()
              ->Iterations(REPLAYS)
              ->Unit(benchmark::kMicrosecond);
        }
      }
    }
  }
}

void describe_run(int argc, char** argv) {
  cudaDeviceProp device;
  bench::must(cudaGetDeviceProperties(&device, 0), "cudaGetDeviceProperties");
  int driver = 0;
  bench::must(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  std::string command = "bench";
  for (int i = 1; i < argc; ++i) command += std::string(" ") + argv[i];
  const std::int32_t version = fd_version();
  benchmark::AddCustomContext("gpu", device.name);
  benchmark::AddCustomContext("sms", std::to_string(device.multiProcessorCount));
  benchmark::AddCustomContext("driver_cuda", std::to_string(driver / 1000) + "." + std::to_string(driver % 1000 / 10));
  benchmark::AddCustomContext("cudart",
                              std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10));
  benchmark::AddCustomContext("flashdelta", std::to_string(version / 10000) + "." + std::to_string(version / 100 % 100) +
                                                "." + std::to_string(version % 100));
  benchmark::AddCustomContext("commit", FLASHDELTA_COMMIT);
  benchmark::AddCustomContext("command", command);
  benchmark::AddCustomContext("copy_GB_per_s", std::to_string(bandwidth * 1e-9));
}

}  // namespace

int main(int argc, char** argv) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::fprintf(stderr, "bench: no CUDA device\n");
    return 1;
  }
  bench::must(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  bandwidth = copy_bandwidth(stream);
  describe_run(argc, argv);
  register_steps();
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}
