#include "bench/gpu_timing.hpp"

#include <chrono>
#include <cmath>

#include "bench/gpu_kernels.hpp"

namespace flashdelta::bench {
namespace {

// The clock of the SMs between begin() and end().
class SmClock {
 public:
  explicit SmClock(const Machine& machine)
      : machine_(machine), blocks_(8 * machine.sm_count), memory_(2 * sizeof(Stamp) * static_cast<std::size_t>(blocks_)) {}
  void begin() { stamp(stamps(), blocks_, machine_.stream); }
  double end() {  // MHz; waits for the stream
    stamp(stamps() + blocks_, blocks_, machine_.stream);
    const auto count = static_cast<std::size_t>(blocks_);
    std::vector<Stamp> before(count), after(count);
    must(cudaStreamSynchronize(machine_.stream), "stamps");
    must(cudaMemcpy(before.data(), stamps(), count * sizeof(Stamp), cudaMemcpyDeviceToHost), "cudaMemcpy");
    must(cudaMemcpy(after.data(), stamps() + blocks_, count * sizeof(Stamp), cudaMemcpyDeviceToHost), "cudaMemcpy");
    return clock_between(before, after);
  }

 private:
  Stamp* stamps() const { return static_cast<Stamp*>(memory_.data()); }
  const Machine& machine_;
  int blocks_;
  DeviceMemory memory_;
};

// The best of our own kernel and the driver's copy over several sizes, whose two ends lie differently in the memory's banks.
double copy_bandwidth(cudaStream_t stream) {
  double best = 0;
  for (const std::size_t bytes :
       {std::size_t{1} << 30, std::size_t{1} << 31, (std::size_t{1} << 31) + (std::size_t{5} << 20), std::size_t{1} << 32}) {
    const DeviceMemory from(bytes), to(bytes);
    fill(from.data(), FD_BFLOAT16, bytes / 2, Fill::normal, 1, 1, stream);
    Graph own(stream, 2, [&](int, cudaStream_t s) { copy(to.data(), from.data(), bytes, s); });
    Graph driver(stream, 2, [&](int, cudaStream_t s) {
      must(cudaMemcpyAsync(to.data(), from.data(), bytes, cudaMemcpyDeviceToDevice, s), "cudaMemcpyAsync");
    });
    for (int i = 0; i < 6; ++i) {
      const double seconds = std::min(own.replay(), driver.replay());
      if (i > 0) best = std::max(best, 2.0 * static_cast<double>(bytes) / seconds);
    }
  }
  return best;
}

// The median of launches of about 5 ms in a row: the clock settles where the power allows.
void product_rate(Machine& machine) {
  constexpr int rounds = 5000;
  const DeviceMemory noise(NOISE_BYTES), sums(sizeof(float) * MULTIPLY_THREADS * static_cast<std::size_t>(machine.sm_count));
  fill(noise.data(), FD_BFLOAT16, NOISE_BYTES / 2, Fill::normal, 1, 2, machine.stream);
  double flops = 0;
  Graph graph(machine.stream, 1, [&](int, cudaStream_t s) {
    flops = multiply(noise.data(), static_cast<float*>(sums.data()), machine.sm_count, rounds, s);
  });
  for (int i = 0; i < 10; ++i) graph.replay();
  SmClock clock(machine);
  clock.begin();
  std::vector<double> samples;
  for (int i = 0; i < 20; ++i) samples.push_back(graph.replay());
  machine.rate_clock = clock.end();
  machine.rate = flops / quantile(samples, 0.5);
  std::vector<float> seen(sums.bytes() / sizeof(float));
  must(cudaMemcpy(seen.data(), sums.data(), sums.bytes(), cudaMemcpyDeviceToHost), "cudaMemcpy");
  const auto right = [](float x) { return std::isfinite(x) && x != 0; };
  if (!std::all_of(seen.begin(), seen.end(), right)) {
    std::fprintf(stderr, "bench_gpu: the products of the ceiling are zero or not finite\n");
    std::exit(1);
  }
}

}  // namespace

Machine measure_machine() {
  Machine machine{};
  must(cudaStreamCreateWithFlags(&machine.stream, cudaStreamNonBlocking), "cudaStreamCreate");
  must(cudaDeviceGetAttribute(&machine.sm_count, cudaDevAttrMultiProcessorCount, 0), "cudaDeviceGetAttribute");
  machine.bandwidth = copy_bandwidth(machine.stream);
  product_rate(machine);
  return machine;
}

bool served(benchmark::State& state, fd_status status) {
  if (status != FD_UNSUPPORTED) must(status);
  if (status == FD_OK) return true;
  state.SkipWithError((std::string("skipped, ") + fd_last_error()).c_str());
  return false;
}

void measure(benchmark::State& state, const Machine& machine, const Row& row, Graph& graph, const Work& needed,
             const std::function<void()>& host_call) {
  // Long enough for the clocks to leave what was before: a GPU that was idle, or the data's generator.
  constexpr double WARM_UP = 20e-3;
  const auto warm_up = std::chrono::steady_clock::now();
  do {
    graph.replay();
  } while (std::chrono::duration<double>(std::chrono::steady_clock::now() - warm_up).count() < WARM_UP);
  SmClock clock(machine);
  clock.begin();
  std::vector<double> samples;
  for (auto _ : state) {
    samples.push_back(graph.replay());
    state.SetIterationTime(samples.back());
  }
  const double sm_clock = clock.end();

  std::vector<double> host;  // of single calls: more of them in flight than the driver's queue holds would wait
  for (int i = 0; i < 20; ++i) {
    must(cudaStreamSynchronize(machine.stream), "a call");
    const auto start = std::chrono::steady_clock::now();
    host_call();
    host.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  must(cudaStreamSynchronize(machine.stream), "a call");

  const double median = quantile(samples, 0.5);
  const double floor = std::max(needed.bytes / machine.bandwidth, needed.flops / machine.rate);
  state.counters["median_us"] = median * 1e6;
  state.counters["p10_us"] = quantile(samples, 0.1) * 1e6;
  state.counters["p90_us"] = quantile(samples, 0.9) * 1e6;
  state.counters["host_us"] = quantile(host, 0.5) * 1e6;
  if (needed.flops > 0) state.counters["TFLOP_per_s"] = needed.flops / median * 1e-12;
  state.counters["GB_per_s"] = needed.bytes / median * 1e-9;
  state.counters["floor_us"] = floor * 1e6;
  state.counters["percent_of_floor"] = 100 * floor / median;
  if (row.must_ms > 0) {
    state.counters["must_us"] = row.must_ms * 1e3;
    state.counters["aim_us"] = row.aim_ms * 1e3;
  }
  state.counters["sm_MHz"] = sm_clock;
}

}  // namespace flashdelta::bench
