// The decode step's kernels, emulated.
#pragma once

#include <cstddef>

#include "flashdelta/flashdelta.h"

namespace flashdelta::emulation {

// fd_step by the code in src/cuda/step.cu, with all pointers on the CPU.
fd_status step(const fd_step_args*, void* workspace, std::size_t bytes, void* stream);

}  // namespace flashdelta::emulation
