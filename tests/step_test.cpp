// fd_step of the chunked CPU backend, with every vector target of this machine, against the reference.
#include <gtest/gtest.h>

#include "tests/support/compare.hpp"

namespace flashdelta::testing {
namespace {

class StepCase : public ::testing::TestWithParam<Case> {};

TEST_P(StepCase, MatchesTheReferenceAndIsBitwiseRepeatable) {
  const Case& c = GetParam();
  const Data d = make_data(c, 1);
  const Results want = step(c, d, reference);
  for_each_cpu_target([&](fd_backend backend) {
    const Results got = step(c, d, {.backend = backend});
    expect_close(c, d, got, want, forward_limit);
    for (const int threads : {1, 2, 3, 7, 16}) expect_same_bits(step(c, d, {.backend = backend, .threads = threads}), got);
  });
}

INSTANTIATE_TEST_SUITE_P(, StepCase, ::testing::ValuesIn(step_cases()), case_name<::testing::TestParamInfo<Case>>);

TEST(Step, SequenceAloneEqualsSequenceInBatchBitwise) {
  const Case c{.name = "batch", .lengths = {2, 0, 1, 5}, .packed = true, .padding = 3, .H = 2, .HV = 4, .K = 64, .V = 40};
  const Data d = make_data(c, 3);
  for_each_cpu_target([&](fd_backend backend) {
    const Array all = step(c, d, {.backend = backend}).at("final_state").values;
    for (std::int64_t n = 0; n < c.N(); ++n) {
      const Array one = step(alone(c, n), alone(c, d, n), {.backend = backend}).at("final_state").values;
      for (std::size_t i = 0; i < one.x.size(); ++i) {
        ASSERT_EQ(one.x[i], all.x[static_cast<std::size_t>(n) * one.x.size() + i]) << "sequence " << n << ", element " << i;
      }
    }
  });
}

}  // namespace
}  // namespace flashdelta::testing
