// The C entry points: read the structs, check, choose a backend, run it. Nothing is thrown past them.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "check.hpp"
#include "plan.hpp"

namespace flashdelta {
namespace {

thread_local std::string last_error;

constexpr std::size_t workspace_alignment = 256;

const Backend* const all_backends[] = {
#if defined(FLASHDELTA_CUDA)
    &sm90_backend,
    &cuda_backend,
#endif
    &cpu_backend,
    &reference_backend,
};

// Runs `body` and turns whatever it throws into a status and a message that starts with the function's name.
template <typename Body>
fd_status guarded(const char* function, Body&& body) noexcept {
  try {
    const fd_status status = body();
    if (status != FD_OK) return fail(status, std::string(function) + ": " + last_error);
    return FD_OK;
  } catch (const Refusal& refusal) {
    return fail(refusal.status, std::string(function) + ": " + refusal.message);
  } catch (const std::bad_alloc&) {
    return fail(FD_OUT_OF_MEMORY, std::string(function) + ": out of host memory");
  }
}

template <typename Result>
void require(const Result* result, const char* name) {
  if (result == nullptr) refuse(FD_INVALID, name, " is null");
}

fd_status query_backend(const char* function, Operation operation, const fd_problem* problem, fd_backend* backend) {
  return guarded(function, [&] {
    require(backend, "backend");
    *backend = choose_backend(operation, normalise(operation, read(problem)), backends()).id;
    return FD_OK;
  });
}

fd_status query_workspace(const char* function, Operation operation, const fd_problem* problem, std::size_t* bytes) {
  return guarded(function, [&] {
    require(bytes, "bytes");
    const fd_problem normal = normalise(operation, read(problem));
    *bytes = choose_backend(operation, normal, backends()).workspace(operation, normal);
    return FD_OK;
  });
}

void check_workspace(const void* workspace, std::size_t got, std::size_t needed) {
  if (got < needed) refuse(FD_INVALID, "workspace has ", got, " bytes; needs ", needed);
  if (needed > 0 && workspace == nullptr) refuse(FD_INVALID, "workspace is null; needs ", needed, " bytes");
  if (needed > 0 && reinterpret_cast<std::uintptr_t>(workspace) % workspace_alignment != 0) {
    refuse(FD_INVALID, "workspace is not aligned to ", workspace_alignment, " bytes");
  }
}

void check_saved(const void* saved, std::size_t got, std::size_t needed) {
  if (saved == nullptr && got != 0) refuse(FD_INVALID, "saved is null, but saved_bytes is ", got);
  if (saved != nullptr && got < needed) refuse(FD_INVALID, "saved has ", got, " bytes; needs ", needed);
}

// What the three operations share: structs read, problem normalised, backend chosen, buffers and stream checked.
template <typename Args>
struct Prepared {
  Args args;
  fd_problem problem;
  bool packed;
  const Backend& backend;
  Buffer workspace;

  Prepared(Operation operation, const Args* theirs, const void* data, std::size_t bytes, const void* stream)
      : args(read(theirs)), problem(read(args.problem)), packed(problem.N > 0), backend(choose(operation)) {
    const std::size_t needed = backend.workspace(operation, problem);
    check_workspace(data, bytes, needed);
    workspace = {"workspace", data, needed, true};
    if (problem.device == FD_CPU && stream != nullptr) refuse(FD_INVALID, "stream is given; must be null on the CPU");
    args.problem = &problem;
  }
  Prepared(const Prepared&) = delete;
  Prepared& operator=(const Prepared&) = delete;

 private:
  const Backend& choose(Operation operation) {
    problem = normalise(operation, problem);
    return choose_backend(operation, problem, backends());
  }
};

}  // namespace

std::span<const Backend* const> backends() { return all_backends; }

fd_status fail(fd_status status, std::string message) {
  last_error = std::move(message);
  return status;
}

}  // namespace flashdelta

using namespace flashdelta;

int32_t fd_version(void) { return FD_VERSION_MAJOR * 10000 + FD_VERSION_MINOR * 100 + FD_VERSION_PATCH; }

const char* fd_last_error(void) { return last_error.c_str(); }

