// Instructions that CUDA C++ has no function for. The only file with inline assembly.
#pragma once

#include <cstdint>

namespace flashdelta::cuda {

// 16 bytes that are read once: not kept in L1, first to leave L2. Volatile, so that a batch of loads stays in front of what
// follows it. `address` is aligned to 16 bytes.
__device__ inline uint4 load_once(const uint4* address) {
  uint4 x;
  asm volatile("ld.global.cs.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(address));
  return x;
}
__device__ inline uint2 load_once(const uint2* address) {
  uint2 x;
  asm volatile("ld.global.cs.v2.u32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "l"(address));
  return x;
}

// Copies 16 bytes to shared memory without waiting, past L1. Both addresses are aligned to 16 bytes.
__device__ inline void copy_async(void* shared, const void* global) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
}
// Waits for all copies this thread has started.
__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Waits until the kernels that this one depends on have ended and their writes are visible. Does nothing where kernels of a
// stream do not overlap.
__device__ inline void wait_for_earlier_kernels() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets a kernel that waits as above be set up while this one still runs.
__device__ inline void allow_later_kernels() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

}  // namespace flashdelta::cuda
