// Timing on a GPU for benchmark programs: memory, graph replays, the measured ceilings of the machine.
#pragma once

#include <benchmark/benchmark.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <utility>
#include <vector>

#include "bench/rows.hpp"
#include "flashdelta/flashdelta.h"

namespace flashdelta::bench {

constexpr std::size_t ROTATED_BYTES = std::size_t{256} << 20;  // well above any L2
constexpr int REPLAYS = 40;

inline void must(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "bench_gpu: %s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}
inline void must(fd_status status) {
  if (status == FD_OK) return;
  std::fprintf(stderr, "bench_gpu: %s\n", fd_last_error());
  std::exit(1);
}

class DeviceMemory {
 public:
  DeviceMemory() = default;
  explicit DeviceMemory(std::size_t bytes) : bytes_(bytes) {
    must(cudaMalloc(&data_, std::max<std::size_t>(bytes, 1)), "cudaMalloc");
  }
  DeviceMemory(DeviceMemory&& other) noexcept : data_(std::exchange(other.data_, nullptr)), bytes_(other.bytes_) {}
  DeviceMemory& operator=(DeviceMemory&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~DeviceMemory() { static_cast<void>(cudaFree(data_)); }
  void* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  std::size_t bytes_ = 0;
};

template <typename T>
DeviceMemory upload(const std::vector<T>& host) {
  DeviceMemory device(host.size() * sizeof(T));
  must(cudaMemcpy(device.data(), host.data(), device.bytes(), cudaMemcpyHostToDevice), "cudaMemcpy");
  return device;
}

// `calls` calls captured in one graph.
class Graph {
 public:
  Graph(cudaStream_t stream, int calls, const std::function<void(int call, cudaStream_t)>& enqueue)
      : stream_(stream), calls_(calls) {
    cudaGraph_t graph;
    must(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
    for (int i = 0; i < calls; ++i) enqueue(i, stream);
    must(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
    must(cudaGraphInstantiate(&executable_, graph, 0), "cudaGraphInstantiate");
    must(cudaGraphDestroy(graph), "cudaGraphDestroy");
    must(cudaEventCreate(&start_), "cudaEventCreate");
    must(cudaEventCreate(&stop_), "cudaEventCreate");
  }
  ~Graph() {
    static_cast<void>(cudaGraphExecDestroy(executable_));
    static_cast<void>(cudaEventDestroy(start_));
    static_cast<void>(cudaEventDestroy(stop_));
  }
  Graph(const Graph&) = delete;

  // Seconds per call of one replay.
  double replay() {
    must(cudaEventRecord(start_, stream_), "cudaEventRecord");
    must(cudaGraphLaunch(executable_, stream_), "cudaGraphLaunch");
    must(cudaEventRecord(stop_, stream_), "cudaEventRecord");
    must(cudaEventSynchronize(stop_), "a replay");
    float milliseconds;
    must(cudaEventElapsedTime(&milliseconds, start_, stop_), "cudaEventElapsedTime");
    return milliseconds * 1e-3 / calls_;
  }

 private:
  cudaStream_t stream_;
  int calls_;
  cudaGraphExec_t executable_;
  cudaEvent_t start_, stop_;
};

// The q-quantile of the samples.
inline double quantile(std::vector<double> samples, double q) {
  const auto i = static_cast<std::size_t>(q * static_cast<double>(samples.size() - 1) + 0.5);
  std::nth_element(samples.begin(), samples.begin() + static_cast<std::ptrdiff_t>(i), samples.end());
  return samples[i];
}

// What this machine sustains, and what every row is timed on.
struct Machine {
  cudaStream_t stream;
  int sm_count;
  double bandwidth;   // of a copy, bytes per second, read plus written
  double rate;        // of dense bf16 products on random numbers, operations per second
  double rate_clock;  // MHz of the SMs meanwhile
};
Machine measure_machine();

// Replays the graph until the benchmark has its samples, and reports: median, p10 and p90 in microseconds, the rates of
// `needed`, the floor and the share of it that was reached, the goals of the row, the clock of the SMs. `host_call`: one
// eager call, timed on the host.
void measure(benchmark::State&, const Machine&, const Row&, Graph&, const Work& needed,
             const std::function<void()>& host_call);

// False, and the row is skipped with the library's reason, if no backend serves it. Other failures end the program.
bool served(benchmark::State&, fd_status);

// Register the benchmarks of a row.
void register_sequences(const Machine&, const Row&);  // forward, training_forward, backward
void register_step(const Machine&, const Row&);

}  // namespace flashdelta::bench
