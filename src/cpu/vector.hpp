// The vector kernels: every loop of the CPU backend that is worth vectorising, behind one table of function pointers.
//
// vector_kernels.cpp is compiled once per target (baseline, AVX2, AVX-512) and each gives one table; vector.cpp picks one at
// run time. Everything else is plain C++, compiled without machine flags, that calls through the table: a call costs
// nanoseconds, the tiles it works on microseconds.
//
// Conventions
//  - A tile is row-major fp32 in memory of ours ("packed"): columns contiguous, `row` elements from one row to the next (may
//    be negative). Columns of packed tiles are worked on in blocks of 16: n is a multiple of 16 unless said otherwise, and a
//    driver pads its tiles to that. Tile bases and rows should be aligned to 64 bytes (for speed only).
//  - Rows (m) come in multiples of 8 unless said otherwise.
//  - Every element of a result is a sum in an order that depends on m and k alone, never on n or on the column it stands in:
//    splitting a tile by columns leaves results bitwise equal.
#pragma once

#include <cstdint>

#include "flashdelta/flashdelta.h"

namespace flashdelta {

// Which part of a matrix counts; what lies outside is never read (of an operand).
enum class Part : std::int32_t { all, lower, upper };

// C = keep * C + alpha * diag(row_scale) * A * B.
struct Gemm {
  std::int64_t m, n, k;  // C is m x n, A is m x k, B is k x n; k any
  const float* a;
  std::int64_t a_row, a_column;  // element (i, j) of A is a[i * a_row + j * a_column]: swap them for a transpose
  const float* b;
  std::int64_t b_row;
  float* c;  // must not overlap a or b
  std::int64_t c_row;
  float alpha = 1;
  float keep = 0;                    // 0: C is not read
  const float* row_scale = nullptr;  // m, null: ones
  Part a_part = Part::all;           // lower, upper: A is triangular, its diagonal counts (m = k)
  Part c_part = Part::all;  // lower: only j <= i of C is wanted; elements above the diagonal may or may not be written
};

// Row by row, X_i = row_scale_i * (X_i - sum_j A_ij X_j) over j < i (Part::lower, first row first) or j > i (Part::upper,
// last row first): X = (I + A)^-1 X by substitution where row_scale is null, and with it X = diag(r) (I + A diag(r))^-1 X.
struct Solve {
  std::int64_t m, n;
  const float* a;
  std::int64_t a_row, a_column;
  float* x;
  std::int64_t x_row;
  const float* row_scale = nullptr;
  Part part = Part::lower;
};

// Reads or writes one token's state of one head. The state is K x V, [K, V] or [V, K] in memory.
struct StepRead {
  std::int64_t K, V;
  const void* state;  // null: zero
  fd_dtype dtype;     // fp32 or bf16
  std::int64_t row;   // elements from one row of K (or V) to the next
  bool v_first;
  const float *k, *q;        // K
  float *state_k, *state_q;  // V: S^T k and S^T q
};

// out = decay * S + k u^T; `out` may be `state`; a null state is zero.
struct StepWrite {
  std::int64_t K, V;
  const void* state;
  fd_dtype dtype;
  std::int64_t row;
  void* out;
  fd_dtype out_dtype;
  std::int64_t out_row;
  bool v_first;
  float decay;
  const float *k, *u;  // K; V
  // Memory of the same layout as `state` that will be wanted next (null: none): fetched on the way, so that memory is not
  // idle while this pass works in the cache.
  const void* next = nullptr;
  bool stream = false;  // fp32 `out`, rows on 64 bytes: write past the caches, without reading the memory first
};

struct VectorKernels {
  const char* name;  // "AVX-512"

  void (*gemm)(const Gemm&);
  void (*solve)(const Solve&);

  // Rows of the caller's tensors (fp32, bf16, fp16; n a multiple of 8, m any) to a packed tile and back, rounded to nearest
  // even. `load` fills columns up to the next multiple of 16 with zero. src_row counts elements of its own type.
  void (*load)(std::int64_t m, std::int64_t n, const void* src, fd_dtype dtype, std::int64_t src_row, float* dst,
               std::int64_t dst_row);
  void (*store)(std::int64_t m, std::int64_t n, const float* src, std::int64_t src_row, void* dst, fd_dtype dtype,
                std::int64_t dst_row);

  // x_i *= r_i, r_i = 1 / sqrt(sum_j x_ij^2 + eps); r is also written to `rstd` (m) if not null. n a multiple of 8, m any.
  void (*normalise)(std::int64_t m, std::int64_t n, float* x, std::int64_t row, float eps, float* rstd);

  // dst (n x m) = src (m x n)^T. m and n multiples of 8.
  void (*transpose)(std::int64_t m, std::int64_t n, const float* src, std::int64_t src_row, float* dst,
                    std::int64_t dst_row);

  // y = exp(x), to 2 ulp, for x <= 88; below -87 it is 0. n any, x and y have room for the next multiple of 16; may be
  // equal.
  void (*exp)(std::int64_t n, const float* x, float* y);

  // Decay between the tokens of a chunk, from the decay alpha_i = exp(g_i) of each: out_ij = alpha_{j+1} .. alpha_i for
  // j <= i, zero above the diagonal (m x m, m a multiple of 16), and from_start_i = alpha_0 .. alpha_i. The last row of
  // `out` is the decay from each token to the end. Products, not exp of differences of cumulative sums: they stay exact to a
  // few ulp however strong the decay. What is below 2^-126 is zero.
  void (*decay_products)(std::int64_t m, const float* alpha, float* out, std::int64_t out_row, float* from_start);

  // out_ij = alpha * a_ij * b_ij on and below the diagonal (diagonal = true) or strictly below, zero elsewhere. m x m, m a
  // multiple of 16; out may be a or b.
  void (*multiply_lower)(std::int64_t m, float alpha, bool diagonal, const float* a, std::int64_t a_row, const float* b,
                         std::int64_t b_row, float* out, std::int64_t out_row);

  // out_ij = scale_i * x_ij (+ add_ij if add is not null). m any; out may be x or add.
  void (*scale_rows)(std::int64_t m, std::int64_t n, const float* scale, const float* x, std::int64_t x_row,
                     const float* add, std::int64_t add_row, float* out, std::int64_t out_row);

  // out_ij = scale_j * x_ij (+ add_ij if add is not null). m any; out may be x or add.
  void (*scale_columns)(std::int64_t m, std::int64_t n, const float* scale, const float* x, std::int64_t x_row,
                        const float* add, std::int64_t add_row, float* out, std::int64_t out_row);

  // out_i = keep * out_i + sum_j x_ij y_ij. n a multiple of 8, m any; keep = 0: out is not read.
  void (*row_dots)(std::int64_t m, std::int64_t n, const float* x, std::int64_t x_row, const float* y, std::int64_t y_row,
                   float keep, float* out);

  // out_j = keep * out_j + sum_i x_ij y_ij, i in order. m any.
  void (*column_dots)(std::int64_t m, std::int64_t n, const float* x, std::int64_t x_row, const float* y, std::int64_t y_row,
                      float keep, float* out);

  void (*step_read)(const StepRead&);
  void (*step_write)(const StepWrite&);
};

// The table in use: the best this machine can run.
const VectorKernels& vector_kernels();

// The tables this machine can run, best first, ended by null; and the choice of another one, for tests and benchmarks
// (null: the best again). Not while a call is running.
const VectorKernels* const* vector_targets();
void use_vector_target(const VectorKernels*);

constexpr std::int64_t round_up(std::int64_t x, std::int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

}  // namespace flashdelta
