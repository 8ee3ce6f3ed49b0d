#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "dtype.hpp"
#include "tests/stress/machine.hpp"

namespace flashdelta::stress {
namespace {

class Host : public Machine {
 public:
  fd_device device() const override { return FD_CPU; }
  void* stream() const override { return nullptr; }
  unsigned char* allocate(std::size_t bytes) override {
    blocks_.push_back(std::make_unique_for_overwrite<unsigned char[]>(bytes + 256));
    unsigned char* const p = blocks_.back().get();
    return p + (256 - reinterpret_cast<std::uintptr_t>(p) % 256) % 256;
  }
  void upload(void* to, const void* from, std::size_t bytes) override { std::memcpy(to, from, bytes); }
  void download(void* to, const void* from, std::size_t bytes) override { std::memcpy(to, from, bytes); }
  void copy(void* to, const void* from, std::size_t bytes) override { std::memcpy(to, from, bytes); }
  void set(void* to, unsigned char value, std::size_t bytes) override { std::memset(to, value, bytes); }

  void count_different(const void* a, const void* b, std::size_t bytes, unsigned counter) override {
    const auto *x = static_cast<const unsigned char*>(a), *y = static_cast<const unsigned char*>(b);
    for (std::size_t i = 0; i < bytes; ++i) counts_[counter] += x[i] != y[i] ? 1 : 0;
  }
  void count_other(const void* a, unsigned char value, std::size_t bytes, unsigned counter) override {
    const auto* x = static_cast<const unsigned char*>(a);
    counts_[counter] += bytes - static_cast<std::size_t>(std::count(x, x + bytes, value));
  }
  void count_not_finite(const void* a, fd_dtype type, std::size_t elements, unsigned counter) override {
    for (std::size_t i = 0; i < elements; ++i) {
      counts_[counter] += std::isfinite(load(a, type, static_cast<std::int64_t>(i))) ? 0 : 1;
    }
  }
  std::vector<std::uint64_t> counts(double) override { return std::exchange(counts_, std::vector<std::uint64_t>(COUNTERS)); }

 private:
  std::vector<std::unique_ptr<unsigned char[]>> blocks_;
  std::vector<std::uint64_t> counts_ = std::vector<std::uint64_t>(COUNTERS);
};

}  // namespace

std::unique_ptr<Machine> host_machine() { return std::make_unique<Host>(); }

}  // namespace flashdelta::stress
