#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "cuda/block_sm90.cuh"
#include "cuda/context_cost_sm90.hpp"
#include "cuda/context_sm90.hpp"
#include "cuda/device.hpp"
#include "cuda/prepare_sm90.hpp"
#include "cuda/ptx.cuh"
#include "cuda/states_sm90.hpp"

namespace flashdelta::cuda {
namespace {

constexpr int MOST_SMS = 132;  // of a Hopper GPU: whether sequences may be cut, and workspaces, do not depend on the device
constexpr int MIN_RUN = 2;     // chunks
constexpr int MOST_HEADS = 256;  // more of them fill every GPU without cutting sequences
constexpr int64_t MOST_SEQUENCES = 1 << 20;
constexpr int MOST_CHUNKS = 1 << 25;
constexpr int LIKELY_WINDOW = 5;  // chunks, where gates decay as in trained models: for the host, which sees no gates

// What the planner leaves on the device.
struct Plan {
  int runs[2];  // of the forward in the shape for whole sequences, and in that for runs; the shape not chosen has none
  int pre_runs, chunks;  // of the pre-pass
  int chains;            // sequences that are cut
  unsigned next_item;    // of the forward
  unsigned next_walk;    // of the pre-pass
};

// A sequence that is cut.
struct Chain {
  int sequence;
  int runs;
  int start;    // row of the first run's first state
  int pre_run;  // of the first run
};

// How much of everything there may be.
struct Limits {
  int64_t runs, pre_runs, chunks, starts;
};
Limits limits(const fd_problem& p) {
  const int64_t chunks = p.N == p.B ? p.B * ((p.T + CHUNK - 1) / CHUNK) : p.T / CHUNK + p.N;
  if (!may_split(p)) return {p.N, 0, chunks, 0};
  // Runs that fill the largest GPU twice are as many as can be useful.
  const int64_t blocks = p.HV * ((p.V + 2 * VALUES - 1) / (2 * VALUES));
  const int64_t pre_runs = std::min((2 * MOST_SMS + blocks - 1) / blocks, chunks / MIN_RUN);
  return {p.N + pre_runs, pre_runs, chunks, 2 * pre_runs};
}

// The workspace's arrays, one after another; from a null pointer on it only counts.
struct Workspace {
  Plan* plan;
  ForwardRun* runs;
  Run* pre_runs;
  Chain* chains;
  ChunkPlace* chunks;
  int* windows;     // [pre_runs][HV]
  uint8_t* needed;  // [chunks][HV]
  ChunkVectors* vectors;
  uint8_t* t;
  float* outcomes;  // [pre_runs][HV][V + K][K]
  float* starts;    // [starts][HV][V][K]
  std::size_t bytes;

