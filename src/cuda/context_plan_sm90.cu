// The planner: puts the forward's runs in order of length and, for context parallelism, decides into how many runs each
// sequence is cut, all from cu_seqlens on the device.
#include "cuda/block_sm90.cuh"
#include "cuda/context_kernels_sm90.hpp"
#include "cuda/device.hpp"
#include "cuda/ptx.cuh"

namespace flashdelta::cuda {
namespace {

// One block's work is short, so that what it costs is its way to memory and its own code, which comes from there, too: loads
// that need no other come first, lengths are kept, and what is done once is not unrolled.
constexpr int PLAN_THREADS = 512, PLAN_WARPS = PLAN_THREADS / 32, CANDIDATES = MOST_RUNS;
constexpr int LANES = PLAN_THREADS / CANDIDATES;  // threads that estimate a candidate together
constexpr int CLASSES = 192;                      // of runs by length
constexpr int SAMPLES = 64;                       // tokens
constexpr float UNIT = 65536;                     // of log2 of a decay
constexpr int KEPT = 1024;                        // sequences whose lengths are kept

// Sums, which start at zero.
struct PlanSums {
  unsigned longest, total_low, total_high;
  unsigned pre_runs, chunks, starts, chains, exact_heads;
  unsigned decays[MOST_SPLIT_HEADS];
  Cut cuts[CANDIDATES];
  unsigned count[CLASSES];
};
struct PlanMemory : PlanSums {
  int kept[KEPT];  // the first sequences' chunks
  float windows[MOST_SPLIT_HEADS];
  float costs[CANDIDATES];
  int shapes[CANDIDATES];
  unsigned place[CLASSES];
  Chain cut[MOST_CHAINS];  // as in memory
};

[[gnu::noinline]] __device__ int load_chunks_of(const Sequences& sequences, int64_t n) {
  const TokenRange range = sequences[n];
  return static_cast<int>((range.end - range.begin + CHUNK - 1) / CHUNK);
}
__device__ int chunks_of(const PlanParameters& p, const PlanMemory& shared, int64_t n) {
  return n < KEPT ? shared.kept[n] : load_chunks_of(p.sequences, n);
}

// Class of a length in chunks: itself, from 32 on with three bits after the first.
__device__ int class_of(int chunks) {
  int shift = 0;
#pragma unroll 1
  while ((chunks >> shift) >= 16) ++shift;
  return shift < 2 ? chunks : 8 * (shift + 1) + (chunks >> shift);
}

// Adds up how much each head decays at a sample of the tokens, a warp's by it: a lane for each head. Sums are of integers,
// so that they do not depend on their order.
__device__ void sample_gates(const PlanParameters& p, PlanMemory& shared) {
  constexpr int EACH = SAMPLES / PLAN_WARPS;  // loads of a lane that are under way together
  constexpr float LOG2E = 1.44269504088896341f, MOST = 64;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t tokens = p.sequences.used_tokens() * p.B;
  if (tokens == 0) return;
  uint32_t batch[EACH], token[EACH];
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const auto at = static_cast<uint32_t>(tokens * (2 * (warp + i * PLAN_WARPS) + 1) / (2 * SAMPLES));
    batch[i] = p.B == 1 ? 0 : at / static_cast<uint32_t>(p.sequences.T);
    token[i] = at - batch[i] * static_cast<uint32_t>(p.sequences.T);
  }
#pragma unroll 1
  for (int head = lane; head < p.value_heads; head += 32) {
    Gates::Bits bits[EACH];
#pragma unroll
    for (int i = 0; i < EACH; ++i) bits[i] = p.gates.gate_bits(batch[i], token[i], head);
    unsigned sum = 0;
#pragma unroll 1
    for (int n = 0; n < EACH; ++n) {
      const float decay = -p.gates.log_decay(bits[0], head) * LOG2E;
      sum += decay > 0 ? static_cast<unsigned>(fminf(decay, MOST) * UNIT) : 0u;
#pragma unroll
      for (int i = 0; i + 1 < EACH; ++i) bits[i] = bits[i + 1];
    }
    if (sum > 0) atomicAdd(&shared.decays[head], sum);
  }
}

// How many chunks of a head will have decayed below the bound, as its sample has it: an estimate, what is skipped in the end
// is decided in `windows`.
__device__ float window_of(const PlanParameters& p, unsigned decays) {
  constexpr float MARGIN = 1.25f;
  const float decay = static_cast<float>(decays) / (UNIT * SAMPLES);  // of a token
  return decay > 0 ? ceilf(-p.log_bound * MARGIN / (decay * CHUNK)) + 1 : INFINITY;
}

// The heads, those first that need the longest windows.
__device__ void order_heads(const PlanParameters& p, const PlanMemory& shared) {
  const auto head = static_cast<int>(threadIdx.x);
  if (head >= p.value_heads) return;
  const float window = shared.windows[head];
  int place = 0;
#pragma unroll 4
  for (int i = 0; i < p.value_heads; ++i) {
    place += shared.windows[i] > window || (shared.windows[i] == window && i < head) ? 1 : 0;
  }
  p.heads[place] = head;
}

// Cycles that a cut would take, by the candidate's lanes together, in the better of the forward's shapes.
__device__ float cost(const PlanParameters& p, const PlanMemory& shared, const Cut& cut, int lane, int& shape) {
  const float length = static_cast<float>(cut.pre_chunks) / fmaxf(static_cast<float>(cut.pre_runs), 1.0f);
  float exact = 0, windows = 0, longest = 0;
#pragma unroll 1
  for (int head = lane; head < p.value_heads; head += LANES) {
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
  float best = INFINITY;
#pragma unroll 1
  for (int i = 0; i < p.shapes; ++i) {
    const float cycles = forward_cost(p.shape[i], cut);
    if (cycles < best) {
      best = cycles;
      shape = i;
    }
  }
  return best + pre_pass_cost(p.shape[0], cut, {static_cast<int>(exact), windows, longest});
}

// How many chunks a run may have, and the forward's shape.
struct Choice {
  int length, shape;
};

// The same in all threads.
__device__ Choice choose(const PlanParameters& p, PlanMemory& shared) {
  const int thread = static_cast<int>(threadIdx.x), candidate = thread / LANES, lane = thread % LANES;
  const auto longest = static_cast<int>(shared.longest);
  const auto length_of = [&](int i) { return max(p.shortest, (longest + i) / (i + 1)); };
  Cut& cut = shared.cuts[candidate];
  const auto add = [&](unsigned Cut::*member, int x) { atomicAdd(&(cut.*member), static_cast<unsigned>(x)); };
  const auto raise = [&](unsigned Cut::*member, int x) { atomicMax(&(cut.*member), static_cast<unsigned>(x)); };
#pragma unroll 1
  for (int64_t n = lane; n < p.sequences.N; n += LANES) {
    add_sequence(chunks_of(p, shared, n), length_of(candidate), add, raise);
  }
  __syncwarp();  // a candidate's lanes are of one warp
  int shape = 0;
  const float cycles = cost(p, shared, cut, lane, shape);
  if (lane == 0) {
    const bool allowed = p.may_split != 0 && cut.pre_runs > 0;
    const float whole = candidate == 0 && cut.pre_runs == 0 && p.forced == 0 ? cycles : INFINITY;
    shared.costs[candidate] = allowed ? DOUBT * cycles : whole;
    shared.shapes[candidate] = shape;
  }
  __syncthreads();
  int best = 0;  // of two as good, the first
  float least = INFINITY;
#pragma unroll
  for (int i = 0; i < CANDIDATES; i += 32) {
    if (shared.costs[thread % 32 + i] < least) {
      best = thread % 32 + i;
      least = shared.costs[best];
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
  if (!(least < INFINITY)) best = 0;
  const int length = length_of(best);
  if (p.may_split != 0 && thread < p.value_heads && !(shared.windows[thread] < static_cast<float>(length))) {
    atomicAdd(&shared.exact_heads, 1u);
  }
  return {length, shared.shapes[best]};
}

// For each class, the number of runs in those above it: where its first run lies. By one warp; the sum is lane 0's.
__device__ unsigned find_places(PlanMemory& shared, int lane) {
  constexpr int EACH = CLASSES / 32;
  unsigned count[EACH], longer = 0;
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    count[i] = shared.count[EACH * lane + i];
    longer += count[i];
  }
  const unsigned own = longer;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const unsigned more = __shfl_down_sync(~0u, longer, step);
    if (lane + step < 32) longer += more;
  }
  longer -= own;
#pragma unroll
  for (int i = EACH - 1; i >= 0; --i) {
    shared.place[EACH * lane + i] = longer;
    longer += count[i];
  }
  return longer;
}

// The runs of all sequences, longest first, and the pre-pass's; the sum is thread 0's. Which thread comes first decides
// where something lies, and no result depends on that.
__device__ unsigned lay_out(const PlanParameters& p, PlanMemory& shared, int length) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
#pragma unroll 1
  for (int64_t n = thread; n < p.sequences.N; n += PLAN_THREADS) {
    const Pieces cut = pieces(chunks_of(p, shared, n), length);
    atomicAdd(&shared.count[class_of(cut.size)], static_cast<unsigned>(cut.count - cut.more));
    if (cut.more > 0) atomicAdd(&shared.count[class_of(cut.size + 1)], static_cast<unsigned>(cut.more));
    if (cut.count == 1) continue;
    const auto start = static_cast<int>(atomicAdd(&shared.starts, static_cast<unsigned>(cut.count)));
    const auto pre_run = static_cast<int>(atomicAdd(&shared.pre_runs, static_cast<unsigned>(cut.count - 1)));
    atomicAdd(&shared.chunks, static_cast<unsigned>(cut.first(cut.count - 1)));
    const unsigned chain = atomicAdd(&shared.chains, 1u);
    p.chains[chain] = shared.cut[chain] = {static_cast<int>(n), cut.count, start, pre_run};
  }
  __syncthreads();
  unsigned runs = 0;
  if (thread < 32) runs = find_places(shared, lane);
  __syncthreads();
  const auto put = [&](const ForwardRun& run) { p.runs[atomicAdd(&shared.place[class_of(run.end - run.first)], 1u)] = run; };
#pragma unroll 1
  for (int64_t n = thread; n < p.sequences.N; n += PLAN_THREADS) {
    const int chunks = chunks_of(p, shared, n);
    if (chunks <= length) put({static_cast<int>(n), 0, chunks, -1});
  }
  // A warp for each sequence that is cut, a lane for each run.
#pragma unroll 1
  for (int c = thread / 32; c < static_cast<int>(shared.chains); c += PLAN_WARPS) {
    const Chain chain = shared.cut[c];
    const Pieces cut = pieces(chunks_of(p, shared, chain.sequence), length);
#pragma unroll 1
    for (int i = lane; i < cut.count; i += 32) {
      const int first = cut.first(i), end = cut.first(i + 1);
      put({chain.sequence, first, end, chain.start + i});
      if (i + 1 < cut.count) p.pre_runs[chain.pre_run + i] = {chain.sequence, first, end - first, chain.start + i};
    }
  }
  return runs;
}

}  // namespace

