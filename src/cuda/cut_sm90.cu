#include <algorithm>
#include <limits>

#include "cuda/cut_sm90.hpp"
#include "cuda/device.hpp"
#include "cuda/ptx.cuh"

namespace flashdelta::cuda {
namespace {

struct CutParameters {
  Tiling tiling;
  Sequences sequences;
  Tables tables;
};

__device__ int64_t floor_divide(int64_t a, int64_t b) { return (a >= 0 ? a : a - b + 1) / b; }
__device__ int64_t ceil_divide(int64_t a, int64_t b) { return floor_divide(a + b - 1, b); }

// A sequence on the axis of positions.
struct Span {
  int64_t start, tokens;
  __device__ int64_t chunks() const { return ceil_divide(tokens, CHUNK); }
};
__device__ Span span(const Sequences& sequences, int64_t n) {
  const TokenRange range = sequences[n];
  return {range.batch * sequences.T + range.begin, range.end - range.begin};
}

struct WaveBounds {
  int64_t begin, end;
  int64_t first;  // sequence: the first that starts in the wave or goes on in it
};
__device__ WaveBounds wave_bounds(const CutParameters& p, int wave) {
  WaveBounds bounds;
  bounds.begin = wave * p.tiling.wave_tokens;
  bounds.end = wave == p.tiling.waves - 1 ? std::numeric_limits<int64_t>::max() : bounds.begin + p.tiling.wave_tokens;
  int64_t low = 0, high = p.sequences.N;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    const Span s = span(p.sequences, middle);
    if (s.start >= bounds.begin || s.start + s.tokens > bounds.begin) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  bounds.first = low;
  return bounds;
}

// Slot of a sequence's first chunk, or segment, of `size` tokens; may be negative where it lies in an earlier wave.
__device__ int64_t first_slot(const WaveBounds& wave, int64_t start, int64_t n, int size) {
  return floor_divide(start - wave.begin, size) + n - wave.first;
}

// The last sequence whose first slot is at most `slot`, or -1.
__device__ int64_t sequence_at(const CutParameters& p, const WaveBounds& wave, int64_t slot, int size) {
  int64_t low = wave.first, high = p.sequences.N;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (first_slot(wave, span(p.sequences, middle).start, middle, size) <= slot) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low > wave.first ? low - 1 : -1;
}

// Segments [first, last) of a sequence that start in the wave.
struct Segments {
  int64_t first, last;
};
__device__ Segments segments_in(const WaveBounds& wave, const Span& s) {
  const int64_t all = ceil_divide(s.tokens, SEGMENT);
  const int64_t first = s.start >= wave.begin ? 0 : ceil_divide(wave.begin - s.start, SEGMENT);
  const int64_t last = wave.end > s.start + s.tokens ? all : max(int64_t{0}, ceil_divide(wave.end - s.start, SEGMENT));
  return {first, min(all, last)};
}

constexpr Run NOTHING = {-1, 0, 0, 0};

// Chunks of segments [first, last), if their slots exist.
__device__ Run run_of(const CutParameters& p, const WaveBounds& wave, int64_t n, const Span& s, int64_t first,
                      int64_t last) {
  const int64_t chunk = first * SEGMENT_CHUNKS, chunks = min(s.chunks(), last * SEGMENT_CHUNKS) - chunk;
  const int64_t slot = first_slot(wave, s.start, n, CHUNK) + chunk;
  if (chunks < 0 || slot < 0 || slot + chunks > p.tiling.chunk_slots) return NOTHING;
  return {static_cast<int>(n), static_cast<int>(chunk), static_cast<int>(chunks), static_cast<int>(slot)};
}

// Of a sequence without chunks.
__device__ Run empty_run(const WaveBounds& wave, int64_t n, const Span& s) {
  return s.start >= wave.begin && s.start < wave.end ? Run{static_cast<int>(n), 0, 0, 0} : NOTHING;
}

__device__ ChunkPlace chunk_at(const CutParameters& p, const WaveBounds& wave, int64_t slot) {
  const int64_t n = sequence_at(p, wave, slot, CHUNK);
  if (n < 0) return {-1, 0, 0, 0};
  const Span s = span(p.sequences, n);
  const int64_t chunk = slot - first_slot(wave, s.start, n, CHUNK);
  const Segments segments = segments_in(wave, s);
  if (chunk < segments.first * SEGMENT_CHUNKS || chunk >= segments.last * SEGMENT_CHUNKS || chunk >= s.chunks()) {
    return {-1, 0, 0, 0};
  }
  const int64_t begin = p.sequences[n].begin + chunk * CHUNK;
  return {static_cast<int>(n), static_cast<int>(chunk), static_cast<int>(begin),
          static_cast<int>(min(int64_t{CHUNK}, s.tokens - chunk * CHUNK))};
}

__device__ Run segment_at(const CutParameters& p, const WaveBounds& wave, int64_t slot) {
  const int64_t n = sequence_at(p, wave, slot, SEGMENT);
  if (n < 0) return NOTHING;
  const Span s = span(p.sequences, n);
  const int64_t segment = slot - first_slot(wave, s.start, n, SEGMENT);
  if (s.tokens == 0) return segment == 0 ? empty_run(wave, n, s) : NOTHING;
  const Segments segments = segments_in(wave, s);
  if (segment < segments.first || segment >= segments.last) return NOTHING;
  return run_of(p, wave, n, s, segment, segment + 1);
}

__device__ Run piece_at(const CutParameters& p, const WaveBounds& wave, int64_t i) {
  const int64_t n = wave.first + i;
  if (n >= p.sequences.N) return NOTHING;
  const Span s = span(p.sequences, n);
  if (s.tokens == 0) return empty_run(wave, n, s);
  const Segments segments = segments_in(wave, s);
  return segments.first < segments.last ? run_of(p, wave, n, s, segments.first, segments.last) : NOTHING;
}

// A thread for each entry of each table.
__global__ void cut(CutParameters p) {
  wait_for_earlier_kernels();
  const Tiling& t = p.tiling;
  const int64_t per_wave = int64_t{t.chunk_slots} + t.segment_slots + t.sequence_slots;
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= per_wave * t.waves) return;
  const int wave = static_cast<int>(i / per_wave);
  int64_t entry = i % per_wave;
  const WaveBounds bounds = wave_bounds(p, wave);
  if (entry < t.chunk_slots) {
    p.tables.chunks[int64_t{wave} * t.chunk_slots + entry] = chunk_at(p, bounds, entry);
    return;
  }
  entry -= t.chunk_slots;
  if (entry < t.segment_slots) {
    p.tables.segments[int64_t{wave} * t.segment_slots + entry] = segment_at(p, bounds, entry);
    return;
  }
  entry -= t.segment_slots;
  p.tables.pieces[int64_t{wave} * t.sequence_slots + entry] = piece_at(p, bounds, entry);
}

}  // namespace

