// Small problems with shapes and options drawn at random, against the reference.
#include <gtest/gtest.h>

#include <cstdint>
#include <random>
#include <string>

#include "tests/support/compare.hpp"

namespace flashdelta::testing {
namespace {

constexpr int problems = 200;

TEST(Random, ProblemsMatchTheReference) {
  // --gtest_random_seed=N draws other problems than the default's.
  const auto first_seed = static_cast<std::uint64_t>(::testing::UnitTest::GetInstance()->random_seed()) * problems;
  for (std::uint64_t seed = first_seed; seed < first_seed + problems; ++seed) {
    std::mt19937_64 engine(seed);
    const bool decode = seed % 4 == 0;
    const Case c = random_case(engine, decode);
    const ::testing::ScopedTrace trace(__FILE__, __LINE__, "seed " + std::to_string(seed) + ": " + describe(c));
    const Data d = make_data(c, seed);
    const Setting setting{.backend = FD_BACKEND_CPU, .threads = 2};
    if (decode) {
      expect_close(c, d, step(c, d, setting), step(c, d, reference), forward_limit);
    } else {
      expect_close(c, d, forward(c, d, setting), forward(c, d, reference), forward_limit);
      expect_close(c, d, backward(c, d, setting), backward(c, d, reference), backward_limit);
    }
  }
}

}  // namespace
}  // namespace flashdelta::testing
