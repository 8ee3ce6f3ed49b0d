// What the tensors g and beta of a call mean: log decay and write strength of a token, and their derivatives.
// Real is the type of the arithmetic: double in the reference, float in the chunked backend.
#pragma once

#include <cmath>
#include <cstdint>

#include "dtype.hpp"
#include "flashdelta/flashdelta.h"

namespace flashdelta {

// 1 / (1 + e^-x) without overflow.
template <typename Real>
Real sigmoid(Real x) {
  const Real e = std::exp(-std::fabs(x));
  return (x >= 0 ? Real(1) : e) / (1 + e);
}

// log(1 + e^x) without overflow.
template <typename Real>
Real softplus(Real x) {
  return std::fmax(x, Real(0)) + std::log1p(std::exp(-std::fabs(x)));
}

// One value head's log decay as a function of an element x of the tensor g (without the tensor: any x).
template <typename Real>
struct LogDecay {
  fd_gate kind;
  Real rate;  // exp(A_log)
  Real bias;  // dt_bias

  Real operator()(Real x) const {
    if (kind == FD_GATE_RAW) return -rate * softplus(x + bias);
    return kind == FD_GATE_LOG ? x : Real(0);
  }

  // By x; with raw gates also by dt_bias. (By A_log it is the log decay itself.)
  Real derivative(Real x) const { return kind == FD_GATE_RAW ? -rate * sigmoid(x + bias) : Real(1); }
};

// Args: fd_forward_args, fd_backward_args or fd_step_args in normal form.
template <typename Real, typename Args>
LogDecay<Real> log_decay(const Args& args, std::int64_t value_head) {
  const fd_problem& p = *args.problem;
  if (p.gate != FD_GATE_RAW) return {p.gate, 0, 0};
  const double a = load(args.A_log.data, p.A_log_dtype, value_head * args.A_log.stride[0]);
  const double bias =
      args.dt_bias.data == nullptr ? 0 : load(args.dt_bias.data, p.dt_bias_dtype, value_head * args.dt_bias.stride[0]);
  return {p.gate, std::exp(static_cast<Real>(a)), static_cast<Real>(bias)};
}

// The write strength as a function of an element x of the tensor beta (without the tensor: any x).
template <typename Real>
struct WriteStrength {
  fd_beta kind;
  Real largest;  // 1, or 2 with allow_neg_eigval

  explicit WriteStrength(const fd_problem& p) : kind(p.beta), largest(p.allow_neg_eigval != 0 ? 2 : 1) {}

  Real operator()(Real x) const {
    if (kind == FD_BETA_LOGIT) return largest * sigmoid(x);
    return kind == FD_BETA_VALUE ? x : Real(1);
  }

  Real derivative(Real x) const { return kind == FD_BETA_LOGIT ? largest * sigmoid(x) * sigmoid(-x) : Real(1); }
};

}  // namespace flashdelta
