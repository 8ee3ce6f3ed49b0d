// The Hopper backend: which calls it serves, tensor maps, the choice of the block's shape, launches.
#include <algorithm>
#include <cmath>
#include <string>

#include "backend.hpp"
#include "cuda/backward_sm90.hpp"
#include "cuda/context_sm90.hpp"
#include "cuda/device.hpp"
#include "cuda/forward_sm90.hpp"
#include "cuda/ptx.cuh"
#include "cuda/tensor_map_sm90.hpp"

namespace flashdelta {
namespace cuda {
namespace {

constexpr int64_t MAX_TOKENS = 1 << 30;  // coordinates of the copy engine
constexpr int64_t MAX_ITEMS = 1 << 30;

std::string unavailable() {
  return no_device([](int major, int minor) { return major == 9 && minor == 0; }, "compute capability 9.0");
}

std::string unsupported(Operation operation, const fd_problem& p) {
  const auto is = [](const char* name, auto got, const char* wanted) {
    return std::string(name) + " is " + std::to_string(got) + "; sm90 has " + wanted;
  };
  if (operation == Operation::step) return "sm90 has no decode step";
  if (p.dtype != FD_BFLOAT16 && p.dtype != FD_FLOAT16) return "dtype is not bfloat16 or float16; sm90 has these two";
  if (p.K != KEYS) return is("K", p.K, "K = 128");
  if (p.V % VALUES != 0) return is("V", p.V, "multiples of 64");
  if (p.T >= MAX_TOKENS) return is("T", p.T, "less than 2^30 tokens");
  if ((p.N + (operation == Operation::backward ? p.B * p.T / CHUNK : 0)) * p.HV * (p.V / VALUES) >= MAX_ITEMS) {
    return operation == Operation::backward ? "(N + B * T / 64) * HV * V / 64 is 2^30 or more; sm90 has less"
                                            : "N * HV * V / 64 is 2^30 or more; sm90 has less";
  }
  if (p.gate == FD_GATE_LOG_PER_KEY) return "gate is per key; sm90 has one per token and head";
  for (const fd_dtype type :
       {p.gate_dtype, p.beta_dtype, p.A_log_dtype, p.dt_bias_dtype, p.initial_dtype, p.final_dtype, p.checkpoint_dtype}) {
    if (type == FD_FLOAT64) return "a gate, strength or state is float64; sm90 has 32 and 16 bits";
  }
  return "";
}

std::size_t workspace(Operation operation, const fd_problem& p) {
  return operation == Operation::forward ? runs_workspace(p) : backward_workspace(p);
}

// The current device, if it is a Hopper GPU; else null, and `status` says why.
const Device* hopper(const char* operation, const void* saved, fd_status& status) {
  cudaError_t error;
  const Device* device = current_device(error);
  if (device == nullptr) {
    status = checked(error, (std::string(operation) + ": the current device").c_str());
  } else if (device->major != 9 || device->minor != 0) {
    status = fail(FD_UNSUPPORTED, std::string(operation) + ": " + device_name(*device) + " is not a Hopper GPU");
  } else if (reinterpret_cast<uintptr_t>(saved) % 16 != 0) {
    status = fail(FD_UNSUPPORTED, std::string(operation) + ": saved is not aligned to 16 bytes; sm90 needs that");
  } else {
    return device;
  }
  return nullptr;
}

// Bytes of a head's state in a pool if its elements lie together and begin where a bulk copy may; else 0.
int bytes_together(const View& states, const fd_problem& p) {
  const int64_t size = states.type == FD_FLOAT32 ? 4 : 2, inner = p.state_v_first != 0 ? p.K : p.V;
  const bool together = states.data != nullptr && states.stride[3] == 1 && states.stride[2] == inner;
  const bool aligned = (reinterpret_cast<uintptr_t>(states.data) | static_cast<uintptr_t>(states.stride[0] * size) |
                        static_cast<uintptr_t>(states.stride[1] * size)) %
                           16 ==
                       0;
  return together && aligned ? static_cast<int>(p.K * p.V * size) : 0;
}

fd_status forward(const fd_forward_args& args, void* workspace, void* stream) {
  const fd_problem& p = *args.problem;
  fd_status status;
  const Device* device = hopper("fd_forward", args.saved, status);
  if (device == nullptr) return status;
  if (p.N == 0) return FD_OK;
  const bool packed = args.cu_seqlens != nullptr;

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
      .runs = nullptr,
      .run_count = nullptr,
      .starts = nullptr,
      .next_item = nullptr,
      .checkpoint_interval = args.checkpoints.data == nullptr ? 0 : p.checkpoint_interval,
      .saved = saved_bytes(p) == 0 ? nullptr : static_cast<float*>(args.saved),
      .heads = static_cast<int>(p.H),
      .value_heads = static_cast<int>(p.HV),
      .values = static_cast<int>(p.V),
      .value_blocks = 0,
      .items = 0,
      .state_v_first = p.state_v_first,
      .initial_bytes = 0,
      .scale = static_cast<float>(p.scale),
      .l2norm_eps = static_cast<float>(p.l2norm_eps),
  };
  parameters.initial_bytes = bytes_together(parameters.initial.states, p);
  status = tensor_map(parameters.q, "fd_forward: q", args.q, p, packed, p.H, p.K);
  if (status == FD_OK) status = tensor_map(parameters.k, "fd_forward: k", args.k, p, packed, p.H, p.K);
  if (status == FD_OK) status = tensor_map(parameters.v, "fd_forward: v", args.v, p, packed, p.HV, p.V);
  if (status == FD_OK) status = tensor_map(parameters.o, "fd_forward: o", args.o, p, packed, p.HV, p.V);
  if (status != FD_OK) return status;

  // Blocks that take `shape` times 64 values, for `runs` runs at most.
  const auto walk = [&](int shape, int64_t runs) {
    parameters.value_blocks = static_cast<int>(p.V / (VALUES * shape));
    const int64_t items = runs * p.HV * parameters.value_blocks;
    parameters.items = static_cast<int>(items);
    const dim3 grid(static_cast<unsigned>(std::min<int64_t>(items, device->sm_count)));
    return launch_forward(parameters, shape, p.dtype == FD_BFLOAT16, p.qk_l2norm != 0, grid, stream);
  };
  const RunLimits most = run_limits(p);
  if (!needs_plan(p, most, device->sm_count)) return walk(shape_of_sequences(p, device->sm_count), p.N);

  ForwardRuns runs;
  status = plan_runs(args, most, parameters.k, parameters.v, runs, device->sm_count, workspace, stream);
  if (status != FD_OK) return status;
  parameters.runs = runs.runs;
  parameters.starts = runs.starts;
  parameters.next_item = runs.next_item;
  for (int i = 0; i < 2 && status == FD_OK && runs.count[i] != nullptr; ++i) {
    parameters.run_count = runs.count[i];
    status = walk(runs.shape[i], most.runs);
  }
  return status;
}

fd_status backward(const fd_backward_args& args, void* workspace, void* stream) {
  fd_status status;
  const Device* device = hopper("fd_backward", args.saved, status);
  return device == nullptr ? status : run_backward(args, workspace, device->sm_count, stream);
}

fd_status no_step(const fd_step_args&, void*, void*) { return fail(FD_UNSUPPORTED, "sm90 has no decode step"); }

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
    .saved = cuda::saved_bytes,
    .forward = cuda::forward,
    .backward = cuda::backward,
    .step = cuda::no_step,
};

}  // namespace flashdelta
