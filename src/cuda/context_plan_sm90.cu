// The planner: puts the forward's runs in order of length and, for context parallelism, decides into how many runs each
// sequence is cut, all from cu_seqlens on the device.
#include "cuda/block_sm90.cuh"
#include "cuda/context_kernels_sm90.hpp"
#include "cuda/device.hpp"
#include "cuda/ptx.cuh"

namespace flashdelta::cuda {
namespace {

constexpr int PLAN_THREADS = 512, PLAN_WARPS = PLAN_THREADS / 32, CANDIDATES = MOST_RUNS;
constexpr int LANES = PLAN_THREADS / CANDIDATES;  // threads that estimate a candidate together
constexpr int CLASSES = 192;                      // of runs by length
constexpr int SAMPLES = 64;                       // tokens

struct PlanMemory {
  unsigned longest, total_low, total_high;
  unsigned pre_runs, chunks, starts, chains, runs, exact_heads;
  int length;  // of runs
  int second;  // shape of the forward
  int64_t batch[SAMPLES], token[SAMPLES];
  unsigned decays[MOST_SPLIT_HEADS];
  float windows[MOST_SPLIT_HEADS];
  float costs[CANDIDATES];
  int shapes[CANDIDATES];
  Cut cuts[CANDIDATES];
  unsigned count[CLASSES], place[CLASSES];
  unsigned sums[CLASSES / 32];
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

// How many chunks of each head will have decayed below the bound, as a sample of the gates has it, and the heads in that
// order. An estimate: what is skipped in the end is decided in `windows`. Sums are of integers, so that they do not depend
// on their order.
__device__ void sample_gates(const PlanParameters& p, PlanMemory& shared) {
  constexpr int BATCH = 8;  // loads of a thread that are under way together
  constexpr float LOG2E = 1.44269504088896341f, MOST = 64, UNIT = 65536, MARGIN = 1.25f;
  const int thread = static_cast<int>(threadIdx.x), samples = p.first.value_heads * SAMPLES;
  const int64_t tokens = p.sequences.used_tokens() * p.B;
  if (thread < SAMPLES) {
    const int64_t token = tokens * (2 * thread + 1) / (2 * SAMPLES);
    shared.batch[thread] = tokens > 0 ? token / p.sequences.T : 0;
    shared.token[thread] = tokens > 0 ? token % p.sequences.T : 0;
  }
  __syncthreads();
  for (int first = thread; tokens > 0 && first < samples; first += BATCH * PLAN_THREADS) {
    Gates::Bits bits[BATCH];
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      const int sample = min(first + i * PLAN_THREADS, samples - 1) / p.first.value_heads;
      const int head = min(first + i * PLAN_THREADS, samples - 1) % p.first.value_heads;
      bits[i] = p.gates.gate_bits(shared.batch[sample], shared.token[sample], head);
    }
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      const int sample = first + i * PLAN_THREADS, head = sample % p.first.value_heads;
      if (sample >= samples) break;
      const float decay = -p.gates.log_decay(bits[i], head) * LOG2E;
      atomicAdd(&shared.decays[head], decay > 0 ? static_cast<unsigned>(fminf(decay, MOST) * UNIT) : 0u);
    }
  }
  __syncthreads();
  for (int head = thread; head < p.first.value_heads; head += PLAN_THREADS) {
    const float decay = static_cast<float>(shared.decays[head]) / (UNIT * SAMPLES);  // of a token
    shared.windows[head] = decay > 0 ? ceilf(-p.log_bound * MARGIN / (decay * CHUNK)) + 1 : INFINITY;
  }
  __syncthreads();
  for (int head = thread; head < p.first.value_heads; head += PLAN_THREADS) {
    const float window = shared.windows[head];
    int place = 0;
    for (int i = 0; i < p.first.value_heads; ++i) {
      place += shared.windows[i] > window || (shared.windows[i] == window && i < head) ? 1 : 0;
    }
    p.heads[place] = head;
  }
}

// Cycles that a cut would take, by the candidate's lanes together. `second`: in the forward's second shape.
__device__ float cost(const PlanParameters& p, const PlanMemory& shared, const Cut& cut, int lane, bool& second) {
  const float length = static_cast<float>(cut.pre_chunks) / fmaxf(static_cast<float>(cut.pre_runs), 1.0f);
  float exact = 0, windows = 0, longest = 0;
  for (int head = lane; head < p.first.value_heads; head += LANES) {
    const float window = shared.windows[head];
    if (window < length) {
      windows += window;
      longest = fmaxf(longest, window);
    } else {
      exact += 1;
    }
  }
#pragma unroll
  for (int step = LANES / 2; step > 0; step /= 2) {
    exact += __shfl_xor_sync(~0u, exact, step);
    windows += __shfl_xor_sync(~0u, windows, step);
    longest = fmaxf(longest, __shfl_xor_sync(~0u, longest, step));
  }
  float best = forward_cost(p.first, cut);
  second = p.shapes == 2 && forward_cost(p.second, cut) < best;
  if (second) best = forward_cost(p.second, cut);
  return best + pre_pass_cost(p.first, cut, {static_cast<int>(exact), windows, longest});
}

// Leaves in `length` how many chunks a run may have, and in `second` whether the forward takes its second shape.
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
  bool second;
  const float cycles = cost(p, shared, cut, lane, second);
  if (lane == 0) {
    shared.costs[candidate] = cycles;
    shared.shapes[candidate] = second ? 1 : 0;
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    int best = 0;  // of two as good, the first
    float least = p.forced != 0 ? INFINITY : shared.costs[0];
    for (auto i = static_cast<int>(threadIdx.x); i < CANDIDATES; i += 32) {
      if (shared.cuts[i].pre_runs > 0 && shared.costs[i] < least) {
        best = i;
        least = shared.costs[i];
      }
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      const float other = __shfl_xor_sync(~0u, least, step);
      const int its = __shfl_xor_sync(~0u, best, step);
      if (other < least || (other == least && its < best)) {
        best = its;
        least = other;
      }
    }
    if (threadIdx.x == 0) {
      shared.length = length_of(best);
      shared.second = shared.shapes[best];
    }
  }
  __syncthreads();
  for (auto head = static_cast<int>(threadIdx.x); head < p.first.value_heads; head += PLAN_THREADS) {
    if (!(shared.windows[head] < static_cast<float>(shared.length))) atomicAdd(&shared.exact_heads, 1u);
  }
  __syncthreads();
}

