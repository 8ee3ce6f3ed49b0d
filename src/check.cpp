#include "check.hpp"

#include <omp.h>
#include <pthread.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "dtype.hpp"

namespace flashdelta {
namespace {

constexpr std::int64_t max_dimension = INT64_C(0x7fffffff);
constexpr std::size_t max_struct_bytes = 4096;  // far more than any version will need; more is a size never set
constexpr std::int64_t max_tensor_bytes = INT64_C(1) << 60;
constexpr int max_threads = 1024;

// A forked child's copy of the OpenMP runtime has lost its threads and would wait for them for ever.
std::atomic<bool> forked{false};

// Runs when the library is loaded.
const int fork_is_noticed = pthread_atfork(nullptr, nullptr, [] { forked.store(true, std::memory_order_relaxed); });

template <typename Struct>
Struct read_struct(const Struct* theirs, const char* name) {
  if (theirs == nullptr) refuse(FD_INVALID, name, " is null");
  const std::size_t size = theirs->size;
  if (size < sizeof(size) || size > max_struct_bytes) {
    refuse(FD_INVALID, name, ".size is ", size, "; must be the size of the struct, ", sizeof(Struct));
  }
  const auto* bytes = reinterpret_cast<const unsigned char*>(theirs);
  for (std::size_t i = sizeof(Struct); i < size; ++i) {
    if (bytes[i] != 0) {
      refuse(FD_UNSUPPORTED, name, " has a member at byte ", i, " that this version, ", FD_VERSION_MAJOR, ".",
             FD_VERSION_MINOR, ".", FD_VERSION_PATCH, ", does not know");
    }
  }
  Struct ours{};
  std::memcpy(&ours, theirs, std::min(size, sizeof(Struct)));
  ours.size = sizeof(Struct);
  return ours;
}

void check_range(const char* name, std::int64_t got, std::int64_t low, std::int64_t high) {
  if (got < low || got > high) refuse(FD_INVALID, name, " is ", got, "; must be in [", low, ", ", high, "]");
}

void check_enum(const char* name, std::int32_t got, std::int32_t last) {
  if (got < 0 || got > last) refuse(FD_UNSUPPORTED, name, " is ", got, "; this version knows 0 to ", last);
}

void check_dimensions(const fd_problem& p) {
  const std::pair<const char*, std::int64_t> from_zero[] = {
      {"B", p.B},
      {"T", p.T},
      {"N", p.N},
      {"initial_rows", p.initial_rows},
      {"final_rows", p.final_rows},
      {"checkpoint_rows", p.checkpoint_rows},
      {"initial_slots", p.initial_slots},
      {"final_slots", p.final_slots},
      {"checkpoint_slots", p.checkpoint_slots},
      {"checkpoint_interval", p.checkpoint_interval},
  };
  for (const auto& [name, got] : from_zero) check_range(name, got, 0, max_dimension);
  check_range("H", p.H, 1, max_dimension);
  check_range("HV", p.HV, 1, max_dimension);
  check_range("K", p.K, 1, max_dimension);
  check_range("V", p.V, 1, max_dimension);
  check_range("threads", p.threads, 0, max_threads);
  if (p.HV % p.H != 0) {
    refuse(FD_INVALID, "v has ", p.HV, " heads (HV); must be a multiple of q's ", p.H, " (H)");
  }
  if (p.N > 0 && p.B != 1) refuse(FD_INVALID, "B is ", p.B, "; must be 1 for packed sequences (N is ", p.N, ")");
}

void check_options(const fd_problem& p) {
  check_enum("device", p.device, FD_CUDA);
  check_enum("backend", p.backend, FD_BACKEND_SM90);
  const std::pair<const char*, fd_dtype> dtypes[] = {
      {"dtype", p.dtype},
      {"gate_dtype", p.gate_dtype},
      {"beta_dtype", p.beta_dtype},
      {"A_log_dtype", p.A_log_dtype},
      {"dt_bias_dtype", p.dt_bias_dtype},
      {"initial_dtype", p.initial_dtype},
      {"final_dtype", p.final_dtype},
      {"checkpoint_dtype", p.checkpoint_dtype},
  };
  for (const auto& [name, got] : dtypes) check_enum(name, got, FD_FLOAT64);
  check_enum("cu_seqlens_dtype", p.cu_seqlens_dtype, FD_INT32);
  check_enum("index_dtype", p.index_dtype, FD_INT32);
  check_enum("gate", p.gate, FD_GATE_LOG_PER_KEY);
  check_enum("beta", p.beta, FD_BETA_LOGIT);
  check_enum("qk_l2norm", p.qk_l2norm, 1);
  check_enum("allow_neg_eigval", p.allow_neg_eigval, 1);
  check_enum("state_v_first", p.state_v_first, 1);
  check_enum("context_parallel", p.context_parallel, FD_CONTEXT_OFF);
  check_enum("reserved", p.reserved, 0);
  if (p.workspace_limit < 0) refuse(FD_INVALID, "workspace_limit is ", p.workspace_limit, "; must be >= 0");
  if (p.gate == FD_GATE_LOG_PER_KEY) refuse(FD_UNSUPPORTED, "gate is FD_GATE_LOG_PER_KEY; no backend has it");
  if (p.allow_neg_eigval != 0 && p.beta != FD_BETA_LOGIT) {
    refuse(FD_INVALID,
           "allow_neg_eigval doubles sigmoid(beta); must come with FD_BETA_LOGIT (plain values up to 2 need no flag)");
  }
  if (!std::isfinite(p.scale)) refuse(FD_INVALID, "scale is ", p.scale, "; must be finite");
  if (!std::isfinite(p.l2norm_eps) || p.l2norm_eps < 0) {
    refuse(FD_INVALID, "l2norm_eps is ", p.l2norm_eps, "; must be finite and >= 0");
  }
  if (std::isnan(p.context_bound) || p.context_bound >= 1) {
    refuse(FD_INVALID, "context_bound is ", p.context_bound, "; must be below 1");
  }
}

void check_operation(Operation operation, const fd_problem& p) {
  if (operation != Operation::step && (p.initial_slots > 0 || p.final_slots > 0)) {
    refuse(FD_UNSUPPORTED, "initial_slots and final_slots are ", p.initial_slots, " and ", p.final_slots,
           "; only fd_step reads and writes several states per sequence");
  }
  if (p.checkpoint_interval == 0) return;
  if (operation == Operation::step)
    refuse(FD_UNSUPPORTED, "checkpoint_interval is ", p.checkpoint_interval, "; fd_step has none");
  if (p.checkpoint_interval % 64 != 0) {
    refuse(FD_INVALID, "checkpoint_interval is ", p.checkpoint_interval, "; must be a multiple of 64");
  }
  if (p.checkpoint_slots == 0) refuse(FD_INVALID, "checkpoint_slots is 0; must say how many columns checkpoint_index has");
}

// What the checks know of one tensor: the bytes it spans, and whether it fills all of them.
struct Extent {
  const char* name;
  const unsigned char* begin;
  const unsigned char* end;
  bool dense;
  bool output;
  const fd_tensor* pool;  // null: not a pool of states
  fd_dtype dtype;

