#include "tests/emulation/cut_sm90.hpp"

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>

#define cuda emulated_cuda
namespace flashdelta::cuda {
using std::max;
using std::min;
}  // namespace flashdelta::cuda
#include "cuda/cut_sm90.cu"

namespace flashdelta::emulation {
namespace {

template <typename To, typename From>
std::vector<To> part(const std::vector<From>& all, int wave, int count) {
  static_assert(sizeof(To) == sizeof(From));
  std::vector<To> result(static_cast<std::size_t>(count));
  std::memcpy(static_cast<void*>(result.data()), all.data() + wave * count, static_cast<std::size_t>(count) * sizeof(To));
  return result;
}

}  // namespace

std::vector<CutWave> cut(const std::vector<std::int64_t>& bounds, std::int64_t B, std::int64_t T, std::int64_t wave_tokens) {
  fd_problem p{};
  p.B = B;
  p.T = T;
  p.N = bounds.empty() ? B : static_cast<std::int64_t>(bounds.size()) - 1;
  fd_forward_args args{};
  args.problem = &p;
  args.cu_seqlens = bounds.empty() ? nullptr : bounds.data();
  const cuda::Tiling t = cuda::make_tiling(p, wave_tokens);
  const auto waves = static_cast<std::size_t>(t.waves);
  std::vector<cuda::ChunkPlace> chunks(waves * static_cast<std::size_t>(t.chunk_slots), {-7, -7, -7, -7});
  std::vector<cuda::Run> segments(waves * static_cast<std::size_t>(t.segment_slots), {-7, -7, -7, -7});
  std::vector<cuda::Run> pieces(waves * static_cast<std::size_t>(t.sequence_slots), {-7, -7, -7, -7});
  cuda::launch_cut(t, cuda::Sequences(args), {chunks.data(), segments.data(), pieces.data()}, nullptr);
  std::vector<CutWave> result;
  for (int w = 0; w < t.waves; ++w) {
    result.push_back({part<CutChunk>(chunks, w, t.chunk_slots), part<CutRun>(segments, w, t.segment_slots),
                      part<CutRun>(pieces, w, t.sequence_slots)});
  }
  return result;
}

}  // namespace flashdelta::emulation
