// One table of vector kernels (vector.hpp) for the target this file is compiled for; FLASHDELTA_TARGET names it. Only vector
// code lives here: no standard headers beyond plain types, so that no inline function shared with other files is compiled
// with this target's instructions.
#include <stdint.h>

#include "cpu/vector.hpp"
#include "hwy/cache_control.h"
#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"

#define FLASHDELTA_UNROLL _Pragma("GCC unroll 16")

namespace flashdelta {
namespace {

namespace hn = hwy::HWY_NAMESPACE;
static_assert(!HWY_HAVE_SCALABLE, "vectors of a size known at compile time are needed");

using D = hn::ScalableTag<float>;
using Vec = hn::Vec<D>;
constexpr int64_t kLanes = HWY_LANES(float);
constexpr int64_t kBlock = 16;  // packed tiles have a multiple of this many columns
static_assert(kLanes <= kBlock);

// Calls f(tag, j) over columns [0, n), n a multiple of 8 (or of 16: then always with whole vectors).
template <typename F>
HWY_INLINE void columns(int64_t n, F f) {
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) f(D(), j);
  if constexpr (kLanes > 8) {
    if (j < n) f(hn::Half<D>(), j);
  }
}

// ---------------------------------------------------------------------------------------------------- element conversion

template <fd_dtype kType>
struct Element {
  using type = uint16_t;
};
template <>
struct Element<FD_FLOAT32> {
  using type = float;
};

template <class DF>
HWY_INLINE hn::Vec<DF> half_to_float(DF d, hn::Vec<hn::Rebind<uint16_t, DF>> h) {
#if HWY_TARGET <= HWY_AVX2 || HWY_TARGET == HWY_NEON
  return hn::PromoteTo(d, hn::BitCast(hn::Rebind<hwy::float16_t, DF>(), h));
#else
  const hn::RebindToUnsigned<DF> du;
  const auto bits = hn::PromoteTo(du, h);
  const auto sign = hn::ShiftLeft<16>(hn::And(bits, hn::Set(du, 0x8000u)));
  const auto magnitude = hn::ShiftLeft<13>(hn::And(bits, hn::Set(du, 0x7fffu)));
  const auto value = hn::BitCast(du, hn::Mul(hn::BitCast(d, magnitude), hn::Set(d, 0x1p112f)));
  const auto special =
      hn::Gt(hn::BitCast(hn::RebindToSigned<DF>(), magnitude), hn::Set(hn::RebindToSigned<DF>(), 0x0f7fffff));
  const auto infinite = hn::Or(magnitude, hn::Set(du, 0x7f800000u));
  return hn::BitCast(d, hn::Or(sign, hn::IfThenElse(hn::RebindMask(du, special), infinite, value)));
#endif
}

template <class DF>
HWY_INLINE hn::Vec<hn::Rebind<uint16_t, DF>> float_to_half(DF d, hn::Vec<DF> x) {
  const hn::Rebind<uint16_t, DF> d16;
#if HWY_TARGET <= HWY_AVX2 || HWY_TARGET == HWY_NEON
  (void)d;
  return hn::BitCast(d16, hn::DemoteTo(hn::Rebind<hwy::float16_t, DF>(), x));
#else
  const hn::RebindToUnsigned<DF> du;
  const hn::RebindToSigned<DF> di;
  const auto bits = hn::BitCast(du, x);
  const auto sign = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 0x8000u));
  const auto magnitude = hn::And(bits, hn::Set(du, 0x7fffffffu));
  const auto odd = hn::And(hn::ShiftRight<13>(magnitude), hn::Set(du, 1u));
  const auto normal =
      hn::ShiftRight<13>(hn::Sub(hn::Add(magnitude, hn::Add(hn::Set(du, 0xfffu), odd)), hn::Set(du, 112u << 23)));
  // Adding 0.5 rounds a subnormal to a multiple of 2^-24.
  const auto tiny = hn::And(hn::BitCast(du, hn::Add(hn::BitCast(d, magnitude), hn::Set(d, 0.5f))), hn::Set(du, 0x7ffu));
  const auto signed_magnitude = hn::BitCast(di, magnitude);
  auto result = hn::IfThenElse(hn::RebindMask(du, hn::Lt(signed_magnitude, hn::Set(di, 113 << 23))), tiny, normal);
  result =
      hn::IfThenElse(hn::RebindMask(du, hn::Gt(signed_magnitude, hn::Set(di, 0x477fefff))), hn::Set(du, 0x7c00u), result);
  result =
      hn::IfThenElse(hn::RebindMask(du, hn::Gt(signed_magnitude, hn::Set(di, 0x7f800000))), hn::Set(du, 0x7e00u), result);
  return hn::DemoteTo(d16, hn::BitCast(di, hn::Or(sign, result)));
