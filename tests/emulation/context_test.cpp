// The states that the Hopper forward leaves for the backward, and its context parallelism: on the CPU, as
// emulation_test.cpp.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <numbers>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "tests/emulation/cases.hpp"
#include "tests/emulation/sm90.hpp"
#include "tests/support/compare.hpp"

namespace flashdelta::testing {
namespace {

using emulation::context_counts;
using emulation::ContextCounts;
using emulation::hopper;
using emulation::Schedule;

constexpr int FEW_SMS = 2, MANY_SMS = 132;

struct Options {
  fd_context_parallel context_parallel = FD_CONTEXT_ON;
  double bound = 0;
  int sm_count = MANY_SMS;
  Schedule schedule = Schedule::forward;
  const void* cu_seqlens = nullptr;
};

Results emulated(const Case& c, const Data& d, const Options& options = {},
                 decltype(&fd_forward) call = emulation::forward) {
  hopper = {options.sm_count, options.schedule, options.cu_seqlens};
  return forward(c, d,
                 {.backend = FD_BACKEND_REFERENCE,
                  .context_parallel = options.context_parallel,
                  .context_bound = options.bound,
                  .forward = call});
}

class EmulatedContext : public ::testing::TestWithParam<Case> {};

TEST_P(EmulatedContext, MatchesTheReferenceHoweverSequencesAreCut) {
  const Case& c = GetParam();
  const Data d = make_data(c, 1);
  const Results want = forward(c, d, reference);
  for (const int sm_count : {FEW_SMS, MANY_SMS}) {
    SCOPED_TRACE(sm_count);
    const Results got = emulated(c, d, {.sm_count = sm_count});
    expect_close(c, d, got, want, limit(c));
    EXPECT_EQ(context_counts.chains > 0, c.T() > 0);
    if (c.gates == Gates::none) {
      EXPECT_EQ(context_counts.windows, 0);
    }
    if (c.gates == Gates::strong) {
      EXPECT_EQ(context_counts.windows, context_counts.pre_runs * c.HV);
    }
    // The last run of a sequence comes first.
    if (sm_count == MANY_SMS) expect_same_bits(emulated(c, d, {.schedule = Schedule::backward}), got);
  }
}

INSTANTIATE_TEST_SUITE_P(, EmulatedContext, ::testing::ValuesIn(emulated_cases(200)),
                         case_name<::testing::TestParamInfo<Case>>);

// --- the gate-driven shortcut

// A head whose every token decays by e^-0.075, hence a chunk by 2^-6.9; its runs have three chunks, the last one two.
constexpr double DECAY = 0.075, CHUNK_DECAY = 64 * DECAY / std::numbers::ln2;  // log2

Case decaying_case() {
  Case c = sm90_case({16 * 64 + 5});
  c.HV = 1;
  return c;
}
Data decaying_data(const Case& c) {
  Data d = make_data(c, 7);
  for (double& g : d.g.x) g = static_cast<float>(-DECAY);
  return d;
}

double norm(const double* x, std::int64_t count) {
  double squares = 0;
  for (std::int64_t i = 0; i < count; ++i) squares += x[i] * x[i];
  return std::sqrt(squares);
}

TEST(EmulatedShortcut, ErrorsStayBelowTheBoundTimesTheStateThatWasDropped) {
  Case c = decaying_case();
  c.checkpoint_interval = 64;
  for (const double size : {1e6, 1e15}) {  // of the initial state; the larger one outlasts any run
    SCOPED_TRACE(size);
    Data d = decaying_data(c);
    for (double& x : d.initial_state.x) x = static_cast<double>(static_cast<float>(x * size));
    for (double& x : d.v.x) x = static_cast<double>(static_cast<float>(x / 1024));
    const Results want = forward(c, d, reference);
    const std::int64_t state = c.K * c.V, count = 16;
    const double first = norm(d.initial_state.x.data(), state);
    for (const double bound : {0x1p-20, 0x1p-12, 0x1p-6}) {
      const Results got = emulated(c, d, {.bound = bound});
      EXPECT_EQ(context_counts.windows, context_counts.pre_runs);
      EXPECT_EQ(context_counts.skipped > 0, bound > 0x1p-20);
      double worst = 0;  // relative to the state
      for (std::int64_t i = 0; i < count; ++i) {
        const double* x = want.at("checkpoints").values.x.data() + i * state;
        Array difference({state});
        for (std::int64_t j = 0; j < state; ++j) {
          difference.x[static_cast<std::size_t>(j)] =
              got.at("checkpoints").values.x[static_cast<std::size_t>(i * state + j)] - x[j];
        }
        const double error = norm(difference.x.data(), state);
        EXPECT_LE(error, bound * first + BFLOAT16_LIMIT * norm(x, state)) << "chunk " << i << ", bound " << bound;
        worst = std::max(worst, error / norm(x, state));
      }
      if (size > 1e6 && context_counts.skipped > 0) {
        EXPECT_GT(worst, 10 * BFLOAT16_LIMIT) << "it leaves a trace";
      }
    }
    // The exact way has no such error.
    expect_close(c, d, emulated(c, d, {.bound = -1}), want, BFLOAT16_LIMIT);
    EXPECT_EQ(context_counts.windows, 0);
    EXPECT_GT(context_counts.pre_runs, 0);
  }
}

TEST(EmulatedShortcut, WindowsAreAsShortAsTheBoundAllows) {
  const Case c = decaying_case();
  const Data d = decaying_data(c);
  for (const int chunks : {1, 2}) {
    for (const bool enough : {true, false}) {
      emulated(c, d, {.bound = std::exp2(-CHUNK_DECAY * chunks * (enough ? 0.999 : 1.001))});
      const int window = enough ? chunks : chunks + 1;
      EXPECT_EQ(context_counts.skipped, context_counts.pre_chunks - window * context_counts.pre_runs) << chunks << enough;
    }
  }
}

TEST(EmulatedShortcut, KeysThatLengthenTheStatePreventIt) {
  Case c = decaying_case();
  c.strengths = Strengths::full;
  for (const bool long_keys : {false, true}) {
    Data d = decaying_data(c);
    for (double& x : d.k.x)
      x = static_cast<double>(static_cast<float>(x * (long_keys ? 1.5 : 1.25)));  // |k|^2 = 2.25 or 1.56
    const Results got = emulated(c, d), want = forward(c, d, reference);
    EXPECT_EQ(context_counts.windows, long_keys ? 0 : context_counts.pre_runs);
    expect_close(c, d, got, want, 2 * BFLOAT16_LIMIT);
  }
}

TEST(EmulatedShortcut, WindowsMayBeLongerThanWhatABlockLooksAtAtOnce) {
  Case c = decaying_case();
  c.lengths = {40 * 64 + 5};
  for (const bool long_keys : {false, true}) {
    SCOPED_TRACE(long_keys);
    c.strengths = long_keys ? Strengths::full : Strengths::typical;
    Data d = decaying_data(c);
    // Each key then lengthens a state by up to |k|^2 - 1 = 1.05, a chunk's 2^4.5 of 2^-6.9.
    for (double& x : d.k.x) x = long_keys ? static_cast<double>(static_cast<float>(x * std::sqrt(2.05))) : x;
    const double chunk = long_keys ? 2.4 : CHUNK_DECAY;
    const Results got = emulated(c, d, {.bound = std::exp2(-chunk * (long_keys ? 9.5 : 9.999)), .sm_count = FEW_SMS});
    ASSERT_GT(context_counts.pre_runs, 0);
    EXPECT_EQ(context_counts.windows, context_counts.pre_runs);
    const int windows = context_counts.pre_chunks - context_counts.skipped;
    EXPECT_GT(context_counts.pre_chunks, 12 * context_counts.pre_runs);
    EXPECT_GE(windows, (long_keys ? 9 : 10) * context_counts.pre_runs);
    EXPECT_LE(windows, (long_keys ? 11 : 10) * context_counts.pre_runs);
    expect_close(c, d, got, forward(c, d, reference), 2 * BFLOAT16_LIMIT);
  }
}

// --- when sequences are cut

TEST(EmulatedPlan, OffIsTheForwardOfWholeSequencesWhateverElseIsInTheBatch) {
  Case c = sm90_case({700, 0, 30, 300});
  c.padding = 10;
  const Data d = make_data(c, 3);
  const Results off = emulated(c, d, {.context_parallel = FD_CONTEXT_OFF});
  for (std::int64_t n = 0; n < c.N(); ++n) {
    const Results one = emulated(alone(c, n), alone(c, d, n), {.context_parallel = FD_CONTEXT_OFF, .sm_count = FEW_SMS});
    const Array &a = off.at("final_state").values, &b = one.at("final_state").values;
    EXPECT_TRUE(std::equal(b.x.begin(), b.x.end(), a.x.begin() + n * a.inner(1))) << n;
    const Array &o = off.at("o").values, &p = one.at("o").values;
    EXPECT_TRUE(std::equal(p.x.begin(), p.x.end(), o.x.begin() + d.first_token(c, n) * o.inner(2))) << n;
  }
  // So short sequences are left whole unless they have to be cut.
  expect_same_bits(emulated(c, d, {.context_parallel = FD_CONTEXT_AUTO}), off);
  emulated(c, d);
  EXPECT_EQ(context_counts.chains, 2);
}

TEST(EmulatedPlan, LongSequencesOfFewHeadsAreCutUnasked) {
  Case c = sm90_case({5000});
  c.HV = 1;
  c.V = 64;
  const Data d = make_data(c, 4);
  const Results got = emulated(c, d, {.context_parallel = FD_CONTEXT_AUTO});
  EXPECT_EQ(context_counts.chains, 1);
  EXPECT_GT(context_counts.runs, 3);
  expect_close(c, d, got, forward(c, d, reference), BFLOAT16_LIMIT);
  // On a device that one run fills it does not pay.
  expect_same_bits(emulated(c, d, {.context_parallel = FD_CONTEXT_AUTO, .sm_count = 1}),
                   emulated(c, d, {.context_parallel = FD_CONTEXT_OFF}));
}

TEST(EmulatedPlan, LengthsMayChangeOnTheDevice) {
  Case host = sm90_case({500, 100, 0}), device = sm90_case({130, 0, 400});
  device.padding = 70;
  host.pool = device.pool = host.in_place = device.in_place = true;
  Data d = make_data(device, 5);
  const Results want = emulated(device, d);
  const std::vector<std::int64_t> lengths = d.cu_seqlens;
  d.cu_seqlens = make_data(host, 5).cu_seqlens;
  expect_same_bits(emulated(host, d, {.cu_seqlens = lengths.data()}), want);
}

// What the planner decides on 132 SMs for sizes that are used, with gates that are all 0, those of trained models (a quarter
// of the heads does not decay), and without seeing them. No chunk is walked.
struct Decision {
  std::vector<std::int64_t> lengths;
  std::int64_t H, HV;
  bool considered;      // whether the device is asked
  int constant, usual;  // sequences that are cut then
};

TEST(EmulatedPlan, CutsSequencesWhereThatShouldPay) {
  const std::vector<std::int64_t> tail = [] {
    std::vector<std::int64_t> lengths = {16384};
    lengths.insert(lengths.end(), 16, 512);
    lengths.insert(lengths.end(), 32, 64);
    lengths.insert(lengths.end(), 32, 33);
    return lengths;
  }();
  const std::vector<Decision> decisions = {
      {{32768}, 16, 64, false, 0, 0},
      {{32768}, 16, 48, false, 0, 0},
      {{32768}, 16, 32, true, 1, 1},
      {{32768}, 4, 16, true, 1, 1},
      {{32768}, 2, 8, true, 1, 1},
      {{65536}, 2, 8, true, 1, 1},
      {{8192}, 16, 64, false, 0, 0},
      {{8192}, 16, 32, true, 1, 1},
      {{8192}, 2, 8, true, 1, 1},
      {{2048}, 2, 8, true, 1, 1},
      {{512}, 2, 8, false, 0, 0},
      {{512}, 16, 32, false, 0, 0},
      {{8192, 8192, 8192, 8192}, 16, 64, false, 0, 0},
      {{16384, 16384}, 16, 64, false, 0, 0},
      {{4096}, 16, 32, false, 0, 0},
      {tail, 16, 32, true, 0, 1},
      {{28672, 4096}, 16, 32, true, 1, 1},
      {{16384, 16384}, 16, 32, true, 0, 0},
      {{1024, 7168}, 2, 8, true, 1, 1},
      {{2048, 2048, 2048, 2048}, 16, 32, false, 0, 0},
  };
  for (const Decision& decision : decisions) {
    SCOPED_TRACE(std::to_string(decision.lengths[0]) + " and " + std::to_string(decision.lengths.size() - 1) + " others, " +
                 std::to_string(decision.HV) + " heads");
    for (const bool constant : {true, false}) {
      const std::optional<ContextCounts> counts =
          emulation::plan(decision.lengths, decision.H, decision.HV, constant, MANY_SMS);
      const bool considered = counts.has_value() && counts->may_cut;
      EXPECT_EQ(considered, decision.considered);
      if (!considered) continue;
      EXPECT_EQ(counts->chains, constant ? decision.constant : decision.usual);
      EXPECT_EQ(counts->runs, static_cast<int>(decision.lengths.size()) + counts->pre_runs);
    }
  }
}

// Sequences that cannot be cut with gain may still be so uneven that blocks of half the values are better.
TEST(EmulatedPlan, ChoosesTheShapeOfTheForwardForTheLengths) {
  for (const auto& [lengths, shape] : std::vector<std::pair<std::vector<std::int64_t>, int>>{
           {{28672, 4096}, 1}, {{16384, 16384}, 2}, {{8192, 8192, 8192, 8192}, 2}}) {
    SCOPED_TRACE(lengths[0]);
    const std::optional<ContextCounts> counts = emulation::plan(lengths, 16, 64, false, MANY_SMS);
    ASSERT_TRUE(counts.has_value());
    EXPECT_FALSE(counts->may_cut);
    EXPECT_EQ(counts->chains, 0);
    EXPECT_EQ(counts->runs, static_cast<int>(lengths.size()));
    EXPECT_EQ(counts->shape, shape);
  }
  EXPECT_FALSE(emulation::plan({2048, 2048, 2048, 2048}, 16, 32, false, MANY_SMS).has_value()) << "too little to gain";
  EXPECT_FALSE(emulation::plan({6144, 2048}, 16, 64, false, MANY_SMS).has_value()) << "too much if the lengths were equal";
}

TEST(EmulatedPlan, GarbageInCuSeqlensStaysInsideTheOutputs) {
  const Case c = sm90_case({300, 0, 300, 50, 0, 150});
  const Data d = make_data(c, 6);
  const std::vector<std::vector<std::int64_t>> garbage = {{0, 800, 0, 800, 0, 800, 0},
                                                          {-1, -5, std::int64_t{1} << 60, 0, 800, 700, 900},
                                                          {800, 0, 300, 100, 700, 700, 0},
                                                          {5, 805, 5, 600, 10, 11, 400}};
  for (const std::vector<std::int64_t>& lengths : garbage) {
    for (const int sm_count : {FEW_SMS, MANY_SMS}) {
      EXPECT_NO_THROW(emulated(c, d, {.sm_count = sm_count, .cu_seqlens = lengths.data()}));
    }
  }
}

// --- states for the backward

// `saved` of the call that runs, between two guard bands.
Memory* saved_memory = nullptr;

fd_status forward_with_saved(const fd_forward_args* call, void* workspace, std::size_t bytes, void* stream) {
  fd_forward_args args = *call;
  args.saved = saved_memory->data();
  args.saved_bytes = saved_memory->size();
  return emulation::forward(&args, workspace, bytes, stream);
}

TEST(EmulatedSavedStates, AreThoseBeforeEverySegmentButTheFirst) {
  constexpr std::int64_t SEGMENT = 2048;
  for (const bool packed : {true, false}) {
    Case c = sm90_case(packed ? std::vector<std::int64_t>{100, 2 * SEGMENT, 64, SEGMENT + 1}
                              : std::vector<std::int64_t>{SEGMENT + 70, SEGMENT + 70});
    c.packed = packed;
    c.v_first = true;
    c.V = packed ? 64 : 128;
    c.HV = packed ? 2 : 1;
    c.checkpoint_interval = SEGMENT;
    c.index_dtype = FD_INT32;
    const Data d = make_data(c, 1);
    const std::int64_t state = c.HV * c.V * c.K, rows = (c.B() * c.T() + SEGMENT - 1) / SEGMENT;
    Memory saved(static_cast<std::size_t>(rows * state) * sizeof(float));
    saved_memory = &saved;
    const Options options = {.context_parallel = packed ? FD_CONTEXT_OFF : FD_CONTEXT_ON,
                             .sm_count = packed ? FEW_SMS : MANY_SMS};
    const Results got = emulated(c, d, options, forward_with_saved);
    EXPECT_TRUE(saved.guards_intact());
    expect_close(c, d, got, forward(c, d, reference), BFLOAT16_LIMIT);

    // The same bits as the checkpoints at these tokens; nothing in other rows.
    std::vector<bool> written(static_cast<std::size_t>(rows));
    const std::vector<float> values = [&] {
      std::vector<float> x(static_cast<std::size_t>(rows * state));
      std::memcpy(x.data(), saved.data(), saved.size());
      return x;
    }();
    const Array& checkpoints = got.at("checkpoints").values;
    const std::int64_t slots = checkpoints.shape[0] / c.N();
    std::int64_t compared = 0;
    for (std::int64_t n = 0; n < c.N(); ++n) {
      const std::int64_t begin = packed ? d.cu_seqlens[static_cast<std::size_t>(n)] : n * c.T();
      for (std::int64_t token = SEGMENT; token < c.lengths[static_cast<std::size_t>(n)]; token += SEGMENT) {
        const std::int64_t row = (begin + token) / SEGMENT;
        written[static_cast<std::size_t>(row)] = true;
        const double* want = checkpoints.x.data() + (n * slots + token / SEGMENT - 1) * state;
        for (std::int64_t i = 0; i < state; ++i) {
          const float x = values[static_cast<std::size_t>(row * state + i)];
          if (n % 3 == 2) {  // these sequences have no checkpoints
            ASSERT_EQ(x, x);
          } else {
            ASSERT_EQ(x, static_cast<float>(want[i])) << "sequence " << n << ", token " << token << ", element " << i;
            ++compared;
          }
        }
      }
    }
    EXPECT_EQ(compared, 2 * state);
    for (std::int64_t i = 0; i < rows * state; ++i) {
      if (!written[static_cast<std::size_t>(i / state)]) {
        ASSERT_NE(values[static_cast<std::size_t>(i)], values[static_cast<std::size_t>(i)]);
      }
    }
  }
}

}  // namespace
}  // namespace flashdelta::testing
