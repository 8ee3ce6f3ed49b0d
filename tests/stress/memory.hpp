// Memory of one batch: buffers between guard bands in one arena, which the host can mirror, and the noise they are filled
// with.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "dtype.hpp"
#include "tests/stress/machine.hpp"

namespace flashdelta::stress {

inline constexpr std::size_t GUARD = 4096;

struct Buffer {
  unsigned char* data = nullptr;  // null: absent
  std::size_t bytes = 0;
};

// Buffers one after another, poisoned, each between guard bands.
class Arena {
 public:
  Arena(Machine& machine, std::size_t bytes) : machine_(machine), base_(machine.allocate(bytes)), capacity_(bytes) {}

  void clear() {
    used_ = 0;
    buffers_.clear();
  }
  Buffer take(std::size_t bytes) {
    const std::size_t rounded = (bytes + 255) / 256 * 256;
    if (used_ + rounded + 2 * GUARD > capacity_) throw std::length_error("the batch is larger than the arena");
    unsigned char* const start = base_ + used_;
    machine_.set(start, POISON, rounded + 2 * GUARD);
    used_ += rounded + 2 * GUARD;
    buffers_.push_back({start + GUARD, bytes});
    return buffers_.back();
  }
  // Bytes around the buffers that are not poison any more.
  void count_guards(unsigned counter) const {
    for (const Buffer& b : buffers_) {
      machine_.count_other(b.data - GUARD, POISON, GUARD, counter);
      const std::size_t even = (b.bytes + 1) / 2 * 2, rounded = (b.bytes + 255) / 256 * 256;
      machine_.count_other(b.data + even, POISON, rounded - even + GUARD, counter);
    }
  }
  const unsigned char* base() const { return base_; }
  std::size_t used() const { return used_; }

 private:
  Machine& machine_;
  unsigned char* base_;
  std::size_t capacity_, used_ = 0;
  std::vector<Buffer> buffers_;
};

enum class Kind { unit, correlated, normal, gate, strong_gate, projection, strength, A_log };

// A million random elements of each kind and type on the machine, and buffers filled with stretches of them.
class Noise {
 public:
  explicit Noise(Machine& machine) : machine_(machine) {}

  // Fills from a row of 128 elements that `random` picks.
  void fill(const Buffer& to, Kind kind, fd_dtype type, std::mt19937_64& random) {
    const unsigned char* const from = noise(kind, type);
    const std::size_t all = ELEMENTS * size_of(type);
    std::size_t at = random() % ROWS * ROW * size_of(type);
    for (std::size_t done = 0; done < to.bytes;) {
      const std::size_t part = std::min(all - at, to.bytes - done);
      machine_.copy(to.data + done, from + at, part);
      done += part;
      at = 0;
    }
  }

 private:
  static constexpr std::size_t ROW = 128, ROWS = 8191, ELEMENTS = ROW * ROWS;

  const unsigned char* noise(Kind kind, fd_dtype type) {
    unsigned char*& data = made_[{kind, type}];
    if (data == nullptr) {
      const std::vector<double> values = make(kind);
      std::vector<unsigned char> host(ELEMENTS * size_of(type));
      for (std::size_t i = 0; i < ELEMENTS; ++i) store(host.data(), type, static_cast<std::int64_t>(i), values[i]);
      data = machine_.allocate(host.size());
      machine_.upload(data, host.data(), host.size());
    }
    return data;
  }

  static std::vector<double> make(Kind kind) {
    std::mt19937_64 random(static_cast<std::uint64_t>(kind) + 1);
    std::normal_distribution<double> normal;
    std::vector<double> x(ELEMENTS), common(ROW);
    for (double& y : common) y = normal(random);
    for (std::size_t i = 0; i < ELEMENTS; ++i) {
      const double y = normal(random), u = 1 / (1 + std::exp(-y));
      switch (kind) {
        case Kind::correlated: x[i] = common[i % ROW] + 0.1 * y; break;
        case Kind::gate: x[i] = i % 4 == 0 ? 0 : std::log(u) / 16; break;
        case Kind::strong_gate: x[i] = i % 4 == 0 ? 0 : -20 * u * u; break;
        case Kind::projection: x[i] = 2 * y; break;
        case Kind::strength: x[i] = u; break;
        case Kind::A_log: x[i] = std::log(0.05 + 4 * u); break;
        default: x[i] = y;
      }
    }
    for (std::size_t row = 0; (kind == Kind::unit || kind == Kind::correlated) && row < ROWS; ++row) {
      double squares = 0;
      for (std::size_t i = 0; i < ROW; ++i) squares += x[row * ROW + i] * x[row * ROW + i];
      for (std::size_t i = 0; i < ROW; ++i) x[row * ROW + i] /= std::sqrt(squares);
    }
    return x;
  }

  Machine& machine_;
  std::map<std::pair<Kind, fd_dtype>, unsigned char*> made_;
};

}  // namespace flashdelta::stress
