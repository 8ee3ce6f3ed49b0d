#include <cstdio>
#include <flashdelta/flashdelta.hpp>

int main() {
  std::vector<float> q(128 * 2 * 64, 0.1F), k(q), v(128 * 4 * 64, 1.0F), g(128 * 4, -0.01F), beta(128 * 4, 0.5F),
      o(v.size());
  auto problem = flashdelta::make<fd_problem>();
  problem.B = 1, problem.T = 128, problem.H = 2, problem.HV = 4, problem.K = 64, problem.V = 64;
  problem.gate = FD_GATE_LOG, problem.beta = FD_BETA_VALUE, problem.qk_l2norm = 1;
  auto args = flashdelta::make<fd_forward_args>();
  args.problem = &problem;
  args.q = flashdelta::tensor(q), args.k = flashdelta::tensor(k), args.v = flashdelta::tensor(v);
  args.g = flashdelta::tensor(g), args.beta = flashdelta::tensor(beta), args.o = flashdelta::tensor(o);
  flashdelta::Workspace workspace;
  const auto done = flashdelta::forward(args, workspace);
  std::printf("%s o[last] = %f\n", done ? "ok" : done.message().c_str(), o.back());
  return done ? 0 : 1;
}
