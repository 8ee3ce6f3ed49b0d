// Seeded inputs of a case, in double and already rounded to the case's element types.
#pragma once

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "tests/cases.hpp"
#include "tests/support/tensor.hpp"

namespace flashdelta::testing {

// States and rows are those of the sequences; where they lie in pools is up to Call. Rows of q, k, v, g, beta, do past the
// last sequence are NaN.
struct Data {
  std::vector<std::int64_t> cu_seqlens;  // [N + 1], also if not packed
  Array q, k;                            // [B, T, H, K]
  Array v, do_;                          // [B, T, HV, V]
  Array g, beta;                         // [B, T, HV]
  Array A_log, dt_bias;                  // [HV]
  Array initial_state, dfinal_state;     // [N, HV, K, V], or [N, HV, V, K] if v_first
  std::vector<bool> has_row;             // of each sequence, in the pools; where not, its initial state is zero

  // Where sequence n's tokens start in an array [B, T, ...], counting tokens.
  std::int64_t first_token(const Case& c, std::int64_t n) const {
    return c.packed ? cu_seqlens[static_cast<std::size_t>(n)] : n * c.T();
  }
};

Data make_data(const Case&, std::uint64_t seed);

// The inputs of sequence n alone, as a batch of one; and its case.
Case alone(const Case&, std::int64_t n);
Data alone(const Case&, const Data&, std::int64_t n);

// Tokens [begin, end) of a case of a single sequence, from `state`.
Case part(const Case&, std::int64_t begin, std::int64_t end);
Data part(const Data&, std::int64_t begin, std::int64_t end, const Array& state);

// Shapes and options in one line, for failure messages.
std::string describe(const Case&);

// A small case with shapes and options drawn at random. `step`: a few tokens per sequence.
Case random_case(std::mt19937_64&, bool step);

}  // namespace flashdelta::testing
