// Tiles of the chunked backward; see backward_chunk.hpp.
#include "cpu/backward_chunk.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/gates.hpp"
#include "cpu/tiles.hpp"
#include "dtype.hpp"

namespace flashdelta {
namespace {

constexpr std::int64_t C = kBackwardChunk;

// A log decay below this is worth as much as this one: e^-88 is 0 in the kernels. It keeps sums of them finite and precise.
constexpr float kLeastLogDecay = -88;

}  // namespace

BackwardShape::BackwardShape(const fd_problem& p)
    : K(p.K),
      V(p.V),
      G(p.HV / p.H),
      K_row(round_up(p.K, 16)),
      blocks((p.V + kBackwardValueBlock - 1) / kBackwardValueBlock),
      width(round_up((p.V + blocks - 1) / blocks, 16)) {}

std::int64_t BackwardShape::columns(std::int64_t block) const { return std::min(width, V - block * width); }

KeyChunk::KeyChunk(const BackwardShape& s, Arena& m)
    : token(0),
      rows(0),
      qk(m.take<float>(2 * C * s.K_row)),
      qk_t(m.take<float>(s.K * 2 * C)),
      gram(m.take<float>(2 * C * C)),
      qk_diagonal(m.take<float>(C)),
      rstd(m.take<float>(2 * C)) {}

HeadChunk::HeadChunk(const BackwardShape&, Arena& m)
    : log_decay(m.take<float>(C)),
      beta(m.take<float>(C)),
      read_decay(m.take<float>(2 * C)),
      write_scale(m.take<float>(C)),
      decay(m.take<float>(C * C)),
      overlap(m.take<float>(C * C)),
      write_overlap(m.take<float>(C * C)),
      read(m.take<float>(C * C)) {}

Partial::Partial(const BackwardShape& s, Arena& m)
    : read_t(m.take<float>(s.K * 2 * C)),
      write_t(m.take<float>(s.K * C)),
      within(m.take<float>(2 * C * C)),
      dbeta(m.take<float>(C)),
      state_dot(m.take<float>(16)) {}

std::int64_t Partial::size(const BackwardShape& s) {
  Arena counted;
  const Partial partial(s, counted);
  return static_cast<std::int64_t>(counted.used() / sizeof(float));
}

void Partial::add(const BackwardShape& s, const Partial& other) const {
  const std::int64_t n = size(s);
  for (std::int64_t i = 0; i < n; ++i) read_t[i] += other.read_t[i];
}

KeyGradient::KeyGradient(const BackwardShape& s, Arena& m)
    : read_t(m.take<float>(s.K * 2 * C)), within(m.take<float>(2 * C * C)), dqk(m.take<float>(2 * C * s.K_row)) {}

BlockScratch::BlockScratch(const BackwardShape& s, Arena& m)
    : block(m.take<float>(2 * C * s.width)),
      scaled(m.take<float>(2 * C * s.width)),
      scaled_t(m.take<float>(s.width * 2 * C)),
      r_t(m.take<float>(s.width * C)),
      vectors(m.take<float>(8 * (2 * C + s.K_row))),
      state(m.take<float>(kStateRows * s.K_row)) {}

// ------------------------------------------------------------------------------------------------------- tensors and tiles

void BackwardKernels::load_state(const ValueBlock& b, const fd_tensor& states, fd_dtype type, std::int64_t row, float* state,
                                 const BlockScratch& s) const {
  flashdelta::load_state(vector_, p_, states, type, row, b.value_head, b.block * shape_.width, shape_.columns(b.block),
                         state, shape_.width, s.state);
}

void BackwardKernels::store_state(const ValueBlock& b, const fd_tensor& states, fd_dtype type, std::int64_t row,
                                  const float* state, const BlockScratch& s) const {
  flashdelta::store_state(vector_, p_, state, shape_.width, states, type, row, b.value_head, b.block * shape_.width,
                          shape_.columns(b.block), s.state);
}

// ---------------------------------------------------------------------------------------------------------- chunk and head

void BackwardKernels::load_keys(const Sequence& sequence, std::int64_t query_head, std::int64_t chunk, bool with_q,
                                KeyChunk& x) const {
  const std::int64_t K = shape_.K, row = shape_.K_row, first = with_q ? 0 : C;
  x.token = sequence.begin + chunk * C;
  x.rows = std::min(C, sequence.length - chunk * C);
  float* const k = x.qk + C * row;
  load_tokens(vector_, args_.k, p_.dtype, sequence.batch, x.token, query_head, x.rows, 0, K, k, row, C);
  if (with_q) load_tokens(vector_, args_.q, p_.dtype, sequence.batch, x.token, query_head, x.rows, 0, K, x.qk, row, C);
  if (p_.qk_l2norm != 0) {
    vector_.normalise(2 * C - first, K, x.qk + first * row, row, static_cast<float>(p_.l2norm_eps), x.rstd + first);
  }
  vector_.transpose(2 * C - first, K, x.qk + first * row, row, x.qk_t + first, 2 * C);
  vector_.gemm({.m = 2 * C - first,
                .n = C,
                .k = K,
                .a = x.qk + first * row,
                .a_row = row,
                .a_column = 1,
                .b = x.qk_t + C,
                .b_row = 2 * C,
                .c = x.gram + first * C,
                .c_row = C});
  if (!with_q) return;
  // The diagonal of dP .* Q K^T would cancel in dg, but only up to rounding: it must not take part.
  for (std::int64_t i = 0; i < C; ++i) {
    x.qk_diagonal[i] = x.gram[i * C + i];
    x.gram[i * C + i] = 0;
  }
}

void BackwardKernels::load_head(const Sequence& sequence, std::int64_t value_head, const KeyChunk& keys, bool for_reverse,
                                HeadChunk& x) const {
  load_gates(args_, log_decay<float>(args_, value_head), sequence.batch, keys.token, value_head, keys.rows, C, x.log_decay,
             x.beta);
  for (std::int64_t i = 0; i < C; ++i) x.log_decay[i] = std::max(x.log_decay[i], kLeastLogDecay);
  float* const from_start = x.read_decay + C;
  vector_.exp(C, x.log_decay, x.read_decay);
  vector_.decay_products(C, x.read_decay, x.decay, C, from_start);
  for (std::int64_t i = 0; i < C; ++i) {
    x.read_decay[i] = static_cast<float>(p_.scale) * from_start[i];
    from_start[i] = -from_start[i];
    x.write_scale[i] = x.beta[i] * x.write_decay()[i];
  }
  vector_.multiply_lower(C, 1, false, x.decay, C, keys.gram + C * C, C, x.overlap, C);
  if (for_reverse) {
    vector_.multiply_lower(C, static_cast<float>(p_.scale), true, x.decay, C, keys.gram, C, x.read, C);
    for (std::int64_t i = 0; i < C; ++i) x.read[i * C + i] = static_cast<float>(p_.scale) * keys.qk_diagonal[i];
  } else {
    vector_.scale_columns(C, C, x.beta, x.overlap, C, nullptr, 0, x.write_overlap, C);
  }
}

// ------------------------------------------------------------------------------------------------------------- value block

void BackwardKernels::advance(const ValueBlock& b, const KeyChunk& keys, const HeadChunk& head, const float* state, float* r,
                              float* next, const BlockScratch& s) const {
  const std::int64_t width = shape_.width, n = shape_.padded_columns(b.block), K = shape_.K;
  const float* const k = keys.qk + C * shape_.K_row;
  // R = (I + overlap diag(beta))^-1 (V - e^gamma .* K S)
  load_tokens(vector_, args_.v, p_.dtype, b.sequence.batch, keys.token, b.value_head, keys.rows, b.block * width,
              shape_.columns(b.block), r, width, C);
  vector_.gemm({.m = C,
                .n = n,
                .k = K,
                .a = k,
                .a_row = shape_.K_row,
                .a_column = 1,
                .b = state,
                .b_row = width,
                .c = r,
                .c_row = width,
                .keep = 1,
                .row_scale = head.read_decay + C});
  vector_.solve({.m = C, .n = n, .a = head.write_overlap, .a_row = C, .a_column = 1, .x = r, .x_row = width});
  if (next == nullptr) return;
  // S1 = e^gamma_C S + K^T (beta e^(gamma_C - gamma) .* R)
  if (next != state) std::memcpy(next, state, static_cast<std::size_t>(shape_.state()) * sizeof(float));
  vector_.scale_rows(C, n, head.write_scale, r, width, nullptr, 0, s.block, width);
  vector_.gemm({.m = K,
                .n = n,
                .k = C,
                .a = k,
                .a_row = 1,
                .a_column = shape_.K_row,
                .b = s.block,
                .b_row = width,
                .c = next,
                .c_row = width,
                .keep = head.chunk_decay()});
}

void BackwardKernels::reverse(const ValueBlock& b, const KeyChunk& keys, const HeadChunk& head, const float* state,
                              const float* r, float* dstate, const Partial& out, const BlockScratch& s) const {
  const std::int64_t width = shape_.width, n = shape_.padded_columns(b.block), columns = shape_.columns(b.block);
  const std::int64_t K = shape_.K;
  float* const do_ = s.block;
  float* const dv = s.block + C * width;
  if (args_.do_.data != nullptr) {
    load_tokens(vector_, args_.do_, p_.dtype, b.sequence.batch, keys.token, b.value_head, keys.rows, b.block * width,
                columns, do_, width, C);
  } else {
    std::fill_n(do_, C * width, 0.0f);
  }

  // dV' = e^(gamma_C - gamma) .* (K dS1) + P^T do
  vector_.gemm({.m = C,
                .n = n,
                .k = K,
                .a = keys.qk + C * shape_.K_row,
                .a_row = shape_.K_row,
                .a_column = 1,
                .b = dstate,
                .b_row = width,
                .c = dv,
                .c_row = width,
                .row_scale = head.write_decay()});
  vector_.gemm({.m = C,
                .n = n,
                .k = C,
                .a = head.read,
                .a_row = 1,
                .a_column = C,
                .b = do_,
                .b_row = width,
                .c = dv,
                .c_row = width,
                .keep = 1,
                .a_part = Part::upper});
  vector_.row_dots(C, n, dv, width, r, width, 0, out.dbeta);
  // dv = diag(beta) (I + overlap^T diag(beta))^-1 dV'
  vector_.solve({.m = C,
                 .n = n,
                 .a = head.overlap,
                 .a_row = 1,
                 .a_column = C,
                 .x = dv,
                 .x_row = width,
                 .row_scale = head.beta,
                 .part = Part::upper});
  if (args_.dv.data != nullptr) {
    store_tokens(vector_, dv, width, args_.dv, p_.dtype, b.sequence.batch, keys.token, b.value_head, keys.rows,
                 b.block * width, columns);
  }

  // Both tiles decayed to the chunk's start, one below the other: what reads the state, and what dS takes up.
  vector_.scale_rows(2 * C, n, head.read_decay, s.block, width, nullptr, 0, s.scaled, width);
  vector_.transpose(2 * C, n, s.scaled, width, s.scaled_t, 2 * C);
  vector_.transpose(C, n, r, width, s.r_t, C);
  vector_.gemm({.m = K,
                .n = 2 * C,
                .k = n,
                .a = state,
                .a_row = width,
                .a_column = 1,
                .b = s.scaled_t,
                .b_row = 2 * C,
                .c = out.read_t,
                .c_row = 2 * C});
  vector_.gemm({.m = K,
                .n = C,
                .k = n,
                .a = dstate,
                .a_row = width,
                .a_column = 1,
                .b = s.r_t,
                .b_row = C,
                .c = out.write_t,
                .c_row = C});
  vector_.gemm({.m = 2 * C,
                .n = C,
                .k = n,
                .a = s.block,
                .a_row = width,
                .a_column = 1,
                .b = s.r_t,
                .b_row = C,
                .c = out.within,
                .c_row = C});
  float* const row_dots = s.vectors;
  vector_.row_dots(K, n, dstate, width, state, width, 0, row_dots);
  double dot = 0;
  for (std::int64_t i = 0; i < K; ++i) dot += static_cast<double>(row_dots[i]);
  std::fill_n(out.state_dot, 16, 0.0f);
  out.state_dot[0] = static_cast<float>(dot);

  // dS = e^gamma_C dS1 + Q^T (scale e^gamma .* do) - K^T (e^gamma .* dv)
  vector_.gemm({.m = K,
                .n = n,
                .k = 2 * C,
                .a = keys.qk,
                .a_row = 1,
                .a_column = shape_.K_row,
                .b = s.scaled,
                .b_row = width,
                .c = dstate,
                .c_row = width,
                .keep = head.chunk_decay()});
}

// --------------------------------------------------------------------------------------------------------------- gradients

void BackwardKernels::finish_head(const Sequence& sequence, std::int64_t value_head, const KeyChunk& keys,
                                  const HeadChunk& head, const Partial& sum, bool first, const KeyGradient& out,
                                  double* parameter_sums, const BlockScratch& s) const {
  const std::int64_t K = shape_.K;
  float* const dp = sum.within;
  float* const x = sum.within + C * C;
  float* const read_dots = s.vectors;           // [2C]: <q_i, S do_i>, <k_i, S dU_i>, decayed
  float* const write_dots = read_dots + 2 * C;  // [C]
  float* const row_sums = write_dots + C;       // [2C]: of dP .* Q K^T and of X diag(beta) .* K K^T
  float* const column_sums = row_sums + 2 * C;  // [C]: of dP .* Q K^T
  float* const overlap_sums = column_sums + C;  // [C]: of X .* K K^T

  // dP without beta on its columns, and X; then both with it (the second is -E).
  vector_.multiply_lower(C, static_cast<float>(p_.scale), true, head.decay, C, dp, C, dp, C);
  vector_.multiply_lower(C, 1, false, head.decay, C, x, C, x, C);
  vector_.column_dots(C, C, x, C, keys.gram + C * C, C, 0, overlap_sums);
  vector_.scale_columns(2 * C, C, head.beta, dp, C, nullptr, 0, dp, C);

  vector_.column_dots(K, 2 * C, sum.read_t, 2 * C, keys.qk_t, 2 * C, 0, read_dots);
  vector_.column_dots(K, C, sum.write_t, C, keys.qk_t + C, 2 * C, 0, write_dots);
  vector_.row_dots(2 * C, C, dp, C, keys.gram, C, 0, row_sums);
  vector_.column_dots(C, C, dp, C, keys.gram, C, 0, column_sums);

  const LogDecay<float> log_decay_of = log_decay<float>(args_, value_head);
  const WriteStrength<float> strength_of(p_);
  const auto element = [&](const fd_tensor& x, fd_dtype type, std::int64_t t) {
    return x.data == nullptr ? 0.0f : static_cast<float>(load(address(x, type, sequence.batch, t, value_head, 0), type, 0));
  };
  // dg_t = sum over i >= t of a_i, plus sum over j < t of w_j, plus e^gamma_C <dS1, S>
  double dlog_decay[C];
  double later = 0;
  for (std::int64_t i = C - 1; i >= 0; --i) {
    later += static_cast<double>(read_dots[i]) + static_cast<double>(read_dots[C + i]) + static_cast<double>(row_sums[i]) -
             static_cast<double>(row_sums[C + i]) - static_cast<double>(column_sums[i]) +
             static_cast<double>(head.beta[i]) * static_cast<double>(overlap_sums[i]);
    dlog_decay[i] = later;
  }
  double earlier = static_cast<double>(head.chunk_decay()) * static_cast<double>(sum.state_dot[0]);
  double dA_log = 0, ddt_bias = 0;
  for (std::int64_t i = 0; i < keys.rows; ++i) {
    dlog_decay[i] += earlier;
    earlier += static_cast<double>(head.write_scale[i]) * static_cast<double>(write_dots[i]);
    const std::int64_t t = keys.token + i;
    const double dg = dlog_decay[i] * static_cast<double>(log_decay_of.derivative(element(args_.g, p_.gate_dtype, t)));
    dA_log += dlog_decay[i] * static_cast<double>(head.log_decay[i]);
    ddt_bias += dg;
    if (args_.dg.data != nullptr)
      store(address(args_.dg, p_.gate_dtype, sequence.batch, t, value_head, 0), p_.gate_dtype, 0, dg);
    if (args_.dbeta.data != nullptr) {
      const double dbeta = static_cast<double>(sum.dbeta[i]) - static_cast<double>(overlap_sums[i]);
      store(address(args_.dbeta, p_.beta_dtype, sequence.batch, t, value_head, 0), p_.beta_dtype, 0,
            dbeta * static_cast<double>(strength_of.derivative(element(args_.beta, p_.beta_dtype, t))));
    }
  }
  parameter_sums[0] = dA_log;
  parameter_sums[1] = ddt_bias;

  vector_.scale_columns(K, C, head.write_scale, sum.write_t, C, sum.read_t + C, 2 * C, sum.read_t + C, 2 * C);
  if (first) {
    std::copy_n(sum.read_t, K * 2 * C, out.read_t);
    std::copy_n(dp, 2 * C * C, out.within);
  } else {
    for (std::int64_t i = 0; i < K * 2 * C; ++i) out.read_t[i] += sum.read_t[i];
    for (std::int64_t i = 0; i < 2 * C * C; ++i) out.within[i] += dp[i];
  }
}

void BackwardKernels::finish_keys(const Sequence& sequence, std::int64_t query_head, const KeyChunk& keys,
                                  const KeyGradient& sums, const BlockScratch& s) const {
  const std::int64_t K = shape_.K, row = shape_.K_row;
  // E + E^T serves both sides of K K^T; it is symmetric, so its rows are its columns.
  float* const e = sums.within + C * C;
  for (std::int64_t i = 0; i < C; ++i) {
    for (std::int64_t j = 0; j < i; ++j) e[j * C + i] = e[i * C + j] = -e[i * C + j];
  }
  vector_.transpose(K, 2 * C, sums.read_t, 2 * C, sums.dqk, row);
  float* const dq = sums.dqk;
  float* const dk = sums.dqk + C * row;
  for (std::int64_t i = 0; K < row && i < 2 * C; ++i) std::fill(dq + i * row + K, dq + (i + 1) * row, 0.0f);
  vector_.gemm({.m = C,
                .n = row,
                .k = C,
                .a = sums.within,
                .a_row = C,
                .a_column = 1,
                .b = keys.qk + C * row,
                .b_row = row,
                .c = dq,
                .c_row = row,
                .keep = 1,
                .a_part = Part::lower});
  vector_.gemm({.m = C,
                .n = row,
                .k = 2 * C,
                .a = sums.within,
                .a_row = 1,
                .a_column = C,
                .b = keys.qk,
                .b_row = row,
                .c = dk,
                .c_row = row,
                .keep = 1});
  if (p_.qk_l2norm != 0) {  // dx = rstd (dy - y <y, dy>)
    float* const along = s.vectors;
    vector_.row_dots(2 * C, K, keys.qk, row, sums.dqk, row, 0, along);
    for (std::int64_t i = 0; i < 2 * C; ++i) along[i] = -along[i];
    vector_.scale_rows(2 * C, row, along, keys.qk, row, sums.dqk, row, sums.dqk, row);
    vector_.scale_rows(2 * C, row, keys.rstd, sums.dqk, row, nullptr, 0, sums.dqk, row);
  }
  if (args_.dq.data != nullptr) {
    store_tokens(vector_, dq, row, args_.dq, p_.dtype, sequence.batch, keys.token, query_head, keys.rows, 0, K);
  }
  if (args_.dk.data != nullptr) {
    store_tokens(vector_, dk, row, args_.dk, p_.dtype, sequence.batch, keys.token, query_head, keys.rows, 0, K);
  }
}

}  // namespace flashdelta
