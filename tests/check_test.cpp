// Wrong calls: each is refused with its message, and a refused call touches no output.
#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "flashdelta/flashdelta.h"

namespace {

enum class Operation { forward, backward, step };

// A valid packed call of each operation, small, with every tensor present; a test breaks one thing.
struct Call {
  static constexpr std::int64_t T = 70, N = 2, H = 2, HV = 4, K = 8, V = 16, slots = 2, rows = 6, checkpoint_slots = 1;
  static constexpr float poison = -12345.0f;

  fd_problem problem{};
  fd_forward_args forward{};
  fd_backward_args backward{};
  fd_step_args step{};
  std::vector<std::int64_t> cu_seqlens{0, 66, 70}, initial_index{0, 1, 2, 3}, final_index{2, 3, 4, 5},
      checkpoint_index{4, -1};
  std::vector<std::int64_t> accepted{1, 2};
  std::vector<float> q = input(T * H * K), k = input(T * H * K), v = input(T * HV * V), g = input(T * HV),
                     beta = input(T * HV);
  std::vector<float> A_log = input(HV), dt_bias = input(HV), initial = input(rows * HV * K * V), do_ = input(T * HV * V);
  std::vector<float> dfinal = input(N * HV * K * V);
  std::vector<float> o = output(T * HV * V), final_state = output(rows * HV * K * V),
                     checkpoints = output(rows * HV * K * V);
  std::vector<float> dq = output(T * H * K), dk = output(T * H * K), dv = output(T * HV * V), dg = output(T * HV);
  std::vector<float> dbeta = output(T * HV), dA_log = output(HV), ddt_bias = output(HV), dinitial = output(N * HV * K * V);
  std::vector<unsigned char> scratch;
  unsigned char* workspace = nullptr;
  std::size_t workspace_bytes = 0;
  void* stream = nullptr;
  bool null_args = false;

  explicit Call(Operation operation) {
    problem.size = sizeof problem;
    problem.B = 1;
    problem.T = T;
    problem.N = N;
    problem.H = H;
    problem.HV = HV;
    problem.K = K;
    problem.V = V;
    problem.gate = FD_GATE_RAW;
    problem.beta = FD_BETA_LOGIT;
    problem.backend = FD_BACKEND_REFERENCE;
    problem.initial_rows = problem.final_rows = rows;
    if (operation == Operation::step) problem.initial_slots = problem.final_slots = slots;
    if (operation == Operation::forward) {
      problem.checkpoint_rows = rows;
      problem.checkpoint_slots = checkpoint_slots;
      problem.checkpoint_interval = 64;
    }
    const auto inputs = [this](auto& a) {
      a.size = sizeof a;
      a.problem = &problem;
      a.q.data = q.data();
      a.k.data = k.data();
      a.v.data = v.data();
      a.g.data = g.data();
      a.beta.data = beta.data();
      a.A_log.data = A_log.data();
      a.dt_bias.data = dt_bias.data();
      a.cu_seqlens = cu_seqlens.data();
      a.initial_state.data = initial.data();
      a.initial_index.data = initial_index.data();
    };
    inputs(forward);
    inputs(backward);
    inputs(step);
    forward.o.data = step.o.data = o.data();
    forward.final_state.data = step.final_state.data = final_state.data();
    forward.final_index.data = step.final_index.data = final_index.data();
    forward.checkpoints.data = checkpoints.data();
    forward.checkpoint_index.data = checkpoint_index.data();
    step.accepted = accepted.data();
    backward.do_.data = do_.data();
    backward.dfinal_state.data = dfinal.data();
    backward.dq.data = dq.data();
    backward.dk.data = dk.data();
    backward.dv.data = dv.data();
    backward.dg.data = dg.data();
    backward.dbeta.data = dbeta.data();
    backward.dA_log.data = dA_log.data();
    backward.ddt_bias.data = ddt_bias.data();
    backward.dinitial_state.data = dinitial.data();
    std::size_t bytes = 0;
    query(operation, bytes);
    workspace_bytes = bytes;
    scratch.resize(bytes + 512);
    const auto address = reinterpret_cast<std::uintptr_t>(scratch.data());
    workspace = scratch.data() + (256 - address % 256) % 256;
  }