#endif
}

template <fd_dtype kType, class DF>
HWY_INLINE hn::Vec<DF> load_elements(DF d, const typename Element<kType>::type* p) {
  const hn::Rebind<uint16_t, DF> d16;
  if constexpr (kType == FD_FLOAT32) {
    return hn::LoadU(d, p);
  } else if constexpr (kType == FD_BFLOAT16) {
    return hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(hn::RebindToUnsigned<DF>(), hn::LoadU(d16, p))));
  } else {
    return half_to_float(d, hn::LoadU(d16, p));
  }
}

template <fd_dtype kType, class DF>
HWY_INLINE void store_elements(DF d, hn::Vec<DF> x, typename Element<kType>::type* p) {
  const hn::Rebind<uint16_t, DF> d16;
  if constexpr (kType == FD_FLOAT32) {
    hn::StoreU(x, d, p);
  } else if constexpr (kType == FD_BFLOAT16) {
    const hn::RebindToUnsigned<DF> du;
    const auto bits = hn::BitCast(du, x);
    const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 1u));
    const auto rounded = hn::ShiftRight<16>(hn::Add(bits, hn::Add(hn::Set(du, 0x7fffu), odd)));
    const auto quiet = hn::Or(hn::ShiftRight<16>(bits), hn::Set(du, 0x40u));
    const auto result = hn::IfThenElse(hn::RebindMask(du, hn::Ne(x, x)), quiet, rounded);
    hn::StoreU(hn::DemoteTo(d16, hn::BitCast(hn::RebindToSigned<DF>(), result)), d16, p);
  } else {
    hn::StoreU(float_to_half(d, x), d16, p);
  }
}

// Calls f with the element type as a compile-time constant.
template <typename F>
HWY_INLINE void with_type(fd_dtype type, F f) {
  if (type == FD_FLOAT32) {
    f(hwy::SizeTag<FD_FLOAT32>());
  } else if (type == FD_BFLOAT16) {
    f(hwy::SizeTag<FD_BFLOAT16>());
  } else {
    f(hwy::SizeTag<FD_FLOAT16>());
  }
}
template <size_t kType>
constexpr fd_dtype type_of(hwy::SizeTag<kType>) {
  return static_cast<fd_dtype>(kType);
}

void load(int64_t m, int64_t n, const void* src, fd_dtype dtype, int64_t src_row, float* dst, int64_t dst_row) {
  with_type(dtype, [&](auto tag) {
    constexpr fd_dtype kType = type_of(decltype(tag)());
    const auto* from = static_cast<const typename Element<kType>::type*>(src);
    for (int64_t i = 0; i < m; ++i) {
      columns(n, [&](auto d, int64_t j) {
        hn::StoreU(load_elements<kType>(d, from + i * src_row + j), d, dst + i * dst_row + j);
      });
      for (int64_t j = n; j % kBlock != 0; ++j) dst[i * dst_row + j] = 0;
    }
  });
}

void store(int64_t m, int64_t n, const float* src, int64_t src_row, void* dst, fd_dtype dtype, int64_t dst_row) {
  with_type(dtype, [&](auto tag) {
    constexpr fd_dtype kType = type_of(decltype(tag)());
    auto* to = static_cast<typename Element<kType>::type*>(dst);
    for (int64_t i = 0; i < m; ++i) {
      columns(n, [&](auto d, int64_t j) {
        store_elements<kType>(d, hn::LoadU(d, src + i * src_row + j), to + i * dst_row + j);
      });
    }
  });
}

// ------------------------------------------------------------------------------------------------------- matrix products

// Register tile: kRows x kVectors vectors of sums. As many as the registers hold beside one row of B and one element of A.
constexpr int kRows = HWY_TARGET <= HWY_AVX3 ? 8 : 4;
constexpr int kVectors = 2;
constexpr int64_t kTile = kVectors * kLanes;

