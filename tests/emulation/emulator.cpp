#include "tests/emulation/emulator.hpp"

#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

namespace flashdelta::emulation {

Block block;

namespace {

constexpr std::size_t STACK_BYTES = 128 * 1024;

struct Fibre {
  ucontext_t context;
  const unsigned* word = nullptr;  // waits while *word == value; null: does not wait
  unsigned value = 0;
  bool ended = false;

  bool ready() const { return !ended && (word == nullptr || *word != value); }
};

ucontext_t scheduler;
std::array<Fibre, MAX_THREADS> fibres;
const std::function<void()>* program;
std::string failure;

Fibre& current() { return fibres[static_cast<std::size_t>(block.thread)]; }

void leave() { swapcontext(&current().context, &scheduler); }

void start() {
  (*program)();
  current().ended = true;
  leave();
}

std::string who_waits() {
  std::string list;
  for (int warp = 0; warp < block.threads / WARP; ++warp) {
    const auto first = fibres.begin() + warp * WARP;
    const auto waiting = std::count_if(first, first + WARP, [](const Fibre& f) { return !f.ended; });
    if (waiting > 0) list += " " + std::to_string(warp) + " (" + std::to_string(waiting) + " lanes)";
  }
  return list;
}

}  // namespace

void run_block(int threads, Schedule schedule, const std::function<void()>& body,
               const std::function<void(int thread)>& resumed) {
  static const auto stacks = std::make_unique_for_overwrite<char[]>(MAX_THREADS * STACK_BYTES);
  if (threads < 1 || threads > MAX_THREADS || threads % WARP != 0) throw std::runtime_error("no such block");
  block = {};
  block.threads = threads;
  program = &body;
  failure.clear();
  for (int i = 0; i < threads; ++i) {
    Fibre& fibre = fibres[static_cast<std::size_t>(i)];
    fibre = {};
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = stacks.get() + static_cast<std::size_t>(i) * STACK_BYTES;
    fibre.context.uc_stack.ss_size = STACK_BYTES;
    fibre.context.uc_link = nullptr;
    makecontext(&fibre.context, start, 0);
  }

  std::vector<int> order(static_cast<std::size_t>(threads));
  std::iota(order.begin(), order.end(), 0);
  if (schedule == Schedule::backward) std::reverse(order.begin(), order.end());
  std::mt19937 random(1);
  for (bool any = true; any;) {
    any = false;
    if (schedule == Schedule::shuffled) std::shuffle(order.begin(), order.end(), random);
    for (const int thread : order) {
      Fibre& fibre = fibres[static_cast<std::size_t>(thread)];
      if (!fibre.ready()) continue;
      any = true;
      fibre.word = nullptr;
      block.thread = thread;
      resumed(thread);
      swapcontext(&scheduler, &fibre.context);
      if (!failure.empty()) throw std::runtime_error("thread " + std::to_string(thread) + ": " + failure);
    }
  }
  const std::string waiting = who_waits();
  if (!waiting.empty()) throw std::runtime_error("nobody can go on; these warps wait:" + waiting);
}

void fault(const std::string& what) {
  failure = what;
  while (true) leave();  // run_block throws and never comes back
}

void wait_while(const unsigned& word, unsigned value) {
  current().word = &word;
  current().value = value;
  leave();
}

void gather(Gathering& gathering, int threads) {
  if (++gathering.arrived < threads) {
    wait_while(gathering.generation, gathering.generation);
    return;
  }
  gathering.arrived = 0;
  ++gathering.generation;
}

Barrier& barrier_at(std::uint32_t address) {
  if (address % 8 != 0 || address >= SHARED_BYTES) fault("no barrier can lie at " + std::to_string(address));
  return block.barriers[address / 8];
}

namespace {

void end_phase_if_complete(Barrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.pending = barrier.arrivals;
}

}  // namespace

void arrive(Barrier& barrier, int expected_bytes) {
  if (barrier.pending == 0) fault("an arrival too many at a barrier");
  barrier.bytes += expected_bytes;
  --barrier.pending;
  end_phase_if_complete(barrier);
}

void copied(Barrier& barrier, int bytes) {
  barrier.bytes -= bytes;
  end_phase_if_complete(barrier);
}

}  // namespace flashdelta::emulation
