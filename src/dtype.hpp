// Element types: their sizes, and exact conversions of single elements. Vector code has its own (cpu/vector.hpp).
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "flashdelta/flashdelta.h"

namespace flashdelta {

constexpr std::size_t size_of(fd_dtype type) {
  switch (type) {
    case FD_FLOAT32: return 4;
    case FD_BFLOAT16: return 2;
    case FD_FLOAT16: return 2;
    case FD_FLOAT64: return 8;
    default: return 0;
  }
}

constexpr const char* name_of(fd_dtype type) {
  switch (type) {
    case FD_FLOAT32: return "float32";
    case FD_BFLOAT16: return "bfloat16";
    case FD_FLOAT16: return "float16";
    case FD_FLOAT64: return "float64";
    default: return "unknown";
  }
}

constexpr std::size_t size_of_index(fd_index_dtype type) { return type == FD_INT32 ? 4 : 8; }

inline float bfloat16_to_float(std::uint16_t bits) { return std::bit_cast<float>(std::uint32_t{bits} << 16); }

// Round to nearest even; NaN stays NaN.
inline std::uint16_t float_to_bfloat16(float x) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  if (std::isnan(x)) return static_cast<std::uint16_t>((bits >> 16) | 0x40u);
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float float16_to_float(std::uint16_t bits) {
  const std::uint32_t sign = (bits & 0x8000u) << 16, exponent = (bits >> 10) & 0x1fu, mantissa = bits & 0x3ffu;
  if (exponent == 0x1fu) return std::bit_cast<float>(sign | 0x7f800000u | (mantissa << 13));
  if (exponent != 0) return std::bit_cast<float>(sign | ((exponent + 112u) << 23) | (mantissa << 13));
  const float magnitude = std::ldexp(static_cast<float>(mantissa), -24);  // subnormal
  return sign != 0 ? -magnitude : magnitude;
}

// Round to nearest even, overflow to infinity; NaN stays NaN.
inline std::uint16_t float_to_float16(float x) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  const auto sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000u);
  const float magnitude = std::fabs(x);
  if (std::isnan(x)) return static_cast<std::uint16_t>(sign | 0x7e00u);
  if (magnitude >= 65520.0f) return static_cast<std::uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x1p-14f) {  // subnormal: adding 0.5 rounds to multiples of 2^-24
    return static_cast<std::uint16_t>(sign | (std::bit_cast<std::uint32_t>(magnitude + 0.5f) & 0x7ffu));
  }
  const std::uint32_t u = bits & 0x7fffffffu;
  return static_cast<std::uint16_t>(sign | ((u + 0xfffu + ((u >> 13) & 1u) - (112u << 23)) >> 13));
}

// Element `i` of an array of any element type, in double (exact).
inline double load(const void* data, fd_dtype type, std::int64_t i) {
  switch (type) {
    case FD_FLOAT32: return static_cast<const float*>(data)[i];
    case FD_BFLOAT16: return bfloat16_to_float(static_cast<const std::uint16_t*>(data)[i]);
    case FD_FLOAT16: return float16_to_float(static_cast<const std::uint16_t*>(data)[i]);
    default: return static_cast<const double*>(data)[i];
  }
}

// Stores `x`, rounded to the element type (to fp32 first for the 16-bit types).
inline void store(void* data, fd_dtype type, std::int64_t i, double x) {
  switch (type) {
    case FD_FLOAT32: static_cast<float*>(data)[i] = static_cast<float>(x); break;
    case FD_BFLOAT16: static_cast<std::uint16_t*>(data)[i] = float_to_bfloat16(static_cast<float>(x)); break;
    case FD_FLOAT16: static_cast<std::uint16_t*>(data)[i] = float_to_float16(static_cast<float>(x)); break;
    default: static_cast<double*>(data)[i] = x; break;
  }
}

inline std::int64_t load_index(const void* data, fd_index_dtype type, std::int64_t i) {
  return type == FD_INT32 ? static_cast<const std::int32_t*>(data)[i] : static_cast<const std::int64_t*>(data)[i];
}

}  // namespace flashdelta