__global__ void __launch_bounds__(PLAN_THREADS) plan_kernel(const __grid_constant__ PlanParameters p) {
  extern __shared__ __align__(1024) uint8_t raw[];
  auto& shared = *reinterpret_cast<PlanMemory*>(raw);
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll 1
  for (int i = thread; i < static_cast<int>(sizeof(PlanSums) / sizeof(unsigned)); i += PLAN_THREADS) {
    reinterpret_cast<unsigned*>(raw)[i] = 0;
  }
  __syncthreads();
  allow_later_kernels();
  wait_for_earlier_kernels();

  int64_t total = 0;
  int longest = 0;
#pragma unroll 1
  for (int64_t n = thread; n < p.sequences.N; n += PLAN_THREADS) {
    const int chunks = load_chunks_of(p.sequences, n);
    if (n < KEPT) shared.kept[n] = chunks;
    total += chunks;
    longest = max(longest, chunks);
  }
  if (longest > 0) {
    atomicMax(&shared.longest, static_cast<unsigned>(longest));
    atomicAdd(&shared.total_low, static_cast<unsigned>(total & 0xffff));
    atomicAdd(&shared.total_high, static_cast<unsigned>(min(total >> 16, int64_t{1} << 22)));
  }
  if (p.may_split != 0) sample_gates(p, shared);
  __syncthreads();
  Choice choice = {max(1, static_cast<int>(shared.longest)), 0};
  if (p.may_split != 0) {
    if (thread < p.value_heads) shared.windows[thread] = window_of(p, shared.decays[thread]);
    __syncthreads();
    order_heads(p, shared);
  }
  // Sequences that overlap, where cu_seqlens is garbage, may have more chunks than there is room for.
  if ((p.may_split != 0 || p.shapes == 2) && (int64_t{shared.total_high} << 16) + shared.total_low <= p.most_chunks) {
    choice = choose(p, shared);
  }
  const unsigned sum = lay_out(p, shared, choice.length);
  if (thread == 0) {
    const auto runs = static_cast<int>(sum);
    *p.plan = {{choice.shape == 0 ? runs : 0, choice.shape == 0 ? 0 : runs},
               static_cast<int>(shared.pre_runs),
               static_cast<int>(shared.chunks),
               static_cast<int>(shared.chains),
               static_cast<int>(shared.exact_heads),
               p.shape[choice.shape].blocks,
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
