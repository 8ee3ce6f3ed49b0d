// What Hopper does beside the threads of a block: matrix multiplications and bulk copies, whose operands may be read and
// whose results may be written at any time until somebody has waited for them, and which do not see what threads write to
// shared memory without a fence. What is read too early is NaN, what is overwritten too early comes out wrong; what can be
// told apart from right use is a fault.
#pragma once

#include <array>
#include <cstdint>
#include <functional>

#include "tests/emulation/emulator.hpp"

namespace flashdelta::emulation {

// A new block begins.
void reset_asynchrony();
// The threads of the block have ended: faults over what they left undone.
void check_warpgroups();

// --- wgmma: accumulators are NaN from the issue until no multiplication in flight has them

// An operand in a register: its value at the issue, and the variable it came from (null: none).
struct RegisterOperand {
  std::uint32_t value;
  const std::uint32_t* at;
};
using Accumulators = std::array<float*, WARP>;  // of each lane
using VisitShared = void(std::uint32_t address, std::uint32_t bytes);

// One instruction of one warp.
struct Multiplication {
  Accumulators d;
  std::size_t count;  // registers of d, per lane
  bool first;         // d = a b
  std::array<std::array<RegisterOperand, 4>, WARP> a;
  std::uint64_t matrices;                           // a hash of its matrices in shared memory
  std::function<void(VisitShared*)> operands;       // visits what it reads of shared memory
  std::function<void(const Accumulators&)> finish;  // reads and multiplies
};
// By one thread, for its warp.
void issue(Multiplication);
// By each lane.
void fence_multiplications();
void commit_multiplications();
void wait_for_multiplications(unsigned pending);
void check_accumulators(const float* d);  // faults if a multiplication has them

// --- bulk copies

// Into shared memory: `finish` copies and arrives.
void start_load(std::function<void()> finish);
// Out of shared memory: `read` reads it and returns what writes elsewhere.
void start_store(std::function<std::function<void()>()> read);
void commit_stores();
void wait_for_stores(unsigned pending, bool written);

// --- what threads write to shared memory

void written_by_thread(std::uint32_t address, std::uint32_t bytes, int thread);
void written_by_copy(std::uint32_t address, std::uint32_t bytes);
void fence_writes_of_all(std::uint32_t address, std::uint32_t bytes);  // by one who knows that they are there
void fence_writes();                                                   // by the calling thread
void check_visible(std::uint32_t address, std::uint32_t bytes);        // to copies and multiplications; else faults

}  // namespace flashdelta::emulation
