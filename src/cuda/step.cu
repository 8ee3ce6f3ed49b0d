// The decode step: a few tokens per sequence, one after another. See docs/kernels/step.md.
//
// Memory-bound: what counts is that each state is read once and written once, with many bytes in flight. Three kernels:
//   row      128 keys, states in fp32 [V, K], one token: a warp has all keys of 8 values in registers
//   tiles    128 keys, q and k in 16 bits: likewise, multiplied by the tensor cores
//   general  everything else
//
// Several tokens are taken at once, and only the short recurrence between them is serial. With D_ts the decay after token
// s up to and including token t, D_t the decay up to and including t, and S the state before the tokens:
//
//   d_t = beta_t (v_t - D_t S^T k_t - sum_{s < t}  D_ts (k_s . k_t) d_s)
//   o_t = scale  (      D_t S^T q_t + sum_{s <= t} D_ts (k_s . q_t) d_s)
//
// Deterministic: every sum has a fixed order, which does not depend on the batch.

#include <algorithm>
#include <limits>
#include <optional>
#include <sstream>
#include <utility>

#include "cuda/device.hpp"
#include "cuda/inputs.cuh"
#include "cuda/step_general.cuh"
#include "cuda/step_row.cuh"
#include "cuda/step_tiles.cuh"

namespace flashdelta::cuda {
namespace {

// A variant per layout, vector and power of two of K.
struct Variant {
  void (*kernel)(StepParameters);
  int threads, values;
  std::size_t (*shared_bytes)(int capacity);
};

template <bool V_FIRST, int VECTOR, int KEYS>
constexpr Variant variant() {
  using S = Shape<V_FIRST, VECTOR, KEYS>;
  return {step_kernel<S>, S::THREADS, S::VALUES, SharedMemory<S>::bytes};
}

Variant choose_variant(const fd_problem& p, bool wide_vectors) {
  static constexpr Variant VARIANTS[2][2][3] = {
      {{variant<false, 4, 64>(), variant<false, 4, 128>(), variant<false, 4, 256>()},
       {variant<false, 8, 64>(), variant<false, 8, 128>(), variant<false, 8, 256>()}},
      {{variant<true, 4, 64>(), variant<true, 4, 128>(), variant<true, 4, 256>()},
       {variant<true, 8, 64>(), variant<true, 8, 128>(), variant<true, 8, 256>()}}};
  return VARIANTS[p.state_v_first != 0][wide_vectors][p.K <= 64 ? 0 : p.K <= 128 ? 1 : 2];
}

// Whether vectors of so many elements may be accessed in one piece.
bool aligned(const View& x, int elements) {
  return reinterpret_cast<std::uintptr_t>(x.data) % (static_cast<std::uintptr_t>(elements) * size_of(x.type)) == 0 &&
         x.stride[0] % elements == 0 && x.stride[1] % elements == 0 && x.stride[2] % elements == 0;
}

Access access_of(const View& states, int vector) {
  if (!aligned(states, vector)) return Access::pieces;
  return static_cast<std::size_t>(vector) * size_of(states.type) == 16 ? Access::whole16 : Access::whole8;
}

// A kernel whose warps own all keys of some values, or share them by two.
struct WarpVariant {
  void (*kernel)(WarpCall);
  int values;  // of `split` warps
  int split;
  int warps;  // of a block
  int few;    // of a block, in a call of `small` warps or less
  int small;
  int resident;             // of an SM, at a time
  std::size_t warp_shared;  // bytes
  int lines_ahead;          // see WarpCall
};

template <typename Element, typename Token, bool V_FIRST, bool TURNS = false>
constexpr WarpVariant tiles_variant() {
  using State = StateTiles<Element, Token, V_FIRST>;
  constexpr int WARPS = V_FIRST ? 4 : 2;
  constexpr int RESIDENT = State::WIDE ? 16 : V_FIRST ? 20 : 12;  // as many as need not spill registers
  return {.kernel = tiles_kernel<State, !TURNS, WARPS, RESIDENT / WARPS>,
          .values = State::VALUES,
          .split = State::SPLIT,
          .warps = WARPS,
          .few = 2,
          .small = 512,
          .resident = RESIDENT,
          .warp_shared = State::SPLIT == 1 ? 0 : State::TILES * 32 * sizeof(float4),
          // Those of all blocks must fit into L2 beside the states that are written: a part of them where states are large.
          .lines_ahead = State::WIDE ? State::LINES / (V_FIRST ? 4 : 2) : State::LINES};
}
constexpr WarpVariant row_variant() {
  constexpr int WARPS = 4, RESIDENT = 32;
  return {.kernel = row_kernel<WARPS, RESIDENT / WARPS>,
          .values = ROW_VALUES,
          .split = 1,
          .warps = 1,
          .few = WARPS,
          .small = 4096,
          .resident = RESIDENT,
          .warp_shared = 0,
          .lines_ahead = 0};
}

// The call for such a kernel. None where sizes or strides do not fit in its 32 bits.
std::optional<WarpCall> make_warp_call(const fd_problem& p, const StepParameters& parameters) {
  bool fits = true;
  constexpr int64_t LIMIT = std::numeric_limits<int32_t>::max();
  const auto narrow = [&](int64_t x) {
    fits = fits && x >= -LIMIT && x <= LIMIT;
    return static_cast<int32_t>(x);
  };
  const auto tensor = [&](const View& x) {
    const auto size = static_cast<int64_t>(size_of(x.type));
    return TokenTensor{static_cast<char*>(x.data), x.type, narrow(x.stride[0] * size), narrow(x.stride[1] * size),
                       narrow(x.stride[2] * size)};
  };
  const auto pool = [&](const Pool& x) {
    const auto size = static_cast<int64_t>(size_of(x.states.type));
    fits = fits && x.states.stride[0] >= 0;
    return StatePool{static_cast<char*>(x.states.data),
                     x.index,
                     static_cast<uint32_t>(narrow(x.states.stride[0] * size)),
                     narrow(x.states.stride[1] * size),
                     narrow(x.states.stride[2] * size),
                     narrow(x.stride[0]),
                     narrow(x.stride[1]),
                     narrow(x.rows),
                     narrow(x.slots)};
  };
  constexpr int64_t MAX_GRID = 65535;  // in y and z
  const auto group = static_cast<uint64_t>(parameters.group);
  const WarpCall call = {.q = tensor(parameters.q),
                         .k = tensor(parameters.k),
                         .v = tensor(parameters.v),
                         .o = tensor(parameters.o),
                         .g = tensor(parameters.gates.g),
                         .beta = tensor(parameters.gates.beta),
                         .initial = pool(parameters.initial),
                         .final = pool(parameters.final),
                         .gates = parameters.gates,
                         .accepted = parameters.accepted,
                         .cu_seqlens = parameters.sequences.cu_seqlens,
                         .index_type = parameters.initial.type,
                         .cu_seqlens_type = parameters.sequences.type,
                         .N = narrow(p.N),
                         .T = narrow(p.T),
                         .ahead = 0,
                         .lines_ahead = 0,
                         .early = false,
                         .group_inverse = group == 1 ? 0 : static_cast<uint32_t>(((uint64_t{1} << 32) + group - 1) / group),
                         .state_per_token = parameters.state_per_token,
                         .l2norm = parameters.l2norm,
                         .l2norm_eps = parameters.l2norm_eps,
                         .scale = parameters.scale};
  if (!fits || p.N > MAX_GRID || p.HV > MAX_GRID) return {};
  return call;
}

// Null kernel where none of them can serve the call.
WarpVariant choose_warps(const fd_problem& p, const StepParameters& call) {
  const Pool& initial = call.initial;
  const Pool& final = call.final;
  const fd_dtype type = final.states.data != nullptr ? p.final_dtype : p.initial_dtype;
  const auto serves = [&](const Pool& pool, Access access) {
    return pool.states.data == nullptr || (pool.states.type == type && access == Access::whole16);
  };
  if (p.K != WARP_KEYS) return {};
  if (!serves(initial, call.initial_access) || !serves(final, call.final_access)) return {};
  const bool packed = call.sequences.cu_seqlens != nullptr;
  const bool turns = packed || p.T > (call.state_per_token ? 1 : WARP_TOKENS);
  if (type == FD_FLOAT32 && p.state_v_first != 0 && p.T == 1 && !packed && aligned(call.q, 4) && aligned(call.k, 4)) {
    return row_variant();
  }
  if (size_of(p.dtype) != 2 || !aligned(call.q, 8) || !aligned(call.k, 8) || !aligned(call.v, 8) || !aligned(call.o, 8)) {
    return {};
  }
  using bf16 = __nv_bfloat16;
  static constexpr WarpVariant WIDE[2][2][2] = {
      {{tiles_variant<float, bf16, false>(), tiles_variant<float, bf16, false, true>()},
       {tiles_variant<float, bf16, true>(), tiles_variant<float, bf16, true, true>()}},
      {{tiles_variant<float, __half, false>(), tiles_variant<float, __half, false, true>()},
       {tiles_variant<float, __half, true>(), tiles_variant<float, __half, true, true>()}}};
  if (type == FD_FLOAT32) return WIDE[p.dtype == FD_FLOAT16][p.state_v_first != 0][turns];
  // Between turns a state in bf16 would be rounded.
  if (turns || p.dtype != FD_BFLOAT16) return {};
  return p.state_v_first != 0 ? tiles_variant<bf16, bf16, true>() : tiles_variant<bf16, bf16, false>();
}

constexpr int64_t MAX_K = 256;
constexpr int64_t MIN_VALUES = 32;  // of a block, over all variants

bool compiled_for(int major, int) { return major == 8 || major == 9 || major == 10 || major >= 12; }

std::string unavailable() { return no_device(compiled_for, "8.x, 9.x, 10.x or 12.x and later"); }

std::string unsupported(Operation operation, const fd_problem& p) {
  const auto got = [](const char* member, const auto& value, const char* expected) {
    std::ostringstream text;
    text << member << " is " << value << "; cuda has " << expected;
    return text.str();
  };
  if (operation != Operation::step) return "cuda has the decode step only";
  if (p.dtype == FD_FLOAT64) return got("dtype", name_of(p.dtype), "float32, bfloat16, float16");
  if (p.gate == FD_GATE_LOG_PER_KEY) return "gate is FD_GATE_LOG_PER_KEY; cuda has one decay per head";
  if (p.K % 8 != 0 || p.K > MAX_K) return got("K", p.K, "multiples of 8 up to 256");
  if (p.V % 8 != 0) return got("V", p.V, "multiples of 8");
  for (const auto& [member, type] : {std::pair{"initial_dtype", p.initial_dtype}, {"final_dtype", p.final_dtype}}) {
    if (type != FD_FLOAT32 && type != FD_BFLOAT16) return got(member, name_of(type), "float32 and bfloat16");
  }
  for (const auto& [member, type] : {std::pair{"gate_dtype", p.gate_dtype},
                                     {"beta_dtype", p.beta_dtype},
                                     {"A_log_dtype", p.A_log_dtype},
                                     {"dt_bias_dtype", p.dt_bias_dtype}}) {
    if (type == FD_FLOAT64) return got(member, name_of(type), "float32, bfloat16, float16");
  }
  // Kernel parameters and the grid hold these in 32 bits.
  const int64_t limit = std::numeric_limits<int32_t>::max(), blocks = (p.V + MIN_VALUES - 1) / MIN_VALUES;
  if (p.T > limit || p.V > limit || p.HV > limit / std::max<int64_t>(blocks, 1) ||
      p.N > limit / std::max<int64_t>(p.HV * blocks, 1)) {
    return "T or N * HV * V is too large for one launch";
  }
  return "";
}

std::size_t no_bytes(Operation, const fd_problem&) { return 0; }
std::size_t nothing_saved(const fd_problem&) { return 0; }

template <typename Args>
fd_status not_here(const Args&, void*, void*) {
  return fail(FD_UNSUPPORTED, "cuda has the decode step only");
}

fd_status step(const fd_step_args& args, void*, void* stream) {
  const fd_problem& p = *args.problem;
  if (p.N == 0 || p.HV == 0 || p.V == 0) return FD_OK;
  const Pool initial(args.initial_state, p.initial_dtype, p.initial_rows, args.initial_index, p.index_dtype,
                     p.initial_slots);
  const Pool final(args.final_state, p.final_dtype, p.final_rows, args.final_index, p.index_dtype, p.final_slots);
  const auto narrow = [](const Pool& pool) { return pool.states.data == nullptr || pool.states.type == FD_BFLOAT16; };
  const bool wide_vectors = narrow(initial) && narrow(final);
  const int vector = wide_vectors ? 8 : 4;
  const Variant variant = choose_variant(p, wide_vectors);
  const int64_t value_blocks = (p.V + variant.values - 1) / variant.values;
  const int capacity = static_cast<int>(std::clamp<int64_t>(p.T, 1, MAX_TOKENS));

  StepParameters parameters = {
      .q = View(args.q, p.dtype),
      .k = View(args.k, p.dtype),
      .v = View(args.v, p.dtype),
      .o = View(args.o, p.dtype),
      .gates = Gates(args),
      .sequences = Sequences(args),
      .initial = initial,
      .final = final,
      .initial_access = access_of(initial.states, vector),
      .final_access = access_of(final.states, vector),
      .accepted = args.accepted,
      .state_per_token = p.final_slots > 0,
      .HV = static_cast<int32_t>(p.HV),
      .group = static_cast<int32_t>(p.HV / p.H),
      .K = static_cast<int32_t>(p.K),
      .V = static_cast<int32_t>(p.V),
      .value_blocks = static_cast<int32_t>(value_blocks),
      .capacity = capacity,
      .l2norm = p.qk_l2norm != 0,
      .l2norm_eps = static_cast<float>(p.l2norm_eps),
      .scale = static_cast<float>(p.scale),
  };
  const WarpVariant warp = choose_warps(p, parameters);
  std::optional<WarpCall> call = make_warp_call(p, parameters);
  if (warp.kernel != nullptr && p.V % warp.values == 0 && call) {
    cudaError_t error;
    const Device* device = current_device(error);
    if (device == nullptr) return checked(error, "the current device");
    const int64_t of_a_head = p.V / warp.values * warp.split, of_a_sequence = p.HV * of_a_head;
    const int64_t at_a_time = int64_t{device->sm_count} * warp.resident;
    int warps = p.N * of_a_sequence <= warp.small ? warp.few : warp.warps;
    while (of_a_head % warps != 0) warps /= 2;
    call->ahead = static_cast<int32_t>((at_a_time + of_a_sequence - 1) / of_a_sequence);
    call->lines_ahead = warp.lines_ahead;
    call->early = 2 * p.N * of_a_sequence <= at_a_time;
    const Launch config = {
        .name = "step kernel",
        .grid = dim3(static_cast<unsigned>(of_a_head / warps), static_cast<unsigned>(p.HV), static_cast<unsigned>(p.N)),
        .block = dim3(static_cast<unsigned>(32 * warps)),
        .shared = warp.warp_shared * static_cast<std::size_t>(warps),
        .overlap = device->major >= 9};
    return launch(warp.kernel, config, *call, stream);
  }
  const Launch config = {.name = "step kernel",
                         .grid = dim3(static_cast<unsigned>(p.N * p.HV * value_blocks)),
                         .block = dim3(static_cast<unsigned>(variant.threads)),
                         .shared = variant.shared_bytes(capacity)};
  return launch(variant.kernel, config, parameters, stream);
}

}  // namespace
}  // namespace flashdelta::cuda

namespace flashdelta {

const Backend cuda_backend = {
    .id = FD_BACKEND_CUDA,
    .device = FD_CUDA,
    .name = "cuda",
    .unavailable = cuda::unavailable,
    .description = cuda::describe_device,
    .unsupported = cuda::unsupported,
    .workspace = cuda::no_bytes,
    .saved = cuda::nothing_saved,
    .forward = cuda::not_here<fd_forward_args>,
    .backward = cuda::not_here<fd_backward_args>,
    .step = cuda::step,
};

}  // namespace flashdelta
