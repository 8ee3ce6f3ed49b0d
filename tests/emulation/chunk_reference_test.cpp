// The chunk-by-chunk float64 against the token recurrence and its gradients (the reference backend).
#include "tests/emulation/chunk_reference.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <random>

namespace flashdelta::emulation {
namespace {

constexpr int K = 128, V = 64;

std::vector<double> normal(std::mt19937& random, std::size_t count, double scale) {
  std::normal_distribution<double> distribution;
  std::vector<double> x(count);
  for (double& y : x) y = scale * distribution(random);
  return x;
}

fd_tensor tensor(std::vector<double>& x) { return {x.data(), {}}; }

void expect_near(const std::vector<double>& got, const std::vector<double>& expected, const char* name) {
  ASSERT_EQ(got.size(), expected.size()) << name;
  double error = 0, norm = 0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    error += (got[i] - expected[i]) * (got[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  EXPECT_GT(norm, 0) << name;
  EXPECT_LE(error, 1e-20 * norm) << name;
}

TEST(ChunkReference, EqualsTheTokenRecurrenceAndItsGradients) {
  std::mt19937 random(7);
  HeadInputs h;
  h.tokens = 150;
  h.V = V;
  h.scale = 0.3;
  const auto tokens = static_cast<std::size_t>(h.tokens);
  h.q = normal(random, tokens * K, 0.1);
  h.k = normal(random, tokens * K, 0.09);
  h.v = normal(random, tokens * V, 1);
  h.do_ = normal(random, tokens * V, 1);
  h.state = normal(random, K * V, 1);
  h.dstate = normal(random, K * V, 1);
  for (std::size_t i = 0; i < tokens; ++i) {
    h.g.push_back(i % 5 == 0 ? -2.5 : -0.05);
    h.beta.push_back(static_cast<double>(i % 7) / 6);
  }
  const HeadReference got = chunk_reference(h);

  fd_problem p{};
  p.size = sizeof(p);
  p.B = p.H = p.HV = 1;
  p.T = h.tokens;
  p.K = K;
  p.V = V;
  p.scale = h.scale;
  p.dtype = p.gate_dtype = p.beta_dtype = p.initial_dtype = p.final_dtype = FD_FLOAT64;
  p.gate = FD_GATE_LOG;
  p.beta = FD_BETA_VALUE;
  p.backend = FD_BACKEND_REFERENCE;
  std::vector<double> o(got.o.size()), state(K * V), dstate(K * V), dq(tokens * K), dk(tokens * K), dv(tokens * V),
      dg(tokens), dbeta(tokens);
  fd_forward_args f{};
  f.size = sizeof(f);
  f.problem = &p;
  f.q = tensor(h.q), f.k = tensor(h.k), f.v = tensor(h.v), f.g = tensor(h.g), f.beta = tensor(h.beta);
  f.initial_state = tensor(h.state), f.o = tensor(o), f.final_state = tensor(state);
  std::size_t bytes = 0;
  ASSERT_EQ(fd_forward_workspace(&p, &bytes), FD_OK);
  std::vector<double> workspace(bytes / 8 + 64);
  void* aligned = reinterpret_cast<void*>((reinterpret_cast<std::uintptr_t>(workspace.data()) + 255) / 256 * 256);
  ASSERT_EQ(fd_forward(&f, aligned, bytes, nullptr), FD_OK) << fd_last_error();
  fd_backward_args b{};
  b.size = sizeof(b);
  b.problem = &p;
  b.q = f.q, b.k = f.k, b.v = f.v, b.g = f.g, b.beta = f.beta, b.initial_state = f.initial_state;
  b.do_ = tensor(h.do_), b.dfinal_state = tensor(h.dstate), b.dq = tensor(dq), b.dk = tensor(dk), b.dv = tensor(dv);
  b.dg = tensor(dg), b.dbeta = tensor(dbeta), b.dinitial_state = tensor(dstate);
  ASSERT_EQ(fd_backward_workspace(&p, &bytes), FD_OK);
  workspace.resize(bytes / 8 + 64);
  aligned = reinterpret_cast<void*>((reinterpret_cast<std::uintptr_t>(workspace.data()) + 255) / 256 * 256);
  ASSERT_EQ(fd_backward(&b, aligned, bytes, nullptr), FD_OK) << fd_last_error();

  std::vector<double> chunk_dv;
  for (const ChunkTiles& t : got.chunks) chunk_dv.insert(chunk_dv.end(), t.dv.begin(), t.dv.begin() + t.tokens * V);
  expect_near(got.o, o, "o");
  expect_near(got.state, state, "state");
  expect_near(got.dstate, dstate, "dstate");
  expect_near(got.dq, dq, "dq");
  expect_near(got.dk, dk, "dk");
  expect_near(chunk_dv, dv, "dv");
  expect_near(got.dg, dg, "dg");
  expect_near(got.dbeta, dbeta, "dbeta");
}

TEST(ChunkReference, TilesComeBackAsTheyWereWritten) {
  std::vector<std::uint8_t> tile(16384);
  std::vector<double> state(K * 192), back(K * 192);
  for (std::size_t i = 0; i < state.size(); ++i) state[i] = static_cast<double>(i % 251) - 100;
  for (const fd_dtype dtype : {FD_BFLOAT16, FD_FLOAT16}) {
    for (int first = 0; first < 192; first += 64) {
      write_state_tile(tile.data(), dtype, state, 192, first);
      read_state_tile(tile.data(), dtype, back, 192, first);
    }
    EXPECT_EQ(state, back);
  }
  // Row 9 (9 % 8 = 1), column 8: block 1 exchanged with block 0.
  std::vector<double> matrix(64 * 64);
  matrix[9 * 64 + 8] = 1;
  write_tile(tile.data(), FD_FLOAT16, matrix.data(), 64);
  EXPECT_EQ(tile[9 * 128 + 1], 0x3c);
}

}  // namespace
}  // namespace flashdelta::emulation
