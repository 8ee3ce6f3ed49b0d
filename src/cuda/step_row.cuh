// The decode step on states in fp32 [V, K], 128 keys, one token. See docs/kernels/step.md.
//
// The fewest bytes per warp, and the most warps: 8 values and all keys, 4 of them in a lane, in 32 registers.
#pragma once

#include "cuda/step_warp.cuh"

namespace flashdelta::cuda {

constexpr int ROW_VALUES = 8;  // of a warp

// Elements 4 i .. of a row of q or k: as they lie in memory, as numbers.
__device__ inline uint4 load_four(const char* row, bool wide, int i) {
  if (wide) return reinterpret_cast<const uint4*>(row)[i];
  const uint2 x = reinterpret_cast<const uint2*>(row)[i];
  return {x.x, x.y, 0, 0};
}
__device__ inline float4 four_of(const uint4& raw, fd_dtype type) {
  if (type == FD_FLOAT32) {
    return {__uint_as_float(raw.x), __uint_as_float(raw.y), __uint_as_float(raw.z), __uint_as_float(raw.w)};
  }
  return {element_of(raw.x & 0xffff, type), element_of(raw.x >> 16, type), element_of(raw.y & 0xffff, type),
          element_of(raw.y >> 16, type)};
}
__device__ inline float dot(const float4& x, const float4& y) {
  return fmaf(x.x, y.x, fmaf(x.y, y.y, fmaf(x.z, y.z, x.w * y.w)));
}

template <int WARPS, int BLOCKS>
__global__ void __launch_bounds__(32 * WARPS, BLOCKS) row_kernel(const __grid_constant__ WarpCall call) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const WarpPlace place(call, ROW_VALUES, 1);
  // Two lanes come by the sums of each value for k, and two of the other half of the warp for q.
  const int value = place.first_value + lane % 16 / 2;
  const fd_dtype type = call.q.type;

  wait_for_earlier_kernels();
  if (call.early) allow_later_kernels();
  const int from = initial_row(call, place.n);
  float4 x[ROW_VALUES];
  if (from >= 0) {
    const char* address =
        call.initial.at(from, place.value_head) + int64_t{place.first_value} * call.initial.pitch + lane * 16;
#pragma unroll
    for (int i = 0; i < ROW_VALUES; ++i) {
      const uint4 bits = load_at_once(reinterpret_cast<const uint4*>(address + int64_t{i} * call.initial.pitch));
      x[i] = {__uint_as_float(bits.x), __uint_as_float(bits.y), __uint_as_float(bits.z), __uint_as_float(bits.w)};
    }
  } else {
#pragma unroll
    for (int i = 0; i < ROW_VALUES; ++i) x[i] = {};
  }
  const uint4 k_bits = load_four(call.k.at(place.n, 0, place.key_head), type == FD_FLOAT32, lane);
  const uint4 q_bits = load_four(call.q.at(place.n, 0, place.key_head), type == FD_FLOAT32, lane);
  const Gates::Bits gates = call.gate_bits(place.n, 0, place.value_head);
  uint32_t v = load_bits(call.v.at(place.n, 0, place.value_head), type, value);
  pin(v);
  const int to = call.final.row_of(place.n, 0, call.index_type);

  const float4 k = four_of(k_bits, type), q = four_of(q_bits, type);
  float products[4] = {dot(k, k), dot(q, q), dot(q, k), 0};  // the sum of each ends in 8 lanes
  sum_and_share<4, 16, 1>(products, lane);
  float key_factor = 1, query_factor = call.scale;
  const float k_k = __shfl_sync(ALL_LANES, products[0], 0), q_q = __shfl_sync(ALL_LANES, products[0], 8);
  const float q_k = __shfl_sync(ALL_LANES, products[0], 16);
  if (call.l2norm) {
    key_factor = rsqrtf(k_k + call.l2norm_eps);
    query_factor *= rsqrtf(q_q + call.l2norm_eps);
  }
  const float decay = expf(call.gates.log_decay(gates, place.value_head));
  const float strength = key_factor * call.gates.write_strength(gates);

  float sums[2 * ROW_VALUES];  // S^T k of all values, S^T q
#pragma unroll
  for (int i = 0; i < ROW_VALUES; ++i) sums[i] = dot(k, x[i]), sums[ROW_VALUES + i] = dot(q, x[i]);
  sum_and_share<2 * ROW_VALUES, 16, 1>(sums, lane);
  const float read = decay * key_factor * sums[0];  // in the lower half of the warp
  const float written = __shfl_sync(ALL_LANES, strength * (element_of(v, type) - read), lane % 16);
  if (lane >= 16 && lane % 2 == 0) {
    const float output = query_factor * fmaf(q_k, written, decay * sums[0]);
    store_element(call.o.at(place.n, 0, place.value_head), type, value, output);
  }
  if (to < 0) return;
  char* address = call.final.at(to, place.value_head) + int64_t{place.first_value} * call.final.pitch + lane * 16;
#pragma unroll
  for (int i = 0; i < ROW_VALUES; ++i) {
    const float e = __shfl_sync(ALL_LANES, written, 2 * i);
    __stcs(reinterpret_cast<uint4*>(address + int64_t{i} * call.final.pitch),
           make_uint4(__float_as_uint(fmaf(e, k.x, decay * x[i].x)), __float_as_uint(fmaf(e, k.y, decay * x[i].y)),
                      __float_as_uint(fmaf(e, k.z, decay * x[i].z)), __float_as_uint(fmaf(e, k.w, decay * x[i].w))));
  }
}

}  // namespace flashdelta::cuda
