// What the last kernel of the backward is given, and how to launch it: gradients of A_log and dt_bias from the sums of all
// chunks, zeros in the gradients' rows past the last sequence.
#pragma once

#include "backend.hpp"
#include "cuda/tiling_sm90.hpp"

namespace flashdelta::cuda {

struct FinishParameters {
  Sequences sequences;
  View dq, dk;              // [B, T, H, K]; data null: not wanted, here and below
  View dv;                  // [B, T, HV, V]
  View dg, dbeta;           // [B, T, HV]
  View dA_log, ddt_bias;    // [HV]
  const float2* gate_sums;  // [sum_count, HV]: gradients' parts for A_log and dt_bias; zero for slots without a chunk
  int64_t sum_count;
  int heads, value_heads, values;  // H, HV, V
};

fd_status launch_finish(const FinishParameters&, int sm_count, void* stream);

}  // namespace flashdelta::cuda
