#include "tests/support/compare.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "cpu/vector.hpp"

namespace flashdelta::testing {
namespace {

// Largest relative error of rounding one element, and largest relative L2 error of rounding many.
struct Rounding {
  double one, many;
};

Rounding rounding(fd_dtype type) {
  switch (type) {
    case FD_BFLOAT16: return {0x1p-8, 0.0025};
    case FD_FLOAT16: return {0x1p-11, 0.0025 / 8};
    default: return {0, 0};
  }
}

// Per element, below this error counts for nothing: there fp32 (or fp16) has no relative precision left, and sums of such
// values none either.
double floor_of(fd_dtype type) { return type == FD_FLOAT16 ? 0x1p-25 : 1e-35; }

constexpr double many_elements = 100;

// Where fewer than this many elements share the norm, or a sequence has a single token, the result is in effect one sum (a
// gate's gradient, the product of a lone query and key) that may cancel: the limit is ten times as large.
constexpr double few_elements = 16;

// The values of one (sequence, head), gathered.
struct Group {
  std::vector<double> got, want;

  void add(const Array& got_, const Array& want_, std::int64_t begin, std::int64_t count) {
    got.insert(got.end(), got_.x.begin() + begin, got_.x.begin() + begin + count);
    want.insert(want.end(), want_.x.begin() + begin, want_.x.begin() + begin + count);
  }

  // Error over limit; above 1 is wrong.
  double excess(double limit, fd_dtype type) const {
    double error = 0, squares = 0, fourth_powers = 0;
    for (std::size_t i = 0; i < got.size(); ++i) {
      const double square = want[i] * want[i];
      error += (got[i] - want[i]) * (got[i] - want[i]);
      squares += square;
      fourth_powers += square * square;
    }
    if (error == 0) return 0;
    if (!std::isfinite(error)) return INFINITY;
    // How many elements share the norm: errors average out only over many.
    const double sharing = fourth_powers == 0 ? 0 : squares * squares / fourth_powers;
    const bool many = sharing >= many_elements;
    if (sharing < few_elements) limit *= 10;
    const Rounding r = rounding(type);
    const double allowed = (limit + (many ? r.many : r.one)) * std::sqrt(squares);
    return std::sqrt(error) / (allowed + floor_of(type) * std::sqrt(static_cast<double>(got.size())));
  }
};

bool is_state(const std::string& name) { return name.find("state") != std::string::npos || name == "checkpoints"; }

void expect_result_close(const Case& c, const Data& d, const std::string& name, const Result& got, const Result& want,
                         double limit) {
  ASSERT_EQ(got.values.shape, want.values.shape) << name;
  double worst = 0;
  std::string where;
  const auto judge = [&](const Group& group, std::int64_t n, std::int64_t head, std::int64_t tokens) {
    const double excess = group.excess(tokens == 1 ? 10 * limit : limit, got.dtype);
    if (excess <= worst) return;
    worst = excess;
    where = "sequence or row " + std::to_string(n) + ", head " + std::to_string(head);
  };
  const Array &g = got.values, &w = want.values;
  if (g.shape.size() == 1) {  // [HV], taken together
    Group group;
    group.add(g, w, 0, g.shape[0]);
    judge(group, 0, 0, c.T());
  } else if (is_state(name)) {  // [N or more, HV, .., ..]
    for (std::int64_t row = 0; row < g.shape[0]; ++row) {
      if (std::isnan(w.x[static_cast<std::size_t>(row * w.inner(1))])) continue;  // nothing was to be written
      for (std::int64_t head = 0; head < c.HV; ++head) {
        Group group;
        group.add(g, w, (row * c.HV + head) * g.inner(2), g.inner(2));
        judge(group, row, head, c.T());
      }
    }
  } else {  // [B, T, heads, ..]
    const std::int64_t heads = g.shape[2], width = g.inner(3);
    for (std::int64_t n = 0; n < c.N(); ++n) {
      const std::int64_t first = d.first_token(c, n), length = c.lengths[static_cast<std::size_t>(n)];
      for (std::int64_t head = 0; head < heads; ++head) {
        Group group;
        for (std::int64_t t = 0; t < length; ++t) group.add(g, w, ((first + t) * heads + head) * width, width);
        judge(group, n, head, length);
      }
    }
    const auto padding = g.x.end() - (c.packed ? c.padding : 0) * heads * width;
    EXPECT_TRUE(std::all_of(padding, g.x.end(), [](double x) { return x == 0; }))
        << name << " is not zero past the last sequence";
  }
  EXPECT_LE(worst, 1) << name << " of " << c.name << ": error is " << worst << " times its limit (fp32: " << limit << ") at "
                      << where;
}

}  // namespace

void expect_close(const Case& c, const Data& d, const Results& got, const Results& want, double limit) {
  ASSERT_EQ(got.size(), want.size());
  for (const auto& [name, result] : got) {
    ASSERT_TRUE(want.contains(name)) << name;
    expect_result_close(c, d, name, result, want.at(name), c.hard() ? 10 * limit : limit);
  }
}

void expect_same_bits(const Results& got, const Results& want) {
  ASSERT_EQ(got.size(), want.size());
  for (const auto& [name, result] : got) {
    ASSERT_TRUE(want.contains(name)) << name;
    EXPECT_TRUE(same_bits(result.values, want.at(name).values)) << name << " differs";
  }
}

void for_each_cpu_target(const std::function<void(fd_backend)>& body) {
  static bool printed = false;
  int targets = 0;
  for (const VectorKernels* const* target = vector_targets(); *target != nullptr; ++target, ++targets) {
    const ::testing::ScopedTrace trace(__FILE__, __LINE__, std::string("vector target ") + (*target)->name);
    if (!printed) std::printf("vector target: %s\n", (*target)->name);
    use_vector_target(*target);
    body(FD_BACKEND_CPU);
  }
  use_vector_target(nullptr);
  printed = true;
  EXPECT_GT(targets, 0);
}

}  // namespace flashdelta::testing
