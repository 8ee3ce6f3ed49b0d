// Comparing the results of a call with the reference, and the backends and vector targets to compare.
#pragma once

#include <functional>
#include <string>

#include "tests/cases.hpp"
#include "tests/support/call.hpp"

namespace flashdelta::testing {

// Largest relative L2 error of one (sequence, head) on random data in fp32. Hard data (Case::hard): ten times as much.
inline constexpr double forward_limit = 5e-6;
inline constexpr double backward_limit = 5e-5;

// Fails the running test for every result whose worst (sequence, head) is above the limit, and where rows that belong to no
// sequence are not zero. 16-bit outputs may add their rounding error. NaN is above every limit.
void expect_close(const Case&, const Data&, const Results& got, const Results& want, double limit);

void expect_same_bits(const Results& got, const Results& want);

// Runs `body` for the chunked CPU backend with each vector target this machine has, and prints (once) which those are.
void for_each_cpu_target(const std::function<void(fd_backend)>& body);

// Test name of a case.
template <typename Info>
std::string case_name(const Info& info) {
  return info.param.name;
}

}  // namespace flashdelta::testing
