// The kernel of src/cuda/prepare_sm90.cu on the emulated device against float64.
#include "tests/emulation/prepare_sm90.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "tests/support/compare.hpp"

namespace flashdelta::emulation {
namespace {

using testing::Case;
using testing::Data;
using testing::Gates;
using testing::Keys;
using testing::Strengths;

constexpr int C = cuda::CHUNK;
constexpr double LOG2E = 1.4426950408889634;

// Relative Frobenius error of the tiles of one (sequence, value head): rounding to 16 bits, and the fp16 operands of the
// inverse. Of vectors: fp32.
constexpr double BFLOAT16_LIMIT = 0.003, FLOAT16_LIMIT = 0.0004, VECTOR_LIMIT = 1e-5;

constexpr int FEW_SMS = 1, SOME_SMS = 3;  // one block for all chunks; several

void compare(const Case& c, const Data& d, const Wave& wave, std::int64_t n, std::int64_t value_head) {
  const HeadInputs inputs = head_inputs(c, d, n, value_head);
  const HeadReference expected = chunk_reference(inputs);
  const auto normalised = [&](const testing::Array& rows, std::int64_t token) {
    if (!c.l2norm) return 1.0;
    return token < inputs.tokens ? inverse_norm(rows, d.first_token(c, n) + token, value_head / (c.HV / c.H)) : 1e3;
  };
  RelativeError T, P, rise, end, beta, key, query;
  for (std::size_t chunk = 0; chunk < expected.chunks.size(); ++chunk) {
    const ChunkTiles& tiles = expected.chunks[chunk];
    const auto slot = wave.first_slot[static_cast<std::size_t>(n)] + static_cast<int>(chunk);
    const std::int64_t at = wave.scratch.head(slot, static_cast<int>(value_head));
    std::vector<double> got(C * C);
    read_tile(wave.scratch.t + at * cuda::TILE, c.dtype, got.data(), C, true);
    for (std::size_t i = 0; i < got.size(); ++i) T.add(got[i], tiles.T[i]);
    read_tile(wave.scratch.p + at * cuda::TILE, c.dtype, got.data(), C);
    for (std::size_t i = 0; i < got.size(); ++i) P.add(got[i], tiles.P[i]);
    const cuda::ChunkVectors& v = wave.scratch.vectors[at];
    for (std::size_t i = 0; i < C; ++i) {
      const std::size_t token = chunk * C + i;
      const double gam = tiles.gam[i] * LOG2E;
      EXPECT_NEAR(v.gam[i], gam, 1e-5 - 1e-6 * gam) << "token " << token;
      rise.add(v.rise[i], tiles.rise[i]);
      end.add(v.end[i], tiles.end[i]);
      beta.add(v.beta[i], token < inputs.beta.size() ? inputs.beta[token] : 0);
      key.add(v.key[i], normalised(d.k, static_cast<std::int64_t>(token)));
      query.add(v.query[i], normalised(d.q, static_cast<std::int64_t>(token)));
    }
  }
  const double limit = c.dtype == FD_BFLOAT16 ? BFLOAT16_LIMIT : FLOAT16_LIMIT;
  EXPECT_LE(T.value(), limit);
  EXPECT_LE(P.value(), limit);
  for (const RelativeError& vector : {rise, end, beta, key, query}) EXPECT_LE(vector.value(), VECTOR_LIMIT);
}

void run(const Case& c, Wave& wave, int sm_count, Schedule schedule = Schedule::forward) {
  const Data d = make_data(c, 1);
  with_call(c, d, [&](const fd_forward_args& args) { return prepare(args, wave, sm_count, schedule); });
  EXPECT_TRUE(wave.guards_intact());
  for (std::size_t slot = 0; slot < wave.chunks.size(); ++slot) {
    if (wave.chunks[slot].sequence >= 0) continue;
    const std::int64_t at = wave.scratch.head(static_cast<int>(slot), 0);
    EXPECT_TRUE(poison(wave.scratch.t + at * cuda::TILE, c.HV * cuda::TILE)) << "slot " << slot;
    EXPECT_TRUE(poison(wave.scratch.p + at * cuda::TILE, c.HV * cuda::TILE)) << "slot " << slot;
    EXPECT_TRUE(poison(wave.scratch.vectors + at, c.HV * static_cast<std::int64_t>(sizeof(cuda::ChunkVectors))))
        << "slot " << slot;
  }
  for (std::int64_t n = 0; n < c.N(); ++n) {
    for (std::int64_t hv = 0; hv < c.HV; ++hv) {
      SCOPED_TRACE("sequence " + std::to_string(n) + ", value head " + std::to_string(hv));
      compare(c, d, wave, n, hv);
    }
  }
}

std::vector<Case> prepare_cases() {
  std::vector<Case> list;
  const auto add = [&](const char* name, std::vector<std::int64_t> lengths, auto change) {
    Case c;
    c.name = name;
    c.lengths = std::move(lengths);
    c.packed = true;
    c.HV = 2;
    c.K = 128;
    c.V = 64;
    c.dtype = FD_BFLOAT16;
    change(c);
    list.push_back(c);
  };
  add("Edges", {130, 0, 1, 63, 65, 0, 0, 0, 64}, [](Case& c) { c.padding = 70, c.H = 2; });
  add("Batch", {70, 70}, [](Case& c) { c.packed = false, c.HV = 1; });
  add("NoTokens", {0, 0}, [](Case& c) { c.packed = false; });
  add("FourValueHeads", {300}, [](Case& c) { c.HV = 4; });
  add("SixValueHeads", {70, 200}, [](Case& c) { c.HV = 6, c.l2norm = true; });
  add("TwoGroupsOfThree", {130}, [](Case& c) { c.H = 2, c.HV = 6; });
  add("CorrelatedKeys", {200}, [](Case& c) { c.keys = Keys::correlated, c.strengths = Strengths::full; });
  add("IdenticalKeys", {200}, [](Case& c) { c.keys = Keys::identical, c.strengths = Strengths::full; });
  add("StrongDecay", {100, 70}, [](Case& c) { c.gates = Gates::strong; });
  add("MixedDecay", {100, 70}, [](Case& c) { c.gates = Gates::mixed, c.HV = 4; });
  add("NoGatesNoStrengths", {100}, [](Case& c) { c.gates = Gates::none, c.strengths = Strengths::none; });
  add("Float16", {100, 70}, [](Case& c) { c.dtype = FD_FLOAT16; });
  add("Float16NormBFloat16Gates", {100, 70},
      [](Case& c) { c.dtype = FD_FLOAT16, c.l2norm = true, c.gate_dtype = c.beta_dtype = FD_BFLOAT16; });
  add("RawGatesLogitsNorm", {100, 70},
      [](Case& c) { c.gates = Gates::raw, c.strengths = Strengths::logit, c.l2norm = true, c.padding = 70; });
  add("RawGatesWithoutBiasNegativeEigenvalues", {100, 70}, [](Case& c) {
    c.gates = Gates::raw, c.strengths = Strengths::logit, c.dt_bias = false, c.l2norm = c.allow_neg_eigval = true;
  });
  return list;
}

class EmulatedPrepare : public ::testing::TestWithParam<Case> {};

TEST_P(EmulatedPrepare, LeavesTheTilesOfAllChunks) {
  for (const int sm_count : {FEW_SMS, SOME_SMS}) {
    Wave wave(GetParam());
    run(GetParam(), wave, sm_count);
  }
}

INSTANTIATE_TEST_SUITE_P(, EmulatedPrepare, ::testing::ValuesIn(prepare_cases()),
                         testing::case_name<::testing::TestParamInfo<Case>>);

TEST(Prepare, TheOrderOfThreadsDoesNotMatter) {
  Case c = prepare_cases()[0];
  c.l2norm = true;
  c.HV = 6;
  Wave expected(c);
  run(c, expected, FEW_SMS);
  for (const Schedule schedule : {Schedule::backward, Schedule::shuffled}) {
    Wave wave(c);
    run(c, wave, SOME_SMS, schedule);
    EXPECT_TRUE(same_bytes(wave.t, expected.t));
    EXPECT_TRUE(same_bytes(wave.p, expected.p));
    EXPECT_TRUE(same_bytes(wave.vectors, expected.vectors));
  }
}

}  // namespace
}  // namespace flashdelta::emulation
