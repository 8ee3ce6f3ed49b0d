// The emulated Hopper kernels are as accurate as the best published ones, in every result.
#include <gtest/gtest.h>

#include <cstdio>

#include "tests/emulation/backward_sm90.hpp"
#include "tests/emulation/sm90.hpp"
#include "tests/sm90_accuracy.hpp"

namespace flashdelta::testing {
namespace {

class EmulatedAccuracy : public ::testing::TestWithParam<AccuracyData> {};

TEST_P(EmulatedAccuracy, IsAtLeastThatOfTheBestPublishedKernels) {
  Case c = sm90_case({500, 524});
  c.HV = 4;
  emulation::hopper = {};
  const Setting setting{.backend = FD_BACKEND_REFERENCE, .forward = emulation::forward, .backward = emulation::backward};
  for (const auto& [name, error] : median_errors(c, GetParam(), 1, setting)) {
    const double limit = 1.05 * best_published_errors.at(GetParam()).at(name);
    std::printf("%-15s %.5f (%.5f)\n", name.c_str(), error, limit);
    EXPECT_LE(error, limit) << name;
  }
}

INSTANTIATE_TEST_SUITE_P(, EmulatedAccuracy,
                         ::testing::Values(AccuracyData::random, AccuracyData::correlated, AccuracyData::decay),
                         [](const auto& info) {
                           return info.param == AccuracyData::random       ? "Random"
                                  : info.param == AccuracyData::correlated ? "CorrelatedKeys"
                                                                           : "StrongDecay";
                         });

}  // namespace
}  // namespace flashdelta::testing
