// Stands for src/cuda/ptx.cuh in the emulation: kernels do not overlap.
#pragma once

#include <cstdint>

namespace flashdelta::cuda {

inline std::int64_t waits = 0;  // by threads of the last kernel
inline void wait_for_earlier_kernels() { ++waits; }
inline void allow_later_kernels() {}

}  // namespace flashdelta::cuda
