// The planner: puts the forward's runs in order of length and, for context parallelism, decides into how many runs each
// sequence is cut, all from cu_seqlens on the device.
#include "cuda/block_sm90.cuh"
#include "cuda/context_kernels_sm90.hpp"
#include "cuda/device.hpp"
#include "cuda/ptx.cuh"

namespace flashdelta::cuda {
namespace {

constexpr int PLAN_THREADS = 512, CANDIDATES = MOST_RUNS, LANES = PLAN_THREADS / CANDIDATES;
constexpr int CLASSES = 192;  // of runs by length

struct PlanMemory {
  unsigned longest, total_low, total_high;
  unsigned pre_runs, chunks, starts, chains, runs;
  int length;  // of runs
  float windows[MOST_SPLIT_HEADS];
  float costs[CANDIDATES];
  Cut cuts[CANDIDATES];
  unsigned count[CLASSES], place[CLASSES];
};

__device__ int chunks_of(const Sequences& sequences, int64_t n) {
  const TokenRange range = sequences[n];
  return static_cast<int>((range.end - range.begin + CHUNK - 1) / CHUNK);
}

// Class of a length in chunks: itself, from 32 on with three bits after the first.
__device__ int class_of(int chunks) {
  int shift = 0;
  while ((chunks >> shift) >= 16) ++shift;
  return shift < 2 ? chunks : 8 * (shift + 1) + (chunks >> shift);
}

// How many chunks of each head will have decayed below the bound, as a sample of the gates has it. An estimate: what is
// skipped in the end is decided in `windows`.
__device__ void sample_gates(const PlanParameters& p, PlanMemory& shared) {
  constexpr int SAMPLES = 64;
  constexpr float LOG2E = 1.44269504088896341f, MARGIN = 1.25f;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t tokens = p.sequences.used_tokens() * p.B;
  for (int head = warp; head < p.split.value_heads; head += PLAN_THREADS / 32) {
    float sum = 0;
    for (int i = lane; i < SAMPLES; i += 32) {
      const int64_t token = tokens * (2 * i + 1) / (2 * SAMPLES);
      if (tokens > 0) sum -= p.gates.log_decay(token / p.sequences.T, token % p.sequences.T, head) * LOG2E;
    }
    sum = warp_sum(sum);
    if (lane == 0) {
      shared.windows[head] = sum > 0 ? ceilf(-p.log_bound * MARGIN * SAMPLES / (sum * CHUNK)) + 1 : INFINITY;
    }
  }
}

// Cycles that a cut would take.
__device__ float cost(const PlanParameters& p, const PlanMemory& shared, const Cut& cut) {
  if (cut.pre_runs == 0) return forward_cost(p.plain, cut);
  const float length = static_cast<float>(cut.pre_chunks) / static_cast<float>(cut.pre_runs);
  Heads heads = {};
  for (int head = 0; head < p.split.value_heads; ++head) {
    const float window = shared.windows[head];
    if (window < length) {
      heads.windows += window;
      heads.longest = fmaxf(heads.longest, window);
    } else {
      ++heads.exact;
    }
  }
  return forward_cost(p.split, cut) + pre_pass_cost(p.split, cut, heads);
}

// Leaves in `length` how many chunks a run may have.
__device__ void choose_length(const PlanParameters& p, PlanMemory& shared) {
  const int candidate = static_cast<int>(threadIdx.x) / LANES, lane = static_cast<int>(threadIdx.x) % LANES;
  const auto longest = static_cast<int>(shared.longest);
  const auto length_of = [&](int i) { return max(p.shortest, (longest + i) / (i + 1)); };
  Cut& cut = shared.cuts[candidate];
  const auto add = [&](unsigned Cut::*member, int x) { atomicAdd(&(cut.*member), static_cast<unsigned>(x)); };
  const auto raise = [&](unsigned Cut::*member, int x) { atomicMax(&(cut.*member), static_cast<unsigned>(x)); };
  for (int64_t n = lane; n < p.sequences.N; n += LANES) {
    add_sequence(chunks_of(p.sequences, n), length_of(candidate), add, raise);
  }
  __syncthreads();
  if (lane == 0) shared.costs[candidate] = cost(p, shared, cut);
  __syncthreads();
  if (threadIdx.x == 0) {
    int best = 0;
    float least = p.forced != 0 ? INFINITY : shared.costs[0];
    for (int i = 1; i < CANDIDATES; ++i) {
      if (shared.cuts[i].pre_runs > 0 && shared.costs[i] < least) {
        best = i;
        least = shared.costs[i];
      }
    }
    shared.length = length_of(best);
  }
  __syncthreads();
}

// The runs of all sequences, longest first, and the pre-pass's. Which thread comes first decides where something lies, and
// no result depends on that.
__device__ void lay_out(const PlanParameters& p, PlanMemory& shared) {
  const int thread = static_cast<int>(threadIdx.x);
  for (int64_t n = thread; n < p.sequences.N; n += PLAN_THREADS) {
    const Pieces cut = pieces(chunks_of(p.sequences, n), shared.length);
    atomicAdd(&shared.count[class_of(cut.size)], static_cast<unsigned>(cut.count - cut.more));
    atomicAdd(&shared.count[class_of(cut.size + 1)], static_cast<unsigned>(cut.more));
  }
  __syncthreads();
  if (thread < CLASSES) {
    unsigned longer = 0;
    for (int i = thread + 1; i < CLASSES; ++i) longer += shared.count[i];
    shared.place[thread] = longer;
    if (thread == 0) shared.runs = longer + shared.count[0];
  }
  __syncthreads();
  for (int64_t n = thread; n < p.sequences.N; n += PLAN_THREADS) {
    const auto sequence = static_cast<int>(n);
    const Pieces cut = pieces(chunks_of(p.sequences, n), shared.length);
    const bool split = cut.count > 1;
    Chain chain = {sequence, cut.count, -1, 0};
    int slot = 0;
    if (split) {
      chain.start = static_cast<int>(atomicAdd(&shared.starts, static_cast<unsigned>(cut.count)));
      chain.pre_run = static_cast<int>(atomicAdd(&shared.pre_runs, static_cast<unsigned>(cut.count - 1)));
      slot = static_cast<int>(atomicAdd(&shared.chunks, static_cast<unsigned>(cut.first(cut.count - 1))));
      p.chains[atomicAdd(&shared.chains, 1u)] = chain;
    }
    for (int i = 0; i < cut.count; ++i) {
      const int first = cut.first(i), end = cut.first(i + 1);
      p.runs[atomicAdd(&shared.place[class_of(end - first)], 1u)] = {sequence, first, end, split ? chain.start + i : -1};
      if (i + 1 < cut.count) p.pre_runs[chain.pre_run + i] = {sequence, first, end - first, slot + first};
    }
  }
}

}  // namespace

__global__ void __launch_bounds__(PLAN_THREADS) plan_kernel(const __grid_constant__ PlanParameters p) {
  extern __shared__ __align__(1024) uint8_t raw[];
  auto& shared = *reinterpret_cast<PlanMemory*>(raw);
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < static_cast<int>(sizeof(PlanMemory) / sizeof(unsigned)); i += PLAN_THREADS) {
    reinterpret_cast<unsigned*>(raw)[i] = 0;
  }
  __syncthreads();
  wait_for_earlier_kernels();