template <int kN>
struct Sums {
  Vec v[kRows][kN];
};

// sums += A[kRows x k] B[k x kN vectors], or -= (kMinus).
template <int kN, bool kMinus>
HWY_INLINE void accumulate(Sums<kN>& sums, const float* HWY_RESTRICT a, int64_t a_row, int64_t a_column,
                           const float* HWY_RESTRICT b, int64_t b_row, int64_t k) {
  const D d;
  Sums<kN> s = sums;
  for (int64_t p = 0; p < k; ++p) {
    Vec row[kN];
    FLASHDELTA_UNROLL for (int v = 0; v < kN; ++v) row[v] = hn::LoadU(d, b + v * kLanes);
    FLASHDELTA_UNROLL for (int r = 0; r < kRows; ++r) {
      const Vec x = hn::Set(d, a[r * a_row]);
      FLASHDELTA_UNROLL for (int v = 0; v < kN; ++v) {
        s.v[r][v] = kMinus ? hn::NegMulAdd(x, row[v], s.v[r][v]) : hn::MulAdd(x, row[v], s.v[r][v]);
      }
    }
    a += a_column;
    b += b_row;
  }
  sums = s;
}

// The same for a lower triangular kRows x kRows block of A, its diagonal included.
template <int kN>
HWY_INLINE void accumulate_lower(Sums<kN>& sums, const float* a, int64_t a_row, int64_t a_column, const float* b,
                                 int64_t b_row) {
  const D d;
  FLASHDELTA_UNROLL for (int p = 0; p < kRows; ++p) {
    FLASHDELTA_UNROLL for (int r = p; r < kRows; ++r) {
      const Vec x = hn::Set(d, a[r * a_row + p * a_column]);
      FLASHDELTA_UNROLL for (int v = 0; v < kN; ++v) {
        sums.v[r][v] = hn::MulAdd(x, hn::LoadU(d, b + p * b_row + v * kLanes), sums.v[r][v]);
      }
    }
  }
}

// All rows of kN vectors of columns. `scale_step` is the step from one row's scale to the next.
template <int kN>
void gemm_columns(const Gemm& g, int64_t scale_step, int64_t j) {
  const D d;
  int64_t i = 0;
  // Only the last row of a block on or below the diagonal decides: blocks wholly above it are left out.
  if (g.c_part == Part::lower) i = j / kRows * kRows;
  for (; i < g.m; i += kRows) {
    Sums<kN> sums;
    FLASHDELTA_UNROLL for (int r = 0; r < kRows; ++r) {
      FLASHDELTA_UNROLL for (int v = 0; v < kN; ++v) sums.v[r][v] = hn::Zero(d);
    }
    const float* a = g.a + i * g.a_row;
    const float* b = g.b + j;
    if (g.a_part == Part::all) {
      accumulate<kN, false>(sums, a, g.a_row, g.a_column, b, g.b_row, g.k);
    } else {
      accumulate<kN, false>(sums, a, g.a_row, g.a_column, b, g.b_row, i);
      accumulate_lower(sums, a + i * g.a_column, g.a_row, g.a_column, b + i * g.b_row, g.b_row);
    }
    FLASHDELTA_UNROLL for (int r = 0; r < kRows; ++r) {
      const Vec scale = hn::Set(d, g.row_scale == nullptr ? g.alpha : g.alpha * g.row_scale[(i + r) * scale_step]);
      float* c = g.c + (i + r) * g.c_row + j;
      FLASHDELTA_UNROLL for (int v = 0; v < kN; ++v) {
        const Vec x = hn::Mul(scale, sums.v[r][v]);
        hn::StoreU(g.keep == 0 ? x : hn::MulAdd(hn::Set(d, g.keep), hn::LoadU(d, c + v * kLanes), x), d, c + v * kLanes);
      }
    }
  }
}

