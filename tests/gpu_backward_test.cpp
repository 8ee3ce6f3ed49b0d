// The Hopper backward against the gradients of the reference. Without such a GPU every test is skipped, with the reason.
// "Small" in a name: worth running under compute-sanitizer (--gtest_filter=*Small*).
#include <gtest/gtest.h>

#include <cstdint>
#include <random>
#include <string>

#include "tests/sm90_cases.hpp"
#include "tests/support/compare.hpp"
#include "tests/support/gpu.hpp"

namespace flashdelta::testing {
namespace {

Results on_gpu(const Case& c, const Data& d, How how = How::null_stream, bool saved = true, std::int64_t limit = 0) {
  Gpu gpu(how);
  return backward(c, d, {.backend = FD_BACKEND_SM90, .saved = saved, .workspace_limit = limit, .remote = &gpu});
}

class Sm90Backward : public ::testing::Test {
 protected:
  void SetUp() override {
    const std::string reason = why_not(FD_BACKEND_SM90, "sm90");
    if (!reason.empty()) GTEST_SKIP() << reason;
  }
};

class Sm90BackwardCase : public Sm90Backward, public ::testing::WithParamInterface<Case> {};

TEST_P(Sm90BackwardCase, SmallMatchesTheReference) {
  const Case& c = GetParam();
  const Data d = make_data(c, 1);
  expect_close(c, d, on_gpu(c, d), backward(c, d, reference), sm90_backward_limit(c));
}

TEST_P(Sm90BackwardCase, IsBitwiseTheSameAgainOnAStreamAndInAGraphWhoseInputsChange) {
  const Case& c = GetParam();
  const Data d = make_data(c, 2);
  const Results first = on_gpu(c, d);
  for (const How how : {How::null_stream, How::side_stream, How::graph, How::graph_changed}) {
    expect_same_bits(on_gpu(c, d, how), first);
  }
}

INSTANTIATE_TEST_SUITE_P(, Sm90BackwardCase, ::testing::ValuesIn(sm90_backward_cases()),
                         case_name<::testing::TestParamInfo<Case>>);

TEST_F(Sm90Backward, WavesAndSavedStatesChangeNoBit) {
  const Case c = [] {
    Case x = sm90_case({100, 9000, 2048, 30, 5000});
    x.H = 2, x.HV = 8;
    return x;
  }();
  const Data d = make_data(c, 3);
  const Results one = on_gpu(c, d);
  expect_close(c, d, one, backward(c, d, reference), sm90_backward_limit(c));
  expect_same_bits(on_gpu(c, d, How::null_stream, false), one);
  expect_same_bits(on_gpu(c, d, How::null_stream, true, 1), one);
}

TEST_F(Sm90Backward, IsBitwiseTheSameAHundredTimes) {
  Case c = sm90_case({700, 0, 65, 300});
  c.H = 4, c.HV = 16, c.l2norm = true;
  const Data d = make_data(c, 4);
  const Results first = on_gpu(c, d);
  for (int i = 0; i < 100; ++i) expect_same_bits(on_gpu(c, d), first);
}

TEST_F(Sm90Backward, RandomPackedBatchesMatchTheReference) {
  std::mt19937_64 random(5);
  const auto below = [&](std::uint64_t n) { return static_cast<std::int64_t>(random() % n); };
  for (std::uint64_t i = 0; i < 12; ++i) {
    Case c = sm90_case({});
    for (std::int64_t n = 1 + below(6); n > 0; --n) c.lengths.push_back(below(400));
    c.padding = below(70);
    c.H = 1 + below(3);
    c.HV = c.H * (1 + below(4));
    c.gates = static_cast<Gates>(below(6));
    c.l2norm = below(2) == 0;
    c.v_first = below(2) == 0;
    const Data d = make_data(c, 6 + i);
    SCOPED_TRACE(describe(c));
    expect_close(c, d, on_gpu(c, d), backward(c, d, reference), sm90_backward_limit(c));
  }
}

}  // namespace
}  // namespace flashdelta::testing
