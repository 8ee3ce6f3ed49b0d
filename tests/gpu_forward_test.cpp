// The Hopper forward against the reference. Without such a GPU every test is skipped, with the reason.
// "Small" in a name: worth running under compute-sanitizer (--gtest_filter=*Small*).
#include <gtest/gtest.h>

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "tests/support/compare.hpp"
#include "tests/support/gpu.hpp"

namespace flashdelta::testing {
namespace {

// Relative L2 error of one (sequence, head) beyond the rounding of what is written: bf16 operands, fp32 sums.
constexpr double BFLOAT16_LIMIT = 0.004, FLOAT16_LIMIT = 0.001;

double limit(const Case& c) { return c.dtype == FD_BFLOAT16 ? BFLOAT16_LIMIT : FLOAT16_LIMIT; }

Case sm90_case(const std::string& name, std::vector<std::int64_t> lengths, bool packed) {
  Case c;
  c.name = name;
  c.lengths = std::move(lengths);
  c.packed = packed;
  c.H = 1;
  c.HV = 2;
  c.K = c.V = 128;
  c.dtype = FD_BFLOAT16;
  return c;
}

template <typename Change>
Case with(Case c, Change change) {
  change(c);
  return c;
}

std::vector<Case> sm90_cases() {
  const std::vector<std::int64_t> mixed = {130, 0, 1, 63, 64, 65, 200};
  const auto packed = [&](const char* name) { return sm90_case(name, mixed, true); };
  std::vector<Case> list;
  for (const std::int64_t T : {0, 1, 63, 64, 65, 128, 1000}) {
    list.push_back(sm90_case("Tokens" + std::to_string(T), {T}, false));
  }
  list.push_back(sm90_case("Batch", {150, 150, 150}, false));
  list.push_back(sm90_case("BatchWithoutTokens", {0, 0}, false));
  list.push_back(with(packed("Packed"), [](Case& c) { c.padding = 37; }));
  list.push_back(with(packed("PackedInt32"), [](Case& c) { c.index_dtype = FD_INT32; }));
  list.push_back(with(packed("ManyHeads"), [](Case& c) { c.H = 16, c.HV = 64; }));
  list.push_back(with(packed("ThreeValueBlocks"), [](Case& c) { c.V = 192; }));
  list.push_back(with(packed("OneValueBlock"), [](Case& c) { c.V = 64; }));
  list.push_back(with(packed("Float16"), [](Case& c) { c.dtype = FD_FLOAT16; }));
  list.push_back(with(packed("CorrelatedKeys"), [](Case& c) { c.keys = Keys::correlated, c.strengths = Strengths::full; }));
  list.push_back(with(packed("IdenticalKeys"), [](Case& c) { c.keys = Keys::identical, c.strengths = Strengths::full; }));
  list.push_back(with(packed("StrongDecay"), [](Case& c) { c.gates = Gates::strong; }));
  list.push_back(with(packed("MixedDecay"), [](Case& c) { c.gates = Gates::mixed; }));
  list.push_back(with(packed("NoGatesNoStrengths"), [](Case& c) { c.gates = Gates::none, c.strengths = Strengths::none; }));
  list.push_back(with(packed("RawGatesLogitsNorm"), [](Case& c) {
    c.gates = Gates::raw, c.strengths = Strengths::logit, c.l2norm = true, c.padding = 5;
  }));
  list.push_back(with(packed("SixteenBitGates"), [](Case& c) { c.gate_dtype = c.beta_dtype = FD_BFLOAT16; }));
  list.push_back(with(packed("ValueFirst"), [](Case& c) { c.v_first = true; }));
  list.push_back(with(packed("BFloat16States"), [](Case& c) { c.initial_dtype = c.final_dtype = FD_BFLOAT16; }));
  list.push_back(with(packed("PoolInPlace"), [](Case& c) { c.pool = c.in_place = true; }));
  list.push_back(with(packed("Checkpoints"), [](Case& c) { c.checkpoint_interval = 64; }));
  list.push_back(with(packed("NoStates"), [](Case& c) { c.initial_state = c.final_state = false; }));
  return list;
}

Results on_gpu(const Case& c, const Data& d, How how = How::null_stream) {
  Gpu gpu(how);
  return forward(c, d, {.backend = FD_BACKEND_SM90, .remote = &gpu});
}

class Sm90 : public ::testing::Test {
 protected:
  void SetUp() override {
    const std::string reason = why_not(FD_BACKEND_SM90, "sm90");
    if (!reason.empty()) GTEST_SKIP() << reason;
  }
};

class Sm90ForwardCase : public Sm90, public ::testing::WithParamInterface<Case> {};

TEST_P(Sm90ForwardCase, SmallMatchesTheReference) {
  const Case& c = GetParam();
  const Data d = make_data(c, 1);
  expect_close(c, d, on_gpu(c, d), forward(c, d, reference), limit(c));
}

TEST_P(Sm90ForwardCase, IsBitwiseTheSameAgainOnAStreamAndInAGraphWhoseInputsChange) {
  const Case& c = GetParam();
  const Data d = make_data(c, 2);
  const Results first = on_gpu(c, d);
  for (const How how : {How::null_stream, How::side_stream, How::graph, How::graph_changed}) {
    expect_same_bits(on_gpu(c, d, how), first);
  }
}

INSTANTIATE_TEST_SUITE_P(, Sm90ForwardCase, ::testing::ValuesIn(sm90_cases()), case_name<::testing::TestParamInfo<Case>>);

// Few heads run with half of the values per block, many with all of them: heads of the same data must agree in every bit.
TEST_F(Sm90, BothBlockShapesGiveTheSameBits) {
  const Case many = with(sm90_case("", {300, 70, 300}, true), [](Case& c) { c.H = 16, c.HV = 64; });
  const Data d = make_data(many, 3);
  const Results together = on_gpu(many, d);
  for (std::int64_t n = 0; n < many.N(); ++n) {
    const Case c = alone(many, n);
    const Data own = alone(many, d, n);
    const Results got = on_gpu(c, own);
    const Array &all = together.at("o").values, &o = got.at("o").values;
    const std::int64_t begin = d.first_token(many, n) * all.inner(2);
    ASSERT_EQ(static_cast<std::int64_t>(o.x.size()), many.lengths[static_cast<std::size_t>(n)] * all.inner(2));
    std::int64_t different = 0;
    for (std::size_t i = 0; i < o.x.size(); ++i) different += o.x[i] != all.x[static_cast<std::size_t>(begin) + i] ? 1 : 0;
    EXPECT_EQ(different, 0) << "sequence " << n;
  }
}

TEST_F(Sm90, BothBlockShapesAreBitwiseTheSameTwoHundredTimes) {
  for (const std::int64_t HV : {2, 64}) {
    Case c = sm90_case("", {300, 0, 65}, true);
    c.H = 2, c.HV = HV, c.l2norm = true, c.checkpoint_interval = 64;
    const Data d = make_data(c, 6);
    const Results first = on_gpu(c, d);
    for (int i = 0; i < 200; ++i) expect_same_bits(on_gpu(c, d), first);
  }
}

TEST_F(Sm90, RandomPackedBatchesMatchTheReference) {
  std::mt19937_64 random(4);
  for (int i = 0; i < 12; ++i) {
    Case c = sm90_case("", {}, true);
    const auto sequences = 1 + random() % 6;
    for (std::size_t n = 0; n < sequences; ++n) c.lengths.push_back(static_cast<std::int64_t>(random() % 400));
    c.padding = static_cast<std::int64_t>(random() % 70);
    c.HV = random() % 2 == 0 ? 3 : 1;
    c.v_first = random() % 2 == 0;
    const Data d = make_data(c, 5 + static_cast<std::uint64_t>(i));
    SCOPED_TRACE(describe(c));
    expect_close(c, d, on_gpu(c, d), forward(c, d, reference), limit(c));
  }
}

}  // namespace
}  // namespace flashdelta::testing
