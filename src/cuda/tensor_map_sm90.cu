#include <algorithm>
#include <string>

#include "cuda/device.hpp"
#include "cuda/tensor_map_sm90.hpp"
#include "cuda/tiling_sm90.hpp"

namespace flashdelta::cuda {
namespace {

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

}  // namespace

fd_status tensor_map(CUtensorMap& map, const std::string& name, const fd_tensor& tensor, const fd_problem& p, bool packed,
                     int64_t heads, int64_t columns) {
  const auto refuse = [&](const std::string& what) { return fail(FD_UNSUPPORTED, name + what); };
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
  if (encode == nullptr) return fail(FD_DEVICE_ERROR, name + ": the driver has no cuTensorMapEncodeTiled");
  // Nothing is loaded or stored through the map of a tensor without elements.
  void* data = tensor.data == nullptr ? reinterpret_cast<void*>(uintptr_t{16}) : tensor.data;
  const auto encode_map = [&] {
    return encode(&map, p.dtype == FD_BFLOAT16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 5, data,
                  dims, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                  CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  CUresult result = encode_map();
  if (result == CUDA_ERROR_INVALID_CONTEXT && enter_context()) result = encode_map();
  if (result != CUDA_SUCCESS) {
    return fail(FD_DEVICE_ERROR, name + ": CUresult " + std::to_string(result) + " for its tensor map");
  }
  return FD_OK;
}

}  // namespace flashdelta::cuda
