// The kernels of src/cuda/gradients_sm90.cu and finish_sm90.cu on the emulated device against the reference's gradients.
#include "tests/emulation/gradients_sm90.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <utility>
#include <vector>

#include "tests/sm90_cases.hpp"
#include "tests/support/compare.hpp"

namespace flashdelta::testing {
namespace {

using emulation::GradientSetting;
using emulation::Schedule;

// Relative L2 error of one (sequence, head) beyond the rounding of what is written. Most of it is that of the 16-bit tiles
// which the kernel is given: where few tokens follow a large initial state, dg is hardly more than one inner product of two
// rounded states.
constexpr double BFLOAT16_LIMIT = 0.01, FLOAT16_LIMIT = 0.0015;

// dv apart from the other results: no row of a sequence is written here, all others are zero.
Results without_dv(const Case& c, Results results) {
  const Array& dv = results.at("dv").values;
  const std::int64_t padding = c.packed ? c.padding : 0;
  const auto middle = dv.x.end() - padding * c.HV * c.V;
  EXPECT_TRUE(std::all_of(dv.x.begin(), middle, [](double x) { return std::isnan(x); }));
  EXPECT_TRUE(std::all_of(middle, dv.x.end(), [](double x) { return x == 0; }));
  results.erase("dv");
  return results;
}

Results wanted(const Case& c, const Data& d) {
  Results results = backward(c, d, reference);
  results.erase("dv");
  results.erase("dinitial_state");
  return results;
}

double limit(const Case& c) { return c.dtype == FD_BFLOAT16 ? BFLOAT16_LIMIT : FLOAT16_LIMIT; }

std::vector<Case> gradient_cases() {
  std::vector<Case> list;
  const auto add = [&](const char* name, Case c, auto change) {
    c.name = name;
    change(c);
    list.push_back(c);
  };
  const Case edges = sm90_case({130, 0, 1, 63, 65}), two = sm90_case({100, 70});
  add("OneChunk", sm90_case({64}), [](Case& c) { c.HV = 1, c.V = 64; });
  add("Edges", edges, [](Case& c) { c.padding = 5, c.H = 2; });
  add("Batch", sm90_case({70, 70}, false), [](Case& c) { c.index_dtype = FD_INT32; });
  add("NoTokens", sm90_case({0, 0}, false), [](Case&) {});
  add("NoTokensRawGates", sm90_case({0}), [](Case& c) { c.gates = Gates::raw; });
  add("OneHeadEach", two, [](Case& c) { c.H = 2; });
  add("GroupOfFour", two, [](Case& c) { c.HV = 4; });
  add("TwoGroupsOfFour", two, [](Case& c) { c.H = 2, c.HV = 8, c.V = 64, c.padding = 3; });
  add("CorrelatedKeys", two, [](Case& c) { c.keys = Keys::correlated, c.strengths = Strengths::full; });
  add("IdenticalKeys", two, [](Case& c) { c.keys = Keys::identical, c.strengths = Strengths::full; });
  add("StrongDecay", two, [](Case& c) { c.gates = Gates::strong; });
  add("MixedDecay", two, [](Case& c) { c.gates = Gates::mixed, c.HV = 4; });
  add("NoGatesNoStrengths", two, [](Case& c) { c.gates = Gates::none, c.strengths = Strengths::none; });
  add("MixedDecayAllBetweenNormAndLogits", sm90_case({64, 128}),
      [](Case& c) { c.gates = Gates::mixed, c.strengths = Strengths::logit, c.l2norm = true, c.scale = 2; });
  add("RawGatesLogitsNorm", edges,
      [](Case& c) { c.gates = Gates::raw, c.strengths = Strengths::logit, c.l2norm = true, c.padding = 70, c.HV = 6; });
  add("RawGatesWithoutBiasNegativeEigenvalues", two, [](Case& c) {
    c.gates = Gates::raw, c.strengths = Strengths::logit, c.dt_bias = false, c.l2norm = c.allow_neg_eigval = true;
  });
  add("BFloat16Gates", two, [](Case& c) { c.gate_dtype = c.beta_dtype = FD_BFLOAT16; });
  add("Float16GatesStrengthsAtTheEdges", two,
      [](Case& c) { c.gate_dtype = c.beta_dtype = FD_FLOAT16, c.strengths = Strengths::edges, c.scale = 0.5; });
  add("NoStates", two, [](Case& c) { c.initial_state = c.dfinal_state = false; });
  add("FinalStateAlone", two, [](Case& c) { c.do_ = false; });
  add("OneValueBlock", two, [](Case& c) { c.V = 64; });
  add("ThreeValueBlocks", two, [](Case& c) { c.V = 192; });
  return list;
}

class EmulatedGradients : public ::testing::TestWithParam<Case> {};

TEST_P(EmulatedGradients, MatchTheReferenceInBothTypes) {
  for (const fd_dtype dtype : {FD_BFLOAT16, FD_FLOAT16}) {
    Case c = GetParam();
    c.dtype = dtype;
    const Data d = make_data(c, 1);
    expect_close(c, d, without_dv(c, emulation::gradients(c, d, {})), wanted(c, d), limit(c));
  }
}

INSTANTIATE_TEST_SUITE_P(, EmulatedGradients, ::testing::ValuesIn(gradient_cases()),
                         case_name<::testing::TestParamInfo<Case>>);

TEST(Gradients, NeitherTheOrderOfThreadsNorTheNumberOfBlocksMatters) {
  Case c = sm90_case({130, 0, 65});
  c.H = 2;
  c.HV = 4;
  c.l2norm = true;
  c.gates = Gates::raw;
  const Data d = make_data(c, 2);
  const Results want = without_dv(c, emulation::gradients(c, d, {.sm_count = 1}));
  for (const Schedule schedule : {Schedule::backward, Schedule::shuffled}) {
    for (const int sm_count : {3, 132}) {
      expect_same_bits(without_dv(c, emulation::gradients(c, d, {.sm_count = sm_count, .schedule = schedule})), want);
    }
  }
}

TEST(Gradients, RandomPackedBatchesMatchTheReference) {
  std::mt19937_64 random(3);
  const auto below = [&](std::uint64_t n) { return static_cast<std::int64_t>(random() % n); };
  for (std::uint64_t i = 0; i < 6; ++i) {
    Case c = sm90_case({});
    for (std::int64_t n = 1 + below(4); n > 0; --n) c.lengths.push_back(below(150));
    c.padding = below(70);
    c.H = 1 + below(2);
    c.HV = c.H * (1 + below(5));
    c.V = 64 * (1 + below(4));
    c.gates = static_cast<Gates>(below(6));
    c.strengths = static_cast<Strengths>(below(7));
    // Strengths of 2 let the triangles grow past fp16.
    c.dtype = c.strengths != Strengths::twice && below(3) == 0 ? FD_FLOAT16 : FD_BFLOAT16;
    c.beta_dtype = below(2) == 0 ? FD_BFLOAT16 : FD_FLOAT32;
    c.l2norm = below(2) == 0;
    const Data d = make_data(c, 4 + i);
    SCOPED_TRACE(describe(c));
    const GradientSetting setting{.sm_count = static_cast<int>(1 + below(3)), .schedule = Schedule::shuffled};
    // Some of so many heads have a dg that is much smaller than most inner products of their states.
    expect_close(c, d, without_dv(c, emulation::gradients(c, d, setting)), wanted(c, d), 4 * limit(c));
  }
}

TEST(Gradients, ResultsMayBeAbsent) {
  Case c = sm90_case({100, 30});
  c.padding = 5;
  c.gates = Gates::raw;
  const Data d = make_data(c, 3);
  const Results all = emulation::gradients(c, d, {});
  const std::pair<const char*, GradientSetting> settings[] = {{"dq", {.dq = false}},
                                                              {"dk", {.dk = false}},
                                                              {"dg", {.dg = false}},
                                                              {"dbeta", {.dbeta = false}},
                                                              {"dA_log", {.dA_log = false}}};
  for (const auto& [name, setting] : settings) {
    SCOPED_TRACE(name);
    Results some = emulation::gradients(c, d, setting), rest = all;
    const Array& values = some.at(name).values;
    EXPECT_TRUE(std::all_of(values.x.begin(), values.x.end(), [](double x) { return std::isnan(x); }));
    some.erase(name);
    rest.erase(name);
    expect_same_bits(some, rest);
  }
}

// The large parts cancel in the end alone.
TEST(Gradients, SumsOverManyChunksLoseNothing) {
  constexpr std::size_t HEADS = 5, CHUNKS = 100'000;
  std::mt19937 random(4);
  std::normal_distribution<float> distribution(0.5f);
  std::vector<float> parts(CHUNKS * HEADS * 2);
  for (std::size_t i = 0; i < parts.size(); ++i) {
    parts[i] = distribution(random) + (i / (HEADS * 2) % 2 == 0 ? 1e4f : -1e4f);
  }
  std::vector<double> want(HEADS * 2);
  for (std::size_t i = 0; i < parts.size(); ++i) want[i % (HEADS * 2)] += parts[i];
  const std::vector<float> got = emulation::sum_gates(parts, HEADS);
  for (std::size_t i = 0; i < want.size(); ++i) EXPECT_FLOAT_EQ(got[i], static_cast<float>(want[i]));

  EXPECT_EQ(emulation::sum_gates({}, HEADS), std::vector<float>(HEADS * 2));
  const std::vector<float> infinite = emulation::sum_gates({1, INFINITY, 1, 2}, 1);
  EXPECT_EQ(infinite, (std::vector<float>{2, INFINITY}));
}

}  // namespace
}  // namespace flashdelta::testing
