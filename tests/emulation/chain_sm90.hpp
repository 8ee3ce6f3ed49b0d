// The kernel of the backward's serial chain, emulated.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <vector>

#include "backend.hpp"
#include "tests/emulation/emulator.hpp"

// In a build with CUDA the real namespace is in the same program.
#define cuda emulated_cuda
#include "cuda/chain_sm90.hpp"

namespace flashdelta::emulation {

// The kernel once for each wave's pieces, the last wave first, for a call in normal form.
fd_status chain(const fd_backward_args&, const cuda::Scratch&, const std::vector<std::vector<cuda::Run>>& waves,
                int sm_count, Schedule);

}  // namespace flashdelta::emulation
