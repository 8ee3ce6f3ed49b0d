// Cases of the emulated Hopper forward, and how far from the reference its results may be.
#pragma once

#include <cstdint>
#include <vector>

#include "tests/sm90_cases.hpp"

namespace flashdelta::testing {

// Relative L2 error of one (sequence, head) beyond the rounding of what is written: as in gpu_forward_test.cpp.
inline constexpr double BFLOAT16_LIMIT = 0.004, FLOAT16_LIMIT = 0.001;

inline double limit(const Case& c) { return c.dtype == FD_BFLOAT16 ? BFLOAT16_LIMIT : FLOAT16_LIMIT; }

// Shapes and options of the Hopper forward; sequences of more than 64 tokens have `more` on top.
inline std::vector<Case> emulated_cases(std::int64_t more) {
  std::vector<Case> list;
  const auto add = [&](const char* name, Case c, auto change) {
    c.name = name;
    change(c);
    for (std::int64_t& length : c.lengths) length += length > 64 ? more : 0;
    list.push_back(c);
  };
  const Case edges = sm90_case({130, 0, 1, 63, 65}), two = sm90_case({100, 70});
  add("Edges", edges, [](Case& c) { c.padding = 5, c.H = 2; });
  add("Batch", sm90_case({70, 70}, false), [](Case& c) { c.index_dtype = FD_INT32; });
  add("NoTokens", sm90_case({0, 0}, false), [](Case&) {});
  add("Long", sm90_case({600}), [](Case& c) { c.HV = 1; });
  add("CorrelatedKeys", sm90_case({200}), [](Case& c) { c.keys = Keys::correlated, c.strengths = Strengths::full; });
  add("IdenticalKeys", sm90_case({200}), [](Case& c) { c.keys = Keys::identical, c.strengths = Strengths::full; });
  add("StrongDecay", two, [](Case& c) { c.gates = Gates::strong; });
  add("MixedDecay", two, [](Case& c) { c.gates = Gates::mixed, c.HV = 4; });
  add("NoGatesNoStrengths", two, [](Case& c) { c.gates = Gates::none, c.strengths = Strengths::none; });
  add("Float16", two, [](Case& c) { c.dtype = FD_FLOAT16; });
  add("RawGatesLogitsNorm", two,
      [](Case& c) { c.gates = Gates::raw, c.strengths = Strengths::logit, c.l2norm = true, c.padding = 70; });
  add("RawGatesWithoutBiasNegativeEigenvalues", two, [](Case& c) {
    c.gates = Gates::raw, c.strengths = Strengths::logit, c.dt_bias = false, c.l2norm = c.allow_neg_eigval = true;
  });
  add("BFloat16Gates", two, [](Case& c) { c.gate_dtype = c.beta_dtype = FD_BFLOAT16; });
  add("Float16GatesAndStrengthsAtTheEdges", two,
      [](Case& c) { c.gate_dtype = c.beta_dtype = FD_FLOAT16, c.strengths = Strengths::edges, c.scale = 0.5; });
  add("ValueFirst", two, [](Case& c) { c.v_first = true; });
  add("BFloat16States", two, [](Case& c) { c.initial_dtype = c.final_dtype = FD_BFLOAT16; });
  add("BFloat16StatesValueFirst", two, [](Case& c) { c.initial_dtype = c.final_dtype = FD_BFLOAT16, c.v_first = true; });
  add("Float16States", two, [](Case& c) { c.dtype = c.initial_dtype = c.final_dtype = FD_FLOAT16; });
  add("NoStates", two, [](Case& c) { c.initial_state = c.final_state = false; });
  add("Pools", edges, [](Case& c) { c.pool = true, c.index_dtype = FD_INT32; });
  add("PoolInPlaceValueFirst", edges, [](Case& c) { c.pool = c.in_place = c.v_first = true; });
  add("OneValueBlock", two, [](Case& c) { c.V = 64; });
  add("ThreeValueBlocks", two, [](Case& c) { c.V = 192, c.padding = 3; });
  add("FourValueBlocks", two, [](Case& c) { c.V = 256, c.padding = 3; });
  add("Checkpoints", sm90_case({64, 200, 63, 128}), [](Case& c) { c.checkpoint_interval = 64; });
  add("SparseCheckpointsValueFirst", sm90_case({200, 200}, false),
      [](Case& c) { c.checkpoint_interval = 128, c.v_first = true, c.final_dtype = FD_BFLOAT16; });
  add("ManySequencesAndHeads", sm90_case({5, 0, 70, 1, 64, 0, 90, 3}),
      [](Case& c) { c.H = 2, c.HV = 6, c.padding = 9, c.l2norm = true; });
  return list;
}

}  // namespace flashdelta::testing