  bool overlaps(const Extent& other) const { return begin < other.end && other.begin < end; }

  // States may be updated in place; `Rows` then compares row by row.
  bool same_pool(const Extent& other) const {
    return pool != nullptr && other.pool != nullptr && begin == other.begin && dtype == other.dtype &&
           std::equal(pool->stride, pool->stride + 4, other.pool->stride);
  }
};

struct Dimension {
  const char* name;
  std::int64_t size;
};

enum class Role { input, output };
enum class Presence { required, optional };
enum class Kind { rows, scalars, states };  // rows and states have an innermost stride of 1

// The checks of one call: each tensor in turn, then the overlaps of all.
class Call {
 public:
  explicit Call(const fd_problem& problem) : p(problem) {}

  template <std::size_t rank>
  void tensor(const char* name, fd_tensor& t, const Dimension (&dimensions)[rank], fd_dtype dtype, Role role,
              Presence presence = Presence::required, Kind kind = Kind::rows) {
    std::int64_t count = 1;
    for (const Dimension& d : dimensions)
      count = count > max_tensor_bytes / std::max<std::int64_t>(d.size, 1) ? max_tensor_bytes : count * d.size;
    if (count >= max_tensor_bytes) refuse(FD_INVALID, name, " has more than 2^60 elements");
    const bool contiguous = std::all_of(t.stride, t.stride + rank, [](std::int64_t s) { return s == 0; });
    if (contiguous) {
      std::int64_t stride = 1;
      for (std::size_t i = rank; i-- > 0; stride *= dimensions[i].size) t.stride[i] = stride;
    }
    for (std::size_t i = rank; i < 4; ++i) t.stride[i] = 0;
    if (t.data == nullptr) {
      if (presence == Presence::required && count > 0) refuse(FD_INVALID, name, " is null");
      return;
    }
    if (count == 0) return;
    std::int64_t contiguous_stride = 1;
    for (std::size_t i = rank; i-- > 0; contiguous_stride *= dimensions[i].size) {
      if (dimensions[i].size == 1) t.stride[i] = contiguous_stride;
      if (t.stride[i] < 0) {
        refuse(FD_INVALID, name, " has stride ", t.stride[i], " in dimension ", i, " (", dimensions[i].name,
               "); must not be negative");
      }
    }
    if (kind != Kind::scalars && t.stride[rank - 1] != 1) {
      refuse(FD_INVALID, name, " has stride ", t.stride[rank - 1], " in its innermost dimension (",
             dimensions[rank - 1].name, "); must be 1");
    }
    if (reinterpret_cast<std::uintptr_t>(t.data) % size_of(dtype) != 0) {
      refuse(FD_INVALID, name, " is not aligned to its element size, ", size_of(dtype), " bytes");
    }
    __int128 last = 0;
    for (std::size_t i = 0; i < rank; ++i) last += static_cast<__int128>(dimensions[i].size - 1) * t.stride[i];
    if (last >= max_tensor_bytes) refuse(FD_INVALID, name, " spans more than 2^60 elements");
    if (role == Role::output) check_no_repeats(name, t, dimensions);
    const auto* begin = static_cast<const unsigned char*>(t.data);
    const std::size_t bytes = static_cast<std::size_t>(last + 1) * size_of(dtype);
    extents[extent_count++] = {
        name, begin, begin + bytes, last + 1 == count, role == Role::output, kind == Kind::states ? &t : nullptr, dtype};
  }

