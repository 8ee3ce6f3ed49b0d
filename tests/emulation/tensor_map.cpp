// Tensor maps for the emulated copy engine, by the unmodified source.
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <string>

#include "backend.hpp"

#define cuda emulated_cuda
#include "cuda/tensor_map_sm90.cu"
