#include <unistd.h>

#include <chrono>
#include <stdexcept>
#include <string>

#include "cuda/inputs.cuh"
#include "tests/stress/machine.hpp"

namespace flashdelta::stress {
namespace {

using Counter = unsigned long long;

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// counter += how many i < count satisfy `wrong`.
template <typename Wrong>
__global__ void count_if(std::size_t count, Counter* counter, Wrong wrong) {
  Counter found = 0;
  const std::size_t all = static_cast<std::size_t>(gridDim.x) * blockDim.x;
  for (std::size_t i = static_cast<std::size_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += all) {
    found += wrong(i) ? 1 : 0;
  }
  if (found != 0) atomicAdd(counter, found);
}

struct Different {
  const uint16_t *a, *b;
  __device__ bool operator()(std::size_t i) const { return a[i] != b[i]; }
};
struct Other {
  const uint16_t* a;
  uint16_t value;
  __device__ bool operator()(std::size_t i) const { return a[i] != value; }
};
struct NotFinite {
  const void* a;
  fd_dtype type;
  __device__ bool operator()(std::size_t i) const { return !isfinite(cuda::load_element(a, type, static_cast<int64_t>(i))); }
};

class Cuda : public Machine {
 public:
  Cuda() {
    int devices = 0;
    check(cudaGetDeviceCount(&devices), "cudaGetDeviceCount");
    if (devices == 0) throw std::runtime_error("no CUDA device");
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
    counters_ = reinterpret_cast<Counter*>(allocate(COUNTERS * sizeof(Counter)));
    set(counters_, 0, COUNTERS * sizeof(Counter));
  }
  ~Cuda() override {
    for (void* p : blocks_) static_cast<void>(cudaFree(p));
    static_cast<void>(cudaStreamDestroy(stream_));
  }

  fd_device device() const override { return FD_CUDA; }
  void* stream() const override { return stream_; }
  unsigned char* allocate(std::size_t bytes) override {
    void* p = nullptr;
    check(cudaMalloc(&p, bytes), "cudaMalloc");
    blocks_.push_back(p);
    return static_cast<unsigned char*>(p);
  }
  void upload(void* to, const void* from, std::size_t bytes) override {
    check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream_), "upload");
    check(cudaStreamSynchronize(stream_), "upload");
  }
  void download(void* to, const void* from, std::size_t bytes) override {
    check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream_), "download");
    check(cudaStreamSynchronize(stream_), "download");
  }
  void copy(void* to, const void* from, std::size_t bytes) override {
    check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream_), "copy");
  }
  void set(void* to, unsigned char value, std::size_t bytes) override {
    check(cudaMemsetAsync(to, value, bytes, stream_), "set");
  }

  void count_different(const void* a, const void* b, std::size_t bytes, unsigned counter) override {
    count(bytes / 2, counter, Different{static_cast<const uint16_t*>(a), static_cast<const uint16_t*>(b)});
  }
  void count_other(const void* a, unsigned char value, std::size_t bytes, unsigned counter) override {
    count(bytes / 2, counter, Other{static_cast<const uint16_t*>(a), static_cast<uint16_t>(value * 0x101)});
  }
  void count_not_finite(const void* a, fd_dtype type, std::size_t elements, unsigned counter) override {
    count(elements, counter, NotFinite{a, type});
  }

  std::vector<std::uint64_t> counts(double seconds) override {
    const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
    for (cudaError_t state; (state = cudaStreamQuery(stream_)) != cudaSuccess; usleep(100)) {
      if (state != cudaErrorNotReady) check(state, "the device");
      if (std::chrono::steady_clock::now() > end) throw std::runtime_error("the device does not come to an end");
    }
    std::vector<std::uint64_t> result(COUNTERS);
    download(result.data(), counters_, COUNTERS * sizeof(Counter));
    set(counters_, 0, COUNTERS * sizeof(Counter));
    return result;
  }

 private:
  template <typename Wrong>
  void count(std::size_t elements, unsigned counter, Wrong wrong) {
    if (elements == 0) return;
    const auto blocks = static_cast<unsigned>(elements / 256 < 2048 ? elements / 256 + 1 : 2048);
    count_if<<<blocks, 256, 0, stream_>>>(elements, counters_ + counter, wrong);
    check(cudaGetLastError(), "count");
  }

  cudaStream_t stream_ = nullptr;
  std::vector<void*> blocks_;
  Counter* counters_ = nullptr;
};

}  // namespace

std::unique_ptr<Machine> cuda_machine() { return std::make_unique<Cuda>(); }

}  // namespace flashdelta::stress