  // States [rows, HV, K, V], or [rows, HV, V, K] with state_v_first.
  void states(const char* name, fd_tensor& t, std::int64_t rows, fd_dtype dtype, Role role) {
    const Dimension P{"P", rows}, HV{"HV", p.HV}, K{"K", p.K}, V{"V", p.V};
    const bool v_first = p.state_v_first != 0;
    tensor(name, t, {P, HV, v_first ? V : K, v_first ? K : V}, dtype, role, Presence::optional, Kind::states);
  }

  // A tensor that no option reads.
  void expect(const char* name, const fd_tensor& t, bool wanted, const char* option) const {
    if (!wanted && t.data != nullptr) refuse(FD_INVALID, name, " is given, but ", option, " does not use it");
  }

  void buffer(const Buffer& buffer) {
    if (buffer.data == nullptr || buffer.bytes == 0) return;
    const auto* begin = static_cast<const unsigned char*>(buffer.data);
    extents[extent_count++] = {buffer.name, begin, begin + buffer.bytes, true, buffer.written, nullptr, FD_FLOAT32};
  }

  // An output may overlap nothing else, where that is certain: two strided views of one packed tensor only interleave.
  void check_overlaps() const {
    for (std::size_t i = 0; i < extent_count; ++i) {
      for (std::size_t j = 0; j < i; ++j) {
        const Extent &a = extents[j], &b = extents[i];
        const bool certain = (a.dense && b.dense) || a.begin == b.begin;
        if ((a.output || b.output) && certain && a.overlaps(b) && !a.same_pool(b)) {
          refuse(FD_INVALID, b.name, " overlaps ", a.name);
        }
      }
    }
  }