void gemm(const Gemm& given) {
  Gemm g = given;
  int64_t scale_step = 1;
  if (g.a_part == Part::upper) {  // with rows and columns of A in reverse order it is lower triangular
    g.a += (g.m - 1) * (g.a_row + g.a_column);
    g.b += (g.m - 1) * g.b_row;
    g.c += (g.m - 1) * g.c_row;
    if (g.row_scale != nullptr) g.row_scale += g.m - 1;
    g.a_row = -g.a_row, g.a_column = -g.a_column, g.b_row = -g.b_row, g.c_row = -g.c_row, scale_step = -1;
  }
  int64_t j = 0;
  for (; j + kTile <= g.n; j += kTile) gemm_columns<kVectors>(g, scale_step, j);
  if constexpr (kTile > kBlock) {
    for (; j < g.n; j += kLanes) gemm_columns<1>(g, scale_step, j);
  }
}

template <int kN>
void solve_columns(const Solve& s, int64_t scale_step, int64_t j) {
  const D d;
  for (int64_t i = 0; i < s.m; i += kRows) {
    Sums<kN> x;
    float* rows = s.x + i * s.x_row + j;
    FLASHDELTA_UNROLL for (int r = 0; r < kRows; ++r) {
      FLASHDELTA_UNROLL for (int v = 0; v < kN; ++v) x.v[r][v] = hn::LoadU(d, rows + r * s.x_row + v * kLanes);
    }
    const float* a = s.a + i * s.a_row;
    accumulate<kN, true>(x, a, s.a_row, s.a_column, s.x + j, s.x_row, i);
    a += i * s.a_column;
    FLASHDELTA_UNROLL for (int p = 0; p < kRows; ++p) {
      if (s.row_scale != nullptr) {
        const Vec scale = hn::Set(d, s.row_scale[(i + p) * scale_step]);
        FLASHDELTA_UNROLL for (int v = 0; v < kN; ++v) x.v[p][v] = hn::Mul(scale, x.v[p][v]);
      }
      FLASHDELTA_UNROLL for (int r = p + 1; r < kRows; ++r) {
        const Vec y = hn::Set(d, a[r * s.a_row + p * s.a_column]);
        FLASHDELTA_UNROLL for (int v = 0; v < kN; ++v) x.v[r][v] = hn::NegMulAdd(y, x.v[p][v], x.v[r][v]);
      }
    }
    FLASHDELTA_UNROLL for (int r = 0; r < kRows; ++r) {
      FLASHDELTA_UNROLL for (int v = 0; v < kN; ++v) hn::StoreU(x.v[r][v], d, rows + r * s.x_row + v * kLanes);
    }
  }
}

void solve(const Solve& given) {
  Solve s = given;
  int64_t scale_step = 1;
  if (s.part == Part::upper) {  // as in gemm
    s.a += (s.m - 1) * (s.a_row + s.a_column);
    s.x += (s.m - 1) * s.x_row;
    if (s.row_scale != nullptr) s.row_scale += s.m - 1;
    s.a_row = -s.a_row, s.a_column = -s.a_column, s.x_row = -s.x_row, scale_step = -1;
  }
  int64_t j = 0;
  for (; j + kTile <= s.n; j += kTile) solve_columns<kVectors>(s, scale_step, j);
  if constexpr (kTile > kBlock) {
    for (; j < s.n; j += kLanes) solve_columns<1>(s, scale_step, j);
  }
}

// ------------------------------------------------------------------------------------------------------- rows and columns

// sum_j f(tag, j) over columns [0, n), n a multiple of 8.
template <typename F>
HWY_INLINE float sum_columns(int64_t n, F f) {
  const D d;
  Vec sum = hn::Zero(d);
  float rest = 0;
  columns(n, [&](auto tag, int64_t j) {
    if constexpr (hn::MaxLanes(decltype(tag)()) == kLanes) {
      sum = hn::Add(sum, f(tag, j));
    } else {
      rest = hn::GetLane(hn::SumOfLanes(tag, f(tag, j)));
    }
  });
  return hn::GetLane(hn::SumOfLanes(d, sum)) + rest;
}

void normalise(int64_t m, int64_t n, float* x, int64_t row, float eps, float* rstd) {
  for (int64_t i = 0; i < m; ++i, x += row) {
    const float sum = sum_columns(n, [&](auto d, int64_t j) {
      const auto y = hn::LoadU(d, x + j);
      return hn::Mul(y, y);
    });
    const float r = 1.0f / __builtin_sqrtf(sum + eps);
    columns(n, [&](auto d, int64_t j) { hn::StoreU(hn::Mul(hn::Set(d, r), hn::LoadU(d, x + j)), d, x + j); });
    if (rstd != nullptr) rstd[i] = r;
  }
}