Tiling make_tiling(const fd_problem& p, int64_t wave_tokens) {
  Tiling t;
  t.positions = p.B * p.T;
  const int64_t most = (wave_tokens + SEGMENT - 1) / SEGMENT * SEGMENT;
  const int64_t waves = std::max<int64_t>(1, (t.positions + most - 1) / most);
  t.waves = static_cast<int>(waves);
  t.wave_tokens = std::max<int64_t>(t.positions, 1);
  if (waves > 1) t.wave_tokens = ((t.positions + waves - 1) / waves + SEGMENT - 1) / SEGMENT * SEGMENT;
  // The last segment of a wave may reach into the next.
  const int64_t reach = waves == 1 ? t.positions : t.wave_tokens + SEGMENT;
  t.chunk_slots = static_cast<int>(reach / CHUNK + p.N);
  t.segment_slots = static_cast<int>(reach / SEGMENT + p.N);
  t.sequence_slots = static_cast<int>(p.N);
  return t;
}

fd_status launch_cut(const Tiling& t, const Sequences& sequences, const Tables& tables, void* stream) {
  constexpr unsigned THREADS = 128;
  const int64_t entries = t.waves * (int64_t{t.chunk_slots} + t.segment_slots + t.sequence_slots);
  const CutParameters parameters{t, sequences, tables};
  const dim3 grid(static_cast<unsigned>((entries + THREADS - 1) / THREADS));
  return launch(cut, {.name = "cut", .grid = grid, .block = dim3(THREADS)}, parameters, stream);
}

}  // namespace flashdelta::cuda
