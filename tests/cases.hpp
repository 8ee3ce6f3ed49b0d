// The one list of shapes and options that tests and benchmarks run.
#pragma once

#include <cstdint>
#include <numeric>
#include <string>
#include <vector>

#include "flashdelta/flashdelta.h"

namespace flashdelta::testing {

enum class Keys {
  random,      // normal, then normalised (raw normal with l2norm)
  correlated,  // one direction plus a tenth of noise, normalised
  identical    // all tokens of a head the same unit vector
};

enum class Gates {
  none,     // absent
  typical,  // logsigmoid(normal) / 16, every fourth head 0: what the benchmarks use
  zero,     // given, all 0
  strong,   // -20 per token
  mixed,    // every fourth head 0, else each token's decay anywhere between 0 and -30
  raw       // raw projections with A_log and dt_bias
};

enum class Strengths {
  none,     // absent
  typical,  // sigmoid(normal)
  zero,     // given, all 0
  full,     // given, all 1
  twice,    // given, all 2
  edges,    // 0, 1 or between, token by token
  logit     // logits
};

struct Case {
  std::string name = {};
  std::vector<std::int64_t> lengths = {};  // tokens of each sequence; not packed: all the same
  bool packed = false;
  std::int64_t padding = 0;  // packed: rows past cu_seqlens[N], NaN in every input
  std::int64_t H = 1, HV = 1, K = 16, V = 16;

  Keys keys = Keys::random;
  Gates gates = Gates::typical;
  Strengths strengths = Strengths::typical;
  bool dt_bias = true;  // with Gates::raw
  bool l2norm = false;
  bool allow_neg_eigval = false;
  double scale = 0;

  fd_dtype dtype = FD_FLOAT32;
  fd_dtype gate_dtype = FD_FLOAT32;  // also A_log, dt_bias
  fd_dtype beta_dtype = FD_FLOAT32;
  fd_dtype initial_dtype = FD_FLOAT32, final_dtype = FD_FLOAT32;
  fd_index_dtype index_dtype = FD_INT64;  // also cu_seqlens

  bool initial_state = true, final_state = true;
  bool v_first = false;
  bool pool = false;      // states are rows of pools, in mixed order, one of four sequences without a row
  bool in_place = false;  // pool: one for reading and writing
  std::int64_t checkpoint_interval = 0;
  std::int64_t slots = 0;  // step: columns of both indices; initial states by `accepted`

  bool strided = false;  // views with gaps, gates token-last, bases off alignment
  bool do_ = true, dfinal_state = true;

