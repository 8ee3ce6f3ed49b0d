// Tensor maps: what Hopper's copy engine must know of a tensor.
#pragma once

#include <cuda.h>

#include <string>

#include "backend.hpp"

namespace flashdelta::cuda {

// Tensor map of a [B, T, heads, columns] tensor of 16-bit elements, for tiles of 64 tokens x 64 columns. `name`: operation
// and tensor, for messages. The tensor must be aligned to 16 bytes, with strides that are positive multiples of 16 bytes
// (FD_UNSUPPORTED).
//   not packed: dimensions (column, token, head, batch, -); tokens end at T.
//   packed:     ragged, dimensions (column, x, head, y, wrap). Tokens of [begin, end) are x = RAGGED - (end - begin) + i,
//               y = end, wrap = RAGGED: strides are chosen so that address = (x + y - RAGGED) rows modulo 2^64, and x ends
//               at RAGGED, so that what lies past the sequence's end is filled with zeros and never stored.
fd_status tensor_map(CUtensorMap& map, const std::string& name, const fd_tensor& tensor, const fd_problem& p, bool packed,
                     int64_t heads, int64_t columns);

}  // namespace flashdelta::cuda