  fd_status query(Operation operation, std::size_t& bytes) const {
    switch (operation) {
      case Operation::forward: return fd_forward_workspace(&problem, &bytes);
      case Operation::backward: return fd_backward_workspace(&problem, &bytes);
      default: return fd_step_workspace(&problem, &bytes);
    }
  }

  fd_status run(Operation operation) {
    switch (operation) {
      case Operation::forward: return fd_forward(null_args ? nullptr : &forward, workspace, workspace_bytes, stream);
      case Operation::backward: return fd_backward(null_args ? nullptr : &backward, workspace, workspace_bytes, stream);
      default: return fd_step(null_args ? nullptr : &step, workspace, workspace_bytes, stream);
    }
  }

  bool outputs_untouched() const {
    for (const auto* each : {&o, &final_state, &checkpoints, &dq, &dk, &dv, &dg, &dbeta, &dA_log, &ddt_bias, &dinitial}) {
      for (const float x : *each) {
        if (x != poison) return false;
      }
    }
    return true;
  }

  static std::vector<float> input(std::int64_t count) {
    std::vector<float> x(static_cast<std::size_t>(count));
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = 0.1f * std::sin(static_cast<float>(i));
    return x;
  }
  static std::vector<float> output(std::int64_t count) {
    return std::vector<float>(static_cast<std::size_t>(count), poison);
  }
};

struct Wrong {
  const char* what;
  Operation operation;
  std::function<void(Call&)> change;
  fd_status status;
  const char* message;
};

constexpr auto forward = Operation::forward, backward = Operation::backward, step = Operation::step;
constexpr double infinity = std::numeric_limits<double>::infinity();

const Wrong wrong_calls[] = {
    // Structs.
    {"no args", forward, [](Call& c) { c.null_args = true; }, FD_INVALID, "fd_forward: args is null"},
    {"no args", backward, [](Call& c) { c.null_args = true; }, FD_INVALID, "fd_backward: args is null"},
    {"no args", step, [](Call& c) { c.null_args = true; }, FD_INVALID, "fd_step: args is null"},
    {"no problem", forward, [](Call& c) { c.forward.problem = nullptr; }, FD_INVALID, "problem is null"},
    {"size of the problem not set", forward, [](Call& c) { c.problem.size = 0; }, FD_INVALID, "problem.size is 0; must be"},
    {"size of the args absurd", step, [](Call& c) { c.step.size = 1 << 20; }, FD_INVALID, "args.size is 1048576; must be"},
    // Dimensions.
    {"negative T", forward, [](Call& c) { c.problem.T = -1; }, FD_INVALID, "T is -1; must be in [0, 2147483647]"},
    {"no heads", forward, [](Call& c) { c.problem.H = 0; }, FD_INVALID, "H is 0; must be in [1,"},
    {"no value heads", forward, [](Call& c) { c.problem.HV = 0; }, FD_INVALID, "HV is 0; must be in [1,"},
    {"K of 0", forward, [](Call& c) { c.problem.K = 0; }, FD_INVALID, "K is 0; must be in [1,"},
    {"V of 0", forward, [](Call& c) { c.problem.V = 0; }, FD_INVALID, "V is 0; must be in [1,"},
    {"negative threads", forward, [](Call& c) { c.problem.threads = -1; }, FD_INVALID,
     "threads is -1; must be in [0, 1024]"},
    {"heads that do not group", forward, [](Call& c) { c.problem.HV = 7; }, FD_INVALID,
     "v has 7 heads (HV); must be a multiple of q's 2 (H)"},
    {"packed batch", forward, [](Call& c) { c.problem.B = 2; }, FD_INVALID,
     "B is 2; must be 1 for packed sequences (N is 2)"},
    {"K not a multiple of 8", forward,
     [](Call& c) {
       c.problem.K = 12;
       c.problem.backend = FD_BACKEND_CPU;
     },
     FD_UNSUPPORTED, "no backend serves this problem (cpu: K is 12"},
    {"V too large", forward,
     [](Call& c) {
       c.problem.V = 520;
       c.problem.backend = FD_BACKEND_CPU;
     },
     FD_UNSUPPORTED, "V is 520"},
    {"too many elements", forward,
     [](Call& c) {
       c.problem.H = c.problem.HV = c.problem.T = c.problem.K = 2147483647;
       c.problem.backend = FD_BACKEND_CPU;
     },
     FD_UNSUPPORTED, "K is 2147483647"},
    {"a tensor of more than 2^60 elements", forward, [](Call& c) { c.problem.T = c.problem.H = c.problem.HV = 2147483647; },
     FD_INVALID, "q has more than 2^60 elements"},
    // Options.
    {"unknown device", forward, [](Call& c) { c.problem.device = 7; }, FD_UNSUPPORTED,
     "device is 7; this version knows 0 to 1"},
    {"unknown backend", forward, [](Call& c) { c.problem.backend = -3; }, FD_UNSUPPORTED,
     "backend is -3; this version knows"},
    {"backend of another device", forward, [](Call& c) { c.problem.backend = FD_BACKEND_SM90; }, FD_UNSUPPORTED,
     "none is compiled in for device 0 and backend 4"},
    {"unknown dtype", forward, [](Call& c) { c.problem.dtype = 9; }, FD_UNSUPPORTED,
     "dtype is 9; this version knows 0 to 3"},
    {"unknown index dtype", forward, [](Call& c) { c.problem.index_dtype = 2; }, FD_UNSUPPORTED, "index_dtype is 2"},
    {"unknown gate", forward, [](Call& c) { c.problem.gate = 4; }, FD_UNSUPPORTED, "gate is 4; this version knows 0 to 3"},
    {"gate per key", forward, [](Call& c) { c.problem.gate = FD_GATE_LOG_PER_KEY; }, FD_UNSUPPORTED,
     "FD_GATE_LOG_PER_KEY; no backend has it"},
    {"unknown beta", forward, [](Call& c) { c.problem.beta = 3; }, FD_UNSUPPORTED, "beta is 3; this version knows 0 to 2"},
    {"flag of 2", forward, [](Call& c) { c.problem.qk_l2norm = 2; }, FD_UNSUPPORTED, "qk_l2norm is 2"},
    {"workspace limit below zero", backward, [](Call& c) { c.problem.workspace_limit = -1; }, FD_INVALID,
     "workspace_limit is -1; must be >= 0"},
    {"reserved set", forward, [](Call& c) { c.problem.reserved = 1; }, FD_UNSUPPORTED, "reserved is 1"},
    {"negative eigenvalues of plain beta", forward,
     [](Call& c) {
       c.problem.beta = FD_BETA_VALUE;
       c.problem.allow_neg_eigval = 1;
     },
     FD_INVALID, "must come with FD_BETA_LOGIT"},
    {"infinite scale", forward, [](Call& c) { c.problem.scale = infinity; }, FD_INVALID, "scale is inf; must be finite"},
    {"negative eps", forward, [](Call& c) { c.problem.l2norm_eps = -1; }, FD_INVALID,
     "l2norm_eps is -1; must be finite and >= 0"},
    {"bound of 1", forward, [](Call& c) { c.problem.context_bound = 1; }, FD_INVALID, "context_bound is 1; must be below 1"},
    {"slots outside step", forward, [](Call& c) { c.problem.final_slots = 2; }, FD_UNSUPPORTED,
     "only fd_step reads and writes several states"},
    {"checkpoints of a step", step, [](Call& c) { c.problem.checkpoint_interval = 64; }, FD_UNSUPPORTED,
     "checkpoint_interval is 64; fd_step has none"},
    {"odd checkpoint interval", forward, [](Call& c) { c.problem.checkpoint_interval = 65; }, FD_INVALID,
     "checkpoint_interval is 65; must be a multiple of 64"},
    {"no checkpoint slots", forward, [](Call& c) { c.problem.checkpoint_slots = 0; }, FD_INVALID,
     "checkpoint_slots is 0; must say"},
    // Tensors.
    {"no q", forward, [](Call& c) { c.forward.q.data = nullptr; }, FD_INVALID, "q is null"},
    {"no o", step, [](Call& c) { c.step.o.data = nullptr; }, FD_INVALID, "o is null"},
    {"no A_log", backward, [](Call& c) { c.backward.A_log.data = nullptr; }, FD_INVALID, "A_log is null"},
    {"g without a gate", forward,
     [](Call& c) {
       c.problem.gate = FD_GATE_NONE;
       c.forward.A_log.data = c.forward.dt_bias.data = nullptr;
     },
     FD_INVALID, "g is given, but FD_GATE_NONE does not use it"},
    {"A_log without raw gates", forward, [](Call& c) { c.problem.gate = FD_GATE_LOG; }, FD_INVALID,
     "A_log is given, but a gate other than FD_GATE_RAW does not use it"},
    {"beta that is one", forward, [](Call& c) { c.problem.beta = FD_BETA_ONE; }, FD_INVALID,
     "beta is given, but FD_BETA_ONE does not use it"},
    {"checkpoints without interval", forward, [](Call& c) { c.problem.checkpoint_interval = 0; }, FD_INVALID,
     "checkpoints is given, but checkpoint_interval 0"},
    {"interval without checkpoints", forward,
     [](Call& c) {
       c.forward.checkpoints.data = nullptr;
       c.forward.checkpoint_index.data = nullptr;
     },
     FD_INVALID, "checkpoint_interval is 64; needs checkpoints and checkpoint_index"},
    {"negative stride", forward,
     [](Call& c) {
       const std::int64_t s[] = {1, -16, 8, 1};
       std::memcpy(c.forward.k.stride, s, sizeof s);
     },
     FD_INVALID, "k has stride -16 in dimension 1 (T); must not be negative"},
    {"innermost stride", forward,
     [](Call& c) {
       const std::int64_t s[] = {0, 16, 1, 2};
       std::memcpy(c.forward.q.stride, s, sizeof s);
     },
     FD_INVALID, "q has stride 2 in its innermost dimension (K); must be 1"},
    {"innermost stride of a state", forward,
     [](Call& c) {
       const std::int64_t s[] = {512, 128, 1, 8};
       std::memcpy(c.forward.initial_state.stride, s, sizeof s);
     },
     FD_INVALID, "initial_state has stride 8 in its innermost dimension (V); must be 1"},
    {"innermost stride of a transposed state", forward,
     [](Call& c) {
       c.problem.state_v_first = 1;
       const std::int64_t s[] = {512, 128, 1, 16};
       std::memcpy(c.forward.initial_state.stride, s, sizeof s);
     },
     FD_INVALID, "initial_state has stride 16 in its innermost dimension (K); must be 1"},
    {"output that repeats", forward,
     [](Call& c) {
       const std::int64_t s[] = {0, 0, 16, 1};
       std::memcpy(c.forward.o.stride, s, sizeof s);
     },
     FD_INVALID, "o has stride 0 in dimension 1 (T), so that elements overlap"},
    {"misaligned", forward, [](Call& c) { c.forward.v.data = reinterpret_cast<char*>(c.v.data()) + 1; }, FD_INVALID,
     "v is not aligned to its element size, 4 bytes"},
    {"span", forward,
     [](Call& c) {
       const std::int64_t s[] = {0, std::int64_t{1} << 59, 8, 1};
       std::memcpy(c.forward.q.stride, s, sizeof s);
     },
     FD_INVALID, "q spans more than 2^60 elements"},
    {"o over v", forward, [](Call& c) { c.forward.o.data = c.v.data(); }, FD_INVALID, "o overlaps v"},
    {"dk over dq", backward, [](Call& c) { c.backward.dk.data = c.dq.data(); }, FD_INVALID, "dk overlaps dq"},
    {"pools that overlap partly", forward,
     [](Call& c) {
       c.forward.final_state.data = c.initial.data() + 512;
       c.problem.final_rows = 5;
       c.final_index = {2, 3};
     },
     FD_INVALID, "final_state overlaps initial_state"},
    {"one pool with two strides", forward,
     [](Call& c) {
       c.forward.final_state.data = c.initial.data();
       const std::int64_t s[] = {520, 128, 16, 1};
       std::memcpy(c.forward.final_state.stride, s, sizeof s);
       c.problem.final_rows = 5;
     },
     FD_INVALID, "final_state overlaps initial_state"},
    // Gradients.
    {"no gradient given", backward, [](Call& c) { c.backward.do_.data = c.backward.dfinal_state.data = nullptr; },
     FD_INVALID, "do_ and dfinal_state are both null"},
    {"dg without a gate", backward,
     [](Call& c) {
       c.problem.gate = FD_GATE_NONE;
       c.backward.g.data = c.backward.A_log.data = c.backward.dt_bias.data = nullptr;
     },
     FD_INVALID, "dg is given, but FD_GATE_NONE"},
    {"dbeta of one", backward,
     [](Call& c) {
       c.problem.beta = FD_BETA_ONE;
       c.backward.beta.data = nullptr;
     },
     FD_INVALID, "dbeta is given, but FD_BETA_ONE"},
    {"dA_log of a plain gate", backward,
     [](Call& c) {
       c.problem.gate = FD_GATE_LOG;
       c.backward.A_log.data = c.backward.dt_bias.data = nullptr;
     },
     FD_INVALID, "dA_log is given, but a gate other than FD_GATE_RAW"},
    {"ddt_bias of nothing", backward, [](Call& c) { c.backward.dt_bias.data = nullptr; }, FD_INVALID,
     "ddt_bias is given, but a call without dt_bias"},
    {"dinitial_state of nothing", backward,
     [](Call& c) {
       c.backward.initial_state.data = nullptr;
       c.backward.initial_index.data = nullptr;
     },
     FD_INVALID, "dinitial_state is given, but a call without initial_state"},
    // Sequences and indices, as far as the host can see them.
    {"cu_seqlens missing", forward, [](Call& c) { c.forward.cu_seqlens = nullptr; }, FD_INVALID,
     "cu_seqlens is null, but N is 2"},
    {"cu_seqlens unexpected", forward, [](Call& c) { c.problem.N = 0; }, FD_INVALID, "cu_seqlens is given, but N is 0"},
    {"cu_seqlens from 1", forward, [](Call& c) { c.cu_seqlens[0] = 1; }, FD_INVALID, "cu_seqlens[0] is 1; must be 0"},
    {"cu_seqlens decreasing", backward, [](Call& c) { c.cu_seqlens[2] = 60; }, FD_INVALID,
     "cu_seqlens[2] is 60; must not be below cu_seqlens[1], 66"},
    {"cu_seqlens past T", step, [](Call& c) { c.cu_seqlens[2] = 71; }, FD_INVALID,
     "cu_seqlens[2] is 71; must not be above T, 70"},
    {"index past the pool", forward, [](Call& c) { c.initial_index[1] = 6; }, FD_INVALID,
     "initial_index[1, 0] is 6; must be -1 or a row of initial_state, which has 6"},
    {"index of -2", step, [](Call& c) { c.final_index[3] = -2; }, FD_INVALID,
     "final_index[1, 1] is -2; must be -1 or a row"},
    {"index stride", forward, [](Call& c) { c.forward.final_index.stride[0] = -1; }, FD_INVALID,
     "final_index has stride -1; must not be negative"},
    {"index without pool", forward, [](Call& c) { c.forward.final_state.data = nullptr; }, FD_INVALID,
     "final_index is given without final_state"},
    {"slots without index", step, [](Call& c) { c.step.final_index.data = nullptr; }, FD_INVALID,
     "final_index is null, but has 2 slots"},
    {"too few rows", forward,
     [](Call& c) {
       c.forward.initial_index.data = nullptr;
       c.problem.initial_rows = 1;
     },
     FD_INVALID, "initial_state has 1 rows; without initial_index it needs one per sequence, 2"},
    {"row written twice", forward, [](Call& c) { c.final_index[1] = 2; }, FD_INVALID,
     "row 2 of final_state is written twice, for sequences 0 and 1"},
    {"slot written twice", step, [](Call& c) { c.final_index[1] = 2; }, FD_INVALID,
     "row 2 of final_state is written twice, for sequences 0 and 0"},
    {"checkpoint over a final state", forward,
     [](Call& c) {
       c.forward.checkpoints.data = c.final_state.data();
       c.checkpoint_index[0] = 3;
     },
     FD_INVALID, "is written twice"},
    {"row read by another sequence", forward,
     [](Call& c) {
       c.forward.final_state.data = c.initial.data();
       c.final_index = {1, 0};
     },
     FD_INVALID, "but written by sequence"},
    {"accepted without slots", step, [](Call& c) { c.problem.initial_slots = 0; }, FD_INVALID,
     "accepted is given, but initial_index has no slots"},
    {"nothing accepted", step, [](Call& c) { c.accepted[0] = 0; }, FD_INVALID, "accepted[0] is 0; must be in [1, 2]"},
    {"more accepted than slots", step, [](Call& c) { c.accepted[1] = 3; }, FD_INVALID,
     "accepted[1] is 3; must be in [1, 2]"},
    // Buffers.
    {"stream on the CPU", forward, [](Call& c) { c.stream = &c; }, FD_INVALID, "stream is given; must be null on the CPU"},
    {"saved of no size", forward, [](Call& c) { c.forward.saved_bytes = 8; }, FD_INVALID,
     "saved is null, but saved_bytes is 8"},
};

TEST(WrongCalls, AreRefusedWithTheirMessageAndTouchNoOutput) {
  for (const Wrong& wrong : wrong_calls) {
    SCOPED_TRACE(wrong.what);
    Call call(wrong.operation);
    wrong.change(call);
    EXPECT_EQ(call.run(wrong.operation), wrong.status) << fd_last_error();
    EXPECT_NE(std::string(fd_last_error()).find(wrong.message), std::string::npos) << fd_last_error();
    EXPECT_TRUE(call.outputs_untouched());
  }
}

TEST(WrongCalls, AreOneStepFromCallsThatRun) {
  for (const Operation operation : {forward, backward, step}) {
    Call call(operation);
    EXPECT_EQ(call.run(operation), FD_OK) << fd_last_error();
    EXPECT_FALSE(call.outputs_untouched());
  }
}

TEST(Workspace, ShortMisalignedMissingOrOverlappingIsRefused) {
  Call call(forward);
  call.problem.backend = FD_BACKEND_CPU;
  std::size_t needed = 0;
  ASSERT_EQ(call.query(forward, needed), FD_OK) << fd_last_error();
  ASSERT_GT(needed, 0u);
  std::vector<unsigned char> memory(needed + 512);
  unsigned char* aligned = memory.data() + (256 - reinterpret_cast<std::uintptr_t>(memory.data()) % 256) % 256;
  const auto refused = [&](void* data, std::size_t bytes, const char* message) {
    call.workspace = static_cast<unsigned char*>(data);
    call.workspace_bytes = bytes;
    EXPECT_EQ(call.run(forward), FD_INVALID);
    EXPECT_NE(std::string(fd_last_error()).find(message), std::string::npos) << fd_last_error();
    EXPECT_TRUE(call.outputs_untouched());
  };
  refused(aligned, needed - 1, "workspace has");
  refused(nullptr, needed, "workspace is null; needs");
  refused(aligned + 4, needed, "workspace is not aligned to 256 bytes");
  call.forward.q.data = aligned;
  refused(aligned, needed, "workspace overlaps q");
}

TEST(Structs, OfAnOlderCallerReadAsIfTheRestWereZero) {
  Call call(forward);
  // Without `saved`, `checkpoint_index`, `checkpoints`: as if the version before had ended at final_index.
  call.problem.checkpoint_interval = 0;
  call.forward.size = offsetof(fd_forward_args, checkpoints);
  EXPECT_EQ(call.run(forward), FD_OK) << fd_last_error();
  // A problem that ends before dtype: fp32 everywhere, no gate, so g must not be given.
  call.problem.size = offsetof(fd_problem, gate);
  EXPECT_EQ(call.run(forward), FD_INVALID);
  EXPECT_NE(std::string(fd_last_error()).find("g is given, but FD_GATE_NONE"), std::string::npos) << fd_last_error();
}

TEST(Structs, OfANewerCallerMustBeZeroPastWhatThisVersionKnows) {
  Call call(forward);
  struct {
    fd_problem known;
    std::int64_t added;
  } newer{call.problem, 0};
  newer.known.size = sizeof newer;
  call.forward.problem = &newer.known;
  EXPECT_EQ(call.run(forward), FD_OK) << fd_last_error();
  newer.added = 1;
  EXPECT_EQ(call.run(forward), FD_UNSUPPORTED);
  EXPECT_NE(std::string(fd_last_error()).find("problem has a member at byte"), std::string::npos) << fd_last_error();
}

TEST(Queries, RefuseNullAndTellTheBackend) {
  const Call call(forward);
  std::size_t bytes = 1;
  fd_backend backend = FD_BACKEND_AUTO;
  EXPECT_EQ(fd_forward_workspace(&call.problem, nullptr), FD_INVALID);
  EXPECT_EQ(fd_forward_saved(&call.problem, nullptr), FD_INVALID);
  EXPECT_EQ(fd_forward_saved(&call.problem, &bytes), FD_OK);
  EXPECT_EQ(fd_forward_backend(&call.problem, nullptr), FD_INVALID);
  EXPECT_EQ(fd_forward_backend(nullptr, &backend), FD_INVALID);
  EXPECT_STREQ(fd_last_error(), "fd_forward_backend: problem is null");
  fd_problem problem = call.problem;
  problem.backend = FD_BACKEND_AUTO;
  EXPECT_EQ(fd_forward_backend(&problem, &backend), FD_OK);
  EXPECT_EQ(backend, FD_BACKEND_CPU);
  problem.dtype = FD_FLOAT64;
  EXPECT_EQ(fd_backward_backend(&problem, &backend), FD_OK);
  EXPECT_EQ(backend, FD_BACKEND_REFERENCE);
  problem.checkpoint_interval = 0;
  EXPECT_EQ(fd_step_backend(&problem, &backend), FD_OK);
  EXPECT_EQ(backend, FD_BACKEND_REFERENCE);
}

TEST(Backends, AreListedBestFirstWithTheCpuAlwaysThere) {
  ASSERT_GE(fd_backend_count(), 2);
  bool cpu = false;
  for (std::int32_t i = 0; i < fd_backend_count(); ++i) {
    fd_backend_description description{};
    description.size = sizeof description;
    ASSERT_EQ(fd_backend_get(i, &description), FD_OK);
    EXPECT_STRNE(description.name, "");
    EXPECT_STRNE(description.detail, "");
    cpu |= description.backend == FD_BACKEND_CPU && description.available == 1 && description.device == FD_CPU;
  }
  EXPECT_TRUE(cpu);
  fd_backend_description description{};
  EXPECT_EQ(fd_backend_get(0, &description), FD_INVALID);
  EXPECT_EQ(fd_backend_get(0, nullptr), FD_INVALID);
  description.size = sizeof description;
  EXPECT_EQ(fd_backend_get(-1, &description), FD_INVALID);
  EXPECT_EQ(fd_backend_get(fd_backend_count(), &description), FD_INVALID);
}

TEST(Status, HasANameAndTheVersionIsTheHeaders) {
  EXPECT_STREQ(fd_status_name(FD_OK), "FD_OK");
  EXPECT_STREQ(fd_status_name(FD_INVALID), "FD_INVALID");
  EXPECT_STREQ(fd_status_name(FD_UNSUPPORTED), "FD_UNSUPPORTED");
  EXPECT_STREQ(fd_status_name(FD_DEVICE_ERROR), "FD_DEVICE_ERROR");
  EXPECT_STREQ(fd_status_name(FD_OUT_OF_MEMORY), "FD_OUT_OF_MEMORY");
  EXPECT_STREQ(fd_status_name(99), "unknown status");
  EXPECT_EQ(fd_version(), FD_VERSION_MAJOR * 10000 + FD_VERSION_MINOR * 100 + FD_VERSION_PATCH);
}

}  // namespace
