#include "tests/emulation/gradients_sm90.hpp"

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <vector>

#include "check.hpp"
#include "tests/emulation/wave.hpp"

#define cuda emulated_cuda
#include "cuda/gradients_sm90.cu"
#include "cuda/tensor_map_sm90.hpp"
// After what gives it CUDA's functions.
#include "cuda/finish_sm90.cu"

namespace flashdelta::emulation {

using testing::Case;
using testing::Data;

namespace {

constexpr int C = cuda::CHUNK, K = cuda::KEYS;
constexpr double LOG2E = 1.4426950408889634, L2NORM_EPS = 1e-6;

// The tiles that the kernels read, and what Wave has no place for.
struct GradientWave : Wave {
  testing::Memory ds, dv;
  std::vector<unsigned> stored;
  unsigned next_item = 0;

  explicit GradientWave(const Case& c)
      : Wave(c),
        ds(s.size()),
        dv(r.size()),
        stored(chunks.size() * static_cast<std::size_t>(c.HV), 2 * static_cast<unsigned>(scratch.value_blocks)) {
    scratch.ds = ds.data();
    scratch.dv = dv.data();
    scratch.stored = stored.data();
    scratch.next_item = &next_item;
  }
};

void fill_vectors(cuda::ChunkVectors& to, const Case& c, const Data& d, const HeadInputs& inputs, const ChunkTiles& tiles,
                  int chunk, std::int64_t n, std::int64_t key_head) {
  for (int i = 0; i < C; ++i) {
    const auto at = static_cast<std::size_t>(i);
    const int token = chunk * C + i;
    const bool inside = token < inputs.tokens;
    const auto norm = [&](const testing::Array& rows) {
      if (!c.l2norm) return 1.0;
      return inside ? inverse_norm(rows, d.first_token(c, n) + token, key_head) : 1 / std::sqrt(L2NORM_EPS);
    };
    to.gam[i] = static_cast<float>(tiles.gam[at] * LOG2E);
    to.rise[i] = static_cast<float>(tiles.rise[at]);
    to.end[i] = static_cast<float>(tiles.end[at]);
    to.beta[i] = inside ? static_cast<float>(inputs.beta[static_cast<std::size_t>(token)]) : 0;
    to.key[i] = static_cast<float>(norm(d.k));
    to.query[i] = static_cast<float>(norm(d.q));
  }
}

void fill(GradientWave& wave, const Case& c, const Data& d, std::int64_t n, std::int64_t value_head) {
  HeadInputs inputs = head_inputs(c, d, n, value_head);
  if (!c.do_) std::fill(inputs.do_.begin(), inputs.do_.end(), 0);
  const HeadReference reference = chunk_reference(inputs);
  const int V = inputs.V;
  for (std::size_t chunk = 0; chunk < reference.chunks.size(); ++chunk) {
    const ChunkTiles& tiles = reference.chunks[chunk];
    const int slot = wave.first_slot[static_cast<std::size_t>(n)] + static_cast<int>(chunk);
    fill_vectors(wave.scratch.vectors[wave.scratch.head(slot, static_cast<int>(value_head))], c, d, inputs, tiles,
                 static_cast<int>(chunk), n, value_head / (c.HV / c.H));
    for (int b = 0; b < wave.scratch.value_blocks; ++b) {
      const std::int64_t at = wave.scratch.block(slot, static_cast<int>(value_head), b);
      write_state_tile(wave.scratch.s + at * cuda::STATE_TILE, c.dtype, tiles.S, V, b * 64);
      write_state_tile(wave.scratch.ds + at * cuda::STATE_TILE, c.dtype, tiles.dS1, V, b * 64);
      write_tile(wave.scratch.r + at * cuda::TILE, c.dtype, tiles.R.data() + b * 64, V);
      write_tile(wave.scratch.dv + at * cuda::TILE, c.dtype, tiles.dv.data() + b * 64, V);
    }
  }
}

struct Request {
  const Case* c;
  const Data* d;
  const GradientSetting* setting;
};
Request request;

fd_status run(const fd_backward_args* call, void*, std::size_t, void*) try {
  const auto& [c, d, setting] = request;
  fd_backward_args args = read(call);
  const fd_problem problem = normalise(Operation::backward, read(args.problem));
  args.problem = &problem;
  check(args, c->packed, {"saved", nullptr, 0, false}, {"workspace", nullptr, 0, true});
  if (!setting->dq) args.dq = {};
  if (!setting->dk) args.dk = {};
  if (!setting->dg) args.dg = {};
  if (!setting->dbeta) args.dbeta = {};
  if (!setting->dA_log) args.dA_log = {};
  const bool packed = args.cu_seqlens != nullptr, sums = args.A_log.data != nullptr;

  GradientWave wave(*c);
  for (std::int64_t n = 0; n < c->N(); ++n) {
    for (std::int64_t hv = 0; hv < c->HV; ++hv) fill(wave, *c, *d, n, hv);
  }
  constexpr float NAN_ = std::numeric_limits<float>::quiet_NaN();
  std::vector<float2> gate_sums(wave.chunks.size() * static_cast<std::size_t>(c->HV), {NAN_, NAN_});
  const int slots = static_cast<int>(wave.chunks.size());
  cuda::GradientParameters p{.q = {},
                             .k = {},
                             .do_ = {},
                             .dq = {},
                             .dk = {},
                             .dv = {},
                             .has_do = args.do_.data != nullptr,
                             .has_dq = args.dq.data != nullptr,
                             .has_dk = args.dk.data != nullptr,
                             .gates = cuda::Gates(args),
                             .sequences = cuda::Sequences(args),
                             .dg = cuda::View(args.dg, problem.gate_dtype),
                             .dbeta = cuda::View(args.dbeta, problem.beta_dtype),
                             .gate_sums = sums ? gate_sums.data() : nullptr,
                             .chunks = wave.chunks.data(),
                             .scratch = wave.scratch,
                             .slots = static_cast<int>(wave.chunks.size()),
                             .heads = static_cast<int>(c->H),
                             .l2norm = problem.qk_l2norm,
                             .scale = static_cast<float>(problem.scale),
                             .runs = 1 + slots % 3,  // results do not depend on it
                             .run_slots = slots / (1 + slots % 3)};
  fd_status status = FD_OK;
  const auto map = [&](CUtensorMap& to, const char* name, const fd_tensor& tensor, std::int64_t heads,
                       std::int64_t columns) {
    if (status == FD_OK && tensor.data != nullptr)
      status = cuda::tensor_map(to, name, tensor, problem, packed, heads, columns);
  };
  map(p.q, "q", args.q, c->H, K);
  map(p.k, "k", args.k, c->H, K);
  map(p.do_, "do", args.do_, c->HV, c->V);
  map(p.dq, "dq", args.dq, c->H, K);
  map(p.dk, "dk", args.dk, c->H, K);
  cuda::schedule = setting->schedule;
  if (status == FD_OK) status = cuda::launch_gradients(p, problem.dtype == FD_BFLOAT16, setting->sm_count, nullptr);
  if (status != FD_OK) return status;
  const cuda::FinishParameters finish{.sequences = cuda::Sequences(args),
                                      .dq = cuda::View(args.dq, problem.dtype),
                                      .dk = cuda::View(args.dk, problem.dtype),
                                      .dv = cuda::View(args.dv, problem.dtype),
                                      .dg = p.dg,
                                      .dbeta = p.dbeta,
                                      .dA_log = cuda::View(args.dA_log, problem.A_log_dtype),
                                      .ddt_bias = cuda::View(args.ddt_bias, problem.dt_bias_dtype),
                                      .gate_sums = gate_sums.data(),
                                      .sum_count = static_cast<std::int64_t>(wave.chunks.size()),
                                      .heads = static_cast<int>(c->H),
                                      .value_heads = static_cast<int>(c->HV),
                                      .values = static_cast<int>(c->V)};
  return cuda::launch_finish(finish, setting->sm_count, nullptr);
} catch (const Refusal& refusal) {
  return fail(refusal.status, refusal.message);
}

}  // namespace

testing::Results gradients(const Case& c, const Data& d, const GradientSetting& setting) {
  request = {&c, &d, &setting};
  testing::Results results = testing::backward(c, d, {.backend = FD_BACKEND_REFERENCE, .backward = run});
  results.erase("dinitial_state");
  return results;
}

std::vector<float> sum_gates(const std::vector<float>& parts, int value_heads) {
  const auto heads = static_cast<std::size_t>(value_heads);
  std::vector<float> result(2 * heads);
  std::vector<float2> sums;
  for (std::size_t i = 0; i < parts.size(); i += 2) sums.push_back({parts[i], parts[i + 1]});
  const fd_problem problem{};
  fd_backward_args args{};
  args.problem = &problem;
  const cuda::View absent(fd_tensor{}, FD_FLOAT32);
  const cuda::FinishParameters finish{.sequences = cuda::Sequences(args),
                                      .dq = absent,
                                      .dk = absent,
                                      .dv = absent,
                                      .dg = absent,
                                      .dbeta = absent,
                                      .dA_log = cuda::View({result.data(), {2}}, FD_FLOAT32),
                                      .ddt_bias = cuda::View({result.data() + 1, {2}}, FD_FLOAT32),
                                      .gate_sums = sums.data(),
                                      .sum_count = static_cast<std::int64_t>(sums.size() / heads),
                                      .heads = value_heads,
                                      .value_heads = value_heads,
                                      .values = 64};
  if (cuda::launch_finish(finish, 132, nullptr) != FD_OK) throw std::runtime_error(fd_last_error());
  return result;
}

}  // namespace flashdelta::emulation
