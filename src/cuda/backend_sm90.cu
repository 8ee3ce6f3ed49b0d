// The Hopper backend: which calls it serves, tensor maps, the choice of the block's shape, launches.
#include <algorithm>
#include <cmath>
#include <string>

#include "backend.hpp"
#include "cuda/device.hpp"
#include "cuda/forward_sm90.hpp"
#include "cuda/ptx.cuh"
#include "cuda/tensor_map_sm90.hpp"

namespace flashdelta {
namespace cuda {
namespace {

constexpr int64_t MAX_TOKENS = 1 << 30;  // coordinates of the copy engine
constexpr int64_t MAX_ITEMS = 1 << 30;
constexpr std::size_t COUNTER_BYTES = 256;

std::string unavailable() {
  return no_device([](int major, int minor) { return major == 9 && minor == 0; }, "compute capability 9.0");
}

std::string unsupported(Operation operation, const fd_problem& p) {
  const auto is = [](const char* name, auto got, const char* wanted) {
    return std::string(name) + " is " + std::to_string(got) + "; sm90 has " + wanted;
  };
  if (operation == Operation::backward) return "sm90 has no backward";
  if (operation == Operation::step) return "sm90 has no decode step";
  if (p.dtype != FD_BFLOAT16 && p.dtype != FD_FLOAT16) return "dtype is not bfloat16 or float16; sm90 has these two";
  if (p.K != KEYS) return is("K", p.K, "K = 128");
  if (p.V % VALUES != 0) return is("V", p.V, "multiples of 64");
  if (p.T >= MAX_TOKENS) return is("T", p.T, "less than 2^30 tokens");
  if (p.N * p.HV * (p.V / VALUES) >= MAX_ITEMS) return "N * HV * V / 64 is 2^30 or more; sm90 has less";
  if (p.gate == FD_GATE_LOG_PER_KEY) return "gate is per key; sm90 has one per token and head";
  for (const fd_dtype type :
       {p.gate_dtype, p.beta_dtype, p.A_log_dtype, p.dt_bias_dtype, p.initial_dtype, p.final_dtype, p.checkpoint_dtype}) {
    if (type == FD_FLOAT64) return "a gate, strength or state is float64; sm90 has 32 and 16 bits";
  }
  return "";
}

// Order of the sequences, and a counter of items: for calls of several sequences.
std::size_t workspace(Operation operation, const fd_problem& p) {
  return operation == Operation::forward && p.N > 1 ? COUNTER_BYTES + static_cast<std::size_t>(p.N) * sizeof(int) : 0;
}

// States for the backward, one per segment of 2,048 tokens; shorter sequences have none.
std::size_t saved(const fd_problem& p) {
  return p.T <= SEGMENT ? 0 : static_cast<std::size_t>(saved_rows(p.B * p.T) * p.HV * p.V * p.K) * sizeof(float);
}

struct OrderParameters {
  Sequences sequences;
  int* order;
  unsigned int* next_item;
};

// Sequences by falling length (stable), and the counter of items set to zero. One block.
__global__ void order_sequences(OrderParameters p) {
  wait_for_earlier_kernels();
  if (threadIdx.x == 0) *p.next_item = 0;
  const int n = static_cast<int>(p.sequences.N);
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    const TokenRange mine = p.sequences[i];
    const int64_t length = mine.end - mine.begin;
    int rank = 0;
    for (int j = 0; j < n; ++j) {
      const TokenRange other = p.sequences[j];
      const int64_t that = other.end - other.begin;
      rank += that > length || (that == length && j < i) ? 1 : 0;
    }
    p.order[rank] = i;
  }
  allow_later_kernels();
}

// Two blocks of half the values double the SMs at work on a head; they lose once whole blocks alone fill the chip, because
// Q K^T and K K^T are then computed twice.
bool half_values(const fd_problem& p, int sm_count) {
  return p.V % (2 * VALUES) != 0 || p.N * p.HV * (p.V / VALUES) <= sm_count;
}

fd_status forward(const fd_forward_args& args, void* workspace, void* stream) {
  const fd_problem& p = *args.problem;
  cudaError_t error;
  const Device* device = current_device(error);
  if (device == nullptr) return checked(error, "fd_forward: the current device");
  if (device->major != 9 || device->minor != 0)
    return fail(FD_UNSUPPORTED, std::string("fd_forward: ") + device->name + " is not a Hopper GPU");
  if (reinterpret_cast<uintptr_t>(args.saved) % 16 != 0) {
    return fail(FD_UNSUPPORTED, "fd_forward: saved is not aligned to 16 bytes; sm90 needs that");
  }
  const int blocks = half_values(p, device->sm_count) ? 1 : 2;
  const int64_t items = p.N * p.HV * (p.V / (VALUES * blocks));
  if (items == 0) return FD_OK;
  const bool packed = args.cu_seqlens != nullptr, queue = items > device->sm_count;

  ForwardParameters parameters{
      .q = {},
      .k = {},
      .v = {},
      .o = {},
      .output = View(args.o, p.dtype),
      .gates = Gates(args),
      .sequences = Sequences(args),
      .initial =
          Pool(args.initial_state, p.initial_dtype, p.initial_rows, args.initial_index, p.index_dtype, p.initial_slots),
      .final = Pool(args.final_state, p.final_dtype, p.final_rows, args.final_index, p.index_dtype, p.final_slots),
      .checkpoints = Pool(args.checkpoints, p.checkpoint_dtype, p.checkpoint_rows, args.checkpoint_index, p.index_dtype,
                          p.checkpoint_slots),
      .order = nullptr,
      .next_item = nullptr,
      .checkpoint_interval = args.checkpoints.data == nullptr ? 0 : p.checkpoint_interval,
      .saved = saved(p) == 0 ? nullptr : static_cast<float*>(args.saved),
      .heads = static_cast<int>(p.H),
      .value_heads = static_cast<int>(p.HV),
      .values = static_cast<int>(p.V),
      .value_blocks = static_cast<int>(p.V / (VALUES * blocks)),
      .items = static_cast<int>(items),
      .state_v_first = p.state_v_first,
      .scale = static_cast<float>(p.scale),
      .l2norm_eps = static_cast<float>(p.l2norm_eps),
  };
  fd_status status = tensor_map(parameters.q, "fd_forward: q", args.q, p, packed, p.H, p.K);
  if (status == FD_OK) status = tensor_map(parameters.k, "fd_forward: k", args.k, p, packed, p.H, p.K);
  if (status == FD_OK) status = tensor_map(parameters.v, "fd_forward: v", args.v, p, packed, p.HV, p.V);
  if (status == FD_OK) status = tensor_map(parameters.o, "fd_forward: o", args.o, p, packed, p.HV, p.V);
  if (status != FD_OK) return status;

  if (queue && p.N > 1) {
    parameters.next_item = static_cast<unsigned int*>(workspace);
    parameters.order = reinterpret_cast<int*>(static_cast<char*>(workspace) + COUNTER_BYTES);
    const OrderParameters order{Sequences(args), const_cast<int*>(parameters.order), parameters.next_item};
    status = launch(order_sequences, {.name = "order_sequences", .grid = dim3(1), .block = dim3(256)}, order, stream);
    if (status != FD_OK) return status;
  }
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(items, device->sm_count)));
  return launch_forward(parameters, blocks, p.dtype == FD_BFLOAT16, p.qk_l2norm != 0, grid, stream);
}

template <typename Args>
fd_status not_here(const Args&, void*, void*) {
  return fail(FD_UNSUPPORTED, "sm90 has only the forward");
}

}  // namespace
}  // namespace cuda

const Backend sm90_backend = {
    .id = FD_BACKEND_SM90,
    .device = FD_CUDA,
    .name = "sm90",
    .unavailable = cuda::unavailable,
    .description = cuda::describe_device,
    .unsupported = cuda::unsupported,
    .workspace = cuda::workspace,
    .saved = cuda::saved,
    .forward = cuda::forward,
    .backward = cuda::not_here<fd_backward_args>,
    .step = cuda::not_here<fd_step_args>,
    .verified = false,
};

}  // namespace flashdelta
