// Context parallelism: which chunks of a run decide its last state, and the first states of all runs.
#include <algorithm>

#include "cuda/block_sm90.cuh"
#include "cuda/context_kernels_sm90.hpp"
#include "cuda/device.hpp"
#include "cuda/fold_sm90.cuh"
#include "cuda/ptx.cuh"
#include "cuda/window_sm90.cuh"

namespace flashdelta::cuda {
namespace {

// --- windows: a block for each (run of the pre-pass, value head)

}  // namespace

template <typename T>
__global__ void __launch_bounds__(WINDOW_THREADS, 2) windows_kernel(const __grid_constant__ WindowParameters p) {
  extern __shared__ __align__(1024) uint8_t raw[];
  auto& shared = *reinterpret_cast<WindowMemory*>(raw);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  allow_later_kernels();
  wait_for_earlier_kernels();
  const int index = static_cast<int>(blockIdx.x) / p.value_heads, value_head = static_cast<int>(blockIdx.x) % p.value_heads;
  const PreRun run = p.runs[index];
  if (index >= p.plan->pre_runs) return;
  const TokenRange range = p.sequences[run.sequence];
  const int64_t begin = range.begin + static_cast<int64_t>(run.first_chunk) * CHUNK;

  int found = -1;
  float factor = 0;  // log2, of the chunks after `last`
  for (int last = run.chunks - 1; last >= 0 && found < 0 && p.log_bound > -INFINITY;) {
    const int mine = last - warp, there = min(last + 1, WINDOW_WARPS);
    const int64_t first = begin + mine * CHUNK + lane;
    const float decay = mine < 0 ? 0.0f : chunk_decay(p, range.batch, value_head, first);
    if (lane == 0) shared.decay[warp] = decay;
    __syncthreads();
    // So many of these chunks would do if no key lengthened a state: only their keys are read.
    int count = 0;
    float least = factor;
    while (count < there && !(least <= p.log_bound)) least += shared.decay[count++];
    // A head that decays as little as it has so far will not get there.
    const int seen = run.chunks - 1 - last + count;
    if (!(least * static_cast<float>(run.chunks) <= p.log_bound * static_cast<float>(seen))) break;
    const float growth = warp < count ? chunk_growth<T>(p, range.batch, value_head, first) : 0.0f;
    if (lane == 0) shared.factor[warp] = decay + growth;
    __syncthreads();
    for (int i = 0; i < count && found < 0; ++i) {
      factor += shared.factor[i];
      if (factor <= p.log_bound) found = last - i;
    }
    last -= count;
  }

  if (thread == 0) p.windows[index * p.value_heads + value_head] = found;
}

// --- fold: a block for 8 or 4 values of each (cut sequence, value head)

namespace {

// A block's item: which runs of a chain have a transition, for a head.
struct FoldItem {
  Chain chain;
  int value_head;
  int some;              // whether any has
  int exact[MOST_RUNS];  // whether a run has
};
struct StateFoldMemory {
  FoldMemory fold;
  FoldItem items[FOLD_WARPS];  // looked at together, a warp each: most heads have no transition
};

// By one warp.
__device__ __forceinline__ void look_at(const FoldParameters& p, FoldItem& item, int value_head, const Chain& chain,
                                        int lane) {
  int some = 0;
  for (int run = lane; run < chain.runs; run += 32) {
    int exact = 0;
    // The first run started from the initial state, and one with a window has no transition.
    if (run > 0 && run + 1 < chain.runs) {
      exact = p.windows[static_cast<int64_t>(chain.pre_run + run) * p.value_heads + value_head] < 0 ? 1 : 0;
    }
    item.exact[run] = exact;
    some |= exact;
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) some |= __shfl_xor_sync(~0u, some, step);
  if (lane == 0) {
    item.chain = chain;
    item.value_head = value_head;
    item.some = some;
  }
}

// Run after run of the chain: state before run i + 1 = (state before run i) M_i + B_i, for the runs that have a transition;
// the states after the others are known. Transitions are loaded while those before are used.
template <typename Share>
__device__ __forceinline__ void fold_states(const FoldParameters& p, StateFoldMemory& shared, Ring& ring, Ring& ahead,
                                            const FoldItem& item, int group, int warp, int lane) {
  const Chain chain = item.chain;
  const int value_head = item.value_head;
  const FoldShape<Share> own(warp, lane);
  const int value = group * FoldShape<Share>::ROWS + own.row, thread = 32 * warp + lane;
  const auto rows_of = [&](int run) {
    return p.outcomes + (static_cast<int64_t>(chain.pre_run + run) * p.value_heads + value_head) * (p.values + KEYS) * KEYS;
  };
  int coming = 0;  // run whose transition may be loaded next, if it has one
  const auto load_next = [&] {
    while (coming < chain.runs && item.exact[coming] == 0) ++coming;
    if (coming == chain.runs) return;
    load_transition(shared.fold, ahead, rows_of(coming) + static_cast<int64_t>(p.values) * KEYS);
    ahead.next<FOLD_STAGES>();
    ++coming;
  };
  if (thread == 0) {
    for (int i = 0; i < FOLD_STAGES; ++i) load_next();
  }
  const auto start_of = [&](int run) {
    const int64_t row = (static_cast<int64_t>(chain.start + run) * p.value_heads + value_head) * p.values + value;
    return reinterpret_cast<Share*>(p.starts + row * KEYS + own.key);
  };
  // B of the next two runs is on its way.
  const auto load_outcome = [&](int run) {
    return run + 1 < chain.runs && item.exact[run] != 0
               ? *reinterpret_cast<const Share*>(rows_of(run) + value * KEYS + own.key)
               : Share{};
  };
  Share next = load_outcome(1), after_next = load_outcome(2), state = {};
  bool known = false;  // the state, from the run before
  for (int i = 1; i + 1 < chain.runs; ++i) {
    const Share b = next;
    next = after_next;
    after_next = load_outcome(i + 2);
    if (item.exact[i] == 0) {
      known = false;
      continue;
    }
    if (!known) state = *start_of(i);
    state = next_state(shared.fold, ring, state, b, warp, lane);
    ring.next<FOLD_STAGES>();
    if (thread == 0) load_next();
    *start_of(i + 1) = state;
    known = true;
  }
}

}  // namespace

__global__ void __launch_bounds__(FOLD_THREADS) fold_kernel(const __grid_constant__ FoldParameters p) {
  extern __shared__ __align__(1024) uint8_t raw[];
  auto& shared = *reinterpret_cast<StateFoldMemory*>(raw);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  if (thread == 0) init_barriers(shared.fold, {1});
  __syncthreads();
  allow_later_kernels();
  wait_for_earlier_kernels();
  const int chains = p.plan->chains;
  if (chains == 0) return;
  // As few rows as make use of all blocks where few heads have transitions.
  const bool few = p.plan->exact_heads * chains * (p.values / 4) <= static_cast<int>(gridDim.x);
  const int groups = p.values / (few ? 4 : 8), per_head = chains * groups;
  const auto items = p.value_heads * per_head, stride = static_cast<int>(gridDim.x);
  Ring ring, ahead;
  for (auto first = static_cast<int>(blockIdx.x); first < items; first += FOLD_WARPS * stride) {
    const int mine = first + warp * stride;
    __syncthreads();  // the items of before are read
    if (mine < items) {
      look_at(p, shared.items[warp], p.heads_in_order[mine / per_head], p.chains[mine % per_head / groups], lane);
    } else if (lane == 0) {
      shared.items[warp].some = 0;
    }
    __syncthreads();
    for (int i = 0; i < FOLD_WARPS; ++i) {
      const FoldItem& item = shared.items[i];
      const int group = (first + i * stride) % groups;
      if (item.some == 0) continue;
      if (few) {
        fold_states<float2>(p, shared, ring, ahead, item, group, warp, lane);
      } else {
        fold_states<float4>(p, shared, ring, ahead, item, group, warp, lane);
      }
    }
  }
}

fd_status launch_windows(const WindowParameters& p, bool bfloat16, int64_t pre_runs, void* stream) {
  const Launch config{.name = "windows_kernel",
                      .grid = dim3(static_cast<unsigned>(pre_runs * p.value_heads)),
                      .block = dim3(WINDOW_THREADS),
                      .shared = sizeof(WindowMemory),
                      .overlap = true};
  return bfloat16 ? launch(windows_kernel<__nv_bfloat16>, config, p, stream)
                  : launch(windows_kernel<__half>, config, p, stream);
}

fd_status launch_fold(const FoldParameters& p, int64_t chains, int sm_count, void* stream) {
  const int64_t items = chains * p.value_heads * (p.values / 4);
  const Launch config{.name = "fold_kernel",
                      .grid = dim3(static_cast<unsigned>(std::min<int64_t>(items, sm_count))),
                      .block = dim3(FOLD_THREADS),
                      .shared = sizeof(StateFoldMemory),
                      .overlap = true};
  return launch(fold_kernel, config, p, stream);
}

}  // namespace flashdelta::cuda
