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
  Scratch scratch;           // vectors, t and p are written
  int slots, heads;
  float scale, l2norm_eps;
};

fd_status launch_prepare(const PrepareParameters&, bool bfloat16, bool l2norm, int sm_count, void* stream);

}  // namespace flashdelta::cuda
