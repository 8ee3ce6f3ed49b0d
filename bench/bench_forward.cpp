// Speed of the CUDA forward, from replays of CUDA graphs. Rows: forward/<H>/<HV>/<lengths>[/cold]
//   the data of the peers' benchmark: normalised bf16 q and k, g = logsigmoid(normal) / 16 with a quarter of the heads at 0,
//   fp32 beta = sigmoid(normal), fp32 initial states, final states written, packed int32 cu_seqlens, K = V = 128
//   cold: inputs and outputs rotated over more than 256 MB; else the same tensors in every replay
// Counters: median, p10 and p90 in microseconds per call, TFLOP/s (2,560 tensor cycles a chunk and value head), GB/s of the
// bytes that must move once, the SM clock while it ran.
//
//     bench_forward --benchmark_out=bench/results/h200.json --benchmark_out_format=json [Google Benchmark's options]
#include <benchmark/benchmark.h>

#include <cmath>
#include <cstdint>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "bench/gpu_timing.hpp"
#include "dtype.hpp"
#include "flashdelta/flashdelta.h"

namespace {

using namespace flashdelta;
using namespace flashdelta::bench;

constexpr std::int64_t HEAD_DIM = 128, CHUNK = 64;
constexpr double FLOP_PER_CHUNK = 2560.0 * 4096;  // per value head
constexpr std::size_t ROTATED_BYTES = std::size_t{256} << 20;
constexpr int REPLAYS = 40;

cudaStream_t stream;

void must(fd_status status) {
  if (status == FD_OK) return;
  std::fprintf(stderr, "bench_forward: %s\n", fd_last_error());
  std::exit(1);
}

template <typename T>
DeviceMemory upload(const std::vector<T>& host) {
  DeviceMemory device(host.size() * sizeof(T));
  bench::must(cudaMemcpy(device.data(), host.data(), device.bytes(), cudaMemcpyHostToDevice), "cudaMemcpy");
  return device;
}

// Normal numbers; those of a longer tensor repeat after a prime number of them.
const std::vector<float>& normals() {
  static const std::vector<float> values = [] {
    std::mt19937_64 random(1);
    std::normal_distribution<float> draw;
    std::vector<float> x(1000003);
    for (float& y : x) y = draw(random);
    return x;
  }();
  return values;
}

DeviceMemory vectors(std::size_t rows, bool normalised, std::size_t seed) {
  const std::vector<float>& x = normals();
  std::vector<std::uint16_t> host(rows * HEAD_DIM);
  for (std::size_t r = 0; r < rows; ++r) {
    const std::size_t first = (r * HEAD_DIM + seed * 7919) % (x.size() - HEAD_DIM);
    float square = 0;
    for (std::size_t i = 0; i < HEAD_DIM; ++i) square += x[first + i] * x[first + i];
    const float factor = normalised ? 1 / std::sqrt(square) : 1;
    for (std::size_t i = 0; i < HEAD_DIM; ++i) host[r * HEAD_DIM + i] = float_to_bfloat16(factor * x[first + i]);
  }
  return upload(host);
}

struct Row {
  std::string name;
  std::vector<std::int64_t> lengths;
  std::int64_t H, HV;
  bool cold;
};

// Tensors of one call.
struct Set {
  DeviceMemory q, k, v, g, beta, o, initial, final;
};

Set make_set(const Row& row, std::size_t tokens, std::size_t seed) {
  const auto H = static_cast<std::size_t>(row.H), HV = static_cast<std::size_t>(row.HV);
  const std::vector<float>& x = normals();
  std::vector<float> g(tokens * HV), beta(tokens * HV), state(row.lengths.size() * HV * HEAD_DIM * HEAD_DIM);
  for (std::size_t i = 0; i < g.size(); ++i) {
    g[i] = i % HV % 4 == 0 ? 0.0f : -std::log1p(std::exp(-x[(i + seed) % x.size()])) / 16;
    beta[i] = 1 / (1 + std::exp(-x[(i + seed + 31) % x.size()]));
  }
  for (std::size_t i = 0; i < state.size(); ++i) state[i] = x[(i + seed + 77) % x.size()];
  return {vectors(tokens * H, true, seed),
          vectors(tokens * H, true, seed + 1),
          vectors(tokens * HV, false, seed + 2),
          upload(g),
          upload(beta),
          DeviceMemory(tokens * HV * HEAD_DIM * 2),
          upload(state),
          DeviceMemory(state.size() * sizeof(float))};
}

void forward_row(benchmark::State& state, const Row& row) {
  const auto tokens = static_cast<std::size_t>(std::accumulate(row.lengths.begin(), row.lengths.end(), std::int64_t{0}));
  std::vector<std::int32_t> bounds{0};
  double chunks = 0;
  for (const std::int64_t length : row.lengths) {
    bounds.push_back(bounds.back() + static_cast<std::int32_t>(length));
    chunks += static_cast<double>((length + CHUNK - 1) / CHUNK);
  }
  const DeviceMemory cu_seqlens = upload(bounds);
  fd_problem p{};
  p.size = sizeof(p);
  p.B = 1, p.T = static_cast<std::int64_t>(tokens), p.N = static_cast<std::int64_t>(row.lengths.size());
  p.H = row.H, p.HV = row.HV, p.K = p.V = HEAD_DIM;
  p.device = FD_CUDA;
  p.dtype = FD_BFLOAT16;
  p.gate = FD_GATE_LOG;
  p.beta = FD_BETA_VALUE;
  p.cu_seqlens_dtype = FD_INT32;
  std::size_t workspace_bytes = 0;
  must(fd_forward_workspace(&p, &workspace_bytes));
  const DeviceMemory workspace(workspace_bytes + 1);

  std::vector<Set> sets;
  sets.push_back(make_set(row, tokens, 0));
  const Set& s = sets[0];
  const std::size_t bytes = s.q.bytes() + s.k.bytes() + s.v.bytes() + s.g.bytes() + s.beta.bytes() + s.o.bytes() +
                            s.initial.bytes() + s.final.bytes();
  const std::size_t copies = row.cold ? ROTATED_BYTES / bytes + 2 : 1;
  while (sets.size() < copies) sets.push_back(make_set(row, tokens, 13 * sets.size()));

  const int calls = row.cold ? static_cast<int>(copies) : (chunks * static_cast<double>(row.HV) < 4000 ? 8 : 1);
  Graph graph(stream, calls, [&](int call, cudaStream_t side) {
    const Set& set = sets[static_cast<std::size_t>(call) % sets.size()];
    fd_forward_args args{};
    args.size = sizeof(args);
    args.problem = &p;
    args.q.data = set.q.data();
    args.k.data = set.k.data();
    args.v.data = set.v.data();
    args.g.data = set.g.data();
    args.beta.data = set.beta.data();
    args.cu_seqlens = cu_seqlens.data();
    args.initial_state.data = set.initial.data();
    args.o.data = set.o.data();
    args.final_state.data = set.final.data();
    must(fd_forward(&args, workspace.data(), workspace_bytes, side));
  });
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
  state.counters["TFLOP_per_s"] = chunks * static_cast<double>(row.HV) * FLOP_PER_CHUNK / median * 1e-12;
  state.counters["GB_per_s"] = static_cast<double>(bytes) / median * 1e-9;
  state.counters["sm_MHz"] = clock;
}

std::vector<std::int64_t> repeated(std::int64_t count, std::int64_t length) {
  return std::vector<std::int64_t>(static_cast<std::size_t>(count), length);
}

void register_rows() {
  const std::vector<std::int64_t> mix24 = {268,  871,  40, 33,  264,  1316, 410, 409, 115, 94,   276,  786,
                                           1535, 1713, 62, 136, 1098, 1047, 529, 752, 534, 1797, 1285, 1014};
  std::vector<std::int64_t> tail80 = {16384};
  for (const auto& [count, length] : {std::pair{16, 512}, {32, 64}, {32, 33}}) {
    const auto more = repeated(count, length);
    tail80.insert(tail80.end(), more.begin(), more.end());
  }
  struct Shape {
    const char* lengths;
    std::vector<std::int64_t> values;
    std::int64_t H, HV;
  };
  const std::vector<Shape> shapes = {
      {"4x8192", repeated(4, 8192), 16, 64},
      {"2x16384", repeated(2, 16384), 16, 64},
      {"8x1024", repeated(8, 1024), 16, 64},
      {"1x32768", {32768}, 16, 64},
      {"1x8192", {8192}, 16, 64},
      {"1x32768", {32768}, 16, 32},
      {"1x8192", {8192}, 16, 32},
      {"4x2048", repeated(4, 2048), 16, 32},
      {"1x512", {512}, 16, 32},
      {"mix24", mix24, 16, 32},
      {"tail80", tail80, 16, 32},
      {"1x32768", {32768}, 8, 32},
      {"1x32768", {32768}, 4, 16},
      {"1x65536", {65536}, 2, 8},
      {"1x32768", {32768}, 2, 8},
      {"1x8192", {8192}, 2, 8},
      {"1x2048", {2048}, 2, 8},
      {"1x512", {512}, 2, 8},
      {"28672+4096", {28672, 4096}, 2, 8},
  };
  for (const bool cold : {false, true}) {
    for (const Shape& shape : shapes) {
      const std::string name = "forward/" + std::to_string(shape.H) + "/" + std::to_string(shape.HV) + "/" + shape.lengths;
      const Row row{name + (cold ? "/cold" : ""), shape.values, shape.H, shape.HV, cold};
      benchmark::RegisterBenchmark(row.name.c_str(), forward_row, row)
          ->UseManualTime()
          ->Iterations(REPLAYS)
          ->Unit(benchmark::kMicrosecond);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::fprintf(stderr, "bench_forward: no CUDA device\n");
    return 1;
  }
  bench::must(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  register_rows();
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}
