// Planning without any device: which backend serves a problem, and what the queries answer, over thousands of problems.
#include "plan.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.hpp"

namespace flashdelta {
namespace {

fd_problem small_problem() {
  fd_problem p{};
  p.size = sizeof p;
  p.B = 1;
  p.T = 64;
  p.H = 1;
  p.HV = 2;
  p.K = p.V = 128;
  return p;
}

std::size_t forward_workspace(const fd_problem& p) {
  std::size_t bytes = std::numeric_limits<std::size_t>::max();
  EXPECT_EQ(fd_forward_workspace(&p, &bytes), FD_OK) << fd_last_error();
  return bytes;
}

std::size_t backward_workspace(const fd_problem& p) {
  std::size_t bytes = std::numeric_limits<std::size_t>::max();
  EXPECT_EQ(fd_backward_workspace(&p, &bytes), FD_OK) << fd_last_error();
  return bytes;
}

TEST(Plan, ForwardWorkspaceOfTheCpuDoesNotDependOnTheTokens) {
  fd_problem p = small_problem();
  p.H = 16;
  p.HV = 32;
  p.threads = 2;
  const std::size_t bytes = forward_workspace(p);
  for (const std::int64_t T : {0, 1, 63, 65, 8192, 1 << 20}) {
    p.T = T;
    EXPECT_EQ(forward_workspace(p), bytes) << T;
  }
}

TEST(Plan, BackendsThatNeverSplitASequenceTakeEveryContextParallel) {
  for (const fd_backend wanted : {FD_BACKEND_REFERENCE, FD_BACKEND_CPU}) {
    for (const fd_context_parallel context : {FD_CONTEXT_AUTO, FD_CONTEXT_ON, FD_CONTEXT_OFF}) {
      fd_problem p = small_problem();
      p.backend = wanted;
      p.context_parallel = context;
      fd_backend backend = FD_BACKEND_AUTO;
      EXPECT_EQ(fd_forward_backend(&p, &backend), FD_OK) << fd_last_error();
      EXPECT_EQ(backend, wanted);
    }
  }
}

TEST(Plan, OffsetsPastTwoToThe31Fit) {
  fd_problem p = small_problem();
  p.T = INT64_C(1) << 24;
  p.H = p.HV = 64;  // 2^37 elements
  p.threads = 2;
  EXPECT_GT(forward_workspace(p), 0u);
  EXPECT_LT(forward_workspace(p), std::size_t{1} << 32);
  EXPECT_LT(backward_workspace(p), std::size_t{1} << 40);
  p.B = (INT64_C(1) << 31) - 1;
  p.T = 1;
  p.H = p.HV = 1;
  EXPECT_GE(forward_workspace(p), 0u);
}

TEST(Plan, MoreThreadsNeverNeedLessWorkspace) {
  fd_problem p = small_problem();
  p.HV = p.H = 64;
  std::size_t before = 0;
  for (const int threads : {1, 2, 3, 7, 16, 64}) {
    p.threads = threads;
    EXPECT_GE(forward_workspace(p), before);
    before = forward_workspace(p);
  }
}

TEST(Plan, AnswersEveryProblemWithABackendOrAReason) {
  std::mt19937_64 random(20);
  const std::int64_t sizes[] = {-1, 0, 1, 2, 3, 4, 7, 8, 12, 16, 64, 100, 128, 256, 264, 512, 520, 4096};
  const auto size = [&] { return sizes[std::uniform_int_distribution<std::size_t>(0, std::size(sizes) - 1)(random)]; };
  const auto number = [&](std::int32_t low, std::int32_t high) { return std::uniform_int_distribution(low, high)(random); };
  int served = 0;
  for (int i = 0; i < 20000; ++i) {
    fd_problem p = small_problem();
    p.B = number(0, 3) == 0 ? size() : 1;
    p.T = size();
    p.N = number(0, 3) == 0 ? size() : 0;
    p.H = number(1, 4);
    p.HV = p.H * number(1, 4) + (number(0, 9) == 0 ? 1 : 0);
    p.K = number(0, 1) == 0 ? 128 : size();
    p.V = number(0, 1) == 0 ? 128 : size();
    p.dtype = number(0, 4);
    p.gate = number(0, 3);
    p.beta = number(0, 2);
    p.device = number(0, 9) == 0 ? FD_CUDA : FD_CPU;
    p.threads = number(0, 4);
    struct Query {
      fd_status (*workspace)(const fd_problem*, std::size_t*);
      fd_status (*backend)(const fd_problem*, fd_backend*);
    };
    for (const auto& [workspace, backend_of] :
         {Query{fd_forward_workspace, fd_forward_backend}, Query{fd_backward_workspace, fd_backward_backend},
          Query{fd_step_workspace, fd_step_backend}}) {
      std::size_t bytes = std::numeric_limits<std::size_t>::max(), again = 0;
      fd_backend backend = FD_BACKEND_AUTO;
      const fd_status status = workspace(&p, &bytes);
      ASSERT_EQ(backend_of(&p, &backend), status);
      if (status != FD_OK) {
        ASSERT_TRUE(status == FD_INVALID || status == FD_UNSUPPORTED);
        ASSERT_GT(std::string(fd_last_error()).size(), 20u);
        continue;
      }
      ++served;
      ASSERT_NE(backend, FD_BACKEND_AUTO);
      ASSERT_EQ(workspace(&p, &again), FD_OK);
      ASSERT_EQ(bytes, again);
      ASSERT_LT(bytes, std::size_t{1} << 40);
      ASSERT_TRUE(p.dtype != FD_FLOAT64 || backend == FD_BACKEND_REFERENCE);
    }
  }
  EXPECT_GT(served, 5000);
}

TEST(Plan, DefaultsAreResolvedOnce) {
  fd_problem p = small_problem();
  p.B = 3;
  const fd_problem n = normalise(Operation::forward, p);
  EXPECT_EQ(n.N, 3);
  EXPECT_EQ(n.initial_rows, 3);
  EXPECT_EQ(n.final_rows, 3);
  EXPECT_DOUBLE_EQ(n.scale * n.scale * 128, 1);
  EXPECT_EQ(n.l2norm_eps, 1e-6);
  EXPECT_EQ(n.context_bound, 0x1p-20);
  EXPECT_EQ(n.workspace_limit, int64_t{640} << 20);
  EXPECT_GE(n.threads, 1);
  p.context_bound = -1;
  EXPECT_EQ(normalise(Operation::forward, p).context_bound, 0);
}

TEST(Plan, WhatWasNeverVerifiedServesOnlyWhoAsksForItByName) {
  Backend unverified = cpu_backend;
  unverified.verified = false;
  const Backend* const candidates[] = {&unverified, &reference_backend};
  fd_problem p = normalise(Operation::forward, small_problem());
  EXPECT_EQ(choose_backend(Operation::forward, p, candidates).id, FD_BACKEND_REFERENCE);
  p.backend = FD_BACKEND_CPU;
  EXPECT_EQ(choose_backend(Operation::forward, p, candidates).id, FD_BACKEND_CPU);
  p.backend = FD_BACKEND_AUTO;
  try {
    choose_backend(Operation::forward, p, std::span(candidates, 1));
    FAIL() << "it was chosen";
  } catch (const Refusal& refusal) {
    EXPECT_EQ(refusal.status, FD_UNSUPPORTED);
    EXPECT_NE(refusal.message.find("must be asked for by name"), std::string::npos) << refusal.message;
  }
}

}  // namespace
}  // namespace flashdelta
