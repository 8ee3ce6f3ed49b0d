// Errors of the Hopper kernels on the data on which the published kernels were measured, and what the best of those reach.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "dtype.hpp"
#include "tests/sm90_cases.hpp"
#include "tests/support/call.hpp"

namespace flashdelta::testing {

enum class AccuracyData { random, correlated, decay };

// The smallest error of FlashQLA 0.1.3, FlashInfer 0.7.2 and flash-linear-attention 0.6.0 in bf16 on an H200: worst relative
// L2 of one (sequence, value head) against float64.
inline const std::map<AccuracyData, std::map<std::string, double>> best_published_errors = {{AccuracyData::random,
                                                                                             {{"o", .0040},
                                                                                              {"final_state", .0038},
                                                                                              {"dq", .0041},
                                                                                              {"dk", .0055},
                                                                                              {"dv", .0037},
                                                                                              {"dg", .0069},
                                                                                              {"dbeta", .0043},
                                                                                              {"dinitial_state", .0025}}},
                                                                                            {AccuracyData::correlated,
                                                                                             {{"o", .0037},
                                                                                              {"final_state", .0037},
                                                                                              {"dq", .0040},
                                                                                              {"dk", .0056},
                                                                                              {"dv", .0095},
                                                                                              {"dg", .0090},
                                                                                              {"dbeta", .0154},
                                                                                              {"dinitial_state", .0009}}},
                                                                                            {AccuracyData::decay,
                                                                                             {{"o", .0033},
                                                                                              {"final_state", .0028},
                                                                                              {"dq", .0035},
                                                                                              {"dk", .0037},
                                                                                              {"dv", .0030},
                                                                                              {"dg", .0037},
                                                                                              {"dbeta", .0034},
                                                                                              {"dinitial_state", .0009}}}};

// Unit queries and keys, values and states of order 1; `correlated`: keys near a common one, strengths near 1, hardly any
// decay; `decay`: up to e^-16 and more per token.
inline Data accuracy_data(const Case& c, AccuracyData kind, std::uint64_t seed) {
  Data d = make_data(c, seed);
  std::mt19937_64 random(seed);
  std::normal_distribution<double> normal;
  std::uniform_real_distribution<double> uniform;
  const auto small = [&](double x) {
    const auto f = static_cast<float>(x);
    return static_cast<double>(c.dtype == FD_BFLOAT16 ? bfloat16_to_float(float_to_bfloat16(f))
                                                      : float16_to_float(float_to_float16(f)));
  };
  const auto fill = [&](Array& a, double scale) {
    for (double& x : a.x) x = scale * normal(random);
  };
  const auto round_all = [&](Array& a) {
    for (double& x : a.x) x = small(x);
  };
  const auto normalise = [&](Array& a) {
    for (auto row = a.x.begin(); row != a.x.end(); row += c.K) {
      double squares = 0;
      for (auto x = row; x != row + c.K; ++x) squares += *x * *x;
      for (auto x = row; x != row + c.K; ++x) *x = small(*x / std::sqrt(squares));
    }
  };
  fill(d.q, 1);
  normalise(d.q);
  fill(d.k, 1);
  if (kind == AccuracyData::correlated) {
    std::vector<double> common(static_cast<std::size_t>(c.H * c.K));
    for (double& x : common) x = normal(random);
    for (std::size_t i = 0; i < d.k.x.size(); ++i) d.k.x[i] = common[i % common.size()] + 0.1 * d.k.x[i];
  }
  normalise(d.k);
  for (auto [array, scale] : {std::pair{&d.v, 1.0}, {&d.do_, 1.0}}) {
    fill(*array, scale);
    round_all(*array);
  }
  for (auto [array, scale] : {std::pair{&d.initial_state, 1.0}, {&d.dfinal_state, 0.125}}) {
    fill(*array, scale);
    for (double& x : array->x) x = static_cast<float>(x);
  }
  std::vector<double> strongest(static_cast<std::size_t>(c.HV));
  for (double& x : strongest) x = uniform(random);
  for (std::size_t i = 0; i < d.g.x.size(); ++i) {
    const std::size_t head = i % static_cast<std::size_t>(c.HV);
    double g = head % 4 == 0 ? 0 : -std::log1p(std::exp(-normal(random))) / 16;
    double beta = 1 / (1 + std::exp(-normal(random)));
    if (kind == AccuracyData::correlated) {
      g *= 0.01;
      beta = 0.9 + 0.1 * beta;
    }
    if (kind == AccuracyData::decay) g = -strongest[head] * 16 * std::log1p(std::exp(normal(random)));
    d.g.x[i] = static_cast<float>(g);
    d.beta.x[i] = static_cast<float>(beta);
  }
  return d;
}

// Worst relative L2 error of one (sequence, head), rounding of the output included.
inline double worst_error(const Case& c, const Data& d, const Array& got, const Array& want, bool state) {
  double worst = 0;
  const std::int64_t heads = got.shape[state ? 1 : 2], inner = got.inner(state ? 2 : 3);
  for (std::int64_t n = 0; n < c.N(); ++n) {
    const std::int64_t rows = state ? 1 : c.lengths[static_cast<std::size_t>(n)], first = state ? n : d.first_token(c, n);
    for (std::int64_t head = 0; head < heads; ++head) {
      double error = 0, norm = 0;
      for (std::int64_t row = first; row < first + rows; ++row) {
        for (std::int64_t i = 0; i < inner; ++i) {
          const auto at = static_cast<std::size_t>((row * heads + head) * inner + i);
          error += (got.x[at] - want.x[at]) * (got.x[at] - want.x[at]);
          norm += want.x[at] * want.x[at];
        }
      }
      const double relative = std::sqrt(error / norm);
      worst = relative <= worst ? worst : relative;  // NaN stays
    }
  }
  return worst;
}

using Errors = std::map<std::string, double>;

// Of all results of a forward and a backward call.
inline Errors accuracy_errors(const Case& c, const Data& d, const Setting& setting) {
  Errors errors;
  const Results forward_got = forward(c, d, setting), forward_want = forward(c, d, reference);
  const Results backward_got = backward(c, d, setting), backward_want = backward(c, d, reference);
  for (const auto& [got, want] : {std::pair{&forward_got, &forward_want}, {&backward_got, &backward_want}}) {
    for (const auto& [name, result] : *got) {
      errors[name] = worst_error(c, d, result.values, want->at(name).values, name.find("state") != std::string::npos);
    }
  }
  return errors;
}

// Medians over seeds 1 to `seeds`.
inline Errors median_errors(const Case& c, AccuracyData kind, int seeds, const Setting& setting) {
  std::map<std::string, std::vector<double>> all;
  for (int seed = 1; seed <= seeds; ++seed) {
    const Data d = accuracy_data(c, kind, static_cast<std::uint64_t>(seed));
    for (const auto& [name, error] : accuracy_errors(c, d, setting)) all[name].push_back(error);
  }
  Errors medians;
  for (auto& [name, errors] : all) {
    std::sort(errors.begin(), errors.end());
    medians[name] = errors[errors.size() / 2];
  }
  return medians;
}

}  // namespace flashdelta::testing
