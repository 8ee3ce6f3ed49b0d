// The Hopper backward's context parallelism, emulated: gradients of sequences whose segments are walked at once.
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <numbers>
#include <utility>
#include <vector>

#include "tests/emulation/backward_sm90.hpp"
#include "tests/emulation/cases.hpp"
#include "tests/emulation/sm90.hpp"
#include "tests/sm90_accuracy.hpp"
#include "tests/sm90_cases.hpp"
#include "tests/support/compare.hpp"

#define cuda emulated_cuda
#include "cuda/backward_context_sm90.hpp"
#include "cuda/backward_sm90.hpp"

namespace flashdelta::testing {
namespace {

using emulation::hopper;
using emulation::Schedule;

constexpr int FEW_SMS = 2, MANY_SMS = 132;

struct Options {
  fd_context_parallel context_parallel = FD_CONTEXT_ON;
  int sm_count = FEW_SMS;
  Schedule schedule = Schedule::forward;
  std::int64_t workspace_limit = 0;
  double bound = 0;
  decltype(&fd_backward) call = emulation::backward;
  const void* cu_seqlens = nullptr;
};

Results emulated(const Case& c, const Data& d, const Options& options) {
  hopper = {options.sm_count, options.schedule, options.cu_seqlens};
  return backward(c, d,
                  {.backend = FD_BACKEND_REFERENCE,
                   .context_parallel = options.context_parallel,
                   .context_bound = options.bound,
                   .workspace_limit = options.workspace_limit,
                   .backward = options.call});
}

Case long_case(std::vector<std::int64_t> lengths, bool packed = true) {
  Case c = sm90_case(std::move(lengths), packed);
  c.HV = 1;
  c.V = 64;
  return c;
}

std::vector<Case> cases() {
  std::vector<Case> list;
  const auto add = [&](const char* name, Case c, auto change) {
    c.name = name;
    change(c);
    list.push_back(c);
  };
  const Case two = long_case({4160, 0, 100, 2049});
  add("TwoValueBlocks", long_case({4160}), [](Case& c) { c.V = 128; });
  add("Batch", long_case({4160, 4160}, false), [](Case& c) { c.index_dtype = FD_INT32, c.v_first = true; });
  add("NoDecay", two, [](Case& c) { c.gates = Gates::none; });
  add("StrongDecay", two, [](Case& c) { c.gates = Gates::strong; });
  add("MixedDecayFloat16", long_case({4160}), [](Case& c) { c.gates = Gates::mixed, c.dtype = FD_FLOAT16, c.HV = 2; });
  add("RawGatesLogitsNorm", two,
      [](Case& c) { c.gates = Gates::raw, c.strengths = Strengths::logit, c.l2norm = true, c.padding = 70; });
  add("NoStates", two, [](Case& c) { c.initial_state = c.dfinal_state = false; });
  add("FinalStateAlone", two, [](Case& c) { c.do_ = false; });
  add("Pool", two, [](Case& c) { c.pool = true; });
  return list;
}

class EmulatedBackwardContext : public ::testing::TestWithParam<Case> {};

TEST_P(EmulatedBackwardContext, MatchesTheReferenceAndTheSerialWalk) {
  const Case& c = GetParam();
  const Data d = make_data(c, 1);
  const Results on = emulated(c, d, {});
  expect_close(c, d, on, backward(c, d, reference), sm90_backward_limit(c));
  expect_close(c, d, emulated(c, d, {.context_parallel = FD_CONTEXT_OFF}), on, sm90_backward_limit(c));
}

INSTANTIATE_TEST_SUITE_P(, EmulatedBackwardContext, ::testing::ValuesIn(cases()), case_name<::testing::TestParamInfo<Case>>);

TEST(EmulatedSegments, NeitherTheDeviceNorWavesNorTheBatchChangeABit) {
  const Case c = long_case({100, 4300, 2048, 30, 6200});
  const Data d = make_data(c, 1);
  const Results want = backward(c, d, reference), on = emulated(c, d, {});
  expect_close(c, d, on, want, sm90_backward_limit(c));
  expect_same_bits(emulated(c, d, {.sm_count = MANY_SMS, .schedule = Schedule::shuffled}), on);
  expect_same_bits(emulated(c, d, {.schedule = Schedule::backward, .workspace_limit = 1}), on);
  expect_close(c, d, emulated(c, d, {.workspace_limit = 1, .call = emulation::backward_from_saved}), want,
               sm90_backward_limit(c));
  for (const std::int64_t n : {1, 2}) {
    const Results one = emulated(alone(c, n), alone(c, d, n), {});
    for (const auto& [name, result] : one) {
      const Array &a = result.values, &b = on.at(name).values;
      if (name == "dA_log" || name == "ddt_bias") continue;
      const bool state = name == "dinitial_state";
      const std::int64_t first = state ? n * b.inner(1) : d.first_token(c, n) * b.inner(2);
      EXPECT_TRUE(std::equal(a.x.begin(), a.x.end(), b.x.begin() + first)) << name << " of sequence " << n;
    }
  }
}

// Errors of both ways, of data on which published kernels were measured, but longer.
TEST(EmulatedSegments, IsAsExactAsTheSerialWalk) {
  const Case c = long_case({5000});
  for (const AccuracyData kind : {AccuracyData::random, AccuracyData::correlated, AccuracyData::decay}) {
    const Data d = accuracy_data(c, kind, 1);
    const Results want = backward(c, d, reference), on = emulated(c, d, {});
    const Results off = emulated(c, d, {.context_parallel = FD_CONTEXT_OFF});
    for (const auto& [name, result] : on) {
      const bool state = name == "dinitial_state";
      const Array& expected = want.at(name).values;
      const double error = worst_error(c, d, result.values, expected, state);
      const double serial = worst_error(c, d, off.at(name).values, expected, state);
      std::printf("%-15s %.5f, serial %.5f\n", name.c_str(), error, serial);
      EXPECT_LE(error, 1.1 * serial + 0.0002) << name;
    }
  }
}

TEST(EmulatedSegments, LengthsMayChangeOnTheDevice) {
  const Case host = long_case({2048, 100, 2048}), device = long_case({0, 4160, 36});
  Data d = make_data(device, 5);
  const Results want = emulated(device, d, {});
  const std::vector<std::int64_t> lengths = d.cu_seqlens;
  d.cu_seqlens = make_data(host, 5).cu_seqlens;
  expect_same_bits(emulated(host, d, {.cu_seqlens = lengths.data()}), want);
}

TEST(EmulatedSegments, GarbageInCuSeqlensStaysInsideTheOutputs) {
  const Case c = long_case({3000, 0, 30, 1270});
  const Data d = make_data(c, 6);
  const std::vector<std::vector<std::int64_t>> garbage = {
      {0, 4300, 0, 4300, 0}, {-1, -5, std::int64_t{1} << 60, 0, 4300}, {4300, 0, 2100, 10, 4300}, {2048, 4096, 0, 4300, 64}};
  for (const std::vector<std::int64_t>& lengths : garbage) {
    for (const std::int64_t workspace_limit : {0, 1}) {
      EXPECT_NO_THROW(emulated(c, d, {.workspace_limit = workspace_limit, .cu_seqlens = lengths.data()}));
    }
  }
}

// What has decayed below the bound is dropped, and nothing else: neither the last segment's gradient of the final state, nor
// what comes from the second chunk of the segment before into the one before that.
TEST(EmulatedSegments, DropWhatDecaysBelowTheBound) {
  constexpr double DECAY = 0.075, CHUNK_DECAY = 64 * DECAY / std::numbers::ln2;  // log2 of it
  constexpr std::int64_t SEGMENT = 2048, CHUNK = 64;
  const Case c = long_case({2 * SEGMENT + CHUNK});
  Data d = make_data(c, 7);
  for (double& g : d.g.x) g = static_cast<float>(-DECAY);
  for (std::int64_t i = (SEGMENT + CHUNK) * c.V; i < (SEGMENT + 2 * CHUNK) * c.V; ++i)
    d.do_.x[static_cast<std::size_t>(i)] *= 1024;
  for (double& x : d.dfinal_state.x) x *= 1024;
  const Results want = backward(c, d, reference);
  const auto error = [&](const Results& got, std::int64_t token) {  // of dv in the chunk before
    double squares = 0, norm = 0;
    for (std::int64_t i = (token - CHUNK) * c.V; i < token * c.V; ++i) {
      const auto at = static_cast<std::size_t>(i);
      const double x = want.at("dv").values.x[at], difference = got.at("dv").values.x[at] - x;
      squares += difference * difference;
      norm += x * x;
    }
    return std::sqrt(squares / norm);
  };
  const Results dropped = emulated(c, d, {.bound = std::exp2(-CHUNK_DECAY * 0.999)});
  EXPECT_GT(error(dropped, SEGMENT), 0.5);
  EXPECT_GT(error(dropped, 2 * SEGMENT), 0.5);
  const Results kept = emulated(c, d, {.bound = std::exp2(-CHUNK_DECAY * 1.001)});
  EXPECT_LT(error(kept, 2 * SEGMENT), 0.01);
  for (const double bound : {0.0, -1.0}) {
    const Results got = emulated(c, d, {.bound = bound});
    EXPECT_LT(error(got, SEGMENT), 0.01);
    EXPECT_LT(error(got, 2 * SEGMENT), 0.01);
    expect_close(c, d, got, want, sm90_backward_limit(c));
  }
}

// --- when segments are walked at once

fd_problem problem(std::int64_t N, std::int64_t T, std::int64_t HV, bool packed = true) {
  fd_problem p{};
  p.B = packed ? 1 : N;
  p.T = packed ? N * T : T;
  p.N = N;
  p.H = p.HV = HV;
  p.K = p.V = 128;
  p.context_parallel = FD_CONTEXT_AUTO;
  p.workspace_limit = std::int64_t{640} << 20;
  return p;
}

TEST(EmulatedSegments, IsChosenForLongSequencesOfFewHeads) {
  using emulated_cuda::splits_backward;
  EXPECT_TRUE(splits_backward(problem(1, 32768, 8)));
  EXPECT_TRUE(splits_backward(problem(1, 8192, 8)));
  EXPECT_TRUE(splits_backward(problem(1, 32768, 16)));
  EXPECT_TRUE(splits_backward(problem(2, 16384, 4, false)));
  EXPECT_FALSE(splits_backward(problem(1, 2048, 8)));    // one segment
  EXPECT_FALSE(splits_backward(problem(1, 32768, 64)));  // heads fill the device
  EXPECT_FALSE(splits_backward(problem(16, 8192, 8)));   // sequences do
  EXPECT_FALSE(splits_backward(problem(64, 2048, 8, false)));
  fd_problem p = problem(1, 32768, 8);
  p.workspace_limit = 1;
  EXPECT_TRUE(splits_backward(p));
  p.context_parallel = FD_CONTEXT_OFF;
  EXPECT_FALSE(splits_backward(p));
  p = problem(1, 2049, 64);
  p.context_parallel = FD_CONTEXT_ON;
  EXPECT_TRUE(splits_backward(p));
}

TEST(EmulatedSegments, KeepsToTheLimitOnTheWorkspace) {
  for (const std::int64_t megabytes : {256, 640, 2048}) {
    fd_problem p = problem(1, 65536, 16);
    p.workspace_limit = megabytes << 20;
    for (const fd_context_parallel choice : {FD_CONTEXT_OFF, FD_CONTEXT_ON}) {
      p.context_parallel = choice;
      const std::size_t bytes = emulated_cuda::backward_workspace(p) - emulated_cuda::saved_bytes(p);
      EXPECT_LE(bytes, 1.05 * static_cast<double>(p.workspace_limit));
      EXPECT_GE(bytes, 0.5 * static_cast<double>(p.workspace_limit));
    }
  }
}

}  // namespace
}  // namespace flashdelta::testing
