// fd_backward of the chunked CPU backend, with every vector target of this machine, against the reference.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>

#include "tests/support/compare.hpp"

namespace flashdelta::testing {
namespace {

class BackwardCase : public ::testing::TestWithParam<Case> {};

TEST_P(BackwardCase, MatchesTheReferenceAndIsBitwiseRepeatable) {
  const Case& c = GetParam();
  const Data d = make_data(c, 1);
  const Results want = backward(c, d, reference);
  for_each_cpu_target([&](fd_backend backend) {
    const Results got = backward(c, d, {.backend = backend});
    expect_close(c, d, got, want, backward_limit);
    expect_same_bits(backward(c, d, {.backend = backend, .threads = 2}), got);
    expect_close(c, d, backward(c, d, {.backend = backend, .threads = 2, .saved = true}), want, backward_limit);
  });
}

INSTANTIATE_TEST_SUITE_P(, BackwardCase, ::testing::ValuesIn(cases()), case_name<::testing::TestParamInfo<Case>>);

// Tokens [begin, begin + count) of a gradient [1, T, ..].
Array tokens_of(const Array& a, std::int64_t begin, std::int64_t count) {
  std::vector<std::int64_t> shape = a.shape;
  shape[1] = count;
  Array result(shape);
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

// Everything of sequence n but the gradients of parameters, which belong to all sequences.
void expect_same_sequence(const Data& d, std::int64_t n, const Results& got, std::int64_t got_first, std::int64_t got_row,
                          const Results& want) {
  const std::int64_t length = packed.lengths[static_cast<std::size_t>(n)], first = d.first_token(packed, n);
  for (const char* name : {"dq", "dk", "dv", "dg", "dbeta"}) {
    EXPECT_TRUE(same_bits(tokens_of(got.at(name).values, got_first, length), tokens_of(want.at(name).values, first, length)))
        << name << " of sequence " << n;
  }
  EXPECT_TRUE(same_bits(state_of(got.at("dinitial_state").values, got_row), state_of(want.at("dinitial_state").values, n)))
      << "dinitial_state of sequence " << n;
}

TEST(Backward, ResultsDoNotDependOnTheNumberOfThreads) {
  const Case raw{.name = "raw",
                 .lengths = {90, 20},
                 .packed = true,
                 .H = 2,
                 .HV = 6,
                 .gates = Gates::raw,
                 .strengths = Strengths::logit};
  for (const Case& c : {packed, raw, Case{.name = "one head", .lengths = {500}, .K = 64, .V = 64}}) {
    const Data d = make_data(c, 2);
    for_each_cpu_target([&](fd_backend backend) {
      const Results one = backward(c, d, {.backend = backend, .threads = 1});
      for (const int threads : {2, 3, 7, 16})
        expect_same_bits(backward(c, d, {.backend = backend, .threads = threads}), one);
    });
  }
}

// With so many wide heads at a time, 330 tokens are more than one segment; on one thread they are one.
TEST(Backward, SegmentsChangeNoBit) {
  const Case c{.name = "segments", .lengths = {330}, .H = 16, .HV = 16, .K = 256, .V = 512};
  const Data d = make_data(c, 5);
  const Results one = backward(c, d, {.backend = FD_BACKEND_CPU, .threads = 1});
  for (const int threads : {16, 64}) expect_same_bits(backward(c, d, {.backend = FD_BACKEND_CPU, .threads = threads}), one);
}

// 700 tokens are one segment; with a small workspace they are several.
TEST(Backward, TheLimitOnTheWorkspaceChangesNoBit) {
  const Case c{.name = "limit", .lengths = {700}, .H = 2, .HV = 4, .K = 64, .V = 64};
  const Data d = make_data(c, 6);
  fd_problem p{};
  p.size = sizeof(p);
  p.B = 1, p.T = 700, p.H = 2, p.HV = 4, p.K = p.V = 64, p.backend = FD_BACKEND_CPU;
  std::size_t usual = 0, small = 0;
  ASSERT_EQ(fd_backward_workspace(&p, &usual), FD_OK);
  p.workspace_limit = 1 << 20;
  ASSERT_EQ(fd_backward_workspace(&p, &small), FD_OK);
  EXPECT_LT(small, usual);
  expect_same_bits(backward(c, d, {.backend = FD_BACKEND_CPU, .workspace_limit = p.workspace_limit}),
                   backward(c, d, {.backend = FD_BACKEND_CPU}));
}

TEST(Backward, SequenceAloneEqualsSequenceInPackedBatchBitwise) {
  const Data d = make_data(packed, 3);
  for_each_cpu_target([&](fd_backend backend) {
    const Results all = backward(packed, d, {.backend = backend});
    for (std::int64_t n = 0; n < packed.N(); ++n) {
      const Results one = backward(alone(packed, n), alone(packed, d, n), {.backend = backend});
      expect_same_sequence(d, n, one, 0, 0, all);
    }
  });
}

TEST(Backward, NanInOneSequenceStaysThere) {
  const Data clean = make_data(packed, 4);
  Data d = clean;
  const std::int64_t sick = 2;
  for (Array* a : {&d.q, &d.k, &d.v, &d.g, &d.beta, &d.do_}) {
    std::fill_n(a->x.begin() + d.first_token(packed, sick) * a->inner(2), packed.lengths[sick] * a->inner(2),
                std::numeric_limits<double>::quiet_NaN());
  }
  for_each_cpu_target([&](fd_backend backend) {
    const Results want = backward(packed, clean, {.backend = backend}), got = backward(packed, d, {.backend = backend});
    for (std::int64_t n = 0; n < packed.N(); ++n) {
      if (n != sick) expect_same_sequence(d, n, got, d.first_token(packed, n), n, want);
    }
  });
}

}  // namespace
}  // namespace flashdelta::testing
