// What the kernel that walks states without outputs is given, and how to launch it: states of all chunks for the backward,
// saved states, transitions of segments for context parallelism.
#pragma once

#include <cuda.h>

#include "backend.hpp"
#include "cuda/tiling_sm90.hpp"

namespace flashdelta::cuda {

struct StatesParameters {
  CUtensorMap k, v;
  Sequences sequences;
  Scratch scratch;  // vectors and t are read; s and r, unless null, are written
  const Run* runs;  // [run_count]
  int run_count;
  int heads;
  // Blocks of 64 rows of S^T: the value blocks; after them, two blocks of the transition, transposed: rows of the identity
  // at the start, without values.
  int row_blocks;
  // A run starts from the call's initial state at its sequence's first chunk, elsewhere from its row of `saved`.
  Pool initial;
  int state_v_first;
  const float* saved;  // [saved_rows][HV][V][K]
  float* save;         // likewise, or null: where the states before every segment but the sequence's first go
  // Where the transitions of runs go that neither begin nor end their sequence, as the gradient's rows are multiplied by
  // them: a row of the state's is a column. The other runs have none then.
  float* transitions = nullptr;           // [run_count][HV][V + K][K]: the rows after V
  const int* gradient_windows = nullptr;  // [run_count][HV]: with `transitions`; where it is not -1 there is none either
  // Set to zero, if not null: the counts behind Scratch::stored and Scratch::next_item.
  unsigned* counts = nullptr;
  int counts_size = 0;
  // The kernel before makes nothing that this one reads, and what came before that one has ended when this one starts: both
  // run at once, and this one ends last.
  int beside_earlier = 0;
};

fd_status launch_states(const StatesParameters&, bool bfloat16, int sm_count, void* stream);

}  // namespace flashdelta::cuda
