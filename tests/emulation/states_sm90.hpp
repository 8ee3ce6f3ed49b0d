// The kernel that walks states without outputs, emulated.
#pragma once

#include <vector>

#include "tests/emulation/emulator.hpp"
#include "tests/emulation/wave.hpp"

namespace flashdelta::emulation {

struct StatesSetting {
  bool tiles = true;    // S and R are wanted
  bool initial = true;  // the call's initial state counts
  bool transition = false;
  const float* saved = nullptr;
  float* save = nullptr;
  float* outcomes = nullptr;
  // As in StatesParameters.
  const int* used_runs = nullptr;
  unsigned* next_item = nullptr;
  const int* windows = nullptr;
  int sm_count = 132;  // many: blocks of 64 rows
  Schedule schedule = Schedule::forward;
};

fd_status states(const fd_forward_args&, const Wave&, const std::vector<cuda::Run>&, const StatesSetting&);

}  // namespace flashdelta::emulation
