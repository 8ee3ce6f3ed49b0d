// The CUDA backends against the reference: the decode step. Without a CUDA device every test is skipped, with the reason.
// "Small" in a name: worth running under compute-sanitizer (--gtest_filter=*Small*).
#include "tests/support/gpu.hpp"

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cstring>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "tests/support/compare.hpp"

namespace flashdelta::testing {
namespace {

class Cuda : public ::testing::Test {
 protected:
  void SetUp() override {
    const std::string reason = why_not(FD_BACKEND_CUDA, "cuda");
    if (!reason.empty()) GTEST_SKIP() << reason;
  }

  static Results on_gpu(const Case& c, const Data& d, How how = How::null_stream) {
    Gpu gpu(how);
    return step(c, d, {.backend = FD_BACKEND_CUDA, .remote = &gpu});
  }

  static void expect_right(const Case& c, std::uint64_t seed) {
    const Data d = make_data(c, seed);
    expect_close(c, d, on_gpu(c, d), step(c, d, reference), forward_limit);
  }
};

class CudaStepCase : public Cuda, public ::testing::WithParamInterface<Case> {};

TEST_P(CudaStepCase, SmallMatchesTheReference) { expect_right(GetParam(), 1); }

TEST_P(CudaStepCase, IsBitwiseTheSameAgainOnAStreamAndInAGraphWhoseInputsChange) {
  const Case& c = GetParam();
  const Data d = make_data(c, 2);
  const Results first = on_gpu(c, d);
  for (const How how : {How::null_stream, How::side_stream, How::graph, How::graph_changed}) {
    expect_same_bits(on_gpu(c, d, how), first);
  }
}

INSTANTIATE_TEST_SUITE_P(, CudaStepCase, ::testing::ValuesIn(step_cases()), case_name<::testing::TestParamInfo<Case>>);

// Every variant of the kernel: layouts, state types, head dims up to and between the powers of two, whole and partial value
// blocks, more tokens than are taken at once, vectors that may and may not be accessed whole.
TEST_F(Cuda, EveryVariantOfTheStepMatchesTheReference) {
  std::uint64_t seed = 0;
  for (const std::int64_t K : {64, 96, 128, 200, 256}) {
    for (const bool v_first : {false, true}) {
      for (const fd_dtype initial : {FD_FLOAT32, FD_BFLOAT16}) {
        for (const fd_dtype final : {FD_FLOAT32, FD_BFLOAT16}) {
          for (const std::int64_t T : {1, 4, 9}) {
            ++seed;
            Case c{.name = "variant", .lengths = {T, T}, .H = 1, .HV = 2, .K = K, .V = seed % 3 == 0 ? 72 : 136};
            c.initial_dtype = initial;
            c.final_dtype = final;
            c.v_first = v_first;
            c.pool = true;
            c.strided = seed % 2 == 0;
            c.l2norm = seed % 4 < 2;
            c.slots = seed % 5 == 0 ? T : 0;
            SCOPED_TRACE("K " + std::to_string(K) + ", T " + std::to_string(T) + ", seed " + std::to_string(seed));
            expect_right(c, seed);
          }
        }
      }
    }
  }
}

// The kernels for 128 keys: layouts, types, tokens at once and in turns, states after every token, one to several warps per
// block, sequences without tokens, vectors of q and k that may not be loaded whole.
TEST_F(Cuda, StepsOf128KeysMatchTheReference) {
  std::uint64_t seed = 0;
  for (const std::int64_t V : {32, 64, 96, 128}) {
    for (const bool v_first : {false, true}) {
      for (const fd_dtype initial : {FD_FLOAT32, FD_BFLOAT16}) {
        for (const fd_dtype final : {FD_FLOAT32, FD_BFLOAT16}) {
          for (const std::int64_t T : {0, 1, 2, 4, 9}) {
            ++seed;
            Case c{.name = "of 128 keys", .lengths = {T, T}, .H = 1, .HV = 2, .K = 128, .V = V};
            if (seed % 3 == 0) c.packed = true, c.lengths = {T, 0, 1, 5}, c.padding = 3;
            c.dtype = seed % 4 == 0 ? FD_FLOAT32 : seed % 4 == 1 ? FD_FLOAT16 : FD_BFLOAT16;
            c.initial_dtype = initial;
            c.final_dtype = final;
            c.v_first = v_first;
            c.pool = seed % 7 < 4;
            c.strided = seed % 11 == 0;
            c.l2norm = seed % 9 < 5;
            c.slots = c.pool && !c.packed && seed % 2 == 0 ? T : 0;
            SCOPED_TRACE("V " + std::to_string(V) + ", T " + std::to_string(T) + ", seed " + std::to_string(seed));
            expect_right(c, seed);
          }
        }
      }
    }
  }
}

// More warps than run at a time: blocks of several, prefetches.
TEST_F(Cuda, StepsOfManyHeadsMatchTheReference) {
  std::uint64_t seed = 0;
  for (const bool v_first : {false, true}) {
    for (const fd_dtype type : {FD_FLOAT32, FD_BFLOAT16}) {
      Case c{.name = "many heads", .lengths = std::vector<std::int64_t>(12, 2), .H = 18, .HV = 36, .K = 128, .V = 128};
      c.dtype = FD_BFLOAT16;
      c.initial_dtype = c.final_dtype = type;
      c.v_first = v_first;
      c.pool = true;
      SCOPED_TRACE("seed " + std::to_string(++seed));
      expect_right(c, seed);
    }
  }
}

TEST_F(Cuda, RandomStepsMatchTheReference) {
  std::mt19937_64 random(5);
  for (std::uint64_t seed = 0; seed < 200; ++seed) {
    const Case c = random_case(random, true);
    SCOPED_TRACE("seed " + std::to_string(seed) + ": " + c.name);
    expect_right(c, seed);
  }
}

TEST_F(Cuda, IsBitwiseTheSameTwoHundredTimes) {
  for (const Case& c : step_cases()) {
    SCOPED_TRACE(describe(c));
    const Data d = make_data(c, 4);
    const Results first = on_gpu(c, d);
    for (int i = 0; i < 200; ++i) expect_same_bits(on_gpu(c, d), first);
  }
}

TEST_F(Cuda, SequenceAloneEqualsSequenceInBatchBitwise) {
  const Case c{.name = "batch", .lengths = {2, 0, 1, 5}, .packed = true, .padding = 3, .H = 2, .HV = 4, .K = 64, .V = 40};
  const Data d = make_data(c, 3);
  const Array all = on_gpu(c, d).at("final_state").values;
  for (std::int64_t n = 0; n < c.N(); ++n) {
    const Array one = on_gpu(alone(c, n), alone(c, d, n)).at("final_state").values;
    for (std::size_t i = 0; i < one.x.size(); ++i) {
      ASSERT_EQ(one.x[i], all.x[static_cast<std::size_t>(n) * one.x.size() + i]) << "sequence " << n << ", element " << i;
    }
  }
}

// Bounds, indices and accepted counts that mean nothing. Rows outside the pool count as -1 and bounds are clamped, so that
// the call may write any row and any output, and nothing else.
TEST_F(Cuda, SmallGarbageBoundsAndIndicesWriteNowhereElse) {
  constexpr std::int64_t N = 4, T = 6, HV = 2, K = 64, V = 64, P = 3, S = 2;
  constexpr std::size_t guard = 4096, state_bytes = P * HV * K * V * sizeof(float), token_bytes = T * HV * V * sizeof(float);
  const auto extreme = [](int i) {
    const std::int64_t values[] = {-1,
                                   0,
                                   1,
                                   T + 1,
                                   P,
                                   std::numeric_limits<std::int64_t>::max(),
                                   std::numeric_limits<std::int64_t>::min(),
                                   std::int64_t{1} << 40,
                                   2,
                                   -7};
    return values[i % 10];
  };
  for (int round = 0; round < 20; ++round) {
    std::vector<std::int64_t> integers;
    for (int i = 0; i < 64; ++i) integers.push_back(extreme(i * (round + 1) + round));
    const DeviceMemory index(integers.size() * sizeof(std::int64_t)), tokens(token_bytes);
    const DeviceMemory o(token_bytes + 2 * guard), states(state_bytes + 2 * guard);
    check(cudaMemcpy(index.data(), integers.data(), integers.size() * sizeof(std::int64_t), cudaMemcpyHostToDevice), "copy");
    check(cudaMemset(tokens.data(), 0x3c, token_bytes), "memset");
    check(cudaMemset(o.data(), 0xff, token_bytes + 2 * guard), "memset");
    check(cudaMemset(states.data(), 0xff, state_bytes + 2 * guard), "memset");

    fd_problem p{};
    p.size = sizeof(p);
    p.B = 1, p.T = T, p.N = N, p.H = HV, p.HV = HV, p.K = K, p.V = V;
    p.device = FD_CUDA;
    p.initial_rows = p.final_rows = P;
    p.initial_slots = p.final_slots = S;
    fd_step_args args{};
    args.size = sizeof(args);
    args.problem = &p;
    args.q.data = args.k.data = args.v.data = tokens.data();
    args.o.data = o.data() + guard;
    args.initial_state.data = args.final_state.data = states.data() + guard;
    const auto* integer = reinterpret_cast<const std::int64_t*>(index.data());
    args.cu_seqlens = integer;
    args.initial_index.data = integer + 8;
    args.final_index.data = integer + 24;
    args.accepted = integer + 40;
    ASSERT_EQ(fd_step(&args, nullptr, 0, nullptr), FD_OK) << fd_last_error();
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess) << "round " << round;

    for (const auto& [memory, bytes] : {std::pair{&o, token_bytes}, std::pair{&states, state_bytes}}) {
      std::vector<unsigned char> seen(bytes + 2 * guard);
      check(cudaMemcpy(seen.data(), memory->data(), seen.size(), cudaMemcpyDeviceToHost), "copy");
      for (std::size_t i = 0; i < guard; ++i) {
        ASSERT_EQ(seen[i], 0xff);
        ASSERT_EQ(seen[bytes + guard + i], 0xff);
      }
    }
  }
}

}  // namespace
}  // namespace flashdelta::testing
