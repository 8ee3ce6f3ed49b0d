// The kernels of the Hopper forward's context parallelism, as they are, compiled for the CPU.
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>

#include "backend.hpp"

#define cuda emulated_cuda
namespace flashdelta::cuda {
using std::max;
using std::min;
}  // namespace flashdelta::cuda
#include "cuda/context_sm90.cu"
