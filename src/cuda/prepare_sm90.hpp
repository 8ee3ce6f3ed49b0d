// What the kernel that makes the tiles of all chunks of a wave is given, and how to launch it.
#pragma once

#include <cuda.h>

#include "backend.hpp"
#include "cuda/tiling_sm90.hpp"

namespace flashdelta::cuda {

struct PrepareParameters {
  CUtensorMap q, k;
  Gates gates;
  Sequences sequences;
  const ChunkPlace* chunks;  // [slots]
  Scratch scratch;           // vectors, t and, unless null, p are written; without p, q is not read and counts as normalised
  int slots, heads;
  float scale, l2norm_eps;
  // On the device, for context parallelism; null: all. The first slots, of those the ones of these heads.
  const int* used_slots = nullptr;
  const uint8_t* needed = nullptr;  // [slots, HV]
};

fd_status launch_prepare(const PrepareParameters&, bool bfloat16, bool l2norm, int sm_count, void* stream);

}  // namespace flashdelta::cuda
