// The kernel that walks states without outputs, emulated.
#pragma once

#include <vector>

#include "tests/emulation/emulator.hpp"
#include "tests/emulation/wave.hpp"

namespace flashdelta::emulation {

struct StatesSetting {
  bool tiles = true;  // S and R are wanted
  // As in StatesParameters; with `transitions`, rows of the transition are walked too.
  const float* saved = nullptr;
  float* save = nullptr;
  float* transitions = nullptr;
  const int* gradient_windows = nullptr;
  int sm_count = 132;  // many: blocks of 64 rows
  Schedule schedule = Schedule::forward;
};

fd_status states(const fd_forward_args&, const Wave&, const std::vector<cuda::Run>&, const StatesSetting&);

}  // namespace flashdelta::emulation
