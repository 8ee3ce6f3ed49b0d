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
  Scratch scratch;  // vectors, t, p are read; ds, dv are written
  const Run* runs;  // [run_count]: pieces, or segments
  int run_count;
  int heads;
  bool full;  // two blocks of values in one block, which share K, Q, T, P; for an even number of them
  // A run that ends its sequence starts from the gradient of the final state (absent: zero), another from `starts`; one that
  // begins its sequence leaves the gradient of the initial state (if that is wanted: zero where the sequence had no initial
  // state), another leaves `carry_out`, unless null. Only with that gradient do is rounded in two parts (see `add_do`),
  // which changes the last bits of the other results.
  Pool initial, dfinal, dinitial;
  int state_v_first;
  const float* starts;   // [HV][V][K], of run r from element r * start_stride on
  int64_t start_stride;  // 0: one for all, as at most one sequence goes on in the next wave
  float* carry_out;      // [HV][V][K]
  float scale;
  // Unless null, this is a pre-pass: of all results only these are left, the gradients of the state before every run that
  // does not begin its sequence. Runs that do not end theirs start from zero; `starts` is not read.
  float* outcomes = nullptr;     // [run_count][HV][V + K][K]: the rows of V
  const int* windows = nullptr;  // [run_count][HV]: of a run only so many first chunks count, from zero; -1: all
};

fd_status launch_chain(const ChainParameters&, bool bfloat16, int sm_count, void* stream);

}  // namespace flashdelta::cuda
