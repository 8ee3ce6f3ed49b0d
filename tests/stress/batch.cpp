#include "tests/stress/batch.hpp"

#include <algorithm>
#include <numeric>
#include <sstream>

#include "dtype.hpp"

namespace flashdelta::stress {
namespace {

constexpr std::int64_t LONGEST = 3000, K = 128;

// Query/key and value heads of models and of their parts on several cards.
constexpr std::int64_t HEADS[][2] = {{16, 16}, {32, 32}, {16, 32}, {16, 48}, {8, 24}, {16, 64}, {8, 32},
                                     {4, 16},  {2, 8},   {8, 16},  {4, 8},   {2, 4},  {1, 1}};

class Random {
 public:
  explicit Random(std::uint64_t seed) : engine_(seed) {}
  std::int64_t below(std::int64_t n) { return static_cast<std::int64_t>(engine_() % static_cast<std::uint64_t>(n)); }
  bool one_in(std::int64_t n) { return below(n) == 0; }
  template <typename T>
  T pick(std::initializer_list<T> values) {
    return values.begin()[below(static_cast<std::int64_t>(values.size()))];
  }

 private:
  std::mt19937_64 engine_;
};

std::int64_t draw_length(Random& random, std::int64_t longest) {
  const std::int64_t length = random.pick<std::int64_t>(
      {0, random.below(66), 64 * random.below(5), random.below(400), random.below(LONGEST + 1), random.below(LONGEST + 1)});
  return std::min(length, longest);
}

}  // namespace

std::int64_t Batch::first_token(std::int64_t n) const {
  return std::accumulate(lengths.begin(), lengths.begin() + n, std::int64_t{0});
}

std::string Batch::describe() const {
  std::ostringstream s;
  s << (operation == Operation::forward    ? "forward"
        : operation == Operation::backward ? "backward"
                                           : "step")
    << ", H " << H << ", HV " << HV << ", V " << V << ", " << name_of(problem.dtype) << ", states "
    << name_of(problem.initial_dtype) << (packed ? ", packed lengths" : ", lengths");
  for (const std::int64_t length : lengths) s << ' ' << length;
  s << ", padding " << padding << ", keys " << static_cast<int>(keys) << ", gates " << static_cast<int>(gates) << ", beta "
    << problem.beta << ", context_parallel " << problem.context_parallel << ", workspace_limit " << problem.workspace_limit;
  const std::pair<const char*, bool> options[] = {{", strided", strided},
                                                  {", pool", pool},
                                                  {", in place", in_place},
                                                  {", initial state", initial_state},
                                                  {", final state", final_state},
                                                  {", checkpoints", checkpoints},
                                                  {", saved", saved},
                                                  {", v_first", problem.state_v_first != 0}};
  for (const auto& [name, on] : options) s << (on ? name : "");
  return s.str();
}

Batch draw(Operation operation, std::uint64_t seed, std::uint64_t index, std::int64_t work, fd_device device) {
  Random random(seed * 0x9e3779b97f4a7c15u + index * 3 + static_cast<std::uint64_t>(operation));
  const bool step = operation == Operation::step, backward = operation == Operation::backward;
  Batch b{};
  b.operation = operation;
  const auto& heads = HEADS[random.below(std::size(HEADS))];
  b.H = heads[0], b.HV = heads[1];
  b.V = random.one_in(4) ? random.pick<std::int64_t>({64, 192, 256}) : 128;
  b.packed = !random.one_in(4);
  const std::int64_t tokens = std::max<std::int64_t>(work / (b.HV * b.V / 128 + 1), 1);
  if (step) {
    const std::int64_t T = 1 + random.below(4), most = std::max<std::int64_t>(1, std::min<std::int64_t>(256, tokens / 128));
    b.lengths.assign(static_cast<std::size_t>(1 + random.below(most)), T);
    if (b.packed) {
      for (std::int64_t& length : b.lengths) length = random.below(T + 1);
    }
  } else {
    const std::int64_t same = draw_length(random, tokens / 4);
    const std::int64_t most = std::clamp<std::int64_t>(work / (32 * b.HV), 1, random.one_in(3) ? 40 : 8);
    std::int64_t left = tokens;
    for (std::int64_t n = 1 + random.below(most); n > 0 && left > 0; --n) {
      b.lengths.push_back(b.packed ? draw_length(random, left) : same);
      left -= std::max<std::int64_t>(b.lengths.back(), 1);
    }
  }
  b.padding = b.packed && random.one_in(2) ? random.below(step ? 4 : 130) : 0;
  b.keys = random.pick({Keys::unit, Keys::unit, Keys::correlated, Keys::raw});
  b.gates = random.pick({Gates::typical, Gates::typical, Gates::strong, Gates::projected, Gates::none});
  // Strided q, k, v share one buffer, hence one kind of noise; v has no reason to resemble the keys, and what a state that
  // already holds it writes is all cancellation.
  b.strided = random.one_in(3) && b.keys != Keys::correlated;
  b.pool = random.one_in(2);
  b.initial_state = !random.one_in(5);
  b.final_state = !random.one_in(6);
  b.in_place = b.pool && b.initial_state && b.final_state && !backward && random.one_in(2);
  b.saved = backward && !random.one_in(3);
  b.checkpoints = operation == Operation::forward && random.one_in(4);

  fd_problem& p = b.problem;
  p.size = sizeof(p);
  p.B = b.packed ? 1 : b.N();
  p.N = b.packed ? b.N() : 0;
  p.T = b.packed ? b.first_token(b.N()) + b.padding : b.lengths[0];
  p.H = b.H, p.HV = b.HV, p.K = K, p.V = b.V;
  p.device = device;
  p.backend = device == FD_CPU ? FD_BACKEND_CPU : step ? FD_BACKEND_CUDA : FD_BACKEND_SM90;
  p.dtype = random.one_in(3) ? FD_FLOAT16 : FD_BFLOAT16;
  p.gate_dtype = p.beta_dtype = p.A_log_dtype = p.dt_bias_dtype = random.one_in(3) ? FD_BFLOAT16 : FD_FLOAT32;
  p.initial_dtype = p.final_dtype = p.checkpoint_dtype = random.one_in(3) ? FD_BFLOAT16 : FD_FLOAT32;
  p.cu_seqlens_dtype = p.index_dtype = random.one_in(2) ? FD_INT32 : FD_INT64;
  p.gate = b.gates == Gates::none ? FD_GATE_NONE : b.gates == Gates::projected ? FD_GATE_RAW : FD_GATE_LOG;
  p.beta = random.pick({FD_BETA_VALUE, FD_BETA_VALUE, FD_BETA_LOGIT, FD_BETA_ONE});
  p.qk_l2norm = b.keys == Keys::raw ? 1 : 0;
  p.state_v_first = random.one_in(2) ? 1 : 0;
  p.context_parallel = random.one_in(2) ? FD_CONTEXT_OFF : FD_CONTEXT_AUTO;
  p.scale = random.one_in(4) ? 0.5 : 0;
  if (backward) p.workspace_limit = random.pick<std::int64_t>({0, 0, 1, std::int64_t{1} << 25});
  const std::int64_t rows = b.pool ? b.N() + 3 : b.N();
  if (b.pool && b.initial_state) p.initial_rows = rows;
  if (b.pool && b.final_state && !backward) p.final_rows = rows;
  if (b.checkpoints) {
    p.checkpoint_interval = 64 * (1 + random.below(4));
    p.checkpoint_slots = 2 + random.below(4);
    p.checkpoint_rows = b.N() * p.checkpoint_slots;
  }
  return b;
}

}  // namespace flashdelta::stress