void transpose(int64_t m, int64_t n, const float* src, int64_t src_row, float* dst, int64_t dst_row) {
  const hn::FixedTag<float, 4> d;
  const hn::FixedTag<double, 2> dd;
  for (int64_t j = 0; j < n; j += 4) {
    for (int64_t i = 0; i < m; i += 4) {
      const float* s = src + i * src_row + j;
      float* t = dst + j * dst_row + i;
      const auto a = hn::LoadU(d, s), b = hn::LoadU(d, s + src_row);
      const auto c = hn::LoadU(d, s + 2 * src_row), e = hn::LoadU(d, s + 3 * src_row);
      const auto ab0 = hn::BitCast(dd, hn::InterleaveLower(d, a, b)), ab1 = hn::BitCast(dd, hn::InterleaveUpper(d, a, b));
      const auto ce0 = hn::BitCast(dd, hn::InterleaveLower(d, c, e)), ce1 = hn::BitCast(dd, hn::InterleaveUpper(d, c, e));
      hn::StoreU(hn::BitCast(d, hn::InterleaveLower(dd, ab0, ce0)), d, t);
      hn::StoreU(hn::BitCast(d, hn::InterleaveUpper(dd, ab0, ce0)), d, t + dst_row);
      hn::StoreU(hn::BitCast(d, hn::InterleaveLower(dd, ab1, ce1)), d, t + 2 * dst_row);
      hn::StoreU(hn::BitCast(d, hn::InterleaveUpper(dd, ab1, ce1)), d, t + 3 * dst_row);
    }
  }
}

void exp(int64_t n, const float* x, float* y) {
  const D d;
  for (int64_t i = 0; i < n; i += kLanes) hn::StoreU(hn::Exp(d, hn::LoadU(d, x + i)), d, y + i);
}

void decay_products(int64_t m, const float* alpha, float* out, int64_t out_row, float* from_start) {
  const D d;
  const Vec smallest = hn::Set(d, 0x1p-126f);
  float product = 1;
  for (int64_t i = 0; i < m; ++i) {
    float* row = out + i * out_row;
    for (int64_t j = 0; j < m; j += kLanes) {
      if (i == 0 || j > i) {
        hn::StoreU(hn::Zero(d), d, row + j);
      } else {
        const Vec x = hn::Mul(hn::Set(d, alpha[i]), hn::LoadU(d, row - out_row + j));
        hn::StoreU(hn::IfThenZeroElse(hn::Lt(x, smallest), x), d, row + j);
      }
    }
    row[i] = 1;
    product *= alpha[i];
    if (product < 0x1p-126f) product = 0;
    from_start[i] = product;
  }
}

void multiply_lower(int64_t m, float alpha, bool diagonal, const float* a, int64_t a_row, const float* b, int64_t b_row,
                    float* out, int64_t out_row) {
  const D d;
  for (int64_t i = 0; i < m; ++i) {
    const int64_t last = diagonal ? i : i - 1;
    for (int64_t j = 0; j < m; j += kLanes) {
      Vec x = hn::Zero(d);
      if (j <= last) {
        const auto below = hn::FirstN(d, static_cast<size_t>(last + 1 - j));
        x = hn::Mul(hn::Mul(hn::Set(d, alpha), hn::LoadU(d, a + i * a_row + j)), hn::LoadU(d, b + i * b_row + j));
        x = hn::IfThenElseZero(below, x);
      }
      hn::StoreU(x, d, out + i * out_row + j);
    }
  }
}

void scale_rows(int64_t m, int64_t n, const float* scale, const float* x, int64_t x_row, const float* add, int64_t add_row,
                float* out, int64_t out_row) {
  const D d;
  for (int64_t i = 0; i < m; ++i) {
    const Vec s = hn::Set(d, scale[i]);
    for (int64_t j = 0; j < n; j += kLanes) {
      const Vec y = hn::LoadU(d, x + i * x_row + j);
      const Vec result = add == nullptr ? hn::Mul(s, y) : hn::MulAdd(s, y, hn::LoadU(d, add + i * add_row + j));
      hn::StoreU(result, d, out + i * out_row + j);
    }
  }
}

