// The tests' own tools: what they must notice, they notice.
#include <gtest/gtest-spi.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <vector>

#include "dtype.hpp"
#include "tests/support/compare.hpp"

namespace flashdelta::testing {
namespace {

const Case small{.name = "small", .lengths = {20, 20}, .packed = true, .padding = 3, .HV = 2};

// Results of the reference with element `at` of o replaced.
Results with_output(const Data& d, std::size_t at, double value) {
  Results results = forward(small, d, reference);
  results["o"].values.x[at] = value;
  return results;
}

TEST(Support, NanInfinityAndErrorsAreNoticed) {
  const Data d = make_data(small, 1);
  const Results want = forward(small, d, reference);
  expect_close(small, d, want, want, forward_limit);
  const double nan = std::numeric_limits<double>::quiet_NaN(), infinity = std::numeric_limits<double>::infinity();
  for (const double wrong : {nan, infinity, want.at("o").values.x[40] + 1e-3}) {
    const Results got = with_output(d, 40, wrong);
    EXPECT_NONFATAL_FAILURE(expect_close(small, d, got, want, forward_limit), "o of small");
  }
  const Results got = with_output(d, want.at("o").values.x.size() - 1, 1e-30);
  EXPECT_NONFATAL_FAILURE(expect_close(small, d, got, want, forward_limit), "not zero past the last sequence");
}

TEST(Support, AnErrorInOneHeadIsNotHiddenByTheOthers) {
  const Data d = make_data(small, 1);
  Results want = forward(small, d, reference), got = want;
  for (double& x : want["o"].values.x) x *= 1e-6;
  for (std::size_t i = 0; i < static_cast<std::size_t>(small.V); ++i) want["o"].values.x[i] *= 1e12;  // one loud head
  got["o"] = want["o"];
  got["o"].values.x[static_cast<std::size_t>(small.V)] += 1e-8;  // the other head
  EXPECT_NONFATAL_FAILURE(expect_close(small, d, got, want, forward_limit), "head 1");
}

TEST(Support, WritesOutsideAndIntoGapsAreNoticed) {
  const std::vector<std::int64_t> shape = {2, 3, 4};
  for (const fd_dtype type : {FD_FLOAT32, FD_BFLOAT16, FD_FLOAT16, FD_FLOAT64}) {
    const std::vector<std::int64_t> strides = Tensor::gapped(shape);
    for (const std::int64_t at : {std::int64_t{-1}, std::int64_t{4}, strides[0], strides[0] + 2 * strides[1] + 4}) {
      Tensor t(type, shape, strides, 1);
      t.remember();
      t.allow_row(0);
      EXPECT_TRUE(t.intact());
      store(t.view().data, type, 0, 1);
      EXPECT_TRUE(t.intact()) << "row 0 may be written";
      store(t.view().data, type, at, 1);
      EXPECT_FALSE(t.intact()) << name_of(type) << ", element " << at;
    }
  }
}

TEST(Support, PoisonIsNanInEveryType) {
  for (const fd_dtype type : {FD_FLOAT32, FD_BFLOAT16, FD_FLOAT16, FD_FLOAT64}) {
    const Tensor t(type, {3}, {1});
    for (const double x : t.read().x) EXPECT_TRUE(x != x) << name_of(type);
  }
}

}  // namespace
}  // namespace flashdelta::testing
