// Timing on a GPU for benchmark programs: memory, graph replays, the measured ceiling of the memory, the SM clock.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <utility>
#include <vector>

namespace flashdelta::bench {

inline void must(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "bench: %s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

class DeviceMemory {
 public:
  DeviceMemory() = default;
  explicit DeviceMemory(std::size_t bytes) : bytes_(bytes) { must(cudaMalloc(&data_, bytes), "cudaMalloc"); }
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

  void launch() { must(cudaGraphLaunch(executable_, stream_), "cudaGraphLaunch"); }

  // Seconds per call of one replay.
  double replay() {
    must(cudaEventRecord(start_, stream_), "cudaEventRecord");
    launch();
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

// Bytes per second, read plus written, of the best of several device-to-device copies of 2 GB.
inline double copy_bandwidth(cudaStream_t stream) {
  constexpr std::size_t bytes = std::size_t{1} << 31;
  const DeviceMemory from(bytes), to(bytes);
  must(cudaMemset(from.data(), 0x3c, bytes), "cudaMemset");
  Graph copy(stream, 4, [&](int, cudaStream_t s) {
    must(cudaMemcpyAsync(to.data(), from.data(), bytes, cudaMemcpyDeviceToDevice, s), "cudaMemcpyAsync");
  });
  double best = copy.replay();
  for (int i = 0; i < 8; ++i) best = std::min(best, copy.replay());
  return 2.0 * static_cast<double>(bytes) / best;
}

// The SM clock in MHz right now, from the driver's management library; 0 if it cannot be read.
inline double sm_clock() {
  using Init = int (*)();
  using Handle = int (*)(unsigned, void**);
  using Clock = int (*)(void*, int, unsigned*);
  static void* const library = dlopen("libnvidia-ml.so.1", RTLD_NOW);
  if (library == nullptr) return 0;
  static const auto clock = reinterpret_cast<Clock>(dlsym(library, "nvmlDeviceGetClockInfo"));
  static void* const device = [] {
    void* found = nullptr;
    const auto init = reinterpret_cast<Init>(dlsym(library, "nvmlInit_v2"));
    const auto handle = reinterpret_cast<Handle>(dlsym(library, "nvmlDeviceGetHandleByIndex_v2"));
    return init != nullptr && handle != nullptr && init() == 0 && handle(0, &found) == 0 ? found : nullptr;
  }();
  constexpr int sm = 1;
  unsigned mhz = 0;
  return device != nullptr && clock != nullptr && clock(device, sm, &mhz) == 0 ? mhz : 0;
}

}  // namespace flashdelta::bench
