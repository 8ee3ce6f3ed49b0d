// The backward (docs/kernels.md): waves of segments, from the last to the first; scratch memory holds one wave.
//
//   cut        once: which chunks, segments and pieces of sequences each wave has
//   per wave   prepare    vectors, T, P of all chunks
//              states     S and R of all chunks, segment by segment from saved states
//              chain      dv, gradients of the state, from last chunk to first; of all segments at once after a pre-pass
//                         (backward_context_sm90.hpp), or of whole pieces
//              gradients  dq, dk, dg, dbeta of all chunks
//   finish     once: dA_log, ddt_bias; zeros in rows past the last sequence
//
// If the forward saved no states, they are found first: per wave, from the first on, prepare and states once more.
#include <algorithm>
#include <cmath>
#include <string>

#include "cuda/backward_context_sm90.hpp"
#include "cuda/backward_sm90.hpp"
#include "cuda/chain_sm90.hpp"
#include "cuda/cut_sm90.hpp"
#include "cuda/finish_sm90.hpp"
#include "cuda/gradients_sm90.hpp"
#include "cuda/prepare_sm90.hpp"
#include "cuda/states_sm90.hpp"
#include "cuda/tensor_map_sm90.hpp"

namespace flashdelta::cuda {
namespace {

// Gives out aligned parts of the workspace; with a null base it only counts.
class Parts {
 public:
  explicit Parts(void* base) : base_(static_cast<char*>(base)) {}
  template <typename T>
  T* take(int64_t count) {
    constexpr std::size_t ALIGNMENT = 256;
    T* part = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + bytes_);
    bytes_ += (static_cast<std::size_t>(count) * sizeof(T) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    return part;
  }
  std::size_t bytes() const { return bytes_; }

 private:
  char* base_;
  std::size_t bytes_ = 0;
};

// Scratch bytes of one slot and value head. Where dv is wanted (`has_dv`), the chain leaves it in the call's tensor alone,
// and the gradients read it there.
int64_t bytes_per_head(const fd_problem& p, bool has_dv) {
  const int64_t blocks = p.V / VALUES;
  return static_cast<int64_t>(sizeof(ChunkVectors)) + 2 * TILE + blocks * (2 * STATE_TILE + (has_dv ? 1 : 2) * TILE);
}

// Floats of all heads' states; and what the pre-pass of context parallelism finds for one segment.
int64_t state_floats(const fd_problem& p) { return p.HV * p.V * p.K; }
int64_t outcome_floats(const fd_problem& p) { return p.HV * (p.V + p.K) * p.K; }

// As many tokens a wave as the limit on the workspace allows: all at once, or at least a segment.
int64_t wave_tokens(const fd_problem& p, bool has_dv) {
  const int64_t positions = p.B * p.T, of_slot = p.HV * bytes_per_head(p, has_dv);
  const int64_t of_segment =
      splits_backward(p) ? (state_floats(p) + outcome_floats(p)) * static_cast<int64_t>(sizeof(float)) : 0;
  const int64_t left = p.workspace_limit - p.N * (of_slot + of_segment);
  const int64_t slots = left / std::max<int64_t>(1, of_slot + of_segment / SEGMENT_CHUNKS);
  if (slots >= positions / CHUNK) return std::max<int64_t>(positions, SEGMENT);
  return std::max<int64_t>(SEGMENT, (slots * CHUNK - SEGMENT) / SEGMENT * SEGMENT);
}

struct Workspace {
  Tiling tiling;
  Tables tables;
  Scratch scratch;
  float* saved;     // states before segments, unless the forward kept them
  float* carry[2];  // gradient of a state at the border of two waves, in turn
  bool splits;
  int* windows;       // [segment_slots, HV], if segments are walked at once
  float* outcomes;    // [segment_slots, HV, V + K, K]
  float* starts;      // [segment_slots, HV, V, K]
  float2* gate_sums;  // [waves, chunk_slots, HV]
  std::size_t bytes;