  Workspace(const fd_problem& p, void* memory)
      : pre_runs(), chains(), chunks(), windows(), needed(), vectors(), t(), outcomes(), starts() {
    const Limits most = limits(p);
    bytes = 0;
    const auto take = [&](auto*& array, int64_t count) {
      array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(reinterpret_cast<uintptr_t>(memory) + bytes);
      bytes += (static_cast<std::size_t>(count) * sizeof(*array) + 255) / 256 * 256;
    };
    take(plan, 1);
    take(runs, most.runs);
    if (most.pre_runs == 0) return;
    take(pre_runs, most.pre_runs);
    take(chains, most.pre_runs);
    take(chunks, most.chunks);
    take(windows, most.pre_runs * p.HV);
    take(needed, most.chunks * p.HV);
    take(vectors, most.chunks * p.HV);
    take(t, most.chunks * p.HV * TILE);
    take(outcomes, most.pre_runs * p.HV * (p.V + p.K) * p.K);
    take(starts, most.starts * p.HV * p.V * p.K);
  }
};

// --- plan: one block

constexpr int PLAN_THREADS = 512, CANDIDATES = 64, LANES = PLAN_THREADS / CANDIDATES;
constexpr int CLASSES = 192;  // of runs by length

struct PlanParameters {
  Sequences sequences;
  Gates gates;
  int64_t B;
  Machine plain, split;  // split.blocks = 0: no sequence is cut
  int forced;            // sequences are cut where there are enough chunks
  int shapes;            // 2: the forward of whole sequences has a shape of its own
  int64_t most_chunks;   // of all sequences that they may be cut
  int shortest;          // run, in chunks
  float log_bound;       // log2 of what the decay over a window must come down to
  Plan* plan;
  ForwardRun* runs;
  Run* pre_runs;
  Chain* chains;
};

struct PlanMemory {
  unsigned longest, total_low, total_high;
  unsigned pre_runs, chunks, starts, chains, runs;
  int length;  // of runs
  float windows[MOST_HEADS];
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
  return shift < 2 ? chunks : 8 * shift + (chunks >> shift);
}

__device__ float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
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
    Plan plan = {};
    plan.runs[p.shapes == 2 && shared.chains > 0 ? 1 : 0] = static_cast<int>(shared.runs);
    plan.pre_runs = static_cast<int>(shared.pre_runs);
    plan.chunks = static_cast<int>(shared.chunks);
    plan.chains = static_cast<int>(shared.chains);
    *p.plan = plan;
  }
  allow_later_kernels();
}

namespace {

// --- windows: a block for each (run of the pre-pass, value head)

constexpr int WINDOW_WARPS = 8, WINDOW_THREADS = 32 * WINDOW_WARPS;

struct WindowParameters {
  Sequences sequences;
  Gates gates;
  View k;
  int heads, value_heads, l2norm;
  float l2norm_eps;
  float log_bound;  // -inf: nothing is skipped
  const Plan* plan;
  const Run* runs;
  int* windows;     // [pre_runs][HV]: where the run starts, from zero; -1: it starts at its beginning, from the state there
  uint8_t* needed;  // [chunks][HV]: whether a chunk is walked
  ChunkPlace* chunks;  // of all runs
};

struct WindowMemory {
  float decay[WINDOW_WARPS], factor[WINDOW_WARPS];
};

// Log2 of the most by which tokens `first` and `first` + 32 of the chunk and those of the warp's other lanes lengthen a
// state: e^g max(1, |1 - beta |k|^2|) each, docs/math.md. Rounded up.
template <typename T>
__device__ float chunk_factor(const WindowParameters& p, const TokenRange& range, int value_head, int64_t first) {
  constexpr float LOG2E = 1.44269504088896341f, ROUNDING = 1e-5f;
  const int head = value_head / (p.value_heads / p.heads);
  float sum = 0, size = 0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t token = first + 32 * i;
    const auto* row =
        reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(p.k.data) + p.k.at(range.batch, token, head));
    float square = 0;
#pragma unroll
    for (int j = 0; j < KEYS / 8; ++j) {
      const uint4 x = row[j];
      const uint32_t word[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float2 y = unpack<T>(word[e]);
        square = fmaf(y.x, y.x, fmaf(y.y, y.y, square));
      }
    }
    if (p.l2norm != 0) square /= square + p.l2norm_eps;
    const float growth = log2f(fmaxf(1.0f, fabsf(1.0f - p.gates.write_strength(range.batch, token, value_head) * square)));
    const float decay = fmaxf(p.gates.log_decay(range.batch, token, value_head) * LOG2E, -1e4f);
    sum += growth + decay;
    size += growth + fabsf(decay);
  }
  return warp_sum(sum) + ROUNDING * (1.0f + warp_sum(size));
}

}  // namespace

