// Every check of a call that the host can make, and the normal form of a call that passed. All refusals are made here, in
// plan.cpp (no backend fits) and, for what only a backend can know, in the backends.
#pragma once

#include <sstream>
#include <string>

#include "backend.hpp"

namespace flashdelta {

// A call that is refused, caught at the C entry points (api.cpp).
struct Refusal {
  fd_status status;
  std::string message;
};

template <typename... Parts>
[[noreturn]] void refuse(fd_status status, const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw Refusal{status, message.str()};
}

// Copies a growable struct of any version: what the caller's lacks reads as zero, what ours lacks must be zero.
fd_problem read(const fd_problem*);
fd_forward_args read(const fd_forward_args*);
fd_backward_args read(const fd_backward_args*);
fd_step_args read(const fd_step_args*);

// Checks sizes and options and resolves defaults: N becomes the number of sequences, rows the rows of each state tensor,
// threads at least 1, and 1 in a forked child; scale, l2norm_eps, context_bound (0: exact) and workspace_limit the numbers
// to use.
fd_problem normalise(Operation, fd_problem);

// Memory of a call that is not a tensor: workspace, saved.
struct Buffer {
  const char* name;
  const void* data;
  std::size_t bytes;
  bool written;
};

// Checks tensors against the normalised problem and against each other and makes every stride explicit. On the CPU also
// what cu_seqlens and indices hold. `args.problem` must point to the normalised problem; `packed`: its N was not 0 before.
void check(fd_forward_args& args, bool packed, const Buffer& saved, const Buffer& workspace);
void check(fd_backward_args& args, bool packed, const Buffer& saved, const Buffer& workspace);
void check(fd_step_args& args, bool packed, const Buffer& workspace);

}  // namespace flashdelta
