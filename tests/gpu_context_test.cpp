// Context parallelism of the Hopper forward against the reference. Without such a GPU every test is skipped, with the
// reason. "Small" in a name: worth running under compute-sanitizer (--gtest_filter=*Small*).
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "tests/emulation/cases.hpp"
#include "tests/support/compare.hpp"
#include "tests/support/gpu.hpp"

namespace flashdelta::testing {
namespace {

Results on_gpu(const Case& c, const Data& d, fd_context_parallel context = FD_CONTEXT_ON, double bound = 0,
               How how = How::null_stream) {
  Gpu gpu(how);
  return forward(c, d, {.backend = FD_BACKEND_SM90, .context_parallel = context, .context_bound = bound, .remote = &gpu});
}

class Sm90Context : public ::testing::Test {
 protected:
  void SetUp() override {
    const std::string reason = why_not(FD_BACKEND_SM90, "sm90");
    if (!reason.empty()) GTEST_SKIP() << reason;
  }
};

class Sm90ContextCase : public Sm90Context, public ::testing::WithParamInterface<Case> {};

TEST_P(Sm90ContextCase, SmallMatchesTheReference) {
  const Case& c = GetParam();
  const Data d = make_data(c, 1);
  const Results want = forward(c, d, reference);
  for (const double bound : {0.0, -1.0}) expect_close(c, d, on_gpu(c, d, FD_CONTEXT_ON, bound), want, limit(c));
}

TEST_P(Sm90ContextCase, IsBitwiseTheSameAgainOnAStreamAndInAGraphWhoseInputsChange) {
  const Case& c = GetParam();
  const Data d = make_data(c, 2);
  const Results first = on_gpu(c, d);
  for (const How how : {How::null_stream, How::side_stream, How::graph, How::graph_changed}) {
    expect_same_bits(on_gpu(c, d, FD_CONTEXT_ON, 0, how), first);
  }
}

INSTANTIATE_TEST_SUITE_P(, Sm90ContextCase, ::testing::ValuesIn(emulated_cases(1000)),
                         case_name<::testing::TestParamInfo<Case>>);

// Long enough that sequences are cut unasked; gates of every kind.
TEST_F(Sm90Context, LongSequencesMatchTheReferenceInEveryMode) {
  const std::pair<std::vector<std::int64_t>, std::int64_t> sizes[] = {
      {{8192}, 4}, {{5000, 40, 0, 700, 64, 1}, 4}, {{6000, 6000}, 2}};
  for (const auto& [lengths, HV] : sizes) {
    for (const Gates gates : {Gates::typical, Gates::zero, Gates::strong, Gates::mixed}) {
      Case c = sm90_case(lengths);
      c.HV = HV;
      c.gates = gates;
      c.pool = c.in_place = lengths.size() > 1;
      const Data d = make_data(c, 3);
      const Results want = forward(c, d, reference);
      for (const fd_context_parallel context : {FD_CONTEXT_AUTO, FD_CONTEXT_ON, FD_CONTEXT_OFF}) {
        SCOPED_TRACE(describe(c) + ", context_parallel " + std::to_string(context));
        expect_close(c, d, on_gpu(c, d, context), want, limit(c));
      }
    }
  }
}

TEST_F(Sm90Context, CutSequencesAreBitwiseTheSameTwoHundredTimes) {
  Case c = sm90_case({1500, 0, 200});
  c.HV = 2;
  c.gates = Gates::mixed;
  const Data d = make_data(c, 5);
  for (const double bound : {0.0, -1.0}) {
    const Results first = on_gpu(c, d, FD_CONTEXT_ON, bound);
    for (int i = 0; i < 200; ++i) expect_same_bits(on_gpu(c, d, FD_CONTEXT_ON, bound), first);
  }
}

TEST_F(Sm90Context, OffDoesNotDependOnTheRestOfTheBatch) {
  Case c = sm90_case({3000, 0, 30, 700});
  c.padding = 10;
  const Data d = make_data(c, 4);
  const Results off = on_gpu(c, d, FD_CONTEXT_OFF);
  for (std::int64_t n = 0; n < c.N(); ++n) {
    const Results one = on_gpu(alone(c, n), alone(c, d, n), FD_CONTEXT_OFF);
    const Array &a = off.at("final_state").values, &b = one.at("final_state").values;
    EXPECT_TRUE(std::equal(b.x.begin(), b.x.end(), a.x.begin() + n * a.inner(1))) << n;
    const Array &o = off.at("o").values, &p = one.at("o").values;
    EXPECT_TRUE(std::equal(p.x.begin(), p.x.end(), o.x.begin() + d.first_token(c, n) * o.inner(2))) << n;
  }
}

}  // namespace
}  // namespace flashdelta::testing
