// Cases for the Hopper kernels, on a GPU and in the emulation.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "tests/cases.hpp"

namespace flashdelta::testing {

inline Case sm90_case(std::vector<std::int64_t> lengths, bool packed = true) {
  Case c;
  c.lengths = std::move(lengths);
  c.packed = packed;
  c.H = 1;
  c.HV = 2;
  c.K = c.V = 128;
  c.dtype = FD_BFLOAT16;
  return c;
}

// Relative L2 error of a gradient of one (sequence, head) beyond the rounding of what is written: 16-bit operands, fp32
// sums.
inline double sm90_backward_limit(const Case& c) { return c.dtype == FD_BFLOAT16 ? 0.008 : 0.002; }

inline std::vector<Case> sm90_backward_cases() {
  std::vector<Case> list;
  const auto add = [&](const char* name, Case c, auto change) {
    c.name = name;
    change(c);
    list.push_back(c);
  };
  const Case edges = sm90_case({130, 0, 1, 63, 65}), two = sm90_case({100, 70});
  add("OneChunk", sm90_case({64}), [](Case& c) { c.HV = 1; });
  add("Edges", edges, [](Case& c) { c.padding = 5, c.H = 2; });
  add("Batch", sm90_case({70, 70}, false), [](Case& c) { c.index_dtype = FD_INT32; });
  add("NoTokens", sm90_case({0, 0}, false), [](Case&) {});
  add("Long", sm90_case({600}), [](Case& c) { c.HV = 1; });
  add("GroupOfFour", sm90_case({90}), [](Case& c) { c.H = 2, c.HV = 8; });
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
  add("StrengthsAtTheEdges", two, [](Case& c) { c.strengths = Strengths::edges, c.scale = 0.5; });
  add("ValueFirst", two, [](Case& c) { c.v_first = true; });
  add("BFloat16StatesValueFirst", two, [](Case& c) { c.initial_dtype = c.final_dtype = FD_BFLOAT16, c.v_first = true; });
  add("NoStates", two, [](Case& c) { c.initial_state = c.dfinal_state = false; });
  add("FinalStateAlone", two, [](Case& c) { c.do_ = false; });
  add("Pool", edges, [](Case& c) { c.pool = true, c.index_dtype = FD_INT32; });
  add("OneValueBlock", two, [](Case& c) { c.V = 64; });
  add("ThreeValueBlocks", two, [](Case& c) { c.V = 192, c.padding = 3; });
  return list;
}

}  // namespace flashdelta::testing
