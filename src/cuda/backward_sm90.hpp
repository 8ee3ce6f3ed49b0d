// The backward on Hopper: the order of its kernels, and the memory between them.
#pragma once

#include <cstddef>

#include "backend.hpp"

namespace flashdelta::cuda {

// Bytes of workspace, and of the states that the forward may save for the backward. Pure.
std::size_t backward_workspace(const fd_problem&);
std::size_t saved_bytes(const fd_problem&);

// Enqueues all kernels; the current device is a Hopper GPU with `sm_count` SMs.
fd_status run_backward(const fd_backward_args&, void* workspace, int sm_count, void* stream);

}  // namespace flashdelta::cuda
