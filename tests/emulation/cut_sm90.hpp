// The kernel that cuts sequences into chunks, segments and pieces, emulated. The types are those of
// src/cuda/tiling_sm90.hpp.
#pragma once

#include <cstdint>
#include <vector>

namespace flashdelta::emulation {

struct CutChunk {
  int sequence, chunk, begin, tokens;
};
struct CutRun {
  int sequence, first_chunk, chunks, slot;
};
struct CutWave {
  std::vector<CutChunk> chunks;
  std::vector<CutRun> segments, pieces;
};

// Packed sequences with these bounds in a buffer of T tokens; bounds empty: B sequences of T tokens.
std::vector<CutWave> cut(const std::vector<std::int64_t>& bounds, std::int64_t B, std::int64_t T, std::int64_t wave_tokens);

}  // namespace flashdelta::emulation