  const fd_problem& p;

 private:
  template <std::size_t rank>
  static void check_no_repeats(const char* name, const fd_tensor& t, const Dimension (&dimensions)[rank]) {
    std::array<std::size_t, rank> order{};
    for (std::size_t i = 0; i < rank; ++i) order[i] = i;
    std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return t.stride[a] < t.stride[b]; });
    std::int64_t reach = 0;  // offset of the last element of the dimensions seen so far
    for (const std::size_t i : order) {
      if (dimensions[i].size == 1) continue;
      if (t.stride[i] <= reach) {
        refuse(FD_INVALID, name, " has stride ", t.stride[i], " in dimension ", i, " (", dimensions[i].name,
               "), so that elements overlap; an output needs more than ", reach);
      }
      reach += (dimensions[i].size - 1) * t.stride[i];
    }
  }

  std::array<Extent, 24> extents{};  // at most 19: backward's 17 tensors, saved and workspace
  std::size_t extent_count = 0;
};

bool on_host(const fd_problem& p) { return p.device == FD_CPU; }

// cu_seqlens as far as the host can see them.
void check_sequences(const fd_problem& p, const void* cu_seqlens, bool packed) {
  if (!packed) {
    if (cu_seqlens != nullptr) refuse(FD_INVALID, "cu_seqlens is given, but N is 0; must be the number of packed sequences");
    return;
  }
  if (cu_seqlens == nullptr) refuse(FD_INVALID, "cu_seqlens is null, but N is ", p.N);
  if (!on_host(p)) return;
  std::int64_t previous = 0;
  for (std::int64_t n = 0; n <= p.N; ++n) {
    const std::int64_t end = load_index(cu_seqlens, p.cu_seqlens_dtype, n);
    if (n == 0 && end != 0) refuse(FD_INVALID, "cu_seqlens[0] is ", end, "; must be 0");
    if (end < previous)
      refuse(FD_INVALID, "cu_seqlens[", n, "] is ", end, "; must not be below cu_seqlens[", n - 1, "], ", previous);
    if (end > p.T) refuse(FD_INVALID, "cu_seqlens[", n, "] is ", end, "; must not be above T, ", p.T);
    previous = end;
  }
}

void check_index(const fd_problem& p, const char* name, fd_index& index, const char* tensor_name, const fd_tensor& tensor,
                 std::int64_t rows, std::int64_t slots) {
  if (index.data == nullptr) {
    if (slots > 0) refuse(FD_INVALID, name, " is null, but has ", slots, " slots");
    if (tensor.data != nullptr && rows < p.N) {
      refuse(FD_INVALID, tensor_name, " has ", rows, " rows; without ", name, " it needs one per sequence, ", p.N);
    }
    return;
  }
  if (tensor.data == nullptr) refuse(FD_INVALID, name, " is given without ", tensor_name);
  if (index.stride[0] == 0 && index.stride[1] == 0) {
    index.stride[0] = std::max<std::int64_t>(slots, 1);
    index.stride[1] = slots > 0 ? 1 : 0;
  }
  for (const std::int64_t stride : index.stride) {
    if (stride < 0) refuse(FD_INVALID, name, " has stride ", stride, "; must not be negative");
  }
  if (!on_host(p)) return;
  for (std::int64_t n = 0; n < p.N; ++n) {
    for (std::int64_t s = 0; s < std::max<std::int64_t>(slots, 1); ++s) {
      const std::int64_t row = load_index(index.data, p.index_dtype, n * index.stride[0] + s * index.stride[1]);
      if (row < -1 || row >= rows) {
        refuse(FD_INVALID, name, "[", n, ", ", s, "] is ", row, "; must be -1 or a row of ", tensor_name, ", which has ",
               rows);
      }
    }
  }
}

