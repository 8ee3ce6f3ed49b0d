// Float64 of everything the Hopper kernels leave in scratch memory, for one sequence and one value head: chunk by chunk, by
// the formulas of docs/math.md. Slow and simple. And tiles of scratch memory from and to doubles.
#pragma once

#include <cstdint>
#include <vector>

#include "flashdelta/flashdelta.h"

namespace flashdelta::emulation {

// What one value head sees. K = 128. Matrices by rows.
struct HeadInputs {
  int tokens = 0, V = 0;
  double scale = 0;
  std::vector<double> q, k;    // [tokens, K], normalised if the call asks for it
  std::vector<double> v;       // [tokens, V]
  std::vector<double> g;       // [tokens] natural log of the decay
  std::vector<double> beta;    // [tokens] write strength
  std::vector<double> state;   // [K, V] before the first token
  std::vector<double> do_;     // [tokens, V]
  std::vector<double> dstate;  // [K, V] gradient of the state after the last token
};

// One chunk: 64 rows, those past the last token as zero tokens without decay. C = 64.
struct ChunkTiles {
  int tokens = 0;
  std::vector<double> gam, rise, end;  // [C] natural log of the decay from the chunk's start; e^gam; e^(gam_C - gam)
  std::vector<double> T;               // [C, C] Gam .* (I + strict_lower(K K^T diag(beta)))^-1
  std::vector<double> P;               // [C, C] scale Gam .* (Q K^T)
  std::vector<double> S;               // [K, V] state before the chunk
  std::vector<double> R;               // [C, V]
  std::vector<double> dS1;             // [K, V] gradient of the state after the chunk
  std::vector<double> dv;              // [C, V]
  std::vector<double> dV;              // [C, V] gradient of V' = beta .* R
  std::vector<double> dbeta_part;      // [C] <dV'_i, R_i>
};

struct HeadReference {
  std::vector<ChunkTiles> chunks;
  std::vector<double> state;      // [K, V] after the last token
  std::vector<double> dstate;     // [K, V] gradient of the state before the first
  std::vector<double> o;          // [tokens, V]
  std::vector<double> dq, dk;     // [tokens, K] this value head's part, of the normalised rows
  std::vector<double> dg, dbeta;  // [tokens] of the log decay and of the write strength
};

HeadReference chunk_reference(const HeadInputs&);

// A tile in scratch memory (tiling_sm90.hpp): 64 x 64 elements of `dtype`. `matrix` points to the first element; its rows
// are `stride` doubles apart. Transposed: element (row, column) of the tile is (column, row) of the matrix.
void write_tile(std::uint8_t* tile, fd_dtype dtype, const double* matrix, int stride, bool transposed = false);
void read_tile(const std::uint8_t* tile, fd_dtype dtype, double* matrix, int stride, bool transposed = false);

// A state tile, 64 values x 128 keys, from and to the values `first`.. of a [K, V] matrix.
void write_state_tile(std::uint8_t* tile, fd_dtype dtype, const std::vector<double>& state, int V, int first);
void read_state_tile(const std::uint8_t* tile, fd_dtype dtype, std::vector<double>& state, int V, int first);

}  // namespace flashdelta::emulation
