// flashdelta in C++20: the C ABI of flashdelta.h with results that carry their message. Header only; adds nothing to the
// ABI.
//
//     auto p = flashdelta::make<fd_problem>();   // all zero, size set: zero means absent or default
//     p.B = 1, p.T = 128, p.H = 2, ...
//     auto a = flashdelta::make<fd_forward_args>();
//     a.problem = &p;
//     a.q = flashdelta::tensor(q);               // a std::span, a std::vector, ...; contiguous unless strides are given
//     flashdelta::Workspace workspace;
//     if (auto done = flashdelta::forward(a, workspace); !done) puts(done.message().c_str());
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "flashdelta/flashdelta.h"

namespace flashdelta {

// A value, or the status and the message of the call that did not give one.
template <typename T = std::monostate>
class [[nodiscard]] Result {
 public:
  Result(T value) : value_(std::move(value)) {}

  // What a C call returned: `value` if it went well, else the thread's last error.
  Result(fd_status status, T value) : status_(status), value_(std::move(value)) {
    if (status != FD_OK) message_ = fd_last_error();
  }

  explicit operator bool() const { return status_ == FD_OK; }
  fd_status status() const { return status_; }
  const std::string& message() const { return message_; }  // empty if it went well

  // The value; only if it went well.
  const T& operator*() const { return value_; }
  const T* operator->() const { return &value_; }

 private:
  fd_status status_ = FD_OK;
  std::string message_;
  T value_;
};

using Done = Result<>;

// A struct of the C ABI, all members zero and `size` set.
template <typename Struct>
Struct make() {
  static_assert(std::is_same_v<decltype(Struct::size), std::size_t>, "a growable struct of flashdelta.h");
  Struct result{};
  result.size = sizeof(Struct);
  return result;
}

// A tensor over memory that the caller owns and keeps; strides in elements, all zero: contiguous.
template <typename Range>
fd_tensor tensor(Range&& range, const std::array<std::int64_t, 4>& stride = {}) {
  const std::span elements(range);
  using Element = std::remove_const_t<typename decltype(elements)::element_type>;
  return {const_cast<Element*>(elements.data()), {stride[0], stride[1], stride[2], stride[3]}};
}

// An index tensor, [N] or [N, S].
template <typename Range>
fd_index index(Range&& range, const std::array<std::int64_t, 2>& stride = {}) {
  const std::span elements(range);
  return {elements.data(), {stride[0], stride[1]}};
}

// Host memory for workspaces: grows to what a call needs and is kept for the next one.
class Workspace {
 public:
  static constexpr std::size_t kAlignment = 256;

  // At least `bytes` bytes, contents undefined; throws std::bad_alloc.
  std::span<std::byte> reserve(std::size_t bytes) {
    if (bytes > bytes_) {
      memory_.reset();
      bytes_ = 0;
      memory_.reset(static_cast<std::byte*>(::operator new (bytes, std::align_val_t{kAlignment})));
      bytes_ = bytes;
    }
    return {memory_.get(), bytes_};
  }

 private:
  struct Free {
    void operator()(std::byte* memory) const { ::operator delete (memory, std::align_val_t{kAlignment}); }
  };
  std::unique_ptr<std::byte, Free> memory_;
  std::size_t bytes_ = 0;
};

namespace detail {

template <typename T, typename Query>
Result<T> query(Query query, const fd_problem& problem) {
  T value{};
  const fd_status status = query(&problem, &value);
  return {status, value};
}

template <typename Args, typename Run>
Done run(Run run, const Args& args, std::span<std::byte> workspace, void* stream) {
  return {run(&args, workspace.data(), workspace.size(), stream), {}};
}

template <typename Args, typename Query, typename Run>
Done run_on_host(Query query, Run run, const Args& args, Workspace& workspace) {
  std::size_t bytes = 0;
  if (args.problem != nullptr) {  // else the call itself says so
    if (const fd_status status = query(args.problem, &bytes); status != FD_OK) return {status, {}};
  }
  return detail::run(run, args, workspace.reserve(bytes), nullptr);
}

}  // namespace detail

// Bytes of workspace, bytes of `saved`, and which backend serves; see flashdelta.h.
inline Result<std::size_t> forward_workspace(const fd_problem& p) {
  return detail::query<std::size_t>(fd_forward_workspace, p);
}
inline Result<std::size_t> backward_workspace(const fd_problem& p) {
  return detail::query<std::size_t>(fd_backward_workspace, p);
}
inline Result<std::size_t> step_workspace(const fd_problem& p) { return detail::query<std::size_t>(fd_step_workspace, p); }
inline Result<std::size_t> forward_saved(const fd_problem& p) { return detail::query<std::size_t>(fd_forward_saved, p); }
inline Result<fd_backend> forward_backend(const fd_problem& p) { return detail::query<fd_backend>(fd_forward_backend, p); }
inline Result<fd_backend> backward_backend(const fd_problem& p) { return detail::query<fd_backend>(fd_backward_backend, p); }
inline Result<fd_backend> step_backend(const fd_problem& p) { return detail::query<fd_backend>(fd_step_backend, p); }

// Run on any device, with the caller's workspace and stream.
inline Done forward(const fd_forward_args& args, std::span<std::byte> workspace, void* stream = nullptr) {
  return detail::run(fd_forward, args, workspace, stream);
}
inline Done backward(const fd_backward_args& args, std::span<std::byte> workspace, void* stream = nullptr) {
  return detail::run(fd_backward, args, workspace, stream);
}
inline Done step(const fd_step_args& args, std::span<std::byte> workspace, void* stream = nullptr) {
  return detail::run(fd_step, args, workspace, stream);
}

// Run on the CPU, with as much of `workspace` as it takes.
inline Done forward(const fd_forward_args& args, Workspace& workspace) {
  return detail::run_on_host(fd_forward_workspace, fd_forward, args, workspace);
}
inline Done backward(const fd_backward_args& args, Workspace& workspace) {
  return detail::run_on_host(fd_backward_workspace, fd_backward, args, workspace);
}
inline Done step(const fd_step_args& args, Workspace& workspace) {
  return detail::run_on_host(fd_step_workspace, fd_step, args, workspace);
}

// The list of backends, best first.
inline std::vector<fd_backend_description> backends() {
  std::vector<fd_backend_description> list(static_cast<std::size_t>(fd_backend_count()), make<fd_backend_description>());
  for (std::size_t i = 0; i < list.size(); ++i) fd_backend_get(static_cast<std::int32_t>(i), &list[i]);
  return list;
}

}  // namespace flashdelta