// One state that a call reads or writes, for the rule that written rows are distinct and read by their own sequence alone.
struct Row {
  const void* data;
  std::int64_t sequence;
  bool written;
  const char* name;
  std::int64_t index;

  // Writes first, so that each run of equal addresses starts with its write, if there is one.
  bool operator<(const Row& other) const {
    return data != other.data ? std::less<>()(data, other.data) : written && !other.written;
  }
};

class Rows {
 public:
  explicit Rows(const fd_problem& problem) : p(problem) {}

  void add(const char* name, const fd_tensor& t, fd_dtype dtype, const fd_index& index, std::int64_t slots, bool written) {
    if (t.data == nullptr) return;
    for (std::int64_t n = 0; n < p.N; ++n) {
      for (std::int64_t s = 0; s < std::max<std::int64_t>(slots, 1); ++s) {
        const std::int64_t row =
            index.data == nullptr ? n : load_index(index.data, p.index_dtype, n * index.stride[0] + s * index.stride[1]);
        if (row < 0) continue;
        const auto* data =
            static_cast<const unsigned char*>(t.data) + static_cast<std::size_t>(row * t.stride[0]) * size_of(dtype);
        rows.push_back({data, n, written, name, row});
      }
    }
  }

  void check() {
    std::sort(rows.begin(), rows.end());
    for (std::size_t i = 0, first = 0; i < rows.size(); ++i) {
      if (rows[i].data != rows[first].data) first = i;
      if (i == first || !rows[first].written) continue;
      if (rows[i].written) {
        refuse(FD_INVALID, "row ", rows[i].index, " of ", rows[i].name, " is written twice, for sequences ",
               rows[first].sequence, " and ", rows[i].sequence, "; written rows must be distinct");
      }
      if (rows[i].sequence != rows[first].sequence) {
        refuse(FD_INVALID, "row ", rows[i].index, " of ", rows[i].name, " is read by sequence ", rows[i].sequence,
               " but written by sequence ", rows[first].sequence);
      }
    }
  }

 private:
  const fd_problem& p;
  std::vector<Row> rows;
};

// The members that all three operations share, in the order of the structs.
template <typename Args>
void check_inputs(Call& call, Args& a, bool packed) {
  const fd_problem& p = call.p;
  const Dimension B{"B", p.B}, T{"T", p.T}, H{"H", p.H}, HV{"HV", p.HV}, K{"K", p.K}, V{"V", p.V};
  call.tensor("q", a.q, {B, T, H, K}, p.dtype, Role::input);
  call.tensor("k", a.k, {B, T, H, K}, p.dtype, Role::input);
  call.tensor("v", a.v, {B, T, HV, V}, p.dtype, Role::input);
  call.expect("g", a.g, p.gate != FD_GATE_NONE, "FD_GATE_NONE");
  if (p.gate != FD_GATE_NONE)
    call.tensor("g", a.g, {B, T, HV}, p.gate_dtype, Role::input, Presence::required, Kind::scalars);
  call.expect("beta", a.beta, p.beta != FD_BETA_ONE, "FD_BETA_ONE");
  if (p.beta != FD_BETA_ONE) {
    call.tensor("beta", a.beta, {B, T, HV}, p.beta_dtype, Role::input, Presence::required, Kind::scalars);
  }
  call.expect("A_log", a.A_log, p.gate == FD_GATE_RAW, "a gate other than FD_GATE_RAW");
  call.expect("dt_bias", a.dt_bias, p.gate == FD_GATE_RAW, "a gate other than FD_GATE_RAW");
  if (p.gate == FD_GATE_RAW) {
    call.tensor("A_log", a.A_log, {HV}, p.A_log_dtype, Role::input, Presence::required, Kind::scalars);
    call.tensor("dt_bias", a.dt_bias, {HV}, p.dt_bias_dtype, Role::input, Presence::optional, Kind::scalars);
  }
  check_sequences(p, a.cu_seqlens, packed);
  call.states("initial_state", a.initial_state, p.initial_rows, p.initial_dtype, Role::input);
  check_index(p, "initial_index", a.initial_index, "initial_state", a.initial_state, p.initial_rows, p.initial_slots);
}

