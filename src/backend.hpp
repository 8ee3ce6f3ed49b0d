// One contract, several implementations: what a backend must offer, and the list of them, best first.
#pragma once

#include <cstddef>
#include <span>
#include <string>

#include "flashdelta/flashdelta.h"

namespace flashdelta {

enum class Operation { forward, backward, step };

// A backend sees only calls that have passed the checks of check.hpp, in normal form: struct sizes are ours, every stride is
// explicit, `problem` has no zero left that stands for a default (N, scale, l2norm_eps, rows, slots, threads, context_bound,
// workspace_limit; see `normalise` in check.hpp), and `cu_seqlens == nullptr` means N = B sequences of T tokens each.
struct Backend {
  fd_backend id;
  fd_device device;
  const char* name;

  // Empty if this machine can run it, else the reason ("no NVIDIA driver").
  std::string (*unavailable)();

  // What it runs on, for people ("AVX-512, 2 threads").
  std::string (*description)();

  // Empty if it serves this problem, else the reason, naming member, got and expected ("K is 96; sm90 has K = 128").
  // Pure: sizes and options only.
  std::string (*unsupported)(Operation, const fd_problem&);

  // Bytes it needs for this problem. Pure.
  std::size_t (*workspace)(Operation, const fd_problem&);
  std::size_t (*saved)(const fd_problem&);

  // Run. `workspace` is aligned to 256 bytes and large enough.
  fd_status (*forward)(const fd_forward_args&, void* workspace, void* stream);
  fd_status (*backward)(const fd_backward_args&, void* workspace, void* stream);
  fd_status (*step)(const fd_step_args&, void* workspace, void* stream);

  // False: its results have never been compared with the reference on the hardware it is for. It then serves only problems
  // that ask for it by name.
  bool verified = true;
};

// Compiled-in backends, best first; the CPU backends are always there.
std::span<const Backend* const> backends();

// One per implementation; each defined in its own folder.
extern const Backend reference_backend;  // cpu/reference.cpp
extern const Backend cpu_backend;        // cpu/backend.cpp
#if defined(FLASHDELTA_CUDA)
extern const Backend cuda_backend;  // cuda/step.cu
extern const Backend sm90_backend;  // cuda/backend_sm90.cu
#endif

// Sets the calling thread's fd_last_error() and returns `status`.
fd_status fail(fd_status status, std::string message);

}  // namespace flashdelta