// For each class, the number of runs in those above it: where its first run lies.
__device__ void find_places(PlanMemory& shared) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  unsigned count = 0, longer = 0;
  if (thread < CLASSES) {
    count = longer = shared.count[thread];
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const unsigned more = __shfl_down_sync(~0u, longer, step);
      if (lane + step < 32) longer += more;
    }
    if (lane == 0) shared.sums[thread / 32] = longer;
  }
  __syncthreads();
  if (thread < CLASSES) {
    for (int i = thread / 32 + 1; i < CLASSES / 32; ++i) longer += shared.sums[i];
    shared.place[thread] = longer - count;
    if (thread == 0) shared.runs = longer;
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
  find_places(shared);
  for (int64_t n = thread; n < p.sequences.N; n += PLAN_THREADS) {
    const auto sequence = static_cast<int>(n);
    const Pieces cut = pieces(chunks_of(p.sequences, n), shared.length);
    if (cut.count == 1) {
      p.runs[atomicAdd(&shared.place[class_of(cut.size)], 1u)] = {sequence, 0, cut.size, -1};
      continue;
    }
    const auto start = static_cast<int>(atomicAdd(&shared.starts, static_cast<unsigned>(cut.count)));
    const auto pre_run = static_cast<int>(atomicAdd(&shared.pre_runs, static_cast<unsigned>(cut.count - 1)));
    atomicAdd(&shared.chunks, static_cast<unsigned>(cut.first(cut.count - 1)));
    p.chains[atomicAdd(&shared.chains, 1u)] = {sequence, cut.count, start, pre_run};
  }
  __syncthreads();
  // A warp for each sequence that is cut, a lane for each run.
  for (int c = thread / 32; c < static_cast<int>(shared.chains); c += PLAN_WARPS) {
    const Chain chain = p.chains[c];
    const Pieces cut = pieces(chunks_of(p.sequences, chain.sequence), shared.length);
    for (int i = thread % 32; i < cut.count; i += 32) {
      const int first = cut.first(i), end = cut.first(i + 1);
      p.runs[atomicAdd(&shared.place[class_of(end - first)], 1u)] = {chain.sequence, first, end, chain.start + i};
      if (i + 1 < cut.count) p.pre_runs[chain.pre_run + i] = {chain.sequence, first, end - first, chain.start + i};
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
  allow_later_kernels();
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
  if (p.may_split != 0) sample_gates(p, shared);
  __syncthreads();
  // Sequences that overlap, where cu_seqlens is garbage, may have more chunks than there is room for.
  total = (int64_t{shared.total_high} << 16) + shared.total_low;
  if (p.may_split != 0 && total <= p.most_chunks) {
    choose_length(p, shared);
  } else {
    if (thread == 0) shared.length = max(1, static_cast<int>(shared.longest));
    __syncthreads();
  }
  lay_out(p, shared);
  __syncthreads();
  if (thread == 0) {
    const auto runs = static_cast<int>(shared.runs);
    const bool second = shared.second != 0;
    *p.plan = {{second ? 0 : runs, second ? runs : 0},
               static_cast<int>(shared.pre_runs),
               static_cast<int>(shared.chunks),
               static_cast<int>(shared.chains),
               static_cast<int>(shared.exact_heads),
               second ? p.second.blocks : p.first.blocks,
               0,
               0};
  }
}

fd_status launch_plan(const PlanParameters& p, void* stream) {
  const Launch config{
      .name = "plan_kernel", .grid = dim3(1), .block = dim3(PLAN_THREADS), .shared = sizeof(PlanMemory), .overlap = true};
  return launch(plan_kernel, config, p, stream);
}

}  // namespace flashdelta::cuda
