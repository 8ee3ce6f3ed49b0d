// The kernel that leaves a call's tiles in scratch memory, emulated.
#pragma once

#include "tests/emulation/emulator.hpp"
#include "tests/emulation/wave.hpp"

namespace flashdelta::emulation {

fd_status prepare(const fd_forward_args&, Wave&, int sm_count, Schedule);

}  // namespace flashdelta::emulation