  int64_t total = 0;
  int longest = 0;
  for (int64_t n = thread; n < p.sequences.N; n += PLAN_THREADS) {
    const int chunks = chunks_of(p.sequences, n);
    total += chunks;
    longest = max(longest, chunks);
  }
  atomicMax(&shared.longest, static_cast<unsigned>(longest));
  atomicAdd(&shared.total_low, static_cast<unsigned>(total & 0xffff));
  atomicAdd(&shared.total_high, static_cast<unsigned>(min(total >> 16, int64_t{1} << 22)));
  if (p.split.blocks > 0) sample_gates(p, shared);
  __syncthreads();
  // Sequences that overlap, where cu_seqlens is garbage, may have more chunks than there is room for.
  total = (int64_t{shared.total_high} << 16) + shared.total_low;
  if (p.split.blocks > 0 && total <= p.most_chunks) {
    choose_length(p, shared);
  } else {
    if (thread == 0) shared.length = max(1, static_cast<int>(shared.longest));
    __syncthreads();
  }
  lay_out(p, shared);
  __syncthreads();
  if (thread == 0) {
    const auto runs = static_cast<int>(shared.runs);
    const bool second = p.shapes == 2 && shared.chains > 0;
    *p.plan = {{second ? 0 : runs, second ? runs : 0},
               static_cast<int>(shared.pre_runs),
               static_cast<int>(shared.chunks),
               static_cast<int>(shared.chains),
               0,
               0};
  }
  allow_later_kernels();
}

fd_status launch_plan(const PlanParameters& p, void* stream) {
  const Launch config{.name = "plan_kernel", .grid = dim3(1), .block = dim3(PLAN_THREADS), .shared = sizeof(PlanMemory)};
  return launch(plan_kernel, config, p, stream);
}

}  // namespace flashdelta::cuda
