// The kernel that cuts a call's sequences into the chunks, segments and pieces of each wave (tiling_sm90.hpp), on the
// device.
#pragma once

#include "backend.hpp"
#include "cuda/tiling_sm90.hpp"

namespace flashdelta::cuda {

// Waves of about `wave_tokens` tokens, of the same size. Pure.
Tiling make_tiling(const fd_problem&, int64_t wave_tokens);

// Fills the tables of all waves. Whatever the device says of the sequences, every entry lies inside the tensors and tables.
fd_status launch_cut(const Tiling&, const Sequences&, const Tables&, void* stream);

}  // namespace flashdelta::cuda
