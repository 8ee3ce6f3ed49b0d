// Between the caller's tensors and packed fp32 tiles: tokens, gates and states.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/gates.hpp"
#include "cpu/sequences.hpp"
#include "cpu/vector.hpp"
#include "dtype.hpp"

namespace flashdelta {

// Element (b, t, h, column) of a tensor [B, T, heads, width] (or of any four dimensions).
inline char* address(const fd_tensor& x, fd_dtype type, std::int64_t b, std::int64_t t, std::int64_t h,
                     std::int64_t column) {
  const std::int64_t i = b * x.stride[0] + t * x.stride[1] + h * x.stride[2] + column * x.stride[3];
  return static_cast<char*>(x.data) + i * static_cast<std::int64_t>(size_of(type));
}

// One head's tokens [t, t + tokens), columns [column, column + n), to a tile of `rows` rows, zero past the tokens.
inline void load_tokens(const VectorKernels& vector, const fd_tensor& x, fd_dtype type, std::int64_t b, std::int64_t t,
                        std::int64_t h, std::int64_t tokens, std::int64_t column, std::int64_t n, float* tile,
                        std::int64_t tile_row, std::int64_t rows) {
  vector.load(tokens, n, address(x, type, b, t, h, column), type, x.stride[1], tile, tile_row);
  for (std::int64_t i = tokens; i < rows; ++i) {
    std::memset(tile + i * tile_row, 0, sizeof(float) * static_cast<std::size_t>(round_up(n, 16)));
  }
}

inline void store_tokens(const VectorKernels& vector, const float* tile, std::int64_t tile_row, const fd_tensor& x,
                         fd_dtype type, std::int64_t b, std::int64_t t, std::int64_t h, std::int64_t tokens,
                         std::int64_t column, std::int64_t n) {
  vector.store(tokens, n, tile, tile_row, address(x, type, b, t, h, column), type, x.stride[1]);
}

// Zeros in the rows of x [B, T, heads, width] that belong to no sequence.
inline void zero_unused_tokens(const fd_problem& p, const void* cu_seqlens, const fd_tensor& x, fd_dtype type,
                               std::int64_t heads, std::int64_t width) {
  if (x.data == nullptr) return;
  for (std::int64_t t = used_tokens(p, cu_seqlens); t < p.T; ++t) {
    for (std::int64_t h = 0; h < heads; ++h) {
      std::memset(address(x, type, 0, t, h, 0), 0, static_cast<std::size_t>(width) * size_of(type));
    }
  }
}

// Log decay and write strength of one value head's tokens [t, t + tokens); past them, up to `rows`: no decay, nothing
// written. Args: fd_forward_args, fd_backward_args or fd_step_args.
template <typename Args>
void load_gates(const Args& args, const LogDecay<float>& log_decay, std::int64_t b, std::int64_t t, std::int64_t value_head,
                std::int64_t tokens, std::int64_t rows, float* g, float* beta) {
  const fd_problem& p = *args.problem;
  const WriteStrength<float> strength(p);
  const auto element = [&](const fd_tensor& x, fd_dtype type, std::int64_t i) {
    if (x.data == nullptr) return 0.0f;
    return static_cast<float>(load(x.data, type, b * x.stride[0] + (t + i) * x.stride[1] + value_head * x.stride[2]));
  };
  for (std::int64_t i = 0; i < rows; ++i) {
    g[i] = i < tokens ? log_decay(element(args.g, p.gate_dtype, i)) : 0;
    beta[i] = i < tokens ? strength(element(args.beta, p.beta_dtype, i)) : 0;
  }
}

// Transposing a state goes through a tile of this many rows of V.
constexpr std::int64_t kStateRows = 32;
inline std::int64_t state_scratch(const fd_problem& p) { return kStateRows * round_up(p.K, 16); }

// Columns [column, column + n) of one head's state in row `row` of a pool, to a tile S [K x n]; row -1: zero. `scratch`:
// state_scratch() floats.
inline void load_state(const VectorKernels& vector, const fd_problem& p, const fd_tensor& states, fd_dtype type,
                       std::int64_t row, std::int64_t value_head, std::int64_t column, std::int64_t n, float* S,
                       std::int64_t S_row, float* scratch) {
  if (row < 0 || p.state_v_first != 0) {
    for (std::int64_t i = 0; i < p.K; ++i)
      std::memset(S + i * S_row, 0, sizeof(float) * static_cast<std::size_t>(round_up(n, 16)));
  }
  if (row < 0) return;
  if (p.state_v_first == 0) {
    vector.load(p.K, n, address(states, type, row, value_head, 0, column), type, states.stride[2], S, S_row);
    return;
  }
  const std::int64_t scratch_row = round_up(p.K, 16);
  for (std::int64_t v = 0; v < n; v += kStateRows) {
    const std::int64_t rows = n - v < kStateRows ? n - v : kStateRows;
    vector.load(rows, p.K, address(states, type, row, value_head, column + v, 0), type, states.stride[2], scratch,
                scratch_row);
    vector.transpose(rows, p.K, scratch, scratch_row, S + v, S_row);
  }
}

// The other way round.
inline void store_state(const VectorKernels& vector, const fd_problem& p, const float* S, std::int64_t S_row,
                        const fd_tensor& states, fd_dtype type, std::int64_t row, std::int64_t value_head,
                        std::int64_t column, std::int64_t n, float* scratch) {
  if (row < 0) return;
  if (p.state_v_first == 0) {
    vector.store(p.K, n, S, S_row, address(states, type, row, value_head, 0, column), type, states.stride[2]);
    return;
  }
  const std::int64_t scratch_row = round_up(p.K, 16);
  for (std::int64_t v = 0; v < n; v += kStateRows) {
    const std::int64_t rows = n - v < kStateRows ? n - v : kStateRows;
    vector.transpose(p.K, rows, S + v, S_row, scratch, scratch_row);
    vector.store(rows, p.K, scratch, scratch_row, address(states, type, row, value_head, column + v, 0), type,
                 states.stride[2]);
  }
}

}  // namespace flashdelta