  std::int64_t N() const { return static_cast<std::int64_t>(lengths.size()); }
  std::int64_t B() const { return packed ? 1 : N(); }
  std::int64_t T() const {
    return packed ? std::accumulate(lengths.begin(), lengths.end(), padding) : (lengths.empty() ? 0 : lengths[0]);
  }
  // Data on which fp32 sums lose more than usual: limits are ten times those of random data.
  bool hard() const {
    return keys != Keys::random || gates == Gates::strong || gates == Gates::mixed || strengths == Strengths::twice;
  }
};

inline std::string head_dims_name(std::int64_t K, std::int64_t V) {
  std::string name("K");
  return name.append(std::to_string(K)).append("_V").append(std::to_string(V));
}

// Whole sequences: forward and backward.
inline std::vector<Case> cases() {
  std::vector<Case> list = {
      {.name = "every_edge_packed",
       .lengths = {0, 1, 15, 16, 17, 31, 32, 33, 0, 63, 64, 65, 127, 128, 200, 0},
       .packed = true,
       .H = 2,
       .HV = 4,
       .K = 24,
       .V = 40},
      {.name = "many_empty_sequences",
       .lengths = {0, 0, 0, 5, 0, 0, 0, 0, 70, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0},
       .packed = true,
       .padding = 7,
       .pool = true},
      {.name = "only_empty_sequences", .lengths = {0, 0, 0}, .packed = true, .padding = 3},
      {.name = "no_tokens", .lengths = {0, 0}, .HV = 2},
      {.name = "padding_past_the_last_sequence",
       .lengths = {3, 64, 20},
       .packed = true,
       .padding = 90,
       .HV = 2,
       .index_dtype = FD_INT32},
      {.name = "one_long_head", .lengths = {700}, .K = 64, .V = 64},
      {.name = "raw_gates_and_logits",
       .lengths = {100, 0, 33},
       .packed = true,
       .padding = 5,
       .H = 2,
       .HV = 4,
       .gates = Gates::raw,
       .strengths = Strengths::logit,
       .l2norm = true},
      {.name = "raw_gates_without_bias_negative_eigenvalues",
       .lengths = {90, 90},
       .HV = 3,
       .gates = Gates::raw,
       .strengths = Strengths::logit,
       .dt_bias = false,
       .l2norm = true,
       .allow_neg_eigval = true},
      {.name = "own_scale", .lengths = {70}, .scale = 0.7},
      {.name = "no_states", .lengths = {70, 70}, .initial_state = false, .final_state = false, .dfinal_state = false},
      {.name = "gradient_of_the_final_state_alone", .lengths = {70}, .HV = 2, .do_ = false},
      {.name = "checkpoints",
       .lengths = {64, 200, 63, 0, 300},
       .packed = true,
       .HV = 2,
       .index_dtype = FD_INT32,
       .checkpoint_interval = 64},
      {.name = "sparse_checkpoints_v_first", .lengths = {300, 300}, .v_first = true, .checkpoint_interval = 128},
      {.name = "pools", .lengths = {40, 65, 7, 0, 1}, .packed = true, .HV = 2, .index_dtype = FD_INT32, .pool = true},
      {.name = "pools_in_place", .lengths = {40, 65, 0, 7, 1}, .packed = true, .HV = 2, .pool = true, .in_place = true},
      {.name = "strided_views", .lengths = {70, 70}, .H = 2, .HV = 4, .strided = true},
      {.name = "strided_pools_v_first",
       .lengths = {70, 0, 33},
       .packed = true,
       .padding = 4,
       .H = 2,
       .HV = 2,
       .v_first = true,
       .pool = true,
       .strided = true},
      {.name = "bfloat16", .lengths = {70, 150}, .packed = true, .H = 2, .HV = 4, .K = 64, .V = 64, .dtype = FD_BFLOAT16},
      {.name = "bfloat16_all",
       .lengths = {130, 70},
       .packed = true,
       .H = 2,
       .HV = 4,
       .gates = Gates::raw,
       .strengths = Strengths::logit,
       .l2norm = true,
       .dtype = FD_BFLOAT16,
       .gate_dtype = FD_BFLOAT16,
       .beta_dtype = FD_BFLOAT16,
       .initial_dtype = FD_BFLOAT16,
       .final_dtype = FD_BFLOAT16,
       .v_first = true,
       .strided = true},
      {.name = "float16",
       .lengths = {130, 130},
       .HV = 2,
       .dtype = FD_FLOAT16,
       .gate_dtype = FD_FLOAT16,
       .beta_dtype = FD_FLOAT16},
  };
  for (const std::int64_t length : {1, 16, 63, 64, 65, 128}) {
    list.push_back({.name = "tokens_" + std::to_string(length), .lengths = {length, length}, .H = 2, .HV = 4});
  }
  for (const std::int64_t group : {2, 3, 4, 5, 6, 7, 8}) {
    list.push_back({.name = "group_of_" + std::to_string(group), .lengths = {40, 40}, .H = 2, .HV = 2 * group});
  }
  const std::int64_t head_dims[][2] = {{8, 8},   {8, 512},  {16, 24},   {24, 8},   {24, 136},
                                       {64, 16}, {128, 64}, {128, 128}, {256, 24}, {256, 512}};
  for (const auto& [K, V] : head_dims) {
    const std::string name = head_dims_name(K, V);
    list.push_back({.name = name, .lengths = {67}, .K = K, .V = V});
    list.push_back({.name = name + "_v_first", .lengths = {17}, .HV = 2, .K = K, .V = V, .l2norm = true, .v_first = true});
  }
  const Case data{.lengths = {200, 65}, .packed = true, .H = 2, .HV = 4, .K = 64, .V = 64};
  const std::pair<const char*, Gates> gates[] = {
      {"no_gate", Gates::none}, {"gate_0", Gates::zero}, {"gate_minus_20", Gates::strong}, {"mixed_gates", Gates::mixed}};
  for (const auto& [name, kind] : gates) {
    list.push_back(data);
    list.back().name = name;
    list.back().gates = kind;
  }
  const std::pair<const char*, Strengths> strengths[] = {{"no_beta", Strengths::none},
                                                         {"beta_0", Strengths::zero},
                                                         {"beta_1", Strengths::full},
                                                         {"beta_2", Strengths::twice},
                                                         {"beta_0_or_1_or_between", Strengths::edges}};
  for (const auto& [name, kind] : strengths) {
    list.push_back(data);
    list.back().name = name;
    list.back().strengths = kind;
  }
  const std::pair<const char*, Keys> keys[] = {{"correlated_keys", Keys::correlated}, {"identical_keys", Keys::identical}};
  for (const auto& [name, kind] : keys) {
    for (const Gates gate : {Gates::typical, Gates::zero, Gates::strong}) {
      list.push_back(data);
      list.back().name = std::string(name) + (gate == Gates::typical ? ""
                                              : gate == Gates::zero  ? "_gate_0"
                                                                     : "_gate_minus_20");
      list.back().keys = kind;
      list.back().gates = gate;
      list.back().strengths = Strengths::full;
    }
  }
  return list;
}

// A few tokens per sequence: step.
inline std::vector<Case> step_cases() {
  std::vector<Case> list = {
      {.name = "one_token", .lengths = {1, 1, 1, 1, 1}, .H = 2, .HV = 4, .K = 32, .V = 40},
      {.name = "one_token_no_state_in", .lengths = {1, 1}, .HV = 2, .initial_state = false},
      {.name = "one_token_no_state_out", .lengths = {1, 1}, .HV = 2, .final_state = false},
      {.name = "one_token_pool_in_place",
       .lengths = {1, 1, 1, 1, 1, 1},
       .H = 2,
       .HV = 4,
       .K = 64,
       .V = 64,
       .index_dtype = FD_INT32,
       .pool = true,
       .in_place = true},
      // States of 1 MiB and more that go elsewhere are written past the caches.
      {.name = "one_token_large_state", .lengths = {1, 1}, .H = 4, .HV = 8, .K = 128, .V = 128},
      {.name = "two_tokens_large_state", .lengths = {2, 0}, .packed = true, .HV = 4, .K = 256, .V = 264, .v_first = true},
      {.name = "one_token_model",
       .lengths = {1, 1, 1},
       .H = 2,
       .HV = 4,
       .K = 128,
       .V = 128,
       .gates = Gates::raw,
       .strengths = Strengths::logit,
       .l2norm = true,
       .dtype = FD_BFLOAT16,
       .gate_dtype = FD_BFLOAT16,
       .beta_dtype = FD_BFLOAT16,
       .v_first = true,
       .pool = true,
       .in_place = true},
      {.name = "bfloat16_states",
       .lengths = {1, 1, 1},
       .HV = 2,
       .K = 64,
       .V = 64,
       .dtype = FD_BFLOAT16,
       .initial_dtype = FD_BFLOAT16,
       .final_dtype = FD_BFLOAT16,
       .pool = true},
      {.name = "float16", .lengths = {3, 3}, .HV = 2, .dtype = FD_FLOAT16, .gate_dtype = FD_FLOAT16},
      {.name = "several_tokens_packed",
       .lengths = {1, 4, 0, 2, 8},
       .packed = true,
       .padding = 3,
       .H = 2,
       .HV = 4,
       .pool = true},
      {.name = "strided", .lengths = {2, 2, 2}, .H = 2, .HV = 4, .v_first = true, .pool = true, .strided = true},
      {.name = "state_per_token", .lengths = {4, 4, 4, 4}, .HV = 2, .pool = true, .slots = 4},
      {.name = "state_per_token_in_place_packed",
       .lengths = {1, 3, 0, 5},
       .packed = true,
       .padding = 2,
       .HV = 2,
       .index_dtype = FD_INT32,
       .v_first = true,
       .pool = true,
       .in_place = true,
       .slots = 4},
      {.name = "negative_eigenvalues",
       .lengths = {2, 2},
       .HV = 2,
       .strengths = Strengths::logit,
       .l2norm = true,
       .allow_neg_eigval = true},
      {.name = "gate_minus_20", .lengths = {3, 3}, .HV = 4, .gates = Gates::strong},
      {.name = "beta_0", .lengths = {3, 3}, .HV = 4, .strengths = Strengths::zero},
      {.name = "no_gate_no_beta", .lengths = {3, 3}, .HV = 4, .gates = Gates::none, .strengths = Strengths::none},
      {.name = "no_tokens", .lengths = {0, 0}, .HV = 2},
  };
  const std::int64_t head_dims[][2] = {{8, 8}, {8, 512}, {24, 136}, {128, 64}, {256, 24}, {256, 512}};
  for (const auto& [K, V] : head_dims) {
    const std::string name = head_dims_name(K, V);
    list.push_back({.name = name, .lengths = {1, 1}, .HV = 2, .K = K, .V = V});
    list.push_back({.name = name + "_v_first", .lengths = {2}, .HV = 2, .K = K, .V = V, .v_first = true});
  }
  return list;
}

// Small enough to differentiate numerically, element by element.
inline std::vector<Case> finite_difference_cases() {
  std::vector<Case> list = {
      {.name = "plain", .lengths = {5, 5}, .H = 2, .HV = 4, .K = 3, .V = 4},
      {.name = "packed", .lengths = {0, 4, 1, 0, 6}, .packed = true, .padding = 2, .H = 1, .HV = 3, .K = 4, .V = 2},
      {.name = "l2norm", .lengths = {6}, .H = 1, .HV = 2, .K = 5, .V = 3, .l2norm = true},
      {.name = "raw_gates_and_logits",
       .lengths = {3, 4},
       .packed = true,
       .H = 2,
       .HV = 4,
       .K = 3,
       .V = 3,
       .gates = Gates::raw,
       .strengths = Strengths::logit,
       .l2norm = true},
      {.name = "negative_eigenvalues_without_bias",
       .lengths = {6},
       .HV = 2,
       .K = 3,
       .V = 4,
       .gates = Gates::raw,
       .strengths = Strengths::logit,
       .dt_bias = false,
       .allow_neg_eigval = true},
      {.name = "beta_0", .lengths = {5}, .HV = 2, .K = 3, .V = 4, .strengths = Strengths::zero},
      {.name = "no_gate", .lengths = {5}, .HV = 2, .K = 3, .V = 4, .gates = Gates::none, .v_first = true},
      {.name = "no_beta", .lengths = {5}, .HV = 2, .K = 3, .V = 4, .strengths = Strengths::none, .scale = 0.3},
      {.name = "output_alone", .lengths = {5}, .HV = 2, .K = 3, .V = 4, .dfinal_state = false},
      {.name = "final_state_alone", .lengths = {5}, .HV = 2, .K = 3, .V = 4, .do_ = false},
      {.name = "pool", .lengths = {2, 3, 0, 2, 1}, .packed = true, .HV = 2, .K = 3, .V = 2, .v_first = true, .pool = true},
      {.name = "strided", .lengths = {5, 5}, .H = 2, .HV = 2, .K = 4, .V = 3, .strided = true},
  };
  for (Case& c : list) {
    c.dtype = c.gate_dtype = c.beta_dtype = c.initial_dtype = c.final_dtype = FD_FLOAT64;
  }
  return list;
}

}  // namespace flashdelta::testing
