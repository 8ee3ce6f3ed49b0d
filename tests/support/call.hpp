// Runs one operation of the C ABI on the data of a case: outputs, gaps and workspace are poisoned before, and everything
// that the call must not write is compared after.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "flashdelta/flashdelta.h"
#include "tests/cases.hpp"
#include "tests/support/data.hpp"
#include "tests/support/tensor.hpp"

namespace flashdelta::testing {

// Where a call runs whose pointers lie on another device. The memory of a call is uploaded, guard bands and all, its
// pointers are translated, and everything comes back for the checks.
class Remote {
 public:
  virtual ~Remote() = default;
  virtual void upload(const std::vector<std::span<unsigned char>>& blocks) = 0;
  virtual void* translate(const void* pointer) const = 0;  // into an uploaded block, to its copy; null stays null
  // Runs `call` as often and in whatever way it likes, and brings the blocks back.
  virtual fd_status run(const std::function<fd_status(void* stream)>& call) = 0;
};

struct Setting {
  fd_backend backend = FD_BACKEND_AUTO;
  int threads = 1;
  bool float64 = false;  // every floating-point tensor is fp64, whatever the case says
  bool saved = false;    // backward reuses what the forward call saved
  fd_context_parallel context_parallel = FD_CONTEXT_AUTO;
  double context_bound = 0;
  std::int64_t workspace_limit = 0;
  Remote* remote = nullptr;  // runs on the CUDA device it stands for
  // What forward(), backward() and step() call: the library, or other code with the same contract.
  decltype(&fd_forward) forward = fd_forward;
  decltype(&fd_backward) backward = fd_backward;
  decltype(&fd_step) step = fd_step;
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
