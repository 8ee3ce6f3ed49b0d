// The GPU as the host sees it: its facts, and the one way to launch a kernel. No synchronisation, no allocation; works
// (saying why not) on a machine without a driver.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <string>

#include "backend.hpp"

namespace flashdelta::cuda {

struct Device {
  int index;
  int sm_count;
  int major, minor;  // compute capability
};

// Facts of the calling thread's current device, read once per device. Null if there is none; then `error` says why.
const Device* current_device(cudaError_t& error);

// Gives a thread that made no call to the runtime yet (one of autograd's, say) its device's context, which the driver's own
// functions need. False if there is none.
bool enter_context();

// Empty if some device here has a compute capability for which `compiled_for` returns true, else the reason: no driver, no
// device, or only devices that are too old or too new. `wanted` completes "... ; needs " for people.
std::string no_device(bool (*compiled_for)(int major, int minor), const char* wanted);

// "NVIDIA H200". For messages: the driver takes long to say it.
std::string device_name(const Device&);

// "NVIDIA H200, 132 SMs, compute capability 9.0"
std::string describe_device();

// FD_OK, or FD_DEVICE_ERROR with "what: reason" as the thread's message. Clears the error, so that the caller's next check
// of the runtime does not find ours.
fd_status checked(cudaError_t error, const char* what);

struct Launch {
  const char* name;  // of the kernel, for error messages
  dim3 grid, block;
  std::size_t shared = 0;  // bytes of dynamic shared memory
  // The kernel runs griddepcontrol.wait before it touches what kernels before it in the stream write (or says why it may do
  // without until its end), so its blocks may be set up while the one before still runs (compute capability 9.0 on).
  bool overlap = false;
};

// Enqueues a kernel; `arguments` points to its arguments, in order.
fd_status launch(const void* kernel, const Launch&, void** arguments, void* stream);

// The same, typed: a kernel takes one parameter struct.
template <typename Parameters>
fd_status launch(void (*kernel)(Parameters), const Launch& config, const Parameters& parameters, void* stream) {
  void* arguments[] = {const_cast<Parameters*>(&parameters)};
  return launch(reinterpret_cast<const void*>(kernel), config, arguments, stream);
}

}  // namespace flashdelta::cuda
