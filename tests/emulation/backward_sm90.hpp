// The Hopper backward, emulated.
#pragma once

#include <cstddef>

#include "flashdelta/flashdelta.h"

namespace flashdelta::emulation {

// fd_backward by the code of src/cuda/backward_sm90.cu and all kernels that it calls, with all pointers on the CPU, on the
// device `hopper`. It takes its own workspace, full of NaN. `backward_from_saved` first lets the emulated forward save its
// states.
fd_status backward(const fd_backward_args*, void* workspace, std::size_t bytes, void* stream);
fd_status backward_from_saved(const fd_backward_args*, void* workspace, std::size_t bytes, void* stream);

}  // namespace flashdelta::emulation
