#include "tests/support/tensor.hpp"

#include <algorithm>
#include <cstring>
#include <functional>
#include <numeric>
#include <utility>

#include "dtype.hpp"

namespace flashdelta::testing {
namespace {

constexpr std::size_t alignment = 256;
constexpr std::size_t guard = 1024;
constexpr unsigned char poison = 0xff;

std::int64_t product(const std::vector<std::int64_t>& shape, std::size_t from = 0) {
  return std::accumulate(shape.begin() + static_cast<std::ptrdiff_t>(from), shape.end(), std::int64_t{1},
                         std::multiplies<>());
}

}  // namespace

Array::Array(std::vector<std::int64_t> shape_, double value)
    : shape(std::move(shape_)), x(static_cast<std::size_t>(product(shape)), value) {}

std::int64_t Array::inner(std::size_t dimensions) const { return product(shape, dimensions); }

bool same_bits(const Array& a, const Array& b) {
  return a.shape == b.shape && (a.x.empty() || std::memcmp(a.x.data(), b.x.data(), a.x.size() * sizeof(double)) == 0);
}

Memory::Memory(std::size_t bytes, std::size_t misalignment)
    : size_(bytes), block_(guard + alignment + misalignment + bytes + guard, poison) {
  const auto address = reinterpret_cast<std::uintptr_t>(block_.data()) + guard;
  begin_ = guard + (alignment - address % alignment) % alignment + misalignment;
}

bool Memory::guards_intact() const {
  const auto is_poison = [](unsigned char byte) { return byte == poison; };
  const auto begin = block_.begin() + static_cast<std::ptrdiff_t>(begin_);
  return std::all_of(block_.begin(), begin, is_poison) &&
         std::all_of(begin + static_cast<std::ptrdiff_t>(size_), block_.end(), is_poison);
}

std::vector<std::int64_t> Tensor::contiguous(const std::vector<std::int64_t>& shape) {
  std::vector<std::int64_t> strides(shape.size());
  std::int64_t stride = 1;
  for (std::size_t i = shape.size(); i-- > 0; stride *= shape[i]) strides[i] = stride;
  return strides;
}

std::vector<std::int64_t> Tensor::gapped(const std::vector<std::int64_t>& shape) {
  std::vector<std::int64_t> strides(shape.size());
  std::int64_t stride = 1;
  for (std::size_t i = shape.size(); i-- > 0;) {
    strides[i] = stride;
    stride = stride * shape[i] + 3;
  }
  return strides;
}

std::vector<std::int64_t> Tensor::transposed(const std::vector<std::int64_t>& shape) {
  return {(shape[1] * 2 + 1) * shape[2] + 1, 2, shape[1] * 2 + 1};
}

Tensor::Tensor(fd_dtype dtype, std::vector<std::int64_t> shape, std::vector<std::int64_t> strides, std::size_t misalignment)
    : dtype_(dtype), shape_(std::move(shape)), strides_(std::move(strides)), memory_(0) {
  std::int64_t elements = product(shape_) == 0 ? 0 : 1;
  for (std::size_t i = 0; elements > 0 && i < shape_.size(); ++i) elements += (shape_[i] - 1) * strides_[i];
  memory_ = Memory(static_cast<std::size_t>(elements) * size_of(dtype), misalignment * size_of(dtype));
}

fd_tensor Tensor::view() {
  fd_tensor t{};
  if (!present()) return t;
  t.data = memory_.data();
  std::copy(strides_.begin(), strides_.end(), t.stride);
  return t;
}

// visit(position in order of the shape, element of the memory), rows [first_row, last_row).
template <typename Visit>
void Tensor::for_each(std::int64_t first_row, std::int64_t last_row, Visit visit) const {
  std::vector<std::int64_t> index(shape_.size(), 0);
  index[0] = first_row;
  const std::int64_t count = (last_row - first_row) * product(shape_, 1);
  std::int64_t at = first_row * strides_[0];
  for (std::int64_t position = 0; position < count; ++position) {
    visit(static_cast<std::size_t>(position), at);
    for (std::size_t d = shape_.size(); d-- > 0;) {
      at += strides_[d];
      if (++index[d] < shape_[d] || d == 0) break;
      at -= shape_[d] * strides_[d];
      index[d] = 0;
    }
  }
}

void Tensor::fill(const Array& values) {
  for_each(0, shape_[0], [&](std::size_t i, std::int64_t at) { store(memory_.data(), dtype_, at, values.x[i]); });
}

void Tensor::fill_row(std::int64_t row, std::span<const double> values) {
  for_each(row, row + 1, [&](std::size_t i, std::int64_t at) { store(memory_.data(), dtype_, at, values[i]); });
}

Array Tensor::read() const {
  Array values(shape_);
  for_each(0, shape_[0], [&](std::size_t i, std::int64_t at) { values.x[i] = load(memory_.data(), dtype_, at); });
  return values;
}

std::vector<double> Tensor::read_row(std::int64_t row) const {
  std::vector<double> values(static_cast<std::size_t>(product(shape_, 1)));
  for_each(row, row + 1, [&](std::size_t i, std::int64_t at) { values[i] = load(memory_.data(), dtype_, at); });
  return values;
}

void Tensor::remember() {
  allowed_rows_.clear();
  before_.assign(memory_.data(), memory_.data() + memory_.size());
}

void Tensor::allow_all() {
  for (std::int64_t row = 0; present() && row < shape_[0]; ++row) allow_row(row);
}

void Tensor::allow_row(std::int64_t row) { allowed_rows_.push_back(row); }

bool Tensor::intact() const {
  if (!present()) return true;
  std::vector<unsigned char> now(memory_.data(), memory_.data() + memory_.size());
  const std::size_t size = size_of(dtype_);
  for (const std::int64_t row : allowed_rows_) {
    for_each(row, row + 1, [&](std::size_t, std::int64_t at) {
      const std::size_t byte = static_cast<std::size_t>(at) * size;
      std::copy_n(before_.begin() + static_cast<std::ptrdiff_t>(byte), size,
                  now.begin() + static_cast<std::ptrdiff_t>(byte));
    });
  }
  return now == before_ && memory_.guards_intact();
}

}  // namespace flashdelta::testing
