// What the kernel that walks the state's gradient from last chunk to first is given, and how to launch it.
#pragma once

#include <cuda.h>

#include "backend.hpp"
#include "cuda/tiling_sm90.hpp"

namespace flashdelta::cuda {

struct ChainParameters {
  CUtensorMap q, k, do_, dv;
  int has_do, has_dv;  // absent: do counts as zero, dv is not stored (its scratch is)
  Sequences sequences;
  Scratch scratch;    // vectors, t, p, r are read; ds, dv, dbeta are written
  const Run* pieces;  // [piece_count]
  int piece_count;
  int heads;
  // A piece that ends its sequence starts from the gradient of the final state (absent: zero), another from `carry_in`; one
  // that begins its sequence leaves the gradient of the initial state (if that is wanted: zero where the sequence had no
  // initial state), another `carry_out`. At most one sequence goes on in the next wave.
  Pool initial, dfinal, dinitial;
  int state_v_first;
  const float* carry_in;  // [HV][V][K]
  float* carry_out;       // [HV][V][K]
  float scale;
};

fd_status launch_chain(const ChainParameters&, bool bfloat16, int sm_count, void* stream);

}  // namespace flashdelta::cuda
