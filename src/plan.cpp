#include "plan.hpp"

#include "check.hpp"

namespace flashdelta {

const Backend& choose_backend(Operation operation, const fd_problem& problem, std::span<const Backend* const> candidates) {
  std::string reasons;
  for (const Backend* backend : candidates) {
    if (backend->device != problem.device) continue;
    if (problem.backend != FD_BACKEND_AUTO && problem.backend != backend->id) continue;
    std::string reason = backend->unavailable();
    if (reason.empty() && !backend->verified && problem.backend != backend->id) {
      reason = "not verified on this hardware yet, so it must be asked for by name";
    }
    if (reason.empty()) reason = backend->unsupported(operation, problem);
    if (reason.empty()) return *backend;
    reasons += std::string(reasons.empty() ? "" : "; ") + backend->name + ": " + reason;
  }
  if (reasons.empty()) {
    reasons = "none is compiled in for device " + std::to_string(problem.device) + " and backend " +
              std::to_string(problem.backend);
  }
  refuse(FD_UNSUPPORTED, "no backend serves this problem (", reasons, ")");
}

}  // namespace flashdelta