void scale_columns(int64_t m, int64_t n, const float* scale, const float* x, int64_t x_row, const float* add,
                   int64_t add_row, float* out, int64_t out_row) {
  const D d;
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; j += kLanes) {
      const Vec s = hn::LoadU(d, scale + j);
      const Vec y = hn::LoadU(d, x + i * x_row + j);
      const Vec result = add == nullptr ? hn::Mul(s, y) : hn::MulAdd(s, y, hn::LoadU(d, add + i * add_row + j));
      hn::StoreU(result, d, out + i * out_row + j);
    }
  }
}

void row_dots(int64_t m, int64_t n, const float* x, int64_t x_row, const float* y, int64_t y_row, float keep, float* out) {
  for (int64_t i = 0; i < m; ++i) {
    const float sum = sum_columns(
        n, [&](auto d, int64_t j) { return hn::Mul(hn::LoadU(d, x + i * x_row + j), hn::LoadU(d, y + i * y_row + j)); });
    out[i] = keep == 0 ? sum : keep * out[i] + sum;
  }
}

void column_dots(int64_t m, int64_t n, const float* x, int64_t x_row, const float* y, int64_t y_row, float keep,
                 float* out) {
  const D d;
  for (int64_t j = 0; j < n; j += kLanes) {
    Vec sum = keep == 0 ? hn::Zero(d) : hn::Mul(hn::Set(d, keep), hn::LoadU(d, out + j));
    for (int64_t i = 0; i < m; ++i) sum = hn::MulAdd(hn::LoadU(d, x + i * x_row + j), hn::LoadU(d, y + i * y_row + j), sum);
    hn::StoreU(sum, d, out + j);
  }
}

// ------------------------------------------------------------------------------------------------------------ decode step

// [K, V]: rows of V, kGroup at a time so that the sums are loaded and stored once per group.
constexpr int kGroup = HWY_TARGET <= HWY_AVX3 ? 8 : 4;

template <fd_dtype kType>
void step_read_rows(const StepRead& s) {
  const auto* state = static_cast<const typename Element<kType>::type*>(s.state);
  for (int64_t i = 0; i < s.K; i += kGroup) {
    columns(s.V, [&](auto d, int64_t j) {
      auto by_k = i == 0 ? hn::Zero(d) : hn::LoadU(d, s.state_k + j);
      auto by_q = i == 0 ? hn::Zero(d) : hn::LoadU(d, s.state_q + j);
      FLASHDELTA_UNROLL for (int r = 0; r < kGroup; ++r) {
        const auto x = load_elements<kType>(d, state + (i + r) * s.row + j);
        by_k = hn::MulAdd(hn::Set(d, s.k[i + r]), x, by_k);
        by_q = hn::MulAdd(hn::Set(d, s.q[i + r]), x, by_q);
      }
      hn::StoreU(by_k, d, s.state_k + j);
      hn::StoreU(by_q, d, s.state_q + j);
    });
  }
}

// [V, K]: rows of K, each a pair of dot products.
template <fd_dtype kType>
void step_read_columns(const StepRead& s) {
  for (int64_t i = 0; i < s.V; ++i) {
    const auto* state = static_cast<const typename Element<kType>::type*>(s.state) + i * s.row;
    const D d;
    Vec by_k = hn::Zero(d), by_q = hn::Zero(d);
    float rest_k = 0, rest_q = 0;
    columns(s.K, [&](auto tag, int64_t j) {
      const auto x = load_elements<kType>(tag, state + j);
      const auto k = hn::LoadU(tag, s.k + j), q = hn::LoadU(tag, s.q + j);
      if constexpr (hn::MaxLanes(decltype(tag)()) == kLanes) {
        by_k = hn::MulAdd(k, x, by_k);
        by_q = hn::MulAdd(q, x, by_q);
      } else {
        rest_k = hn::GetLane(hn::SumOfLanes(tag, hn::Mul(k, x)));
        rest_q = hn::GetLane(hn::SumOfLanes(tag, hn::Mul(q, x)));
      }
    });
    s.state_k[i] = hn::GetLane(hn::SumOfLanes(d, by_k)) + rest_k;
    s.state_q[i] = hn::GetLane(hn::SumOfLanes(d, by_q)) + rest_q;
  }
}

