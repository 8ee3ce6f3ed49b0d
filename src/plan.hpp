// Which backend serves a problem: a pure function of the problem, the operation and the list of backends.
#pragma once

#include "backend.hpp"

namespace flashdelta {

// The first backend of `candidates` that lies on the problem's device, is the one the problem names (if it names one), can
// run here, is verified (or named) and supports the operation; `problem` is in normal form. Refuses with every candidate's
// reason if there is none.
const Backend& choose_backend(Operation operation, const fd_problem& problem, std::span<const Backend* const> candidates);

}  // namespace flashdelta
