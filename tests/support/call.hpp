// Runs one operation of the C ABI on the data of a case: outputs, gaps and workspace are poisoned before, and everything
// that the call must not write is compared after.
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "flashdelta/flashdelta.h"
#include "tests/cases.hpp"
#include "tests/support/data.hpp"
#include "tests/support/tensor.hpp"

namespace flashdelta::testing {

struct Setting {
  fd_backend backend = FD_BACKEND_AUTO;
  int threads = 1;
  bool float64 = false;  // every floating-point tensor is fp64, whatever the case says
  bool saved = false;    // backward reuses what the forward call saved
};

// The definition of correct: the reference backend, with inputs and outputs in fp64.
inline constexpr Setting reference{.backend = FD_BACKEND_REFERENCE, .float64 = true};

struct Result {
  Array values;
  fd_dtype dtype;  // of the memory it was written to
};

// What a call wrote, by the member's name. States are in order of the sequences: "final_state" [N, HV, ..], of a step with
// slots [N * slots, HV, ..]; "checkpoints" [N * slots, HV, ..]. NaN where nothing was to be written.
using Results = std::map<std::string, Result>;

// Throw std::runtime_error if the call fails, or if it touches memory it has no business with.
Results forward(const Case&, const Data&, const Setting&);
Results backward(const Case&, const Data&, const Setting&);
Results step(const Case&, const Data&, const Setting&);

}  // namespace flashdelta::testing