  Workspace(const fd_problem& p, bool has_dv, void* base)
      : tiling(make_tiling(p, wave_tokens(p, has_dv))), splits(splits_backward(p)) {
    Parts parts(base);
    const int64_t heads = int64_t{tiling.chunk_slots} * p.HV, blocks = heads * (p.V / VALUES);
    tables.chunks = parts.take<ChunkPlace>(int64_t{tiling.waves} * tiling.chunk_slots);
    tables.segments = parts.take<Run>(int64_t{tiling.waves} * tiling.segment_slots);
    tables.pieces = parts.take<Run>(int64_t{tiling.waves} * tiling.sequence_slots);
    scratch.value_heads = static_cast<int>(p.HV);
    scratch.value_blocks = static_cast<int>(p.V / VALUES);
    scratch.vectors = parts.take<ChunkVectors>(heads);
    scratch.t = parts.take<uint8_t>(heads * TILE);
    scratch.p = parts.take<uint8_t>(heads * TILE);
    scratch.s = parts.take<uint8_t>(blocks * STATE_TILE);
    scratch.ds = parts.take<uint8_t>(blocks * STATE_TILE);
    scratch.r = parts.take<uint8_t>(blocks * TILE);
    scratch.stored = parts.take<unsigned>(heads + 1);
    scratch.next_item = scratch.stored + heads;
    scratch.next_run = parts.take<unsigned>(1);
    scratch.dv = has_dv ? nullptr : parts.take<uint8_t>(blocks * TILE);
    saved = parts.take<float>(static_cast<int64_t>(saved_bytes(p) / sizeof(float)));
    for (float*& c : carry) c = parts.take<float>(tiling.waves > 1 ? state_floats(p) : 0);
    windows = parts.take<int>(splits ? tiling.segment_slots * p.HV : 0);
    outcomes = parts.take<float>(splits ? tiling.segment_slots * outcome_floats(p) : 0);
    starts = parts.take<float>(splits ? tiling.segment_slots * state_floats(p) : 0);
    gate_sums = parts.take<float2>(p.gate == FD_GATE_RAW ? tiling.waves * heads : 0);
    bytes = parts.bytes();
  }
};

// A call's kernels, with everything that does not change from wave to wave.
class Backward {
 public:
  Backward(const fd_backward_args& args, void* workspace, int sm_count, void* stream)
      : args_(args),
        p_(*args.problem),
        workspace_(p_, args.dv.data != nullptr, workspace),
        sequences_(args),
        gates_(args),
        initial_(args.initial_state, p_.initial_dtype, p_.initial_rows, args.initial_index, p_.index_dtype,
                 p_.initial_slots),
        sm_count_(sm_count),
        stream_(stream) {
    // Two blocks of values in one read K, Q, T, P once; but blocks of one take half as long, if they all run at once.
    const Tiling& t = workspace_.tiling;
    const int64_t walked = workspace_.splits ? t.segment_slots : t.sequence_slots, blocks = p_.V / VALUES;
    full_ = blocks % 2 == 0 && walked * p_.HV * blocks > sm_count;
    if (workspace_.splits && args.cu_seqlens == nullptr) {
      runs_ = static_cast<int>(std::max<int64_t>(1, std::min(t.wave_tokens, t.positions) / SEGMENT));
    }
  }

  fd_status run() {
    if (p_.N == 0 || p_.HV == 0) return FD_OK;
    const Tiling& tiling = workspace_.tiling;
    fd_status status = make_maps();
    if (status == FD_OK) status = launch_cut(tiling, sequences_, workspace_.tables, stream_);
    if (args_.saved == nullptr && saved_bytes(p_) > 0) {
      for (int wave = 0; wave < tiling.waves && status == FD_OK; ++wave) {
        status = prepare(wave);
        if (status == FD_OK) status = save_states(wave);
      }
    }
    for (int wave = tiling.waves; wave-- > 0 && status == FD_OK;) {
      status = prepare(wave);
      if (status == FD_OK && workspace_.splits) status = windows(wave);
      if (status == FD_OK && workspace_.splits) status = outcomes(wave);
      if (status == FD_OK) status = states(wave);
      if (status == FD_OK) status = workspace_.splits ? chain_of_segments(wave) : chain_of_pieces(wave);
      if (status == FD_OK) status = gradients(wave);
    }
    return status == FD_OK ? finish() : status;
  }

 private:
  fd_status make_maps() {
    const bool packed = args_.cu_seqlens != nullptr;
    const struct {
      CUtensorMap& map;
      const char* name;
      const fd_tensor& tensor;
      int64_t heads, columns;
    } maps[] = {
        {q_, "fd_backward: q", args_.q, p_.H, p_.K},     {k_, "fd_backward: k", args_.k, p_.H, p_.K},
        {v_, "fd_backward: v", args_.v, p_.HV, p_.V},    {do_, "fd_backward: do", args_.do_, p_.HV, p_.V},
        {dq_, "fd_backward: dq", args_.dq, p_.H, p_.K},  {dk_, "fd_backward: dk", args_.dk, p_.H, p_.K},
        {dv_, "fd_backward: dv", args_.dv, p_.HV, p_.V},
    };
    for (const auto& m : maps) {
      if (m.tensor.data == nullptr) continue;
      const fd_status status = tensor_map(m.map, m.name, m.tensor, p_, packed, m.heads, m.columns);
      if (status != FD_OK) return status;
    }
    return FD_OK;
  }

