// The memory and arguments of one batch, and what may be said of its results without knowing them.
#pragma once

#include <functional>
#include <random>
#include <string>
#include <vector>

#include "tests/stress/batch.hpp"
#include "tests/stress/memory.hpp"

namespace flashdelta::stress {

// A tensor that a call wrote.
struct Output {
  std::string name;
  Buffer buffer;
  fd_dtype type;
  std::int64_t heads, width;       // elements of one token or state: heads x width; a [HV] tensor: 1 x HV
  std::vector<std::int64_t> rows;  // states: the rows written; tokens: empty
};

// Everything one run of an operation writes. `state` is where states are updated in place.
struct Run {
  std::vector<Output> outputs;
  Buffer workspace, state;
  fd_forward_args forward{};
  fd_backward_args backward{};
  fd_step_args step{};
};

class Call {
 public:
  // Fills the inputs in the arena.
  Call(Machine&, Arena&, Noise&, const Batch&, std::uint64_t seed);

  // Takes memory for one run and says what it will write.
  Run prepare();
  // Enqueues it.
  fd_status enqueue(Run&);

  // Sequence n of a packed forward batch by itself: enqueues it, and counts where it differs from `run`.
  fd_status enqueue_alone(const Run&, std::int64_t n, unsigned counter);

  // The status, and on the host what the backend makes of the same inputs: `mirror` is a copy of the arena before the run.
  fd_status run_on_host(const Run&, std::vector<unsigned char>& mirror, fd_backend) const;

  // In a copy of the arena: changes the last bit of half of the elements of q, k, v, do and the states; of fp32 states the
  // last that bf16 keeps.
  void move_inputs(std::vector<unsigned char>& mirror, std::uint64_t seed) const;

  const Batch& batch() const { return b_; }
  const Buffer& initial_states() const { return initial_; }

 private:
  template <typename Args>
  void inputs(Args&, Run&) const;
  Buffer integers(const std::vector<std::int64_t>&);
  Output& output(Run&, const char* name, fd_dtype, std::int64_t tokens, std::int64_t heads, std::int64_t width);
  fd_tensor states(Run&, const char* name, fd_dtype, const Buffer&, std::vector<std::int64_t> rows);
  std::size_t state_bytes(fd_dtype type) const;

  Machine& machine_;
  Arena& arena_;
  const Batch& b_;
  fd_problem problem_;  // `b_`'s, with a place of its own
  fd_tensor q_{}, k_{}, v_{}, g_{}, beta_{}, A_log_{}, dt_bias_{}, do_{}, dfinal_{};
  Buffer cu_seqlens_, initial_, initial_index_, final_index_, checkpoint_index_;
  std::vector<std::int64_t> rows_, checkpoint_rows_;  // row of each sequence in the pools, or -1
  Buffer saved_;
  Run filling_;  // the forward that leaves `saved_`
};

}  // namespace flashdelta::stress
