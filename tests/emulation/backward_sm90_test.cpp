// The Hopper backward on the CPU: all kernels of src/cuda that it runs, as they are, against the gradients of the reference.
// What an emulation shows and cannot show: emulation_test.cpp. Segments at once: backward_context_sm90_test.cpp.
#include "tests/emulation/backward_sm90.hpp"

#include <gtest/gtest.h>

#include <cstdint>

#include "tests/emulation/sm90.hpp"
#include "tests/sm90_cases.hpp"
#include "tests/support/compare.hpp"

namespace flashdelta::testing {
namespace {

using emulation::hopper;
using emulation::Schedule;

constexpr int FEW_SMS = 2, MANY_SMS = 132;

Results emulated(const Case& c, const Data& d, int sm_count, Schedule schedule = Schedule::forward,
                 std::int64_t workspace_limit = 0) {
  hopper = {sm_count, schedule};
  return backward(c, d,
                  {.backend = FD_BACKEND_REFERENCE,
                   .context_parallel = FD_CONTEXT_OFF,
                   .workspace_limit = workspace_limit,
                   .backward = emulation::backward});
}

class EmulatedBackwardCase : public ::testing::TestWithParam<Case> {};

TEST_P(EmulatedBackwardCase, MatchesTheReferenceWithFewAndManySms) {
  const Case& c = GetParam();
  const Data d = make_data(c, 1);
  const Results many = emulated(c, d, MANY_SMS);
  expect_close(c, d, many, backward(c, d, reference), sm90_backward_limit(c));
  expect_same_bits(emulated(c, d, FEW_SMS, Schedule::shuffled), many);
}

INSTANTIATE_TEST_SUITE_P(, EmulatedBackwardCase, ::testing::ValuesIn(sm90_backward_cases()),
                         case_name<::testing::TestParamInfo<Case>>);

// Several segments, in one wave and in several, with states that the forward saved and with states found again.
TEST(EmulatedBackward, WavesAndSavedStatesChangeNoBit) {
  Case c = sm90_case({100, 4300, 2048, 30});
  c.HV = 1;
  c.V = 64;
  const Data d = make_data(c, 2);
  const Results one = emulated(c, d, FEW_SMS);
  expect_close(c, d, one, backward(c, d, reference), sm90_backward_limit(c));
  expect_same_bits(emulated(c, d, FEW_SMS, Schedule::forward, 1), one);
  hopper = {FEW_SMS, Schedule::forward};
  expect_same_bits(
      backward(
          c, d,
          {.backend = FD_BACKEND_REFERENCE, .context_parallel = FD_CONTEXT_OFF, .backward = emulation::backward_from_saved}),
      one);
}

}  // namespace
}  // namespace flashdelta::testing
