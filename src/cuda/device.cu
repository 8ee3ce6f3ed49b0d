#include <array>
#include <atomic>
#include <cstdio>
#include <mutex>

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
  cudaDeviceProp properties;
  const cudaError_t error = cudaGetDeviceProperties(&properties, index);
  if (error != cudaSuccess) return error;
  device.sm_count = properties.multiProcessorCount;
  device.major = properties.major;
  device.minor = properties.minor;
  device.l2_bytes = static_cast<std::size_t>(properties.l2CacheSize);
  device.shared_bytes = properties.sharedMemPerBlockOptin;
  std::snprintf(device.name, sizeof(device.name), "%s", properties.name);
  return cudaSuccess;
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
    if (compiled_for(device->major, device->minor)) return "";
    seen = std::string(device->name) + " has compute capability " + std::to_string(device->major) + "." +
           std::to_string(device->minor);
  }
  return seen + "; needs " + wanted;
}

std::string describe_device() {
  cudaError_t error;
  const Device* device = current_device(error);
  if (device == nullptr) return cudaGetErrorString(error);
  return std::string(device->name) + ", " + std::to_string(device->sm_count) + " SMs, compute capability " +
         std::to_string(device->major) + "." + std::to_string(device->minor);
}

fd_status checked(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return FD_OK;
  static_cast<void>(cudaGetLastError());
  return fail(FD_DEVICE_ERROR, std::string(what) + ": " + cudaGetErrorString(error));
}

fd_status launch(const void* kernel, const Launch& config, void** arguments, void* stream) {
  constexpr std::size_t SHARED_WITHOUT_OPT_IN = 48 * 1024;
  if (config.shared > SHARED_WITHOUT_OPT_IN) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(config.shared));
    if (error != cudaSuccess) return checked(error, config.name);
  }
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t launch = {};
  launch.gridDim = config.grid;
  launch.blockDim = config.block;
  launch.dynamicSmemBytes = config.shared;
  launch.stream = static_cast<cudaStream_t>(stream);
  launch.attrs = attributes;
  if (config.cluster > 1) {
    attributes[launch.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[launch.numAttrs++].val.clusterDim = {config.cluster, 1, 1};
  }
  if (config.overlap) {
    attributes[launch.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[launch.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  return checked(cudaLaunchKernelExC(&launch, kernel, arguments), config.name);
}

}  // namespace flashdelta::cuda
