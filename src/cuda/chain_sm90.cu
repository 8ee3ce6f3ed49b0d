#include <algorithm>

#include "cuda/chain_sm90.cuh"
#include "cuda/device.hpp"

namespace flashdelta::cuda {
namespace {

template <typename T, int STATE, bool OUTCOMES, bool PAIR>
fd_status launch_chain_variant(const ChainParameters& p, int items, int sm_count, void* stream) {
  const Launch config{.name = "chain_kernel",
                      .grid = dim3(static_cast<unsigned>(std::min(items, sm_count))),
                      .block = dim3(chain::Shape<STATE>::THREADS),
                      .shared = sizeof(chain::SharedMemory<STATE>),
                      .overlap = true};
  return launch(chain_kernel<T, STATE, OUTCOMES, PAIR>, config, p, stream);
}

template <typename T, bool OUTCOMES, bool PAIR>
fd_status launch_chain_shape(const ChainParameters& p, int sm_count, void* stream) {
  const int items = p.run_count * p.scratch.value_heads * p.scratch.value_blocks;
  if (items == 0) return FD_OK;
  // The pre-pass: most runs are short, by their windows, and the others take half as long with half of the values.
  if constexpr (!OUTCOMES) {
    if (p.full) return launch_chain_variant<T, 2, OUTCOMES, PAIR>(p, items / 2, sm_count, stream);
  }
  return launch_chain_variant<T, 1, OUTCOMES, PAIR>(p, items, sm_count, stream);
}

// See `add_do`.
template <typename T, bool OUTCOMES>
fd_status launch_chain_operand(const ChainParameters& p, int sm_count, void* stream) {
  return p.dinitial.states.data != nullptr ? launch_chain_shape<T, OUTCOMES, true>(p, sm_count, stream)
                                           : launch_chain_shape<T, OUTCOMES, false>(p, sm_count, stream);
}

template <typename T>
fd_status launch_chain_type(const ChainParameters& p, int sm_count, void* stream) {
  return p.outcomes == nullptr ? launch_chain_operand<T, false>(p, sm_count, stream)
                               : launch_chain_operand<T, true>(p, sm_count, stream);
}

}  // namespace

fd_status launch_chain(const ChainParameters& p, bool bfloat16, int sm_count, void* stream) {
  return bfloat16 ? launch_chain_type<__nv_bfloat16>(p, sm_count, stream) : launch_chain_type<__half>(p, sm_count, stream);
}

}  // namespace flashdelta::cuda
