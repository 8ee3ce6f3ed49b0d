// The Hopper backend, emulated.
#pragma once

#include <cstddef>

#include "flashdelta/flashdelta.h"
#include "tests/emulation/emulator.hpp"

namespace flashdelta::emulation {

// The device it runs on. Few SMs: blocks with all values of a head and a queue of items; many: one item of 64 values each.
struct Hopper {
  int sm_count = 132;
  Schedule schedule = Schedule::forward;
};
extern Hopper hopper;

// fd_forward by the code in src/cuda/backend_sm90.cu and forward_sm90.cu, with all pointers on the CPU. It takes its own
// workspace.
fd_status forward(const fd_forward_args*, void* workspace, std::size_t bytes, void* stream);

}  // namespace flashdelta::emulation
