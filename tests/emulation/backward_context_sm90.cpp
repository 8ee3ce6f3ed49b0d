// The kernel of the Hopper backward's context parallelism, as it is, compiled for the CPU.
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>

#define cuda emulated_cuda
namespace flashdelta::cuda {
using std::max;
using std::min;
}  // namespace flashdelta::cuda
#include "cuda/backward_context_sm90.cu"
