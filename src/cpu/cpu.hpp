// The chunked CPU backend's operations, one file each, and the memory they work in. Calls are in normal form (backend.hpp).
#pragma once

#include <cstddef>
#include <cstdint>

#include "backend.hpp"

namespace flashdelta {

fd_status cpu_forward(const fd_forward_args&, void* workspace);
fd_status cpu_backward(const fd_backward_args&, void* workspace);
fd_status cpu_step(const fd_step_args&, void* workspace);

std::size_t cpu_forward_workspace(const fd_problem&);
std::size_t cpu_backward_workspace(const fd_problem&);
std::size_t cpu_step_workspace(const fd_problem&);

// Takes arrays from a piece of memory, one after another, each aligned to 64 bytes. From null it only counts: the
// constructor that lays out a workspace also says how large it is.
class Arena {
 public:
  explicit Arena(void* memory = nullptr) : memory_(static_cast<char*>(memory)) {}

  template <typename T>
  T* take(std::int64_t n) {
    char* at = memory_ == nullptr ? nullptr : memory_ + used_;
    used_ += (static_cast<std::size_t>(n) * sizeof(T) + 63) / 64 * 64;
    return reinterpret_cast<T*>(at);
  }

  std::size_t used() const { return used_; }

 private:
  char* memory_;
  std::size_t used_ = 0;
};

}  // namespace flashdelta
