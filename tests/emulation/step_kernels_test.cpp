// The decode step on the CPU, without a GPU: src/cuda/step.cu as it is, compared with the reference. What it shows and what
// it cannot is said in emulation_test.cpp; tests/gpu_test.cpp runs the same contract on a GPU.
#include "tests/emulation/step_kernels.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <random>
#include <string>

#include "tests/support/compare.hpp"

namespace flashdelta::testing {
namespace {

Results emulated(const Case& c, const Data& d) {
  return step(c, d, {.backend = FD_BACKEND_REFERENCE, .step = emulation::step});
}

void expect_right(const Case& c, std::uint64_t seed) {
  const Data d = make_data(c, seed);
  expect_close(c, d, emulated(c, d), step(c, d, reference), forward_limit);
}

class EmulatedStep : public ::testing::TestWithParam<Case> {};

TEST_P(EmulatedStep, MatchesTheReference) { expect_right(GetParam(), 1); }

INSTANTIATE_TEST_SUITE_P(, EmulatedStep, ::testing::ValuesIn(step_cases()), case_name<::testing::TestParamInfo<Case>>);

// The kernels for 128 keys: layouts, types of states, tokens at once and in turns, states after every token, one to several
// warps per block, sequences without tokens, vectors of q and k that may not be loaded whole.
TEST(EmulatedStepOf128Keys, MatchesTheReference) {
  std::uint64_t seed = 0;
  for (const std::int64_t V : {24, 32, 64, 128}) {
    for (const bool v_first : {false, true}) {
      for (const fd_dtype type : {FD_FLOAT32, FD_BFLOAT16}) {
        for (const std::int64_t T : {0, 1, 2, 3, 4, 9}) {
          ++seed;
          Case c{.name = "of 128 keys", .lengths = {T, T}, .H = 1, .HV = 2, .K = 128, .V = V};
          if (seed % 5 == 0) c.packed = true, c.lengths = {T, 0, 1, 5}, c.padding = 3;
          c.dtype = seed % 7 == 3 ? FD_FLOAT32 : seed % 3 == 0 && type == FD_FLOAT32 ? FD_FLOAT16 : FD_BFLOAT16;
          c.initial_dtype = c.final_dtype = type;
          c.v_first = v_first;
          c.pool = seed % 2 == 0;
          c.strided = seed % 7 == 0;
          c.l2norm = seed % 4 < 2;
          c.gates = seed % 3 == 0 ? Gates::raw : seed % 3 == 1 ? Gates::mixed : Gates::typical;
          c.slots = c.pool && !c.packed && seed % 5 == 1 ? T : 0;
          SCOPED_TRACE("V " + std::to_string(V) + ", T " + std::to_string(T) + ", seed " + std::to_string(seed));
          expect_right(c, seed);
        }
      }
    }
  }
}

TEST(EmulatedRandomSteps, MatchTheReference) {
  std::mt19937_64 random(5);
  for (std::uint64_t seed = 0; seed < 60; ++seed) {
    const Case c = random_case(random, true);
    SCOPED_TRACE("seed " + std::to_string(seed) + ": " + c.name);
    expect_right(c, seed);
  }
}

}  // namespace
}  // namespace flashdelta::testing
