// The kernel that leaves a call's tiles in scratch memory, emulated.
#pragma once

#include "tests/emulation/emulator.hpp"
#include "tests/emulation/wave.hpp"

namespace flashdelta::emulation {

// What is wanted of a wave.
struct Wanted {
  bool p = true;                    // the tile P
  const int* used_slots = nullptr;  // as in PrepareParameters
  const std::uint8_t* needed = nullptr;
};

fd_status prepare(const fd_forward_args&, Wave&, const Wanted&, int sm_count, Schedule);

}  // namespace flashdelta::emulation