template <typename T>
__global__ void __launch_bounds__(WINDOW_THREADS) windows_kernel(const __grid_constant__ WindowParameters p) {
  extern __shared__ __align__(1024) uint8_t raw[];
  auto& shared = *reinterpret_cast<WindowMemory*>(raw);
  constexpr float LOG2E = 1.44269504088896341f;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  wait_for_earlier_kernels();
  const int index = static_cast<int>(blockIdx.x) / p.value_heads, value_head = static_cast<int>(blockIdx.x) % p.value_heads;
  if (index >= p.plan->pre_runs) return;
  const Run run = p.runs[index];
  const TokenRange range = p.sequences[run.sequence];
  const int64_t begin = range.begin + static_cast<int64_t>(run.first_chunk) * CHUNK;

  // The gates of the whole run first, which are few bytes: keys never let a state shrink.
  float decay = 0;
  for (int token = thread; token < run.chunks * CHUNK; token += WINDOW_THREADS) {
    decay += fmaxf(p.gates.log_decay(range.batch, begin + token, value_head) * LOG2E, -1e4f);
  }
  decay = warp_sum(decay);
  if (lane == 0) shared.decay[warp] = decay;
  __syncthreads();
  decay = 0;
  for (int i = 0; i < WINDOW_WARPS; ++i) decay += shared.decay[i];

  int found = -1;
  float factor = 0;  // of the chunks from here to the end
  for (int last = run.chunks - 1; decay <= p.log_bound && last >= 0 && found < 0; last -= WINDOW_WARPS) {
    const int mine = last - warp;
    const float x = mine < 0 ? 0.0f : chunk_factor<T>(p, range, value_head, begin + mine * CHUNK + lane);
    __syncthreads();  // the factors of before are read
    if (lane == 0) shared.factor[warp] = x;
    __syncthreads();
    for (int i = 0; i < WINDOW_WARPS && i <= last && found < 0; ++i) {
      factor += shared.factor[i];
      if (factor <= p.log_bound) found = last - i;
    }
  }

  if (thread == 0) p.windows[index * p.value_heads + value_head] = found;
  for (int c = thread; c < run.chunks; c += WINDOW_THREADS) {
    p.needed[static_cast<int64_t>(run.slot + c) * p.value_heads + value_head] = c >= found ? 1 : 0;
    if (value_head == 0) {
      p.chunks[run.slot + c] = {run.sequence, run.first_chunk + c, static_cast<int>(begin) + c * CHUNK, CHUNK};
    }
  }
  allow_later_kernels();
}

namespace {

// --- fold: a block for 8 values of each (cut sequence, value head)

constexpr int FOLD_ROWS = 8, FOLD_WARPS = 8, FOLD_THREADS = 32 * FOLD_WARPS;

struct FoldParameters {
  Pool initial;
  int state_v_first;
  int value_heads, values;
  const Plan* plan;
  const Chain* chains;
  const int* windows;     // [pre_runs][HV]
  const float* outcomes;  // [pre_runs][HV][V + K][K]: values' rows, then the transition's, each of K keys
  float* starts;          // [rows][HV][V][K]
};

struct FoldMemory {
  float state[FOLD_ROWS][KEYS];
  float parts[FOLD_WARPS][FOLD_ROWS][KEYS];  // a warp's share of a product's sums
};

// a + s x
__device__ __forceinline__ float4 plus(const float4& a, float s, const float4& x) {
  return make_float4(fmaf(s, x.x, a.x), fmaf(s, x.y, a.y), fmaf(s, x.z, a.z), fmaf(s, x.w, a.w));
}

}  // namespace

