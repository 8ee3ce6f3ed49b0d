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
__global__ void __launch_bounds__(WINDOW_THREADS) windows_kernel(const __grid_constant__ WindowParameters p) {
  extern __shared__ __align__(1024) uint8_t raw[];
  auto& shared = *reinterpret_cast<WindowMemory*>(raw);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  allow_later_kernels();
  wait_for_earlier_kernels();
  const int index = static_cast<int>(blockIdx.x) / p.value_heads, value_head = static_cast<int>(blockIdx.x) % p.value_heads;
  if (index >= p.plan->pre_runs) return;
  const PreRun run = p.runs[index];
  const TokenRange range = p.sequences[run.sequence];
  const int64_t begin = range.begin + static_cast<int64_t>(run.first_chunk) * CHUNK;

  int found = -1;
  float factor = 0;  // log2, of the chunks from here to the last
  for (int last = run.chunks - 1; last >= 0 && found < 0 && p.log_bound > -INFINITY; last -= WINDOW_WARPS) {
    const int mine = last - warp;
    const float x = mine < 0 ? 0.0f : chunk_factor<T>(p, range.batch, value_head, begin + mine * CHUNK + lane);
    __syncthreads();  // the factors of before are read
    if (lane == 0) shared.factor[warp] = x;
    __syncthreads();
    for (int i = 0; i < WINDOW_WARPS && i <= last && found < 0; ++i) {
      factor += shared.factor[i];
      if (factor <= p.log_bound) found = last - i;
    }
    // A head that decays as little as it has so far will not get there: its other keys are not read.
    const int seen = run.chunks - max(last - WINDOW_WARPS + 1, 0);
    if (!(factor * static_cast<float>(run.chunks) <= p.log_bound * static_cast<float>(seen))) break;
  }

  if (thread == 0) p.windows[index * p.value_heads + value_head] = found;
}

namespace {

// --- fold: a block for 8 values of each (cut sequence, value head)

struct StateFoldMemory {
  FoldMemory fold;
  int exact[MOST_RUNS];  // whether a run has a transition
};

}  // namespace

// Run after run of the chain: state before run i + 1 = (state before run i) M_i + B_i. Transitions are loaded
// while those before are used.
__global__ void __launch_bounds__(FOLD_THREADS) fold_kernel(const __grid_constant__ FoldParameters p) {
  extern __shared__ __align__(1024) uint8_t raw[];
  auto& shared = *reinterpret_cast<StateFoldMemory*>(raw);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  if (thread == 0) init_barriers(shared.fold, {1});
  __syncthreads();
  allow_later_kernels();
  wait_for_earlier_kernels();
  const int groups = p.values / FOLD_ROWS, per_chain = p.value_heads * groups, items = p.plan->chains * per_chain;
  Ring ring, ahead;
  for (int item = static_cast<int>(blockIdx.x); item < items; item += static_cast<int>(gridDim.x)) {
    const Chain chain = p.chains[item / per_chain];
    const int value_head = item % per_chain / groups;
    const int value = item % groups * FOLD_ROWS + warp, key = 4 * lane;  // the thread's row and keys
    const auto outcome_of = [&](int run) { return static_cast<int64_t>(chain.pre_run + run) * p.value_heads + value_head; };
    const auto rows_of = [&](int run) { return p.outcomes + outcome_of(run) * (p.values + KEYS) * KEYS; };

    // The first run started from the initial state, and one with a window has no transition.
    __syncthreads();  // the last item's are read
    if (thread < chain.runs) {
      shared.exact[thread] = thread > 0 && thread + 1 < chain.runs && p.windows[outcome_of(thread)] < 0 ? 1 : 0;
    }
    __syncthreads();
    int coming = 0;  // run whose transition may be loaded next, if it has one
    const auto load_next = [&] {
      while (coming < chain.runs && shared.exact[coming] == 0) ++coming;
      if (coming == chain.runs) return;
      load_transition(shared.fold, ahead, rows_of(coming) + static_cast<int64_t>(p.values) * KEYS);
      ahead.next<FOLD_STAGES>();
      ++coming;
    };
    if (thread == 0) {
      for (int i = 0; i < FOLD_STAGES; ++i) load_next();
    }

    float4 state = make_float4(0, 0, 0, 0);
    if (const int64_t row = p.initial.row(chain.sequence, 0); row >= 0) {
      const StateLayout at = state_layout(p.initial, p.state_v_first != 0, row, value_head);
      const int64_t first = at.base + value * at.value + key * at.key;
      state = make_float4(p.initial.states[first], p.initial.states[first + at.key], p.initial.states[first + 2 * at.key],
                          p.initial.states[first + 3 * at.key]);
    }
    // B of the next two runs is on its way.
    const auto load_outcome = [&](int run) {
      return run + 1 < chain.runs ? *reinterpret_cast<const float4*>(rows_of(run) + value * KEYS + key) : float4{};
    };
    float4 next = load_outcome(0), after_next = load_outcome(1);
    for (int i = 0;; ++i) {
      const int64_t start = (static_cast<int64_t>(chain.start + i) * p.value_heads + value_head) * p.values + value;
      *reinterpret_cast<float4*>(p.starts + start * KEYS + key) = state;
      if (i + 1 == chain.runs) break;
      const float4 b = next;
      next = after_next;
      after_next = load_outcome(i + 2);
      if (shared.exact[i] == 0) {
        state = b;
        continue;
      }
      state = next_state(shared.fold, ring, state, b, warp, lane);
      ring.next<FOLD_STAGES>();
      if (thread == 0) load_next();
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
  const int64_t items = chains * p.value_heads * (p.values / FOLD_ROWS);
  const Launch config{.name = "fold_kernel",
                      .grid = dim3(static_cast<unsigned>(std::min<int64_t>(items, sm_count))),
                      .block = dim3(FOLD_THREADS),
                      .shared = sizeof(StateFoldMemory),
                      .overlap = true};
  return launch(fold_kernel, config, p, stream);
}

}  // namespace flashdelta::cuda
