#include "tests/emulation/wave.hpp"

#include <algorithm>

#include "check.hpp"
#include "tests/support/call.hpp"

namespace flashdelta::emulation {

using testing::Case;
using testing::Data;

namespace {

constexpr int C = cuda::CHUNK;
constexpr double L2NORM_EPS = 1e-6;  // the default

std::size_t slots_of(const Case& c) { return static_cast<std::size_t>((c.B() * c.T() + C - 1) / C + c.N()); }
std::size_t bytes(const Case& c, std::size_t each, bool per_block) {
  const auto heads = slots_of(c) * static_cast<std::size_t>(c.HV);
  return each * (per_block ? heads * static_cast<std::size_t>(c.V / cuda::VALUES) : heads);
}

const std::function<fd_status(const fd_forward_args&)>* body_of_call;

fd_status normal_call(const fd_forward_args* call, void*, std::size_t, void*) try {
  fd_forward_args args = read(call);
  const fd_problem given = read(args.problem), problem = normalise(Operation::forward, given);
  args.problem = &problem;
  check(args, given.N > 0, {"saved", nullptr, 0, true}, {"workspace", nullptr, 0, true});
  return (*body_of_call)(args);
} catch (const Refusal& refusal) {
  return fail(refusal.status, refusal.message);
}

}  // namespace

Wave::Wave(const Case& c)
    : chunks(slots_of(c), cuda::ChunkPlace{-1, 0, 0, 0}),
      vectors(bytes(c, sizeof(cuda::ChunkVectors), false)),
      t(bytes(c, cuda::TILE, false)),
      p(bytes(c, cuda::TILE, false)),
      s(bytes(c, cuda::STATE_TILE, true)),
      r(bytes(c, cuda::TILE, true)),
      scratch{} {
  std::int64_t position = 0;
  for (std::int64_t n = 0; n < c.N(); ++n) {
    const std::int64_t length = c.lengths[static_cast<std::size_t>(n)];
    first_slot.push_back(static_cast<int>(position / C + n));
    for (std::int64_t done = 0; done < length; done += C) {
      const std::int64_t chunk = done / C, begin = (c.packed ? position : 0) + done;
      chunks.at(static_cast<std::size_t>(first_slot.back() + chunk)) = {
          static_cast<int>(n), static_cast<int>(chunk), static_cast<int>(begin),
          static_cast<int>(std::min<std::int64_t>(C, length - done))};
    }
    position += length;
  }
  scratch.value_heads = static_cast<int>(c.HV);
  scratch.value_blocks = static_cast<int>(c.V / cuda::VALUES);
  scratch.vectors = reinterpret_cast<cuda::ChunkVectors*>(vectors.data());
  scratch.t = t.data();
  scratch.p = p.data();
  scratch.s = s.data();
  scratch.r = r.data();
}

bool Wave::guards_intact() const {
  return vectors.guards_intact() && t.guards_intact() && p.guards_intact() && s.guards_intact() && r.guards_intact();
}

bool same_bytes(const testing::Memory& a, const testing::Memory& b) {
  return std::equal(a.data(), a.data() + a.size(), b.data(), b.data() + b.size());
}

bool poison(const void* from, std::int64_t bytes) {
  const auto* first = static_cast<const std::uint8_t*>(from);
  return std::all_of(first, first + bytes, [](std::uint8_t x) { return x == 0xff; });
}

void with_call(const Case& c, const Data& d, const std::function<fd_status(const fd_forward_args&)>& body) {
  body_of_call = &body;
  static_cast<void>(testing::forward(c, d, {.backend = FD_BACKEND_REFERENCE, .forward = normal_call}));
}

double inverse_norm(const testing::Array& rows, std::int64_t token, std::int64_t head) {
  const std::int64_t columns = rows.inner(3);
  const double* row = rows.x.data() + (token * rows.shape[2] + head) * columns;
  double squares = L2NORM_EPS;
  for (std::int64_t i = 0; i < columns; ++i) squares += row[i] * row[i];
  return 1 / std::sqrt(squares);
}

HeadInputs head_inputs(const Case& c, const Data& d, std::int64_t n, std::int64_t value_head) {
  HeadInputs h;
  h.tokens = static_cast<int>(c.lengths[static_cast<std::size_t>(n)]);
  h.V = static_cast<int>(c.V);
  h.scale = c.scale == 0 ? 1 / std::sqrt(static_cast<double>(c.K)) : c.scale;
  const std::int64_t first = d.first_token(c, n), key_head = value_head / (c.HV / c.H);
  const auto rows = [&](const testing::Array& a, std::int64_t head, bool norm) {
    const std::int64_t heads = a.shape[2], columns = a.inner(3);
    std::vector<double> x;
    for (std::int64_t t = first; t < first + h.tokens; ++t) {
      const double factor = norm ? inverse_norm(a, t, head) : 1;
      for (std::int64_t i = 0; i < columns; ++i)
        x.push_back(factor * a.x[static_cast<std::size_t>((t * heads + head) * columns + i)]);
    }
    return x;
  };
  h.q = rows(d.q, key_head, c.l2norm);
  h.k = rows(d.k, key_head, c.l2norm);
  h.v = rows(d.v, value_head, false);
  h.do_ = rows(d.do_, value_head, false);
  h.g = rows(d.g, value_head, false);
  h.beta = rows(d.beta, value_head, false);
  const auto head = static_cast<std::size_t>(value_head);
  for (double& x : h.g) {
    if (c.gates != testing::Gates::raw) break;
    const double y = x + (c.dt_bias ? d.dt_bias.x[head] : 0);
    x = -std::exp(d.A_log.x[head]) * (std::max(y, 0.0) + std::log1p(std::exp(-std::abs(y))));
  }
  for (double& x : h.beta) {
    if (c.strengths == testing::Strengths::none) x = 1;
    if (c.strengths == testing::Strengths::logit) x = (c.allow_neg_eigval ? 2 : 1) / (1 + std::exp(-x));
  }
  h.state.resize(static_cast<std::size_t>(c.K * c.V));
  h.dstate = h.state;
  const auto state = [&](const testing::Array& a, std::vector<double>& to) {
    const double* from = a.x.data() + (n * c.HV + value_head) * c.K * c.V;
    for (std::int64_t k = 0; k < c.K; ++k) {
      for (std::int64_t v = 0; v < c.V; ++v)
        to[static_cast<std::size_t>(k * c.V + v)] = from[c.v_first ? v * c.K + k : k * c.V + v];
    }
  };
  if (c.initial_state) state(d.initial_state, h.state);
  if (c.dfinal_state) state(d.dfinal_state, h.dstate);
  return h;
}

}  // namespace flashdelta::emulation