// Row after row of the chain: state before run i + 1 = (state before run i) M_i + B_i, in fp32. A warp has 16 keys of the
// sums; then a thread adds the warps' shares of four keys of a row.
__global__ void __launch_bounds__(FOLD_THREADS) fold_kernel(const __grid_constant__ FoldParameters p) {
  extern __shared__ __align__(1024) uint8_t raw[];
  auto& shared = *reinterpret_cast<FoldMemory*>(raw);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  wait_for_earlier_kernels();
  const int groups = p.values / FOLD_ROWS, per_chain = p.value_heads * groups;
  const int index = static_cast<int>(blockIdx.x) / per_chain, rest = static_cast<int>(blockIdx.x) % per_chain;
  if (index >= p.plan->chains) return;
  const Chain chain = p.chains[index];
  const int value_head = rest / groups, value = rest % groups * FOLD_ROWS + warp, key = 4 * lane;  // the thread's row, keys

  float4 state = make_float4(0, 0, 0, 0);
  if (const int64_t row = p.initial.row(chain.sequence, 0); row >= 0) {
    const StateLayout at = state_layout(p.initial, p.state_v_first != 0, row, value_head);
    const int64_t first = at.base + value * at.value + key * at.key;
    state = make_float4(p.initial.states[first], p.initial.states[first + at.key], p.initial.states[first + 2 * at.key],
                        p.initial.states[first + 3 * at.key]);
  }
  for (int i = 0;; ++i) {
    const int64_t start = (static_cast<int64_t>(chain.start + i) * p.value_heads + value_head) * p.values + value;
    *reinterpret_cast<float4*>(p.starts + start * KEYS + key) = state;
    if (i + 1 == chain.runs) break;
    const int64_t outcome = static_cast<int64_t>(chain.pre_run + i) * p.value_heads + value_head;
    const float* rows = p.outcomes + outcome * (p.values + KEYS) * KEYS;
    const float4 b = *reinterpret_cast<const float4*>(rows + value * KEYS + key);
    // The first run started from the initial state, and one with a window has no transition.
    if (i == 0 || p.windows[outcome] >= 0) {
      state = b;
      continue;
    }
    const float* transition = rows + static_cast<int64_t>(p.values) * KEYS;
    *reinterpret_cast<float4*>(&shared.state[warp][key]) = state;
    __syncthreads();
    float4 sum[FOLD_ROWS] = {};
#pragma unroll
    for (int j = 4 * warp; j < KEYS; j += 4 * FOLD_WARPS) {
      float4 m[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) m[e] = *reinterpret_cast<const float4*>(transition + (j + e) * KEYS + key);
#pragma unroll
      for (int row = 0; row < FOLD_ROWS; ++row) {
        const float4 s = *reinterpret_cast<const float4*>(&shared.state[row][j]);
        sum[row] = plus(plus(plus(plus(sum[row], s.x, m[0]), s.y, m[1]), s.z, m[2]), s.w, m[3]);
      }
    }
#pragma unroll
    for (int row = 0; row < FOLD_ROWS; ++row) *reinterpret_cast<float4*>(&shared.parts[warp][row][key]) = sum[row];
    __syncthreads();
    state = b;
#pragma unroll
    for (int w = 0; w < FOLD_WARPS; ++w) {
      state = plus(state, 1.0f, *reinterpret_cast<const float4*>(&shared.parts[w][warp][key]));
    }
  }
  allow_later_kernels();
}

namespace {

// --- host

// The machine in which the planner compares forwards of whole sequences, or of runs.
Machine machine(const fd_problem& p, int sm_count, int state_warpgroups) {
  return {.sm_count = sm_count,
          .value_heads = static_cast<int>(p.HV),
          .blocks = static_cast<int>(p.V / (VALUES * state_warpgroups)),
          .walk_blocks = static_cast<int>((p.V + 2 * VALUES - 1) / (2 * VALUES)),
          .chunk = state_warpgroups == 1 ? Costs::HALF_CHUNK : Costs::FULL_CHUNK};
}

Cut cut_equally(int64_t sequences, int chunks, int length) {
  Cut cut = {};
  add_sequence(
      chunks, length, [&](unsigned Cut::*m, int x) { cut.*m += static_cast<unsigned>(sequences * x); },
      [&](unsigned Cut::*m, int x) { cut.*m = static_cast<unsigned>(x); });
  return cut;
}

// Cycles of the best way to cut `sequences` of as many chunks each, with these heads.
float best_split(const Machine& m, int64_t sequences, int chunks, const Heads& heads) {
  float best = std::numeric_limits<float>::infinity();
  for (int runs = 2; runs <= CANDIDATES && chunks / runs >= MIN_RUN; ++runs) {
    const Cut cut = cut_equally(sequences, chunks, (chunks + runs - 1) / runs);
    best = std::min(best, forward_cost(m, cut) + pre_pass_cost(m, cut, heads));
  }
  return best;
}

}  // namespace

