// How the Hopper kernels cut a call: chunks of 64 tokens, segments of 2,048, waves of segments; and the scratch memory in
// which kernels that follow each other leave the tiles of a wave's chunks.
#pragma once

#include "cuda/inputs.cuh"

namespace flashdelta::cuda {

constexpr int KEYS = 128;      // K
constexpr int VALUES = 64;     // values of one state warpgroup: a value block
constexpr int CHUNK = 64;      // tokens
constexpr int SEGMENT = 2048;  // tokens between saved states
constexpr int SEGMENT_CHUNKS = SEGMENT / CHUNK;
constexpr int RAGGED = 1 << 30;  // see tensor_map_sm90.hpp

// Positions: tokens of all sequences on one axis, packed ones as they are, batch entry b from b * T on. A segment, with all
// of its chunks, belongs to the wave in which it starts. A wave's chunks have slots in scratch memory: slot of chunk c of
// sequence n = floor((position - wave begin) / 64) + n - (first sequence of the wave), all different, and in order.
struct Tiling {
  int64_t positions;                               // in all
  int64_t wave_tokens;                             // a multiple of SEGMENT, or all positions in one wave
  int waves;                                       // >= 1
  int chunk_slots, segment_slots, sequence_slots;  // of a wave: what it may need at most
};

// A chunk as its slot's entry in the table says.
struct ChunkPlace {
  int sequence;  // -1: no chunk has this slot
  int chunk;     // of the sequence
  int begin;     // first token, in its batch entry
  int tokens;    // 1 to 64
};

// Consecutive chunks of one sequence, for a block that walks them.
struct Run {
  int sequence;             // -1: nothing
  int first_chunk, chunks;  // of the sequence; an empty sequence has a run without chunks
  int slot;                 // of the first chunk
};

// Tables on the device, one after another for each wave.
struct Tables {
  ChunkPlace* chunks;  // [waves, chunk_slots]
  Run* segments;       // [waves, segment_slots]: a segment each, those of a sequence next to each other
  Run* pieces;         // [waves, sequence_slots]: a sequence's chunks in the wave
};

// Row of the state before token `position` in a tensor of saved states: for every segment but a sequence's first.
__host__ __device__ inline int64_t saved_row(int64_t position) { return position / SEGMENT; }
__host__ __device__ inline int64_t saved_rows(int64_t positions) { return (positions + SEGMENT - 1) / SEGMENT; }

// What a chunk's tokens bring besides q, k, v. `gam`: log2 of the decay from the chunk's start, inclusive; tokens past the
// sequence's end have beta 0 and no decay.
struct ChunkVectors {
  float gam[CHUNK];
  float rise[CHUNK];   // e^gam; the last: decay of the chunk
  float end[CHUNK];    // e^(gam_C - gam)
  float beta[CHUNK];   // write strength
  float key[CHUNK];    // |k|^-1 with l2 norm, else 1
  float query[CHUNK];  // |q|^-1 with l2 norm, else 1; without the scale
};

// Scratch memory of a wave. A tile is the image of 64 rows of 128 bytes in shared memory, swizzled by 128 bytes: 64 x 64
// elements of 16 bits; copies to and from shared memory are plain bulk copies.
constexpr int TILE = CHUNK * 128;     // bytes
constexpr int STATE_TILE = 2 * TILE;  // bytes of 64 values x 128 keys: two tiles of 64 values x 64 keys

struct Scratch {
  int value_heads, value_blocks;
  ChunkVectors* vectors;  // [slot, value head]
  uint8_t* t;             // [slot, value head] tiles: T transposed, row j and column i: Gam_ij T0_ij
  uint8_t* p;             // [slot, value head] tiles: P, row i and column j: scale Gam_ij q_i.k_j
  uint8_t* s;             // [slot, value head, block] state tiles: S before the chunk, transposed
  uint8_t* ds;            // [slot, value head, block] state tiles: gradient of S after the chunk, transposed
  uint8_t* r;             // [slot, value head, block] tiles: R, tokens x values
  uint8_t* dv;            // [slot, value head, block] tiles: gradient of v, tokens x values; null: only in the call's dv

  // [slot, value head]: of the tiles of ds and of dv, how many the chain has stored. While it still walks the chunks, the
  // gradients take up those it is done with. Zero before the chain; so is next_item, the gradients' queue.
  unsigned* stored;
  unsigned* next_item;
  // The queue of the states' runs where the states do not have the SMs to themselves. Zero after `prepare`.
  unsigned* next_run = nullptr;

  __host__ __device__ int64_t head(int slot, int value_head) const {
    return static_cast<int64_t>(slot) * value_heads + value_head;
  }
  __host__ __device__ int64_t block(int slot, int value_head, int value_block) const {
    return head(slot, value_head) * value_blocks + value_block;
  }
};

}  // namespace flashdelta::cuda
