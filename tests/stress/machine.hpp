// Where the stress program runs: memory, copies, and checks that leave their counts on the device until they are asked for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "flashdelta/flashdelta.h"

namespace flashdelta::stress {

inline constexpr unsigned COUNTERS = 8;
inline constexpr unsigned char POISON = 0xff;  // a NaN of every floating-point type

// Every operation is enqueued in order; counts() waits for them.
class Machine {
 public:
  virtual ~Machine() = default;
  virtual fd_device device() const = 0;
  virtual void* stream() const = 0;
  virtual unsigned char* allocate(std::size_t bytes) = 0;  // aligned to 256 bytes, freed with the machine
  virtual void upload(void* to, const void* from, std::size_t bytes) = 0;
  virtual void download(void* to, const void* from, std::size_t bytes) = 0;
  virtual void copy(void* to, const void* from, std::size_t bytes) = 0;
  virtual void set(void* to, unsigned char value, std::size_t bytes) = 0;

  // Adds to a counter: bytes that differ; bytes that are not `value`; elements that are NaN or infinite.
  virtual void count_different(const void* a, const void* b, std::size_t bytes, unsigned counter) = 0;
  virtual void count_other(const void* a, unsigned char value, std::size_t bytes, unsigned counter) = 0;
  virtual void count_not_finite(const void* a, fd_dtype type, std::size_t elements, unsigned counter) = 0;

  // The counters, which start from zero again. Throws std::runtime_error if the device failed, or if it is still at work
  // after `seconds`.
  virtual std::vector<std::uint64_t> counts(double seconds) = 0;
};

std::unique_ptr<Machine> host_machine();
std::unique_ptr<Machine> cuda_machine();  // throws std::runtime_error where there is no CUDA device

}  // namespace flashdelta::stress
