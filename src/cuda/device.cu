#include <algorithm>
#include <array>
#include <mutex>
#include <string>
#include <vector>

#include "cuda/device.hpp"

namespace flashdelta::cuda {
namespace {

constexpr int MAX_DEVICES = 64;

struct Entry {
  std::once_flag once;
  Device device;
  cudaError_t error;
};

cudaError_t read(int index, Device& device) {
  device.index = index;
  cudaError_t error = cudaDeviceGetAttribute(&device.sm_count, cudaDevAttrMultiProcessorCount, index);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&device.major, cudaDevAttrComputeCapabilityMajor, index);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&device.minor, cudaDevAttrComputeCapabilityMinor, index);
  return error;
}

const Device* facts(int index, cudaError_t& error) {
  static std::array<Entry, MAX_DEVICES> entries;
  if (index < 0 || index >= MAX_DEVICES) {
    error = cudaErrorInvalidDevice;
    return nullptr;
  }
  Entry& entry = entries[static_cast<std::size_t>(index)];
  std::call_once(entry.once, [&] { entry.error = read(index, entry.device); });
  error = entry.error;
  if (error != cudaSuccess) static_cast<void>(cudaGetLastError());
  return error == cudaSuccess ? &entry.device : nullptr;
}

// Remembers, in each thread, which kernels may have how much shared memory on which device: opting in takes the driver as
// long as a part of a launch.
class OptIns {
 public:
  cudaError_t add(const void* kernel, std::size_t shared) {
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess) return error;
    const auto same = [&](const OptIn& known) { return known.kernel == kernel && known.device == device; };
    const auto known = std::find_if(known_.begin(), known_.end(), same);
    if (known != known_.end() && known->shared >= shared) return cudaSuccess;
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return error;
    if (known != known_.end()) known->shared = shared;
    if (known == known_.end()) known_.push_back({kernel, device, shared});
    return cudaSuccess;
  }

  void forget() { known_.clear(); }

 private:
  struct OptIn {
    const void* kernel;
    int device;
    std::size_t shared;
  };
  std::vector<OptIn> known_;
};

}  // namespace

const Device* current_device(cudaError_t& error) {
  int index = 0;
  error = cudaGetDevice(&index);
  if (error == cudaSuccess) return facts(index, error);
  static_cast<void>(cudaGetLastError());
  return nullptr;
}

bool enter_context() {
  int index = 0;
  return cudaGetDevice(&index) == cudaSuccess && cudaSetDevice(index) == cudaSuccess;
}

std::string no_device(bool (*compiled_for)(int major, int minor), const char* wanted) {
  // Each call asks, and devices do not go away: the first one that serves is remembered by who asked for it.
  thread_local std::vector<bool (*)(int, int)> served;
  if (std::find(served.begin(), served.end(), compiled_for) != served.end()) return "";
  int driver = 0, count = 0;
  cudaError_t error = cudaDriverGetVersion(&driver);
  if (error != cudaSuccess || driver == 0) {
    static_cast<void>(cudaGetLastError());
    return "no NVIDIA driver";
  }
  error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess || count == 0) {
    static_cast<void>(cudaGetLastError());
    if (error == cudaErrorNoDevice || error == cudaSuccess) return "no CUDA device";
    std::string reason = cudaGetErrorString(error);
    if (error == cudaErrorInsufficientDriver) {
      reason += ": the driver has CUDA " + std::to_string(driver / 1000) + "." + std::to_string(driver % 1000 / 10) +
                ", this library is built with " + std::to_string(CUDART_VERSION / 1000) + "." +
                std::to_string(CUDART_VERSION % 1000 / 10);
    }
    return reason;
  }
  std::string seen;
  for (int i = 0; i < count; ++i) {
    const Device* device = facts(i, error);
    if (device == nullptr) {
      seen = cudaGetErrorString(error);
      continue;
    }
    if (compiled_for(device->major, device->minor)) {
      served.push_back(compiled_for);
      return "";
    }
    seen = device_name(*device) + " has compute capability " + std::to_string(device->major) + "." +
           std::to_string(device->minor);
  }
  return seen + "; needs " + wanted;
}

std::string device_name(const Device& device) {
  cudaDeviceProp properties;
  if (cudaGetDeviceProperties(&properties, device.index) == cudaSuccess) return properties.name;
  static_cast<void>(cudaGetLastError());
  return "device " + std::to_string(device.index);
}

std::string describe_device() {
  cudaError_t error;
  const Device* device = current_device(error);
  if (device == nullptr) return cudaGetErrorString(error);
  return device_name(*device) + ", " + std::to_string(device->sm_count) + " SMs, compute capability " +
         std::to_string(device->major) + "." + std::to_string(device->minor);
}

fd_status checked(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return FD_OK;
  static_cast<void>(cudaGetLastError());
  return fail(FD_DEVICE_ERROR, std::string(what) + ": " + cudaGetErrorString(error));
}

fd_status launch(const void* kernel, const Launch& config, void** arguments, void* stream) {
  constexpr std::size_t SHARED_WITHOUT_OPT_IN = 48 * 1024;
  thread_local OptIns opt_ins;
  const bool large = config.shared > SHARED_WITHOUT_OPT_IN;
  if (large) {
    const cudaError_t error = opt_ins.add(kernel, config.shared);
    if (error != cudaSuccess) return checked(error, config.name);
  }
  cudaLaunchAttribute overlap = {};
  cudaLaunchConfig_t launch = {};
  launch.gridDim = config.grid;
  launch.blockDim = config.block;
  launch.dynamicSmemBytes = config.shared;
  launch.stream = static_cast<cudaStream_t>(stream);
  launch.attrs = &overlap;
  launch.numAttrs = config.overlap ? 1 : 0;
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaError_t error = cudaLaunchKernelExC(&launch, kernel, arguments);
  if (error == cudaErrorInvalidValue && large) {  // the device was reset, or has another context now: nobody opted in there
    static_cast<void>(cudaGetLastError());
    opt_ins.forget();
    error = opt_ins.add(kernel, config.shared);
    if (error == cudaSuccess) error = cudaLaunchKernelExC(&launch, kernel, arguments);
  }
  return checked(error, config.name);
}

}  // namespace flashdelta::cuda