template <typename Args>
void check_final_state(Call& call, Args& a) {
  const fd_problem& p = call.p;
  call.states("final_state", a.final_state, p.final_rows, p.final_dtype, Role::output);
  check_index(p, "final_index", a.final_index, "final_state", a.final_state, p.final_rows, p.final_slots);
}

}  // namespace

fd_problem read(const fd_problem* theirs) { return read_struct(theirs, "problem"); }
fd_forward_args read(const fd_forward_args* theirs) { return read_struct(theirs, "args"); }
fd_backward_args read(const fd_backward_args* theirs) { return read_struct(theirs, "args"); }
fd_step_args read(const fd_step_args* theirs) { return read_struct(theirs, "args"); }

fd_problem normalise(Operation operation, fd_problem p) {
  check_dimensions(p);
  check_options(p);
  check_operation(operation, p);
  if (p.N == 0) p.N = p.B;
  if (p.initial_rows == 0) p.initial_rows = p.N;
  if (p.final_rows == 0) p.final_rows = p.N;
  if (p.checkpoint_rows == 0) p.checkpoint_rows = p.N * p.checkpoint_slots;
  if (p.scale == 0) p.scale = 1 / std::sqrt(static_cast<double>(p.K));
  if (p.l2norm_eps == 0) p.l2norm_eps = 1e-6;
  if (p.context_bound == 0) p.context_bound = 0x1p-20;
  if (p.context_bound < 0) p.context_bound = 0;
  if (p.workspace_limit == 0) p.workspace_limit = int64_t{640} << 20;
  if (fork_is_noticed != 0 || forked.load(std::memory_order_relaxed)) p.threads = 1;
  if (p.threads == 0) p.threads = std::clamp(omp_get_max_threads(), 1, max_threads);
  return p;
}

void check(fd_forward_args& a, bool packed, const Buffer& saved, const Buffer& workspace) {
  Call call(*a.problem);
  const fd_problem& p = call.p;
  check_inputs(call, a, packed);
  call.tensor("o", a.o, {{"B", p.B}, {"T", p.T}, {"HV", p.HV}, {"V", p.V}}, p.dtype, Role::output);
  check_final_state(call, a);
  const bool checkpoints = p.checkpoint_interval > 0;
  call.expect("checkpoints", a.checkpoints, checkpoints, "checkpoint_interval 0");
  if (checkpoints) {
    call.states("checkpoints", a.checkpoints, p.checkpoint_rows, p.checkpoint_dtype, Role::output);
    if (p.N > 0 && (a.checkpoints.data == nullptr || a.checkpoint_index.data == nullptr)) {
      refuse(FD_INVALID, "checkpoint_interval is ", p.checkpoint_interval, "; needs checkpoints and checkpoint_index");
    }
  }
  check_index(p, "checkpoint_index", a.checkpoint_index, "checkpoints", a.checkpoints, p.checkpoint_rows,
              checkpoints ? p.checkpoint_slots : 0);
  call.buffer(saved);
  call.buffer(workspace);
  call.check_overlaps();
  if (!on_host(p)) return;
  Rows rows(p);
  rows.add("initial_state", a.initial_state, p.initial_dtype, a.initial_index, 0, false);
  rows.add("final_state", a.final_state, p.final_dtype, a.final_index, 0, true);
  rows.add("checkpoints", a.checkpoints, p.checkpoint_dtype, a.checkpoint_index, p.checkpoint_slots, true);
  rows.check();
}