  const ChunkPlace* chunks(int wave) const {
    return workspace_.tables.chunks + int64_t{wave} * workspace_.tiling.chunk_slots;
  }
  const Run* segments(int wave) const {
    return workspace_.tables.segments + int64_t{wave} * workspace_.tiling.segment_slots;
  }
  const Run* pieces(int wave) const { return workspace_.tables.pieces + int64_t{wave} * workspace_.tiling.sequence_slots; }
  bool bfloat16() const { return p_.dtype == FD_BFLOAT16; }
  int heads() const { return static_cast<int>(p_.H); }

  fd_status prepare(int wave) {
    const PrepareParameters parameters{
        .q = q_,
        .k = k_,
        .gates = gates_,
        .sequences = sequences_,
        .chunks = chunks(wave),
        .scratch = workspace_.scratch,
        .slots = workspace_.tiling.chunk_slots,
        .heads = heads(),
        .scale = static_cast<float>(p_.scale),
        .l2norm_eps = static_cast<float>(p_.l2norm_eps),
    };
    return launch_prepare(parameters, bfloat16(), p_.qk_l2norm != 0, sm_count_, stream_);
  }

  StatesParameters states_parameters() const {
    return {
        .k = k_,
        .v = v_,
        .sequences = sequences_,
        .scratch = workspace_.scratch,
        .runs = nullptr,
        .run_count = 0,
        .heads = heads(),
        .row_blocks = workspace_.scratch.value_blocks,
        .initial = initial_,
        .state_v_first = p_.state_v_first,
        .saved = args_.saved != nullptr ? static_cast<const float*>(args_.saved) : workspace_.saved,
        .save = nullptr,
    };
  }

  fd_status save_states(int wave) {
    StatesParameters parameters = states_parameters();
    parameters.runs = pieces(wave);
    parameters.run_count = workspace_.tiling.sequence_slots;
    parameters.scratch.s = parameters.scratch.r = nullptr;
    parameters.save = workspace_.saved;
    return launch_states(parameters, bfloat16(), sm_count_, stream_);
  }

  fd_status windows(int wave) {
    const GradientWindowParameters parameters{
        .sequences = sequences_,
        .gates = gates_,
        .k = View(args_.k, p_.dtype),
        .heads = heads(),
        .value_heads = static_cast<int>(p_.HV),
        .l2norm = p_.qk_l2norm,
        .l2norm_eps = static_cast<float>(p_.l2norm_eps),
        .log_bound = static_cast<float>(std::log2(p_.context_bound)),
        .segments = segments(wave),
        .segment_count = workspace_.tiling.segment_slots,
        .windows = workspace_.windows,
    };
    return launch_gradient_windows(parameters, bfloat16(), stream_);
  }

  fd_status states(int wave) {
    StatesParameters parameters = states_parameters();
    parameters.runs = segments(wave);
    parameters.run_count = workspace_.tiling.segment_slots;
    parameters.counts = workspace_.scratch.stored;
    parameters.counts_size = static_cast<int>(workspace_.scratch.next_item - workspace_.scratch.stored) + 1;
    if (workspace_.splits) {
      parameters.row_blocks += KEYS / VALUES;
      parameters.transitions = workspace_.outcomes;
      parameters.gradient_windows = workspace_.windows;
      parameters.beside_earlier = 1;
    }
    return launch_states(parameters, bfloat16(), sm_count_, stream_);
  }

  ChainParameters chain_parameters() const {
    const fd_index none{};
    return {
        .q = q_,
        .k = k_,
        .do_ = do_,
        .dv = dv_,
        .has_do = args_.do_.data != nullptr,
        .has_dv = args_.dv.data != nullptr,
        .sequences = sequences_,
        .scratch = workspace_.scratch,
        .runs = nullptr,
        .run_count = 0,
        .heads = heads(),
        .full = full_,
        .initial = initial_,
        .dfinal = Pool(args_.dfinal_state, p_.final_dtype, p_.N, none, p_.index_dtype, 0),
        .dinitial = Pool(args_.dinitial_state, p_.initial_dtype, p_.N, none, p_.index_dtype, 0),
        .state_v_first = p_.state_v_first,
        .starts = nullptr,
        .start_stride = 0,
        .carry_out = nullptr,
        .scale = static_cast<float>(p_.scale),
    };
  }
  float* carry_in(int wave) const { return workspace_.carry[(wave + 1) % 2]; }
  float* carry_out(int wave) const { return workspace_.carry[wave % 2]; }

  fd_status chain_of_pieces(int wave) {
    ChainParameters parameters = chain_parameters();
    parameters.runs = pieces(wave);
    parameters.run_count = workspace_.tiling.sequence_slots;
    parameters.starts = carry_in(wave);
    parameters.carry_out = carry_out(wave);
    return launch_chain(parameters, bfloat16(), sm_count_, stream_);
  }

