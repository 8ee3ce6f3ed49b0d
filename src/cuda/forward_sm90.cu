#include "cuda/forward_sm90.cuh"

namespace flashdelta::cuda {
namespace {

template <typename T, int STATE, bool NORM>
fd_status launch_variant(const ForwardParameters& p, dim3 grid, void* stream) {
  const Launch config{.name = "forward_kernel",
                      .grid = grid,
                      .block = dim3(THREADS),
                      .shared = sizeof(SharedMemory<STATE>),
                      .overlap = true};
  return launch(forward_kernel<T, STATE, NORM>, config, p, stream);
}

template <typename T>
fd_status launch_type(const ForwardParameters& p, int state_warpgroups, bool l2norm, dim3 grid, void* stream) {
  if (state_warpgroups == 1) {
    return l2norm ? launch_variant<T, 1, true>(p, grid, stream) : launch_variant<T, 1, false>(p, grid, stream);
  }
  return l2norm ? launch_variant<T, 2, true>(p, grid, stream) : launch_variant<T, 2, false>(p, grid, stream);
}

}  // namespace

fd_status launch_forward(const ForwardParameters& p, int state_warpgroups, bool bfloat16, bool l2norm, dim3 grid,
                         void* stream) {
  return bfloat16 ? launch_type<__nv_bfloat16>(p, state_warpgroups, l2norm, grid, stream)
                  : launch_type<__half>(p, state_warpgroups, l2norm, grid, stream);
}

}  // namespace flashdelta::cuda
