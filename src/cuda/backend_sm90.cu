// The Hopper backend: which calls it serves, tensor maps, the choice of the block's shape, launches.
#include <algorithm>
#include <cmath>
#include <string>

#include "backend.hpp"
#include "cuda/device.hpp"
#include "cuda/forward_sm90.hpp"

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
std::size_t nothing_saved(const fd_problem&) { return 0; }

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                            const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

Encode encoder() {
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
  }();
  return encode;
}

// Tensor map of a [B, T, heads, columns] tensor for tiles of 64 tokens x 64 columns.
//   not packed: dimensions (column, token, head, batch, -); tokens end at T.
//   packed:     ragged, dimensions (column, x, head, y, wrap). Tokens of [begin, end) are x = RAGGED - (end - begin) + i,
//               y = end, wrap = RAGGED: strides are chosen so that address = (x + y - RAGGED) rows modulo 2^64, and x ends
//               at RAGGED, so that what lies past the sequence's end is filled with zeros and never stored.
fd_status tensor_map(CUtensorMap& map, const char* name, const fd_tensor& tensor, const fd_problem& p, bool packed,
                     int64_t heads, int64_t columns) {
  const auto refuse = [&](const std::string& what) {
    return fail(FD_UNSUPPORTED, std::string("fd_forward: ") + name + what);
  };
  const auto address = reinterpret_cast<uintptr_t>(tensor.data);
  if (address % 16 != 0) return refuse(": its data is not aligned to 16 bytes; sm90 needs that");
  const int64_t size[3] = {p.B, p.T, heads};
  uint64_t stride[3];
  for (int i = 0; i < 3; ++i) {
    const int64_t bytes = 2 * tensor.stride[i];
    if (size[i] <= 1 || p.T == 0) {  // never used; without tokens, strides may be 0
      stride[i] = 16;
    } else if (bytes % 16 != 0 || bytes <= 0 || bytes >= int64_t{1} << 34) {
      return refuse(" has stride " + std::to_string(tensor.stride[i]) + " in dimension " + std::to_string(i) +
                    "; sm90 needs positive multiples of 8 below 2^33");
    } else {
      stride[i] = static_cast<uint64_t>(bytes);
    }
  }
  const auto at_least_1 = [](int64_t n) { return static_cast<cuuint64_t>(std::max<int64_t>(n, 1)); };
  cuuint64_t dims[5] = {static_cast<cuuint64_t>(columns), at_least_1(p.T), at_least_1(heads), at_least_1(p.B), 1};
  cuuint64_t strides[4] = {stride[1], stride[2], stride[0], 16};
  if (packed) {
    dims[1] = RAGGED;
    dims[3] = dims[4] = uint64_t{1} << 31;
    strides[2] = stride[1];
    strides[3] = (uint64_t{1} << 34) - stride[1];
  }
  const cuuint32_t box[5] = {64, 64, 1, 1, 1}, steps[5] = {1, 1, 1, 1, 1};
  const Encode encode = encoder();
  if (encode == nullptr) return fail(FD_DEVICE_ERROR, "fd_forward: the driver has no cuTensorMapEncodeTiled");
  // Nothing is loaded or stored through the map of a tensor without elements.
  void* data = tensor.data == nullptr ? reinterpret_cast<void*>(uintptr_t{16}) : tensor.data;
  const CUresult result =
      encode(&map, p.dtype == FD_BFLOAT16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 5, data,
             dims, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    return fail(FD_DEVICE_ERROR, std::string("fd_forward: tensor map of ") + name + ": CUresult " + std::to_string(result));
  }
  return FD_OK;
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
      .heads = static_cast<int>(p.H),
      .value_heads = static_cast<int>(p.HV),
      .value_blocks = static_cast<int>(p.V / (VALUES * blocks)),
      .items = static_cast<int>(items),
      .state_v_first = p.state_v_first,
      .scale = static_cast<float>(p.scale),
      .l2norm_eps = static_cast<float>(p.l2norm_eps),
  };
  fd_status status = tensor_map(parameters.q, "q", args.q, p, packed, p.H, p.K);
  if (status == FD_OK) status = tensor_map(parameters.k, "k", args.k, p, packed, p.H, p.K);
  if (status == FD_OK) status = tensor_map(parameters.v, "v", args.v, p, packed, p.HV, p.V);
  if (status == FD_OK) status = tensor_map(parameters.o, "o", args.o, p, packed, p.HV, p.V);
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
    .saved = cuda::nothing_saved,
    .forward = cuda::forward,
    .backward = cuda::not_here<fd_backward_args>,
    .step = cuda::not_here<fd_step_args>,
    .verified = false,
};

}  // namespace flashdelta