  fd_status outcomes(int wave) {
    ChainParameters parameters = chain_parameters();
    parameters.runs = segments(wave);
    parameters.run_count = workspace_.tiling.segment_slots;
    parameters.outcomes = workspace_.outcomes;
    parameters.windows = workspace_.windows;
    return launch_chain(parameters, bfloat16(), sm_count_, stream_);
  }

  fd_status chain_of_segments(int wave) {
    const GradientFoldParameters fold{
        .sequences = sequences_,
        .pieces = pieces(wave),
        .segments = segments(wave),
        .piece_count = workspace_.tiling.sequence_slots,
        .segment_count = workspace_.tiling.segment_slots,
        .value_heads = static_cast<int>(p_.HV),
        .values = static_cast<int>(p_.V),
        .windows = workspace_.windows,
        .outcomes = workspace_.outcomes,
        .starts = workspace_.starts,
        .carry_in = carry_in(wave),
        .carry_out = carry_out(wave),
    };
    const fd_status status = launch_gradient_fold(fold, stream_);
    if (status != FD_OK) return status;

    ChainParameters parameters = chain_parameters();
    parameters.runs = segments(wave);
    parameters.run_count = workspace_.tiling.segment_slots;
    parameters.starts = workspace_.starts;
    parameters.start_stride = state_floats(p_);
    return launch_chain(parameters, bfloat16(), sm_count_, stream_);
  }

  fd_status gradients(int wave) {
    const int64_t heads_before = int64_t{wave} * workspace_.tiling.chunk_slots * p_.HV;
    const GradientParameters parameters{
        .q = q_,
        .k = k_,
        .do_ = do_,
        .dq = dq_,
        .dk = dk_,
        .dv = dv_,
        .has_do = args_.do_.data != nullptr,
        .has_dq = args_.dq.data != nullptr,
        .has_dk = args_.dk.data != nullptr,
        .gates = gates_,
        .sequences = sequences_,
        .dg = View(args_.dg, p_.gate_dtype),
        .dbeta = View(args_.dbeta, p_.beta_dtype),
        .gate_sums = p_.gate == FD_GATE_RAW ? workspace_.gate_sums + heads_before : nullptr,
        .chunks = chunks(wave),
        .scratch = workspace_.scratch,
        .slots = workspace_.tiling.chunk_slots,
        .heads = heads(),
        .l2norm = p_.qk_l2norm,
        .scale = static_cast<float>(p_.scale),
        .runs = runs_,
        .run_slots = runs_ > 1 ? SEGMENT_CHUNKS : workspace_.tiling.chunk_slots,
    };
    return launch_gradients(parameters, bfloat16(), sm_count_, stream_);
  }

  fd_status finish() {
    const FinishParameters parameters{
        .sequences = sequences_,
        .dq = View(args_.dq, p_.dtype),
        .dk = View(args_.dk, p_.dtype),
        .dv = View(args_.dv, p_.dtype),
        .dg = View(args_.dg, p_.gate_dtype),
        .dbeta = View(args_.dbeta, p_.beta_dtype),
        .dA_log = View(args_.dA_log, p_.A_log_dtype),
        .ddt_bias = View(args_.ddt_bias, p_.dt_bias_dtype),
        .gate_sums = workspace_.gate_sums,
        .sum_count = int64_t{workspace_.tiling.waves} * workspace_.tiling.chunk_slots,
        .heads = heads(),
        .value_heads = static_cast<int>(p_.HV),
        .values = static_cast<int>(p_.V),
    };
    return launch_finish(parameters, sm_count_, stream_);
  }

  const fd_backward_args& args_;
  const fd_problem& p_;
  const Workspace workspace_;
  const Sequences sequences_;
  const Gates gates_;
  const Pool initial_;
  const int sm_count_;
  void* const stream_;
  int runs_ = 1;       // see GradientParameters
  bool full_ = false;  // see ChainParameters
  CUtensorMap q_{}, k_{}, v_{}, do_{}, dq_{}, dk_{}, dv_{};
};

}  // namespace

// No sequence has a second segment if none can be longer than one.
std::size_t saved_bytes(const fd_problem& p) {
  return p.T <= SEGMENT ? 0 : static_cast<std::size_t>(saved_rows(p.B * p.T) * p.HV * p.V * p.K) * sizeof(float);
}

std::size_t backward_workspace(const fd_problem& p) {
  return std::max(Workspace(p, true, nullptr).bytes, Workspace(p, false, nullptr).bytes);
}

fd_status run_backward(const fd_backward_args& args, void* workspace, int sm_count, void* stream) {
  return Backward(args, workspace, sm_count, stream).run();
}

}  // namespace flashdelta::cuda
