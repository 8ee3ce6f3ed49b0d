// Runs the calls of tests on the CUDA device: uploads a call's memory, guard bands too, and brings it back.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <functional>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "tests/support/call.hpp"

namespace flashdelta::testing {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Empty if this backend can run here, else the reason.
inline std::string why_not(fd_backend id, const std::string& name) {
  for (std::int32_t i = 0; i < fd_backend_count(); ++i) {
    fd_backend_description backend{};
    backend.size = sizeof(backend);
    if (fd_backend_get(i, &backend) != FD_OK || backend.backend != id) continue;
    return backend.available != 0 ? "" : name + ": skipped, " + backend.detail;
  }
  return name + ": skipped, the library is built without it";
}

class DeviceMemory {
 public:
  explicit DeviceMemory(std::size_t bytes) { check(cudaMalloc(&data_, bytes == 0 ? 1 : bytes), "cudaMalloc"); }
  ~DeviceMemory() { static_cast<void>(cudaFree(data_)); }
  DeviceMemory(DeviceMemory&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  DeviceMemory(const DeviceMemory&) = delete;
  unsigned char* data() const { return static_cast<unsigned char*>(data_); }

 private:
  void* data_ = nullptr;
};

enum class How {
  null_stream,
  side_stream,
  graph,         // captured once, replayed once
  graph_changed  // captured, replayed on other memory contents, then on the call's own
};

class Gpu : public Remote {
 public:
  explicit Gpu(How how = How::null_stream) : how_(how) {}
  ~Gpu() override {
    if (stream_ != nullptr) static_cast<void>(cudaStreamDestroy(stream_));
  }

  void upload(const std::vector<std::span<unsigned char>>& blocks) override {
    blocks_.clear();
    for (const auto& host : blocks) {
      if (host.empty()) continue;
      // A multiple of 256 between host and device addresses, so that what is (un)aligned here is so there.
      DeviceMemory memory(host.size() + 512);
      const auto offset =
          (reinterpret_cast<std::uintptr_t>(host.data()) - reinterpret_cast<std::uintptr_t>(memory.data())) % 256;
      blocks_.push_back({host, std::move(memory), offset});
    }
    copy_in();
  }

  void* translate(const void* pointer) const override {
    if (pointer == nullptr) return nullptr;
    const auto* p = static_cast<const unsigned char*>(pointer);
    for (const Block& block : blocks_) {
      if (p >= block.host.data() && p < block.host.data() + block.host.size())
        return block.device() + (p - block.host.data());
    }
    throw std::logic_error("a pointer of the call lies in none of its blocks");
  }

  fd_status run(const std::function<fd_status(void* stream)>& call) override {
    if (how_ != How::null_stream && stream_ == nullptr) {
      check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
    }
    check(cudaDeviceSynchronize(), "upload");
    fd_status status;
    if (how_ == How::null_stream || how_ == How::side_stream) {
      status = call(stream_);
      if (status != FD_OK) return status;
    } else {
      cudaGraph_t graph;
      cudaGraphExec_t executable;
      check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
      status = call(stream_);
      check(cudaStreamEndCapture(stream_, &graph), "cudaStreamEndCapture");
      if (status != FD_OK) return status;
      check(cudaGraphInstantiate(&executable, graph, 0), "cudaGraphInstantiate");
      if (how_ == How::graph_changed) {  // garbage everywhere, bounds and indices too: must not fault
        for (const Block& block : blocks_) check(cudaMemset(block.device(), 0xa5, block.host.size()), "cudaMemset");
        check(cudaDeviceSynchronize(), "the garbage");  // nothing else orders the stream behind it
        check(cudaGraphLaunch(executable, stream_), "cudaGraphLaunch");
        check(cudaStreamSynchronize(stream_), "the replay on garbage");
        copy_in();
        check(cudaDeviceSynchronize(), "upload");
      }
      check(cudaGraphLaunch(executable, stream_), "cudaGraphLaunch");
      check(cudaStreamSynchronize(stream_), "the replay");
      check(cudaGraphExecDestroy(executable), "cudaGraphExecDestroy");
      check(cudaGraphDestroy(graph), "cudaGraphDestroy");
    }
    check(cudaDeviceSynchronize(), "the kernel");
    for (const Block& block : blocks_) {
      check(cudaMemcpy(block.host.data(), block.device(), block.host.size(), cudaMemcpyDeviceToHost), "cudaMemcpy");
    }
    return status;
  }

 private:
  struct Block {
    std::span<unsigned char> host;
    DeviceMemory memory;
    std::size_t offset;
    unsigned char* device() const { return memory.data() + offset; }
  };

  void copy_in() {
    for (const Block& block : blocks_) {
      check(cudaMemcpy(block.device(), block.host.data(), block.host.size(), cudaMemcpyHostToDevice), "cudaMemcpy");
    }
  }

  How how_;
  cudaStream_t stream_ = nullptr;
  std::vector<Block> blocks_;
};

}  // namespace flashdelta::testing
