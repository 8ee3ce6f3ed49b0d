// The Hopper forward on the CPU, without a GPU: src/cuda/backend_sm90.cu and forward_sm90.cu, as they are, compiled against
// stand-ins for the instructions of ptx_sm90.cuh (tests/emulation/cuda) and for the device, and compared with the reference.
//
// What it shows: the algebra of a chunk; the layouts of fragments, swizzled tiles, matrix descriptors and tensor maps,
// ragged ones included; who arrives at which barrier, in which phase, how often, and that nobody waits for ever, whichever
// thread goes first; which bytes of the outputs are written; the rounding of every 16-bit operand; copies and matrix
// multiplications that end as late as they may, proxy fences left out (asynchrony_test.cpp). What it cannot show: the order
// of sums inside the tensor cores, approximate functions, registers, speed, and hand-overs of plain variables in shared
// memory that hold in every order tried. tests/gpu_forward_test.cpp runs the same contract on a GPU.
#include <gtest/gtest.h>

#include <cstdint>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "tests/emulation/cases.hpp"
#include "tests/emulation/sm90.hpp"
#include "tests/support/compare.hpp"

namespace flashdelta::testing {
namespace {

using emulation::hopper;
using emulation::Schedule;

constexpr int FEW_SMS = 2, MANY_SMS = 132;  // all values of a head in one block and a queue of items; 64 values in a block

Results emulated(const Case& c, const Data& d, int sm_count, Schedule schedule = Schedule::forward) {
  hopper = {sm_count, schedule};
  return forward(c, d, {.backend = FD_BACKEND_REFERENCE, .forward = emulation::forward});
}

class EmulatedForward : public ::testing::TestWithParam<Case> {};

TEST_P(EmulatedForward, MatchesTheReferenceWithBothShapesOfBlocks) {
  const Case& c = GetParam();
  const Data d = make_data(c, 1);
  emulation::seed = static_cast<std::uint32_t>(c.name.size());  // another order in most cases
  const Results half = emulated(c, d, MANY_SMS, Schedule::shuffled), full = emulated(c, d, FEW_SMS, Schedule::shuffled);
  expect_close(c, d, half, forward(c, d, reference), limit(c));
  expect_same_bits(half, full);
}

INSTANTIATE_TEST_SUITE_P(, EmulatedForward, ::testing::ValuesIn(emulated_cases(0)),
                         case_name<::testing::TestParamInfo<Case>>);

TEST(Emulation, TheOrderOfThreadsDoesNotMatter) {
  Case c = sm90_case({400, 0, 65});
  c.HV = 1;
  c.l2norm = true;
  const Data d = make_data(c, 2);
  for (const int sm_count : {FEW_SMS, MANY_SMS}) {
    const Results want = emulated(c, d, sm_count);
    expect_same_bits(emulated(c, d, sm_count, Schedule::backward), want);
    for (emulation::seed = 1; emulation::seed <= 8; ++emulation::seed)
      expect_same_bits(emulated(c, d, sm_count, Schedule::shuffled), want);
  }
}

TEST(Emulation, RandomPackedBatchesMatchTheReference) {
  std::mt19937_64 random(4);
  const auto below = [&](std::uint64_t n) { return static_cast<std::int64_t>(random() % n); };
  for (std::uint64_t i = 0; i < 8; ++i) {
    Case c = sm90_case({});
    for (std::int64_t n = 1 + below(5); n > 0; --n) c.lengths.push_back(below(200));
    c.padding = below(70);
    c.HV = 1 + below(3);
    c.V = 64 * (1 + below(3));
    c.gates = static_cast<Gates>(below(6));
    c.strengths = static_cast<Strengths>(below(7));
    c.dtype = below(3) == 0 ? FD_FLOAT16 : FD_BFLOAT16;
    c.gate_dtype = below(2) == 0 ? FD_BFLOAT16 : FD_FLOAT32;
    c.l2norm = below(2) == 0;
    c.v_first = below(2) == 0;
    c.pool = below(2) == 0;
    c.checkpoint_interval = 64 * below(3);
    const Data d = make_data(c, 5 + i);
    SCOPED_TRACE(describe(c));
    emulation::seed = static_cast<std::uint32_t>(i);
    expect_close(c, d, emulated(c, d, i % 2 == 0 ? FEW_SMS : MANY_SMS, Schedule::shuffled), forward(c, d, reference),
                 limit(c));
  }
}

TEST(Emulation, OddStridesAreRefused) {
  Case c = sm90_case({3, 3}, false);
  c.strided = true;  // bases off alignment
  const Data d = make_data(c, 3);
  try {
    emulated(c, d, MANY_SMS);
    FAIL() << "accepted";
  } catch (const std::runtime_error& error) {
    EXPECT_NE(std::string(error.what()).find("q: its data is not aligned to 16 bytes"), std::string::npos) << error.what();
  }
}

TEST(Emulation, AWaitForNobodyIsReported) {
  using namespace emulation;
  const auto run = [](const std::function<void()>& body) {
    try {
      run_block(64, Schedule::forward, body, [](int) {});
    } catch (const std::runtime_error& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  EXPECT_EQ(run([] {
              if (block.thread >= 32) wait_while(barrier_at(8).phase, 0);
            }),
            "nobody can go on; these warps wait: 1 (32 lanes)");
  EXPECT_EQ(run([] { arrive(barrier_at(8), 0); }), "thread 0: an arrival too many at a barrier");
  EXPECT_EQ(run([] { static_cast<void>(barrier_at(4)); }), "thread 0: no barrier can lie at 4");
  EXPECT_EQ(run([] {}), "");
}

}  // namespace
}  // namespace flashdelta::testing
