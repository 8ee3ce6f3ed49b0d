// Memory for tests: plain arrays of doubles, and strided tensors of any element type in guarded, poisoned memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "flashdelta/flashdelta.h"

namespace flashdelta::testing {

// Contiguous values in double.
struct Array {
  std::vector<std::int64_t> shape;
  std::vector<double> x;

  Array() = default;
  explicit Array(std::vector<std::int64_t> shape_, double value = 0);

  // Elements of one index of the first `dimensions` dimensions.
  std::int64_t inner(std::size_t dimensions) const;
};

// Whether all values have the same bits (0 and -0 differ, a NaN equals itself).
bool same_bits(const Array&, const Array&);

// Bytes between two guard bands, all of it poison (0xff: a NaN of every floating-point type).
class Memory {
 public:
  // The first byte is `misalignment` bytes past a multiple of 256.
  explicit Memory(std::size_t bytes, std::size_t misalignment = 0);

  unsigned char* data() { return block_.data() + begin_; }
  const unsigned char* data() const { return block_.data() + begin_; }
  std::size_t size() const { return size_; }
  std::span<unsigned char> block() { return block_; }  // guard bands and all
  bool guards_intact() const;

 private:
  std::size_t begin_ = 0, size_;
  std::vector<unsigned char> block_;
};

// A strided tensor. Gaps between its elements and the memory around it are poison.
class Tensor {
 public:
  Tensor() = default;  // absent

  // All elements poison.
  Tensor(fd_dtype dtype, std::vector<std::int64_t> shape, std::vector<std::int64_t> strides, std::size_t misalignment = 0);

  static std::vector<std::int64_t> contiguous(const std::vector<std::int64_t>& shape);

  // Every dimension but the innermost with a gap after it.
  static std::vector<std::int64_t> gapped(const std::vector<std::int64_t>& shape);

  // The layout [0, 2, 1] of a [B, T, HV] tensor, with gaps.
  static std::vector<std::int64_t> transposed(const std::vector<std::int64_t>& shape);

  bool present() const { return !shape_.empty(); }
  fd_dtype dtype() const { return dtype_; }
  const std::vector<std::int64_t>& shape() const { return shape_; }

  fd_tensor view();
  Memory& memory() { return memory_; }

  // All elements in order of the shape; of row `row` (first dimension) with the `_row` functions.
  void fill(const Array&);
  void fill_row(std::int64_t row, std::span<const double>);
  Array read() const;
  std::vector<double> read_row(std::int64_t row) const;

  // Marks what a call may write: everything, or one row. What is not marked must stay as it is from remember() on.
  void remember();
  void allow_all();
  void allow_row(std::int64_t row);
  bool intact() const;

 private:
  template <typename Visit>
  void for_each(std::int64_t first_row, std::int64_t last_row, Visit visit) const;

  fd_dtype dtype_ = FD_FLOAT32;
  std::vector<std::int64_t> shape_, strides_;
  Memory memory_{0};
  std::vector<unsigned char> before_;
  std::vector<std::int64_t> allowed_rows_;
};

}  // namespace flashdelta::testing
