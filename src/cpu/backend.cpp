// The chunked CPU backend: what it serves, and its threads.
#include "backend.hpp"

#include <omp.h>

#include "cpu/cpu.hpp"
#include "cpu/vector.hpp"
#include "dtype.hpp"

namespace flashdelta {
namespace {

template <auto kOperation, typename Args>
fd_status run(const Args& args, void* workspace, void* /*stream*/) {
  return kOperation(args, workspace);
}

std::string unavailable() {
  return vector_targets()[0] == nullptr ? "the processor has none of AVX-512, AVX2 and SSE4.2" : "";
}

std::string description() {
  if (vector_targets()[0] == nullptr) return "no vector instructions it knows";
  return std::string(vector_kernels().name) + ", " + std::to_string(omp_get_max_threads()) + " threads";
}

std::string unsupported_type(const char* member, fd_dtype type, bool half) {
  if (type == FD_FLOAT32 || type == FD_BFLOAT16 || (half && type == FD_FLOAT16)) return "";
  return std::string(member) + " is " + name_of(type) + "; cpu has float32" +
         (half ? ", bfloat16 and float16" : " and bfloat16");
}

std::string unsupported_size(const char* member, std::int64_t size, std::int64_t most) {
  if (size % 8 == 0 && size <= most) return "";
  return std::string(member) + " is " + std::to_string(size) + "; cpu has multiples of 8 up to " + std::to_string(most);
}

std::string unsupported(Operation, const fd_problem& p) {
  if (p.gate == FD_GATE_LOG_PER_KEY) return "gate is FD_GATE_LOG_PER_KEY; cpu has one gate per head";
  for (std::string reason : {
           unsupported_size("K", p.K, 256),
           unsupported_size("V", p.V, 512),
           unsupported_type("dtype", p.dtype, true),
           unsupported_type("gate_dtype", p.gate_dtype, true),
           unsupported_type("beta_dtype", p.beta_dtype, true),
           unsupported_type("A_log_dtype", p.A_log_dtype, true),
           unsupported_type("dt_bias_dtype", p.dt_bias_dtype, true),
           unsupported_type("initial_dtype", p.initial_dtype, false),
           unsupported_type("final_dtype", p.final_dtype, false),
           unsupported_type("checkpoint_dtype", p.checkpoint_dtype, false),
       }) {
    if (!reason.empty()) return reason;
  }
  return "";
}

std::size_t workspace(Operation operation, const fd_problem& p) {
  switch (operation) {
    case Operation::forward: return cpu_forward_workspace(p);
    case Operation::backward: return cpu_backward_workspace(p);
    default: return cpu_step_workspace(p);
  }
}

std::size_t saved(const fd_problem&) { return 0; }

}  // namespace

const Backend cpu_backend = {
    .id = FD_BACKEND_CPU,
    .device = FD_CPU,
    .name = "cpu",
    .unavailable = unavailable,
    .description = description,
    .unsupported = unsupported,
    .workspace = workspace,
    .saved = saved,
    .forward = run<cpu_forward, fd_forward_args>,
    .backward = run<cpu_backward, fd_backward_args>,
    .step = run<cpu_step, fd_step_args>,
};

}  // namespace flashdelta
