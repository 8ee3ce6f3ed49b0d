#include <algorithm>

#include "cuda/device.hpp"
#include "cuda/gradients_sm90.cuh"

namespace flashdelta::cuda {

fd_status launch_gradients(const GradientParameters& p, bool bfloat16, int sm_count, void* stream) {
  const int64_t items = static_cast<int64_t>(p.slots) * p.heads;
  if (items == 0) return FD_OK;
  const Launch config{.name = "gradients_kernel",
                      .grid = dim3(static_cast<unsigned>(std::min<int64_t>(items, sm_count))),
                      .block = dim3(gradients::THREADS),
                      .shared = sizeof(gradients::SharedMemory),
                      .overlap = true};
  return bfloat16 ? launch(gradients_kernel<__nv_bfloat16>, config, p, stream)
                  : launch(gradients_kernel<__half>, config, p, stream);
}

}  // namespace flashdelta::cuda