void step_read(const StepRead& s) {
  if (s.state == nullptr) {
    for (int64_t i = 0; i < s.V; ++i) s.state_k[i] = s.state_q[i] = 0;
    return;
  }
  if (s.dtype == FD_FLOAT32) {
    s.v_first ? step_read_columns<FD_FLOAT32>(s) : step_read_rows<FD_FLOAT32>(s);
  } else {
    s.v_first ? step_read_columns<FD_BFLOAT16>(s) : step_read_rows<FD_BFLOAT16>(s);
  }
}

template <fd_dtype kIn, fd_dtype kOut, bool kStream = false>
void step_write_rows(const StepWrite& s) {
  const int64_t m = s.v_first ? s.V : s.K, n = s.v_first ? s.K : s.V;
  const float* by_row = s.v_first ? s.u : s.k;
  const float* by_column = s.v_first ? s.k : s.u;
  for (int64_t i = 0; i < m; ++i) {
    auto* out = static_cast<typename Element<kOut>::type*>(s.out) + i * s.out_row;
    if (s.next != nullptr) {
      const auto* next = static_cast<const typename Element<kIn>::type*>(s.next) + i * s.row;
      for (int64_t j = 0; j < n; j += 64 / static_cast<int64_t>(sizeof(*next))) __builtin_prefetch(next + j, 0, 2);
    }
    const auto update = [&](auto d, int64_t j) { return hn::Mul(hn::Set(d, by_row[i]), hn::LoadU(d, by_column + j)); };
    if (s.state == nullptr) {
      columns(n, [&](auto d, int64_t j) { store_elements<kOut>(d, update(d, j), out + j); });
      continue;
    }
    const auto* in = static_cast<const typename Element<kIn>::type*>(s.state) + i * s.row;
    columns(n, [&](auto d, int64_t j) {
      const auto x = hn::MulAdd(hn::Set(d, s.decay), load_elements<kIn>(d, in + j), update(d, j));
      if constexpr (kStream) {
        hn::Stream(x, d, out + j);
      } else {
        store_elements<kOut>(d, x, out + j);
      }
    });
  }
  if constexpr (kStream) hwy::FlushStream();
}

void step_write(const StepWrite& s) {
  if (s.stream) {
    s.dtype == FD_FLOAT32 ? step_write_rows<FD_FLOAT32, FD_FLOAT32, true>(s)
                          : step_write_rows<FD_BFLOAT16, FD_FLOAT32, true>(s);
  } else if (s.dtype == FD_FLOAT32) {
    s.out_dtype == FD_FLOAT32 ? step_write_rows<FD_FLOAT32, FD_FLOAT32>(s) : step_write_rows<FD_FLOAT32, FD_BFLOAT16>(s);
  } else {
    s.out_dtype == FD_FLOAT32 ? step_write_rows<FD_BFLOAT16, FD_FLOAT32>(s) : step_write_rows<FD_BFLOAT16, FD_BFLOAT16>(s);
  }
}

constexpr const char* target_name() {
#if HWY_TARGET == HWY_AVX3
  return "AVX-512";
#elif HWY_TARGET == HWY_AVX2
  return "AVX2";
#elif HWY_TARGET == HWY_SSE4
  return "SSE4";
#elif HWY_TARGET == HWY_NEON
  return "NEON";
#else
  return "baseline";
#endif
}

}  // namespace

#define FLASHDELTA_TABLE_OF(target) vector_kernels_##target
#define FLASHDELTA_TABLE(target) FLASHDELTA_TABLE_OF(target)

extern const VectorKernels FLASHDELTA_TABLE(FLASHDELTA_TARGET);
const VectorKernels FLASHDELTA_TABLE(FLASHDELTA_TARGET) = {
    .name = target_name(),
    .gemm = gemm,
    .solve = solve,
    .load = load,
    .store = store,
    .normalise = normalise,
    .transpose = transpose,
    .exp = exp,
    .decay_products = decay_products,
    .multiply_lower = multiply_lower,
    .scale_rows = scale_rows,
    .scale_columns = scale_columns,
    .row_dots = row_dots,
    .column_dots = column_dots,
    .step_read = step_read,
    .step_write = step_write,
};

}  // namespace flashdelta
