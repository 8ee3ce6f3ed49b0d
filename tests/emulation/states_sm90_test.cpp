// The kernel of src/cuda/states_sm90.cu on the emulated device against float64, and bit by bit against the forward.
#include "tests/emulation/states_sm90.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "tests/emulation/prepare_sm90.hpp"
#include "tests/emulation/sm90.hpp"
#include "tests/support/call.hpp"
#include "tests/support/compare.hpp"

namespace flashdelta::emulation {
namespace {

using testing::Case;
using testing::Data;
using testing::Gates;
using testing::Keys;
using testing::Strengths;

constexpr int C = cuda::CHUNK, K = cuda::KEYS;
constexpr float nan = std::numeric_limits<float>::quiet_NaN();

// Relative L2 error of one (sequence, value head), rounding to 16 bits included.
constexpr double BFLOAT16_LIMIT = 0.004, FLOAT16_LIMIT = 0.0005;
double limit(const Case& c) { return (c.hard() ? 2 : 1) * (c.dtype == FD_BFLOAT16 ? BFLOAT16_LIMIT : FLOAT16_LIMIT); }

constexpr int FEW_SMS = 2, MANY_SMS = 132;  // pairs of blocks of rows, unless their number is odd; one

std::size_t state_size(const Case& c) { return static_cast<std::size_t>(c.V * K); }

// A run each for all sequences, and between them runs that are none.
std::vector<cuda::Run> whole_sequences(const Case& c, const Wave& wave) {
  std::vector<cuda::Run> runs;
  for (int n = 0; n < c.N(); ++n) {
    const auto at = static_cast<std::size_t>(n);
    runs.push_back({n, 0, static_cast<int>((c.lengths[at] + C - 1) / C), wave.first_slot[at]});
    runs.push_back({-1, 0, 0, 0});
  }
  return runs;
}

// Prepares and walks the runs.
void walk(const Case& c, const Data& d, Wave& wave, const std::vector<cuda::Run>& runs, const StatesSetting& setting) {
  with_call(c, d, [&](const fd_forward_args& args) {
    const fd_status status = prepare(args, wave, setting.sm_count, setting.schedule);
    return status == FD_OK ? states(args, wave, runs, setting) : status;
  });
  EXPECT_TRUE(wave.guards_intact());
}

void compare_tiles(const Case& c, const Wave& wave, const HeadReference& expected, int first_slot, int value_head) {
  RelativeError S, R;
  for (std::size_t chunk = 0; chunk < expected.chunks.size(); ++chunk) {
    std::vector<double> s(state_size(c)), r(static_cast<std::size_t>(C * c.V));
    for (int b = 0; b < wave.scratch.value_blocks; ++b) {
      const std::int64_t at = wave.scratch.block(first_slot + static_cast<int>(chunk), value_head, b);
      read_state_tile(wave.scratch.s + at * cuda::STATE_TILE, c.dtype, s, static_cast<int>(c.V), b * cuda::VALUES);
      read_tile(wave.scratch.r + at * cuda::TILE, c.dtype, r.data() + b * cuda::VALUES, static_cast<int>(c.V));
    }
    const ChunkTiles& tiles = expected.chunks[chunk];
    for (std::size_t i = 0; i < s.size(); ++i) S.add(s[i], tiles.S[i]);
    for (std::size_t i = 0; i < r.size(); ++i) R.add(r[i], tiles.R[i]);
  }
  EXPECT_LE(S.value(), limit(c));
  EXPECT_LE(R.value(), limit(c));
}

// S and R against float64; both shapes of blocks bit by bit.
void expect_states(const Case& c, const Data& d, Schedule schedule) {
  Wave wave(c), other(c);
  const std::vector<cuda::Run> runs = whole_sequences(c, wave);
  walk(c, d, wave, runs, {.sm_count = MANY_SMS, .schedule = schedule});
  walk(c, d, other, runs, {.sm_count = FEW_SMS, .schedule = schedule});
  EXPECT_TRUE(same_bytes(wave.s, other.s));
  EXPECT_TRUE(same_bytes(wave.r, other.r));

  std::vector<bool> used(wave.chunks.size());
  for (std::int64_t n = 0; n < c.N(); ++n) {
    const int first_slot = wave.first_slot[static_cast<std::size_t>(n)];
    for (std::int64_t hv = 0; hv < c.HV; ++hv) {
      SCOPED_TRACE("sequence " + std::to_string(n) + ", value head " + std::to_string(hv));
      const HeadReference expected = chunk_reference(head_inputs(c, d, n, hv));
      compare_tiles(c, wave, expected, first_slot, static_cast<int>(hv));
    }
    for (std::int64_t chunk = 0; chunk * C < c.lengths[static_cast<std::size_t>(n)]; ++chunk) {
      used[static_cast<std::size_t>(first_slot + chunk)] = true;
    }
  }
  for (std::size_t slot = 0; slot < used.size(); ++slot) {
    const std::int64_t at = wave.scratch.block(static_cast<int>(slot), 0, 0), blocks = c.HV * wave.scratch.value_blocks;
    EXPECT_TRUE(used[slot] || poison(wave.scratch.s + at * cuda::STATE_TILE, blocks * cuda::STATE_TILE)) << "slot " << slot;
    EXPECT_TRUE(used[slot] || poison(wave.scratch.r + at * cuda::TILE, blocks * cuda::TILE)) << "slot " << slot;
  }
}

std::vector<Case> states_cases() {
  std::vector<Case> list;
  const auto add = [&](const char* name, std::vector<std::int64_t> lengths, auto change) {
    Case c;
    c.name = name;
    c.lengths = std::move(lengths);
    c.packed = true;
    c.HV = 2;
    c.K = c.V = 128;
    c.dtype = FD_BFLOAT16;
    change(c);
    list.push_back(c);
  };
  add("Edges", {130, 0, 1, 63, 65, 0, 64}, [](Case& c) { c.padding = 70, c.H = 2; });
  add("Batch", {70, 70}, [](Case& c) { c.packed = false, c.HV = 1; });
  add("NoTokens", {0, 0}, [](Case& c) { c.packed = false; });
  add("OneValueBlockFourValueHeads", {200}, [](Case& c) { c.V = 64, c.HV = 4; });
  add("ThreeValueBlocks", {100, 70}, [](Case& c) { c.V = 192, c.padding = 3; });
  add("FourValueBlocks", {100}, [](Case& c) { c.V = 256; });
  add("CorrelatedKeys", {200}, [](Case& c) { c.keys = Keys::correlated, c.strengths = Strengths::full; });
  add("IdenticalKeys", {200}, [](Case& c) { c.keys = Keys::identical, c.strengths = Strengths::full; });
  add("StrongDecay", {100, 70}, [](Case& c) { c.gates = Gates::strong; });
  add("MixedDecay", {100, 70}, [](Case& c) { c.gates = Gates::mixed, c.HV = 4; });
  add("NoGatesNoStrengths", {100}, [](Case& c) { c.gates = Gates::none, c.strengths = Strengths::none; });
  add("Float16ValueFirst", {100, 70}, [](Case& c) { c.dtype = FD_FLOAT16, c.v_first = true; });
  add("BFloat16InitialStates", {100, 70}, [](Case& c) { c.initial_dtype = FD_BFLOAT16; });
  add("Pool", {100, 70, 30, 65}, [](Case& c) { c.pool = true; });
  add("NoInitialState", {100, 70}, [](Case& c) { c.initial_state = false; });
  add("RawGatesLogitsNorm", {100, 70},
      [](Case& c) { c.gates = Gates::raw, c.strengths = Strengths::logit, c.l2norm = true, c.padding = 70; });
  return list;
}

class EmulatedStates : public ::testing::TestWithParam<Case> {};

TEST_P(EmulatedStates, AreThoseOfFloat64) { expect_states(GetParam(), make_data(GetParam(), 1), Schedule::forward); }

INSTANTIATE_TEST_SUITE_P(, EmulatedStates, ::testing::ValuesIn(states_cases()),
                         testing::case_name<::testing::TestParamInfo<Case>>);

Case states_case(std::vector<std::int64_t> lengths, std::int64_t V) {
  Case c = states_cases()[0];
  c.lengths = std::move(lengths);
  c.padding = 5;
  c.H = 1;
  c.V = V;
  return c;
}

// `saved` of the forward that runs.
testing::Memory* saved_by_the_forward;

fd_status forward_with_saved(const fd_forward_args* call, void* workspace, std::size_t bytes, void* stream) {
  fd_forward_args args = *call;
  args.saved = saved_by_the_forward->data();
  args.saved_bytes = saved_by_the_forward->size();
  return emulation::forward(&args, workspace, bytes, stream);
}

// [K, K]: what the run's state is multiplied by, from the left.
std::vector<double> transition_of(const HeadInputs& whole, const cuda::Run& run) {
  const int first = run.first_chunk * C;
  HeadInputs h;
  h.tokens = std::min(whole.tokens - first, run.chunks * C);
  h.V = K;
  h.scale = whole.scale;
  const auto part = [&](const std::vector<double>& x, int columns) {
    return std::vector<double>(x.begin() + first * columns, x.begin() + (first + h.tokens) * columns);
  };
  h.q = part(whole.q, K);
  h.k = part(whole.k, K);
  h.g = part(whole.g, 1);
  h.beta = part(whole.beta, 1);
  h.v = h.do_ = std::vector<double>(static_cast<std::size_t>(h.tokens * K));
  h.state = h.dstate = std::vector<double>(static_cast<std::size_t>(K * K));
  for (std::size_t i = 0; i < K; ++i) h.state[i * K + i] = 1;
  return chunk_reference(h).state;
}

void expect_segments(const Case& c) {
  const Data d = make_data(c, 2);
  const std::size_t rows = static_cast<std::size_t>(cuda::saved_rows(c.T()));
  testing::Memory expected(rows * static_cast<std::size_t>(c.HV) * state_size(c) * sizeof(float)), save(expected.size());
  saved_by_the_forward = &expected;
  hopper = {FEW_SMS, Schedule::forward};
  static_cast<void>(testing::forward(c, d, {.backend = FD_BACKEND_REFERENCE, .forward = forward_with_saved}));
  EXPECT_TRUE(expected.guards_intact());
  float* const saved = reinterpret_cast<float*>(expected.data());
  const std::int64_t row = cuda::saved_row(c.lengths[0] + cuda::SEGMENT);
  EXPECT_FALSE(poison(saved + row * c.HV * c.V * K, c.V * K * static_cast<std::int64_t>(sizeof(float))));

  Wave whole(c), states_only(c);
  walk(c, d, whole, whole_sequences(c, whole), {.sm_count = FEW_SMS});
  walk(c, d, states_only, whole_sequences(c, whole),
       {.tiles = false, .save = reinterpret_cast<float*>(save.data()), .sm_count = FEW_SMS});
  EXPECT_TRUE(save.guards_intact());
  EXPECT_TRUE(same_bytes(save, expected));
  EXPECT_TRUE(poison(states_only.s.data(), static_cast<std::int64_t>(states_only.s.size())));
  EXPECT_TRUE(poison(states_only.r.data(), static_cast<std::int64_t>(states_only.r.size())));

  // The last sequence's only segment, the second one's in the wrong order, the first one's.
  const int second = whole.first_slot[1];
  const std::vector<cuda::Run> runs = {{2, 0, 1, whole.first_slot[2]},
                                       {1, cuda::SEGMENT_CHUNKS, 2, second + cuda::SEGMENT_CHUNKS},
                                       {1, 0, cuda::SEGMENT_CHUNKS, second},
                                       {0, 0, 1, whole.first_slot[0]}};
  for (const int sm_count : {FEW_SMS, MANY_SMS}) {
    Wave segments(c);
    testing::Memory again(expected.size());
    walk(c, d, segments, runs, {.saved = saved, .save = reinterpret_cast<float*>(again.data()), .sm_count = sm_count});
    EXPECT_TRUE(same_bytes(segments.s, whole.s));
    EXPECT_TRUE(same_bytes(segments.r, whole.r));
    EXPECT_TRUE(same_bytes(again, expected));
  }
}

TEST(States, SavedStatesAreTheForwardsBitByBitAndSegmentsGoOnFromThem) {
  Case c = states_case({40, cuda::SEGMENT + 70, 30}, 128);
  c.HV = 1;
  expect_segments(c);
  c.V = 64;
  c.dtype = FD_FLOAT16;
  c.gates = Gates::raw;
  c.strengths = Strengths::logit;
  c.l2norm = c.v_first = true;
  expect_segments(c);
}

TEST(States, TransitionsOfRunsInTheMiddle) {
  for (const std::int64_t V : {64, 128}) {
    const Case c = states_case({70, 400}, V);
    const Data d = make_data(c, 3);
    Wave expected(c);
    const int slot = expected.first_slot[1];
    const std::vector<cuda::Run> runs = {
        {1, 0, 2, slot}, {1, 2, 2, slot + 2}, {-1, 0, 0, 0}, {1, 4, 1, slot + 4}, {1, 5, 2, slot + 5}};
    const std::vector<int> windows = {-1, -1, -1, -1, -1, -1, -1, 0, -1, -1};  // of two value heads each
    const std::vector<float> saved(static_cast<std::size_t>(cuda::saved_rows(c.T()) * c.HV) * state_size(c));
    walk(c, d, expected, runs, {.saved = saved.data()});
    for (const int sm_count : {FEW_SMS, MANY_SMS}) {
      Wave wave(c);
      std::vector<float> got(windows.size() * static_cast<std::size_t>((V + K) * K), nan);
      walk(c, d, wave, runs,
           {.saved = saved.data(),
            .transitions = got.data(),
            .gradient_windows = windows.data(),
            .sm_count = sm_count,
            .schedule = Schedule::shuffled});
      EXPECT_TRUE(same_bytes(wave.s, expected.s));
      EXPECT_TRUE(same_bytes(wave.r, expected.r));
      for (std::size_t i = 0; i < windows.size(); ++i) {
        const cuda::Run& run = runs[i / 2];
        SCOPED_TRACE("V " + std::to_string(V) + ", run " + std::to_string(i / 2) + ", value head " + std::to_string(i % 2));
        const float* const of_run = got.data() + i * static_cast<std::size_t>((V + K) * K);
        const float* const transition = of_run + V * K;
        const auto untouched = [](float x) { return std::isnan(x); };
        EXPECT_TRUE(std::all_of(of_run, transition, untouched));
        if (run.sequence < 0 || run.first_chunk == 0 || run.first_chunk == 5 || windows[i] >= 0) {
          EXPECT_TRUE(std::all_of(transition, transition + K * K, untouched));
          continue;
        }
        RelativeError error;
        const std::vector<double> matrix = transition_of(head_inputs(c, d, 1, static_cast<std::int64_t>(i % 2)), run);
        for (std::size_t j = 0; j < matrix.size(); ++j) error.add(transition[j], matrix[j]);
        EXPECT_LE(error.value(), BFLOAT16_LIMIT);
      }
    }
  }
}

TEST(States, TheOrderOfThreadsDoesNotMatter) {
  const Case c = states_case({200, 0, 65}, 128);
  const Data d = make_data(c, 4);
  Wave expected(c);
  walk(c, d, expected, whole_sequences(c, expected), {});
  for (const int sm_count : {FEW_SMS, MANY_SMS}) {
    for (const Schedule schedule : {Schedule::backward, Schedule::shuffled}) {
      Wave wave(c);
      walk(c, d, wave, whole_sequences(c, wave), {.sm_count = sm_count, .schedule = schedule});
      EXPECT_TRUE(same_bytes(wave.s, expected.s));
      EXPECT_TRUE(same_bytes(wave.r, expected.r));
    }
  }
}

TEST(States, RandomPackedBatches) {
  std::mt19937_64 random(6);
  const auto below = [&](std::uint64_t n) { return static_cast<std::int64_t>(random() % n); };
  for (std::uint64_t i = 0; i < 6; ++i) {
    Case c = states_case({}, 64 * (1 + below(3)));
    for (std::int64_t n = 1 + below(5); n > 0; --n) c.lengths.push_back(below(200));
    c.padding = below(70);
    c.H = 1 + below(2);
    c.HV = c.H * (1 + below(3));
    c.gates = static_cast<Gates>(below(6));
    c.strengths = static_cast<Strengths>(below(7));
    c.dtype = below(3) == 0 ? FD_FLOAT16 : FD_BFLOAT16;
    c.gate_dtype = below(2) == 0 ? FD_BFLOAT16 : FD_FLOAT32;
    c.l2norm = below(2) == 0;
    c.v_first = below(2) == 0;
    c.pool = below(2) == 0;
    const Data d = make_data(c, 5 + i);
    SCOPED_TRACE(describe(c));
    emulation::seed = static_cast<std::uint32_t>(i);
    expect_states(c, d, Schedule::shuffled);
  }
}

}  // namespace
}  // namespace flashdelta::emulation
