// What the kernel that finds all gradients of a wave's chunks but those of v and of the initial state is given, and how to
// launch it.
#pragma once

#include <cuda.h>

#include "backend.hpp"
#include "cuda/tiling_sm90.hpp"

namespace flashdelta::cuda {

struct GradientParameters {
  CUtensorMap q, k, do_, dq, dk;
  CUtensorMap dv;  // read, unless the scratch memory has dv
  int has_do, has_dq, has_dk;
  Gates gates;  // of the call: raw ones are differentiated
  Sequences sequences;
  View dg, dbeta;  // strided [B, T, HV]; data null: not wanted
  // Sums over each chunk's tokens for the gradients of A_log and dt_bias, null unless the gates are raw.
  float2* gate_sums;         // [slots, HV]
  const ChunkPlace* chunks;  // [slots]
  Scratch scratch;           // vectors, s, ds, r, dv are read; the kernel before is the chain, which counts in `stored`
  int slots, heads;
  int l2norm;
  float scale;
  int runs, run_slots;  // the chain walks so many parts of so many slots at once, from their last ones on
};

fd_status launch_gradients(const GradientParameters&, bool bfloat16, int sm_count, void* stream);

}  // namespace flashdelta::cuda
