// The kernels of src/cuda/gradients_sm90.cu and finish_sm90.cu, emulated, on scratch memory that is filled from float64: so
// that errors are theirs alone.
#pragma once

#include <vector>

#include "tests/emulation/emulator.hpp"
#include "tests/support/call.hpp"

namespace flashdelta::emulation {

struct GradientSetting {
  int sm_count = 2;
  Schedule schedule = Schedule::forward;
  // Which of the results are asked for.
  bool dq = true, dk = true, dg = true, dbeta = true, dA_log = true;
};

// All results of a backward call but dv, whose rows past the last sequence alone are written, and the initial state's.
testing::Results gradients(const testing::Case&, const testing::Data&, const GradientSetting&);

// dA_log and ddt_bias, one after the other for each of `value_heads`, from parts [count, value_heads, 2] of them.
std::vector<float> sum_gates(const std::vector<float>& parts, int value_heads);

}  // namespace flashdelta::emulation