void check(fd_backward_args& a, bool packed, const Buffer& saved, const Buffer& workspace) {
  Call call(*a.problem);
  const fd_problem& p = call.p;
  const Dimension B{"B", p.B}, T{"T", p.T}, H{"H", p.H}, HV{"HV", p.HV}, K{"K", p.K}, V{"V", p.V};
  check_inputs(call, a, packed);
  if (a.do_.data == nullptr && a.dfinal_state.data == nullptr && p.B > 0 && p.T > 0) {
    refuse(FD_INVALID, "do_ and dfinal_state are both null; one must be given");
  }
  call.tensor("do_", a.do_, {B, T, HV, V}, p.dtype, Role::input, Presence::optional);
  call.states("dfinal_state", a.dfinal_state, p.N, p.final_dtype, Role::input);
  call.tensor("dq", a.dq, {B, T, H, K}, p.dtype, Role::output, Presence::optional);
  call.tensor("dk", a.dk, {B, T, H, K}, p.dtype, Role::output, Presence::optional);
  call.tensor("dv", a.dv, {B, T, HV, V}, p.dtype, Role::output, Presence::optional);
  call.expect("dg", a.dg, p.gate != FD_GATE_NONE, "FD_GATE_NONE");
  call.tensor("dg", a.dg, {B, T, HV}, p.gate_dtype, Role::output, Presence::optional, Kind::scalars);
  call.expect("dbeta", a.dbeta, p.beta != FD_BETA_ONE, "FD_BETA_ONE");
  call.tensor("dbeta", a.dbeta, {B, T, HV}, p.beta_dtype, Role::output, Presence::optional, Kind::scalars);
  call.expect("dA_log", a.dA_log, p.gate == FD_GATE_RAW, "a gate other than FD_GATE_RAW");
  call.tensor("dA_log", a.dA_log, {HV}, p.A_log_dtype, Role::output, Presence::optional, Kind::scalars);
  call.expect("ddt_bias", a.ddt_bias, a.dt_bias.data != nullptr, "a call without dt_bias");
  call.tensor("ddt_bias", a.ddt_bias, {HV}, p.dt_bias_dtype, Role::output, Presence::optional, Kind::scalars);
  call.expect("dinitial_state", a.dinitial_state, a.initial_state.data != nullptr || p.N == 0,
              "a call without initial_state");
  call.states("dinitial_state", a.dinitial_state, p.N, p.initial_dtype, Role::output);
  call.buffer(saved);
  call.buffer(workspace);
  call.check_overlaps();
}

void check(fd_step_args& a, bool packed, const Buffer& workspace) {
  Call call(*a.problem);
  const fd_problem& p = call.p;
  check_inputs(call, a, packed);
  call.tensor("o", a.o, {{"B", p.B}, {"T", p.T}, {"HV", p.HV}, {"V", p.V}}, p.dtype, Role::output);
  check_final_state(call, a);
  if (a.accepted != nullptr && (a.initial_index.data == nullptr || p.initial_slots == 0)) {
    refuse(FD_INVALID, "accepted is given, but initial_index has no slots [N, S] to choose from");
  }
  call.buffer(workspace);
  call.check_overlaps();
  if (!on_host(p)) return;
  if (a.accepted != nullptr) {
    for (std::int64_t n = 0; n < p.N; ++n) {
      const std::int64_t count = load_index(a.accepted, p.index_dtype, n);
      if (count < 1 || count > p.initial_slots) {
        refuse(FD_INVALID, "accepted[", n, "] is ", count, "; must be in [1, ", p.initial_slots, "]");
      }
    }
  }
  Rows rows(p);
  rows.add("initial_state", a.initial_state, p.initial_dtype, a.initial_index, p.initial_slots, false);
  rows.add("final_state", a.final_state, p.final_dtype, a.final_index, p.final_slots, true);
  rows.check();
}

}  // namespace flashdelta
