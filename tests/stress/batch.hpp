// One random batch: what is called, on which shapes and options.
#pragma once

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "backend.hpp"
#include "flashdelta/flashdelta.h"

namespace flashdelta::stress {

enum class Keys { unit, correlated, raw };              // raw: normal numbers, normalised by the call (qk_l2norm)
enum class Gates { none, typical, strong, projected };  // projected: raw gates with A_log and dt_bias

struct Batch {
  Operation operation;
  std::vector<std::int64_t> lengths;  // tokens of each sequence
  bool packed;                        // not packed: all lengths are the same
  std::int64_t padding;               // packed: rows past the last sequence
  std::int64_t H, HV, V;
  Keys keys;
  Gates gates;
  bool strided;         // q, k and v are views of one projection
  bool pool, in_place;  // states are rows of pools, some sequences have none
  bool initial_state, final_state, checkpoints;
  bool saved;  // the backward has what the forward saved
  fd_problem problem;

  std::int64_t N() const { return static_cast<std::int64_t>(lengths.size()); }
  std::int64_t first_token(std::int64_t n) const;
  std::string describe() const;
};

// Batch number `index` of a seed. `work` bounds tokens times value heads.
Batch draw(Operation, std::uint64_t seed, std::uint64_t index, std::int64_t work, fd_device);

}  // namespace flashdelta::stress
