// fd_forward of the chunked CPU backend, with every vector target of this machine, against the reference.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdint>
#include <limits>

#include "tests/support/compare.hpp"

namespace flashdelta::testing {
namespace {

class ForwardCase : public ::testing::TestWithParam<Case> {};

TEST_P(ForwardCase, MatchesTheReferenceAndIsBitwiseRepeatable) {
  const Case& c = GetParam();
  const Data d = make_data(c, 1);
  const Results want = forward(c, d, reference);
  for_each_cpu_target([&](fd_backend backend) {
    const Results got = forward(c, d, {.backend = backend});
    expect_close(c, d, got, want, forward_limit);
    expect_same_bits(forward(c, d, {.backend = backend, .threads = 2}), got);
  });
}

INSTANTIATE_TEST_SUITE_P(, ForwardCase, ::testing::ValuesIn(cases()), case_name<::testing::TestParamInfo<Case>>);

// Tokens [begin, begin + count) of an output [B, T, HV, V] with B = 1.
Array tokens_of(const Array& a, std::int64_t begin, std::int64_t count) {
  Array result({1, count, a.shape[2], a.shape[3]});
  std::copy_n(a.x.begin() + begin * a.inner(2), count * a.inner(2), result.x.begin());
  return result;
}

Array state_of(const Array& a, std::int64_t n) {
  Array result({1, a.shape[1], a.shape[2], a.shape[3]});
  std::copy_n(a.x.begin() + n * a.inner(1), a.inner(1), result.x.begin());
  return result;
}

const Case packed{
    .name = "packed", .lengths = {40, 0, 100, 64, 1, 33}, .packed = true, .padding = 5, .H = 2, .HV = 4, .K = 32, .V = 24};
const Case single{.name = "single", .lengths = {400}, .H = 2, .HV = 4, .K = 32, .V = 48};

TEST(Forward, ResultsDoNotDependOnTheNumberOfThreads) {
  for (Case c : {packed, single, Case{.name = "one head", .lengths = {900}, .K = 64, .V = 64}}) {
    const Data d = make_data(c, 2);
    for_each_cpu_target([&](fd_backend backend) {
      const Results one = forward(c, d, {.backend = backend, .threads = 1});
      for (const int threads : {2, 3, 7, 16}) expect_same_bits(forward(c, d, {.backend = backend, .threads = threads}), one);
    });
  }
}

TEST(Forward, SequenceAloneEqualsSequenceInPackedBatchBitwise) {
  const Data d = make_data(packed, 3);
  for_each_cpu_target([&](fd_backend backend) {
    const Results all = forward(packed, d, {.backend = backend});
    for (std::int64_t n = 0; n < packed.N(); ++n) {
      const Results one = forward(alone(packed, n), alone(packed, d, n), {.backend = backend});
      const std::int64_t length = packed.lengths[static_cast<std::size_t>(n)];
      EXPECT_TRUE(same_bits(one.at("o").values, tokens_of(all.at("o").values, d.first_token(packed, n), length))) << n;
      EXPECT_TRUE(same_bits(one.at("final_state").values, state_of(all.at("final_state").values, n))) << n;
    }
  });
}

TEST(Forward, NanInOneSequenceStaysThere) {
  const Data clean = make_data(packed, 4);
  Data d = clean;
  const std::int64_t sick = 2, first = d.first_token(packed, sick), length = packed.lengths[sick];
  for (Array* a : {&d.q, &d.k, &d.v, &d.g, &d.beta}) {
    std::fill_n(a->x.begin() + first * a->inner(2), length * a->inner(2), std::numeric_limits<double>::quiet_NaN());
  }
  for_each_cpu_target([&](fd_backend backend) {
    const Results want = forward(packed, clean, {.backend = backend}), got = forward(packed, d, {.backend = backend});
    for (std::int64_t n = 0; n < packed.N(); ++n) {
      if (n == sick) continue;
      const std::int64_t begin = d.first_token(packed, n), count = packed.lengths[static_cast<std::size_t>(n)];
      EXPECT_TRUE(same_bits(tokens_of(got.at("o").values, begin, count), tokens_of(want.at("o").values, begin, count))) << n;
      EXPECT_TRUE(same_bits(state_of(got.at("final_state").values, n), state_of(want.at("final_state").values, n))) << n;
    }
  });
}

TEST(Forward, TwoCallsWithCarriedStateEqualOneCall) {
  const Data d = make_data(single, 5);
  const Results want = forward(single, d, reference);
  for_each_cpu_target([&](fd_backend backend) {
    for (const std::int64_t cut : {0, 1, 63, 64, 200, 399}) {
      const Results first = forward(part(single, 0, cut), part(d, 0, cut, d.initial_state), {.backend = backend});
      const Case rest = part(single, cut, 400);
      const Data rest_data = part(d, cut, 400, first.at("final_state").values);
      Results second = want;
      second["o"].values = tokens_of(want.at("o").values, cut, 400 - cut);
      expect_close(rest, rest_data, forward(rest, rest_data, {.backend = backend}), second, forward_limit);
    }
  });
}

TEST(Forward, PrefillThenStepsEqualOneCall) {
  const Data d = make_data(single, 6);
  const Results want = forward(single, d, reference);
  for_each_cpu_target([&](fd_backend backend) {
    const std::int64_t prompt = 390;
    Results last = forward(part(single, 0, prompt), part(d, 0, prompt, d.initial_state), {.backend = backend});
    for (std::int64_t t = prompt; t < 400; ++t) {
      const Case c = part(single, t, t + 1);
      const Data token = part(d, t, t + 1, last.at("final_state").values);
      last = step(c, token, {.backend = backend});
      Results expected;
      expected["o"] = {tokens_of(want.at("o").values, t, 1), FD_FLOAT64};
      expect_close(c, token, {{"o", last.at("o")}}, expected, forward_limit);
    }
    Results expected;
    expected["final_state"] = want.at("final_state");
    expect_close(single, d, {{"final_state", last.at("final_state")}}, expected, forward_limit);
  });
}

// libgomp's threads do not survive a fork: without care the child waits for them for ever.
TEST(Forward, ChildForkedAfterACallCanCall) {
  const Data d = make_data(packed, 7);
  for (const fd_backend backend : {FD_BACKEND_CPU, FD_BACKEND_REFERENCE}) {
    const Setting setting{.backend = backend, .threads = 2};
    const Results want = forward(packed, d, setting);
    const pid_t child = fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      alarm(20);
      const Results got = forward(packed, d, setting);
      _exit(same_bits(got.at("o").values, want.at("o").values) ? 0 : 1);
    }
    int status = 0;
    ASSERT_EQ(waitpid(child, &status, 0), child);
    EXPECT_FALSE(WIFSIGNALED(status) && WTERMSIG(status) == SIGALRM) << "the child hangs in backend " << backend;
    EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << "status " << status << ", backend " << backend;
  }
}

}  // namespace
}  // namespace flashdelta::testing
