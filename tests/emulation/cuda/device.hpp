// Stands for src/cuda/device.hpp in the emulation: the device, launches, and the driver's tensor maps.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "backend.hpp"
#include "cuda/ptx.cuh"
#include "tests/emulation/emulator.hpp"

namespace flashdelta::cuda {

// Names that the compiler of CUDA C++ knows.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
alignas(1024) inline uint8_t raw[emulation::SHARED_BYTES];  // dynamic shared memory

struct Device {
  int index;
  int sm_count;
  int major, minor;
};
inline Device device = {0, 132, 9, 0};
inline emulation::Schedule schedule = emulation::Schedule::forward;

inline const Device* current_device(cudaError_t&) { return &device; }
inline bool enter_context() { return true; }
inline std::string no_device(bool (*)(int major, int minor), const char*) { return ""; }
inline std::string device_name(const Device&) { return "emulation"; }
inline std::string describe_device() { return device_name(device); }
inline fd_status checked(cudaError_t, const char* what) { return fail(FD_DEVICE_ERROR, what); }

struct Launch {
  const char* name;
  dim3 grid, block;
  std::size_t shared = 0;
  bool overlap = false;
};

// Runs the blocks one after another, in the schedule's order, each with shared memory full of NaN. All threads of a kernel
// that may overlap have to wait for those before.
template <typename Parameters>
fd_status launch(void (*kernel)(Parameters), const Launch& config, const Parameters& parameters, void*) {
  if (config.shared > sizeof(raw)) return fail(FD_DEVICE_ERROR, std::string(config.name) + ": too much shared memory");
  blockDim = config.block;
  gridDim = config.grid;
  const dim3& grid = config.grid;
  std::vector<unsigned> order(std::size_t{grid.x} * grid.y * grid.z);
  std::iota(order.begin(), order.end(), 0);
  if (schedule == emulation::Schedule::backward) std::reverse(order.begin(), order.end());
  if (schedule == emulation::Schedule::shuffled) std::shuffle(order.begin(), order.end(), std::mt19937(emulation::seed));
  waits = 0;
  for (const unsigned i : order) {
    std::memset(raw, 0xff, sizeof(raw));
    blockIdx = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
    emulation::run_block(
        static_cast<int>(config.block.x), schedule, [&] { kernel(parameters); },
        [](int thread) { threadIdx.x = static_cast<unsigned>(thread); }, i);
  }
  if (config.overlap && waits != std::ssize(order) * config.block.x) {
    return fail(FD_DEVICE_ERROR, std::string(config.name) + ": not every thread waits for earlier kernels");
  }
  return FD_OK;
}

// --- tensor maps

struct TensorMap {
  uint64_t data;
  uint64_t size[5], stride[5];  // in elements, in bytes
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));

// Takes only maps as the kernel's tiles need them; refuses what the driver refuses.
inline CUresult encode_tensor_map(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* data,
                                  const cuuint64_t* size, const cuuint64_t* stride, const cuuint32_t* box,
                                  const cuuint32_t* step, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                  CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  const bool sixteen_bits = type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  if (!sixteen_bits || rank != 5 || interleave != CU_TENSOR_MAP_INTERLEAVE_NONE || swizzle != CU_TENSOR_MAP_SWIZZLE_128B ||
      fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE || box[0] != 64 || box[1] != 64 ||
      reinterpret_cast<uintptr_t>(data) % 16 != 0) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  TensorMap encoded = {reinterpret_cast<uintptr_t>(data), {}, {2}};
  for (int i = 0; i < 5; ++i) {
    if (size[i] == 0 || size[i] > uint64_t{1} << 32 || step[i] != 1 || (i > 1 && box[i] != 1))
      return CUDA_ERROR_INVALID_VALUE;
    encoded.size[i] = size[i];
    if (i == 4) break;
    if (stride[i] % 16 != 0 || stride[i] >= uint64_t{1} << 40) return CUDA_ERROR_INVALID_VALUE;
    encoded.stride[i + 1] = stride[i];
  }
  std::memcpy(map, &encoded, sizeof(encoded));
  return CUDA_SUCCESS;
}

inline cudaError_t emulated_entry_point(const char*, void** function, unsigned, unsigned long long,
                                        cudaDriverEntryPointQueryResult* found) {
  *function = reinterpret_cast<void*>(encode_tensor_map);
  *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
#define cudaGetDriverEntryPointByVersion emulated_entry_point

}  // namespace flashdelta::cuda