const char* fd_status_name(fd_status status) {
  switch (status) {
    case FD_OK: return "FD_OK";
    case FD_INVALID: return "FD_INVALID";
    case FD_UNSUPPORTED: return "FD_UNSUPPORTED";
    case FD_DEVICE_ERROR: return "FD_DEVICE_ERROR";
    case FD_OUT_OF_MEMORY: return "FD_OUT_OF_MEMORY";
    default: return "unknown status";
  }
}

int32_t fd_backend_count(void) { return static_cast<int32_t>(backends().size()); }

fd_status fd_backend_get(int32_t i, fd_backend_description* description) {
  return guarded("fd_backend_get", [&] {
    require(description, "description");
    const std::size_t size = description->size;
    if (size < sizeof(size)) refuse(FD_INVALID, "description.size is ", size, "; must be ", sizeof(fd_backend_description));
    if (i < 0 || i >= fd_backend_count()) refuse(FD_INVALID, "i is ", i, "; must be in [0, ", fd_backend_count(), ")");
    const Backend& backend = *backends()[static_cast<std::size_t>(i)];
    // Built once for each backend; a later call finds the same strings.
    static const std::vector<std::pair<bool, std::string>> details = [] {
      std::vector<std::pair<bool, std::string>> all;
      for (const Backend* each : backends()) {
        const std::string reason = each->unavailable();
        all.emplace_back(reason.empty(), reason.empty() ? each->description() : reason);
      }
      return all;
    }();
    const auto& [available, detail] = details[static_cast<std::size_t>(i)];
    const fd_backend_description full{size, backend.id, backend.device, available ? 1 : 0, 0, backend.name, detail.c_str()};
    std::memcpy(description, &full, std::min(size, sizeof(full)));
    return FD_OK;
  });
}

fd_status fd_forward_backend(const fd_problem* problem, fd_backend* backend) {
  return query_backend(__func__, Operation::forward, problem, backend);
}

fd_status fd_backward_backend(const fd_problem* problem, fd_backend* backend) {
  return query_backend(__func__, Operation::backward, problem, backend);
}

fd_status fd_step_backend(const fd_problem* problem, fd_backend* backend) {
  return query_backend(__func__, Operation::step, problem, backend);
}

fd_status fd_forward_workspace(const fd_problem* problem, size_t* bytes) {
  return query_workspace(__func__, Operation::forward, problem, bytes);
}

fd_status fd_backward_workspace(const fd_problem* problem, size_t* bytes) {
  return query_workspace(__func__, Operation::backward, problem, bytes);
}

fd_status fd_step_workspace(const fd_problem* problem, size_t* bytes) {
  return query_workspace(__func__, Operation::step, problem, bytes);
}

fd_status fd_forward_saved(const fd_problem* problem, size_t* bytes) {
  return guarded(__func__, [&] {
    require(bytes, "bytes");
    const fd_problem normal = normalise(Operation::forward, read(problem));
    *bytes = choose_backend(Operation::forward, normal, backends()).saved(normal);
    return FD_OK;
  });
}

fd_status fd_forward(const fd_forward_args* args, void* workspace, size_t workspace_bytes, void* stream) {
  return guarded(__func__, [&] {
    Prepared<fd_forward_args> call(Operation::forward, args, workspace, workspace_bytes, stream);
    const std::size_t saved_bytes = call.backend.saved(call.problem);
    check_saved(call.args.saved, call.args.saved_bytes, saved_bytes);
    check(call.args, call.packed, {"saved", call.args.saved, saved_bytes, true}, call.workspace);
    return call.backend.forward(call.args, workspace, stream);
  });
}

fd_status fd_backward(const fd_backward_args* args, void* workspace, size_t workspace_bytes, void* stream) {
  return guarded(__func__, [&] {
    Prepared<fd_backward_args> call(Operation::backward, args, workspace, workspace_bytes, stream);
    const std::size_t saved_bytes = call.backend.saved(call.problem);
    check_saved(call.args.saved, call.args.saved_bytes, saved_bytes);
    check(call.args, call.packed, {"saved", call.args.saved, saved_bytes, false}, call.workspace);
    return call.backend.backward(call.args, workspace, stream);
  });
}

fd_status fd_step(const fd_step_args* args, void* workspace, size_t workspace_bytes, void* stream) {
  return guarded(__func__, [&] {
    Prepared<fd_step_args> call(Operation::step, args, workspace, workspace_bytes, stream);
    check(call.args, call.packed, call.workspace);
    return call.backend.step(call.args, workspace, stream);
  });
}