// Two blocks of half the values double the SMs at work on a head; they lose once whole blocks alone fill the chip, because
// Q K^T and K K^T are then computed twice.
int shape_of_sequences(const fd_problem& p, int sm_count) {
  return p.V % (2 * VALUES) != 0 || p.N * p.HV * (p.V / VALUES) <= sm_count ? 1 : 2;
}

int shape_of_runs(const fd_problem& p) { return p.V % (2 * VALUES) != 0 ? 1 : 2; }

bool may_split(const fd_problem& p) {
  const int64_t longest = (p.T + CHUNK - 1) / CHUNK;
  if (p.context_parallel == FD_CONTEXT_OFF || longest < 2 * MIN_RUN || p.N > MOST_SEQUENCES || p.HV > MOST_HEADS ||
      longest * p.B + p.N > MOST_CHUNKS) {
    return false;
  }
  if (p.context_parallel == FD_CONTEXT_ON) return true;
  const auto chunks = static_cast<int>(longest);
  const auto heads = static_cast<float>(p.HV);
  const Heads decaying = {0, heads * LIKELY_WINDOW, LIKELY_WINDOW}, constant = {static_cast<int>(p.HV), 0, 0};
  const auto plain = [&](int64_t sequences, int length) {
    const Machine m = machine(p, MOST_SMS, shape_of_sequences(p, MOST_SMS));
    return forward_cost(m, cut_equally(sequences, length, length));
  };
  const Machine split = machine(p, MOST_SMS, shape_of_runs(p));
  if (p.N == p.B) {  // the lengths are known
    const float whole = plain(p.N, chunks);
    return best_split(split, p.N, chunks, constant) <= whole ||
           (best_split(split, p.N, chunks, decaying) <= 0.9f * whole && Costs::EMPTY <= 0.03f * whole);
  }
  const int equal = std::max(1, static_cast<int>(longest / p.N));
  return best_split(split, 1, chunks, decaying) <= 0.9f * plain(1, chunks) && Costs::EMPTY <= 0.03f * plain(p.N, equal);
}

std::size_t runs_workspace(const fd_problem& p) { return p.N > 1 || may_split(p) ? Workspace(p, nullptr).bytes : 0; }

