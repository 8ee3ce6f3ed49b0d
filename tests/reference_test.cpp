// The reference itself: its gradient against central finite differences, and a token computed by hand.
#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "tests/support/compare.hpp"

namespace flashdelta::testing {
namespace {

// sum of <do, o> and <dfinal_state, final_state>, over what the case has and the call writes.
double loss(const Case& c, const Data& d) {
  const Results results = forward(c, d, reference);
  double sum = 0;
  const auto add = [&](const Array& gradient, const Array& value) {
    for (std::size_t i = 0; i < value.x.size(); ++i) {
      if (!std::isnan(gradient.x[i])) sum += gradient.x[i] * value.x[i];
    }
  };
  if (c.do_) add(d.do_, results.at("o").values);
  if (c.dfinal_state) add(d.dfinal_state, results.at("final_state").values);
  return sum;
}

class Gradient : public ::testing::TestWithParam<Case> {};

TEST_P(Gradient, OfTheReferenceMatchesFiniteDifferences) {
  const Case& c = GetParam();
  Data d = make_data(c, 1);
  Case everything_kept = c;  // dfinal_state has a row for every sequence, the pool of final states has not
  everything_kept.pool = false;
  const Results gradients = backward(c, d, reference);
  const std::pair<const char*, Array*> inputs[] = {{"dq", &d.q},
                                                   {"dk", &d.k},
                                                   {"dv", &d.v},
                                                   {"dg", &d.g},
                                                   {"dbeta", &d.beta},
                                                   {"dA_log", &d.A_log},
                                                   {"ddt_bias", &d.dt_bias},
                                                   {"dinitial_state", &d.initial_state}};
  std::size_t compared = 0;
  for (const auto& [name, input] : inputs) {
    if (!gradients.contains(name)) continue;
    const Array& gradient = gradients.at(name).values;
    ASSERT_EQ(gradient.shape, input->shape) << name;
    double error = 0, norm = 0;
    for (std::size_t i = 0; i < input->x.size(); ++i) {
      const double x = input->x[i], h = 1e-5;
      if (std::isnan(x)) {
        EXPECT_EQ(gradient.x[i], 0) << name << " past the last sequence";
        continue;
      }
      const auto n = i / static_cast<std::size_t>(input->inner(1));
      if (input == &d.initial_state && !d.has_row[n]) {
        EXPECT_EQ(gradient.x[i], 0) << name << " of a sequence that starts from zero";
        continue;
      }
      const auto loss_at = [&, input = input](double value) {
        input->x[i] = value;
        return loss(everything_kept, d);
      };
      const double near = loss_at(x + h) - loss_at(x - h), far = loss_at(x + 2 * h) - loss_at(x - 2 * h);
      input->x[i] = x;
      const double numeric = (8 * near - far) / (12 * h);  // fourth order: the l2 norm of a zero row bends sharply
      error += (gradient.x[i] - numeric) * (gradient.x[i] - numeric);
      norm += numeric * numeric;
      ++compared;
    }
    EXPECT_LE(std::sqrt(error), 1e-7 * std::sqrt(norm) + 1e-9) << name;
  }
  EXPECT_GT(compared, 0u);
}

INSTANTIATE_TEST_SUITE_P(, Gradient, ::testing::ValuesIn(finite_difference_cases()),
                         case_name<::testing::TestParamInfo<Case>>);

TEST(Reference, OneTokenIsWhatTheDefinitionSays) {
  const Case c{.name = "one token", .lengths = {1}, .K = 2, .V = 2, .scale = 0.5};
  Data d = make_data(c, 1);
  d.q.x = {1, 2};
  d.k.x = {3, -1};
  d.v.x = {5, 7};
  d.g.x = {std::log(0.5)};
  d.beta.x = {0.25};
  d.initial_state.x = {2, 4, 6, 8};  // halved: {1, 2; 3, 4}, recalled by k: {0, 2}, not yet recalled: {5, 5}
  const Results results = forward(c, d, reference);
  const std::vector<double> state = {1 + 3.75, 2 + 3.75, 3 - 1.25, 4 - 1.25};
  for (std::size_t i = 0; i < 4; ++i) EXPECT_DOUBLE_EQ(results.at("final_state").values.x[i], state[i]);
  EXPECT_DOUBLE_EQ(results.at("o").values.x[0], 0.5 * (state[0] + 2 * state[2]));
  EXPECT_DOUBLE_EQ(results.at("o").values.x[1], 0.5 * (state[1] + 2 * state[3]));
}

TEST(Reference, ResultsDoNotDependOnTheNumberOfThreads) {
  const Case c{.name = "threads", .lengths = {30, 0, 41}, .packed = true, .H = 2, .HV = 4, .gates = Gates::raw};
  const Data d = make_data(c, 1);
  for (const int threads : {1, 3, 16}) {
    const Setting setting{.backend = FD_BACKEND_REFERENCE, .threads = threads, .float64 = true};
    expect_same_bits(forward(c, d, setting), forward(c, d, reference));
    expect_same_bits(backward(c, d, setting), backward(c, d, reference));
  }
}

TEST(Reference, PoolsLayoutsAndStridesChangeNothing) {
  const Case plain{.name = "plain", .lengths = {30, 0, 17, 5}, .packed = true, .H = 2, .HV = 4, .checkpoint_interval = 64};
  const Data d = make_data(plain, 1);
  const Results want = forward(plain, d, reference);
  Case pooled = plain;
  pooled.pool = pooled.strided = pooled.in_place = true;
  pooled.index_dtype = FD_INT32;
  expect_same_bits(forward(pooled, d, reference), want);
}

TEST(Reference, StepIsForward) {
  const Case c{.name = "step", .lengths = {3, 0, 5}, .packed = true, .padding = 2, .HV = 2, .gates = Gates::raw};
  const Data d = make_data(c, 1);
  expect_same_bits(step(c, d, reference), forward(c, d, reference));
}

}  // namespace
}  // namespace flashdelta::testing
