// The Hopper backend, emulated.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "flashdelta/flashdelta.h"
#include "tests/emulation/emulator.hpp"

namespace flashdelta::emulation {

// The device it runs on. Few SMs: blocks with all values of a head and a queue of items; many: one item of 64 values each.
struct Hopper {
  int sm_count = 132;
  Schedule schedule = Schedule::forward;
  // What the device finds in cu_seqlens in place of what the host checked; null: the same.
  const void* cu_seqlens = nullptr;
};
extern Hopper hopper;

// What the last forward planned on the device.
struct ContextCounts {
  int runs = 0;        // of the forward
  int pre_runs = 0;    // of the pre-pass
  int pre_chunks = 0;  // theirs
  int chains = 0;      // sequences that are cut
  int windows = 0;     // (run of the pre-pass, value head) that start from zero
  int skipped = 0;     // (chunk, value head) that they leave out
  int shape = 0;       // of the forward: 64 values times so many a block
  bool may_cut = false;
};
extern ContextCounts context_counts;

// Reads them from the workspace of a call in normal form.
ContextCounts read_context_counts(const fd_problem&, void* workspace);

// What the planner alone decides for packed sequences, with all gates 0 or, in three of four heads, -0.05; nothing if the
// host does not ask it, be it for the forward's shape alone.
std::optional<ContextCounts> plan(const std::vector<std::int64_t>& lengths, std::int64_t H, std::int64_t HV, bool constant,
                                  int sm_count);

// fd_forward by the code in src/cuda/backend_sm90.cu and forward_sm90.cu, with all pointers on the CPU. It takes its own
// workspace.
fd_status forward(const fd_forward_args*, void* workspace, std::size_t bytes, void* stream);

}  // namespace flashdelta::emulation