fd_status plan_runs(const fd_forward_args& args, const CUtensorMap& k, const CUtensorMap& v, ForwardRuns& runs, int sm_count,
                    void* workspace, void* stream) {
  const fd_problem& p = *args.problem;
  const bool split = may_split(p);
  const Workspace w(p, workspace);
  const Limits most = limits(p);
  const int whole = shape_of_sequences(p, sm_count), cut = shape_of_runs(p);
  runs = {w.runs, {&w.plan->runs[0], &w.plan->runs[1]}, most.runs, w.starts, &w.plan->next_item};
  if (!split || whole == cut) runs.count[1] = nullptr;

  const auto log_bound = static_cast<float>(std::log2(p.context_bound));
  const Sequences sequences(args);
  const Gates gates(args);
  const PlanParameters plan{
      .sequences = sequences,
      .gates = gates,
      .B = p.B,
      .plain = machine(p, sm_count, whole),
      .split = split ? machine(p, sm_count, cut) : Machine{},
      .forced = p.context_parallel == FD_CONTEXT_ON ? 1 : 0,
      .shapes = runs.count[1] == nullptr ? 1 : 2,
      .most_chunks = most.chunks,
      .shortest =
          split ? static_cast<int>(std::max<int64_t>(MIN_RUN, (most.chunks + most.pre_runs - 1) / most.pre_runs)) : 1,
      .log_bound = log_bound,
      .plan = w.plan,
      .runs = w.runs,
      .pre_runs = w.pre_runs,
      .chains = w.chains,
  };
  fd_status status = launch(
      plan_kernel, {.name = "plan_kernel", .grid = dim3(1), .block = dim3(PLAN_THREADS), .shared = sizeof(PlanMemory)}, plan,
      stream);
  if (status != FD_OK || !split) return status;

  const bool bfloat16 = p.dtype == FD_BFLOAT16, l2norm = p.qk_l2norm != 0;
  const auto heads = static_cast<int>(p.H), value_heads = static_cast<int>(p.HV), values = static_cast<int>(p.V);
  const WindowParameters window{
      .sequences = sequences,
      .gates = gates,
      .k = View(args.k, p.dtype),
      .heads = heads,
      .value_heads = value_heads,
      .l2norm = p.qk_l2norm,
      .l2norm_eps = static_cast<float>(p.l2norm_eps),
      .log_bound = log_bound,
      .plan = w.plan,
      .runs = w.pre_runs,
      .windows = w.windows,
      .needed = w.needed,
      .chunks = w.chunks,
  };
  const Launch window_launch{.name = "windows_kernel",
                             .grid = dim3(static_cast<unsigned>(most.pre_runs * p.HV)),
                             .block = dim3(WINDOW_THREADS),
                             .shared = sizeof(WindowMemory)};
  status = bfloat16 ? launch(windows_kernel<__nv_bfloat16>, window_launch, window, stream)
                    : launch(windows_kernel<__half>, window_launch, window, stream);
  if (status != FD_OK) return status;

  Scratch scratch = {};
  scratch.value_heads = value_heads;
  scratch.value_blocks = values / VALUES;
  scratch.vectors = w.vectors;
  scratch.t = w.t;
  const Pool initial(args.initial_state, p.initial_dtype, p.initial_rows, args.initial_index, p.index_dtype,
                     p.initial_slots);
  const PrepareParameters prepare{
      .q = k,  // not read
      .k = k,
      .gates = gates,
      .sequences = sequences,
      .chunks = w.chunks,
      .scratch = scratch,
      .slots = static_cast<int>(most.chunks),
      .heads = heads,
      .scale = static_cast<float>(p.scale),
      .l2norm_eps = static_cast<float>(p.l2norm_eps),
      .used_slots = &w.plan->chunks,
      .needed = w.needed,
  };
  status = launch_prepare(prepare, bfloat16, l2norm, sm_count, stream);
  if (status != FD_OK) return status;

  const StatesParameters states{
      .k = k,
      .v = v,
      .sequences = sequences,
      .scratch = scratch,
      .runs = w.pre_runs,
      .run_count = static_cast<int>(most.pre_runs),
      .heads = heads,
      .row_blocks = (values + KEYS) / VALUES,
      .initial = initial,
      .state_v_first = p.state_v_first,
      .saved = nullptr,
      .save = nullptr,
      .outcomes = w.outcomes,
      .used_runs = &w.plan->pre_runs,
      .next_item = &w.plan->next_walk,
      .windows = w.windows,
  };
  status = launch_states(states, bfloat16, sm_count, stream);
  if (status != FD_OK) return status;

  const FoldParameters fold{
      .initial = initial,
      .state_v_first = p.state_v_first,
      .value_heads = value_heads,
      .values = values,
      .plan = w.plan,
      .chains = w.chains,
      .windows = w.windows,
      .outcomes = w.outcomes,
      .starts = w.starts,
  };
  const auto fold_blocks = static_cast<unsigned>(std::min(p.N, most.pre_runs) * p.HV * (p.V / FOLD_ROWS));
  return launch(
      fold_kernel,
      {.name = "fold_kernel", .grid = dim3(fold_blocks), .block = dim3(FOLD_THREADS), .shared = sizeof(FoldMemory)}, fold,
      stream);
}

}  // namespace flashdelta::cuda
