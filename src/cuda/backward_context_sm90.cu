#include <algorithm>

#include "cuda/backward_context_sm90.hpp"
#include "cuda/device.hpp"
#include "cuda/fold_sm90.cuh"
#include "cuda/ptx.cuh"
#include "cuda/window_sm90.cuh"

namespace flashdelta::cuda {
template <typename T>
__global__ void __launch_bounds__(WINDOW_THREADS)
    gradient_windows_kernel(const __grid_constant__ GradientWindowParameters p) {
  extern __shared__ __align__(1024) uint8_t raw[];
  auto& shared = *reinterpret_cast<WindowMemory*>(raw);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  allow_later_kernels();
  wait_for_earlier_kernels();
  const int index = static_cast<int>(blockIdx.x) / p.value_heads, value_head = static_cast<int>(blockIdx.x) % p.value_heads;
  const Run run = p.segments[index];
  if (run.sequence < 0 || run.first_chunk == 0) return;
  const TokenRange range = p.sequences[run.sequence];
  const int64_t begin = range.begin + static_cast<int64_t>(run.first_chunk) * CHUNK;
  const int chunks = min(run.chunks, static_cast<int>((range.end - begin) / CHUNK));  // whole ones

  int found = -1;
  float factor = 0;  // log2, of the first chunks
  for (int first = 0; first < chunks && found < 0 && p.log_bound > -INFINITY; first += WINDOW_WARPS) {
    const int mine = first + warp;
    const float x = mine < chunks ? chunk_factor<T>(p, range.batch, value_head, begin + mine * CHUNK + lane) : 0.0f;
    __syncthreads();  // the factors of before are read
    if (lane == 0) shared.factor[warp] = x;
    __syncthreads();
    const int end = min(first + WINDOW_WARPS, chunks);
    for (int i = first; i < end && found < 0; ++i) {
      factor += shared.factor[i - first];
      if (factor <= p.log_bound) found = i + 1;
    }
    // A head that decays as little as it has so far will not get there: its other keys are not read.
    if (!(factor * static_cast<float>(chunks) <= p.log_bound * static_cast<float>(end))) break;
  }
  if (thread == 0) p.windows[index * p.value_heads + value_head] = found;
}

namespace {

struct GradientFoldMemory {
  FoldMemory fold;
  int first;  // segment of the piece: its entry in the table
};

}  // namespace

// A block for 8 values of one head, of some pieces. Transitions are loaded while those before are used.
__global__ void __launch_bounds__(FOLD_THREADS) gradient_fold_kernel(const __grid_constant__ GradientFoldParameters p) {
  extern __shared__ __align__(1024) uint8_t raw[];
  auto& shared = *reinterpret_cast<GradientFoldMemory*>(raw);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  allow_later_kernels();
  wait_for_earlier_kernels();
  const int groups = p.values / FOLD_ROWS, per_piece = p.value_heads * groups, block = static_cast<int>(blockIdx.x);
  const int value_head = block % per_piece / groups;
  const int value = block % groups * FOLD_ROWS + warp, key = 4 * lane;  // the thread's row, keys
  const int64_t at = (static_cast<int64_t>(value_head) * p.values + value) * KEYS + key;
  if (thread == 0) init_barriers(shared.fold, {1});
  Ring ring, ahead;

  for (int index = block / per_piece; index < p.piece_count; index += static_cast<int>(gridDim.x) / per_piece) {
    const Run piece = p.pieces[index];
    const bool begins = piece.first_chunk == 0;
    if (piece.sequence < 0 || (begins && piece.chunks < SEGMENT_CHUNKS)) continue;
    const TokenRange range = p.sequences[piece.sequence];
    const bool ends = (int64_t{piece.first_chunk} + piece.chunks) * CHUNK >= range.end - range.begin;
    if (begins && ends && piece.chunks == SEGMENT_CHUNKS) continue;

    __syncthreads();  // the piece before is done with
    if (thread == 0) shared.first = p.segment_count;
    __syncthreads();
    for (int i = thread; i < p.segment_count; i += FOLD_THREADS) {
      const Run segment = p.segments[i];
      if (segment.sequence == piece.sequence && segment.first_chunk == piece.first_chunk) shared.first = i;
    }
    __syncthreads();
    const int first = shared.first;
    const int segments = min((piece.chunks + SEGMENT_CHUNKS - 1) / SEGMENT_CHUNKS, p.segment_count - first);
    const auto outcome_of = [&](int i) {
      return p.outcomes + (static_cast<int64_t>(first + i) * p.value_heads + value_head) * (p.values + KEYS) * KEYS;
    };
    const auto is_last = [&](int i) { return ends && i == segments - 1; };  // of the sequence
    const int least = begins ? 1 : 0;                                       // segment with an outcome
    const auto has_transition = [&](int i) {
      return !is_last(i) && p.windows[static_cast<int64_t>(first + i) * p.value_heads + value_head] < 0;
    };
    int coming = segments - 1;  // whose transition may be loaded next, if it has one
    const auto load_next = [&] {
      while (coming >= least && !has_transition(coming)) --coming;
      if (coming < least) return;
      load_transition(shared.fold, ahead, outcome_of(coming) + static_cast<int64_t>(p.values) * KEYS);
      ahead.next<FOLD_STAGES>();
      --coming;
    };
    if (thread == 0) {
      for (int i = 0; i < FOLD_STAGES; ++i) load_next();
    }

    float4 state = ends ? make_float4(0, 0, 0, 0) : *reinterpret_cast<const float4*>(p.carry_in + at);
    for (int i = segments; i-- > 0;) {
      if (!is_last(i)) {
        *reinterpret_cast<float4*>(p.starts + static_cast<int64_t>(first + i) * p.value_heads * p.values * KEYS + at) =
            state;
      }
      if (i < least) break;
      const float4 c = *reinterpret_cast<const float4*>(outcome_of(i) + static_cast<int64_t>(value) * KEYS + key);
      if (!has_transition(i)) {
        state = c;
        continue;
      }
      state = next_state(shared.fold, ring, state, c, warp, lane);
      ring.next<FOLD_STAGES>();
      if (thread == 0) load_next();
    }
    if (!begins) *reinterpret_cast<float4*>(p.carry_out + at) = state;
  }
}

namespace {

constexpr int SMS = 132;  // of a Hopper GPU: results do not depend on the device

// Cycles on one SM. PREDICTIONS from the rates of tensor cores and caches and the counted instructions; none is measured.
struct ChainCosts {
  static constexpr int64_t HALF_CHUNK = 1500;        // chain, a chunk, 64 values
  static constexpr int64_t FULL_CHUNK = 2850;        // chain, a chunk, 128 values
  static constexpr int64_t L2 = 3100;                // bytes a cycle of all SMs together
  static constexpr int64_t TRANSITION_CHUNK = 1600;  // states, a chunk, 128 rows
  static constexpr int64_t FOLD_STEP = 2700;         // 8 values of a head from one segment's start to the next's; L2 limits
  static constexpr int64_t COPY_STEP = 600;          // likewise, without a transition
  static constexpr int64_t PRE_PASS = 15000;         // starts of its three kernels
  static constexpr int64_t LIKELY_WINDOW = 5;        // chunks, where gates decay as in trained models
};

int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Cycles of a chain that walks `runs` of as many chunks each.
int64_t chain_cost(const fd_problem& p, int64_t runs, int64_t chunks, bool outcomes) {
  const int64_t blocks = p.V / VALUES, shape = blocks % 2 != 0 || runs * p.HV * blocks <= SMS ? 1 : 2;
  const int64_t items = runs * p.HV * (blocks / shape);
  const int64_t values = outcomes ? TILE : 3 * TILE + STATE_TILE;  // do; else dv twice, dS, too
  const int64_t bytes = 6 * TILE + static_cast<int64_t>(sizeof(ChunkVectors)) + shape * values;  // K, Q, T, P and these
  return std::max(ceil_divide(items, SMS) * chunks * (shape == 1 ? ChainCosts::HALF_CHUNK : ChainCosts::FULL_CHUNK),
                  items * chunks * bytes / ChainCosts::L2);
}

// Cycles of all that the segments' chain takes, for `sequences` of as many chunks each; `windows`: all heads decay.
int64_t split_cost(const fd_problem& p, int64_t sequences, int64_t chunks, bool windows) {
  const int64_t segments = ceil_divide(chunks, SEGMENT_CHUNKS), longest = std::min<int64_t>(chunks, SEGMENT_CHUNKS);
  const int64_t transitions = windows ? 0 : sequences * p.HV * std::max<int64_t>(segments - 2, 0) * SEGMENT_CHUNKS;
  const int64_t walked = windows ? std::min(longest, ChainCosts::LIKELY_WINDOW) : longest;
  const int64_t step = windows ? ChainCosts::COPY_STEP : ChainCosts::FOLD_STEP;
  return ChainCosts::PRE_PASS + chain_cost(p, sequences * (segments - 1), walked, true) +
         ceil_divide(transitions, SMS) * ChainCosts::TRANSITION_CHUNK +
         (segments - 1) * ceil_divide(sequences * p.HV * p.V / FOLD_ROWS, SMS) * step +
         chain_cost(p, sequences * segments, longest, false);
}

}  // namespace

// Gates are not known here: it has to gain where they decay, and may not lose where they do not. Nor are the lengths of
// packed sequences: it has to pay if one of them has all tokens, and may not cost more than the launches if all have the
// same length.
bool splits_backward(const fd_problem& p) {
  if (p.context_parallel == FD_CONTEXT_OFF || p.T <= SEGMENT || p.N == 0 || p.HV == 0) return false;
  if (p.context_parallel == FD_CONTEXT_ON) return true;
  const bool packed = p.N != p.B;
  const int64_t chunks = ceil_divide(p.T, CHUNK), sequences = packed ? 1 : p.B,
                whole = chain_cost(p, sequences, chunks, false);
  const int64_t equal = packed ? ceil_divide(p.T, CHUNK * p.N) : chunks;
  return split_cost(p, sequences, chunks, false) <= whole && 10 * split_cost(p, sequences, chunks, true) <= 9 * whole &&
         split_cost(p, p.N, equal, false) <= chain_cost(p, p.N, equal, false) + ChainCosts::PRE_PASS;
}

fd_status launch_gradient_windows(const GradientWindowParameters& p, bool bfloat16, void* stream) {
  const Launch config{.name = "gradient_windows_kernel",
                      .grid = dim3(static_cast<unsigned>(p.segment_count * p.value_heads)),
                      .block = dim3(WINDOW_THREADS),
                      .shared = sizeof(WindowMemory),
                      .overlap = true};
  return bfloat16 ? launch(gradient_windows_kernel<__nv_bfloat16>, config, p, stream)
                  : launch(gradient_windows_kernel<__half>, config, p, stream);
}

fd_status launch_gradient_fold(const GradientFoldParameters& p, void* stream) {
  // No more pieces than this can have a second segment, or share their only one's sequence with another wave.
  const int64_t pieces = std::min(p.piece_count, p.segment_count - p.piece_count + 2);
  const Launch config{.name = "gradient_fold_kernel",
                      .grid = dim3(static_cast<unsigned>(pieces * p.value_heads * (p.values / FOLD_ROWS))),
                      .block = dim3(FOLD_THREADS),
                      .shared = sizeof(GradientFoldMemory),
                      .overlap = true};
  return launch(gradient_fold_kernel, config, p, stream);
}

}  // namespace flashdelta::cuda
