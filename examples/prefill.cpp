// Prefill and decode: a prompt in one call, then token by token with the carried state; the same outputs as one pass over
// all.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <flashdelta/flashdelta.hpp>
#include <random>
#include <vector>

namespace fd = flashdelta;

constexpr int64_t kPrompt = 500, kDecoded = 12, kTokens = kPrompt + kDecoded;
constexpr int64_t kHeads = 2, kValueHeads = 4, kKeyDim = 64, kValueDim = 64;

// [tokens, heads, dim] in one vector, so that the rows of token t start at t * heads * dim.
struct Sequence {
  std::vector<float> q, k, v, g, beta;
};

Sequence random_sequence() {
  std::mt19937 engine(1);
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<float> uniform;
  Sequence s{std::vector<float>(kTokens * kHeads * kKeyDim), std::vector<float>(kTokens * kHeads * kKeyDim),
             std::vector<float>(kTokens * kValueHeads * kValueDim), std::vector<float>(kTokens * kValueHeads),
             std::vector<float>(kTokens * kValueHeads)};
  for (auto* x : {&s.q, &s.k, &s.v}) std::ranges::generate(*x, [&] { return normal(engine); });
  std::ranges::generate(s.g, [&] { return -0.1F * uniform(engine); });
  std::ranges::generate(s.beta, [&] { return uniform(engine); });
  return s;
}

fd_problem problem_of(int64_t tokens) {
  auto p = fd::make<fd_problem>();
  p.B = 1, p.T = tokens, p.H = kHeads, p.HV = kValueHeads, p.K = kKeyDim, p.V = kValueDim;
  p.gate = FD_GATE_LOG;
  p.beta = FD_BETA_VALUE;
  p.qk_l2norm = 1;
  return p;
}

// Tokens from `first` on, as arguments of either operation; the state is updated in place.
template <typename Args>
Args args_of(const Sequence& s, int64_t first, const fd_problem& p, std::vector<float>& o, std::vector<float>& state) {
  const auto from = [first](const std::vector<float>& x, int64_t row) {
    return fd::tensor(std::span(x).subspan(first * row));
  };
  auto a = fd::make<Args>();
  a.problem = &p;
  a.q = from(s.q, kHeads * kKeyDim);
  a.k = from(s.k, kHeads * kKeyDim);
  a.v = from(s.v, kValueHeads * kValueDim);
  a.g = from(s.g, kValueHeads);
  a.beta = from(s.beta, kValueHeads);
  a.o = from(o, kValueHeads * kValueDim);
  a.initial_state = a.final_state = fd::tensor(state);
  return a;
}

bool check(const fd::Done& done) {
  if (!done) std::fprintf(stderr, "%s: %s\n", fd_status_name(done.status()), done.message().c_str());
  return static_cast<bool>(done);
}

int main() {
  const Sequence s = random_sequence();
  const auto state_size = static_cast<size_t>(kValueHeads * kKeyDim * kValueDim);
  std::vector<float> once(s.v.size()), parts(s.v.size()), state(state_size), carried(state_size);
  fd::Workspace workspace;

  const fd_problem all = problem_of(kTokens), prompt = problem_of(kPrompt), token = problem_of(1);
  if (!check(fd::forward(args_of<fd_forward_args>(s, 0, all, once, state), workspace))) return 1;
  if (!check(fd::forward(args_of<fd_forward_args>(s, 0, prompt, parts, carried), workspace))) return 1;
  for (int64_t t = kPrompt; t < kTokens; ++t) {
    if (!check(fd::step(args_of<fd_step_args>(s, t, token, parts, carried), workspace))) return 1;
  }

  double difference = 0, norm = 0;
  for (size_t i = 0; i < once.size(); ++i) {
    difference += std::pow(static_cast<double>(once[i]) - parts[i], 2);
    norm += std::pow(static_cast<double>(once[i]), 2);
  }
  const double error = std::sqrt(difference / norm);
  std::printf("prefill of %lld tokens + %lld steps against one pass: relative difference %.1e\n",
              static_cast<long long>(kPrompt), static_cast<long long>(kDecoded), error);
  return error < 1e-5 ? 0 : 1;
}
