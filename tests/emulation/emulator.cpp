// Fibres switch by _longjmp between stacks, which the checks of that macro refuse. (swapcontext makes a system call each
// time.)
#undef _FORTIFY_SOURCE
#include "tests/emulation/emulator.hpp"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#include "tests/emulation/asynchrony.hpp"

namespace flashdelta::emulation {

Block block;
std::uint32_t seed = 1;

namespace {

constexpr std::size_t STACK_BYTES = 128 * 1024;

struct Fibre {
  ucontext_t context;  // where it starts
  jmp_buf place;       // where it goes on
  bool started = false;
  const unsigned* word = nullptr;  // waits while *word == value; null: does not wait
  unsigned value = 0;
  bool ended = false;

  bool ready() const { return !ended && (word == nullptr || *word != value); }
};

jmp_buf scheduler;
std::array<Fibre, MAX_THREADS> fibres;
const std::function<void()>* program;
std::string failure;
Schedule schedule_now;
bool newest_first;
std::mt19937 random_numbers;

struct Work {
  Kind kind;
  std::function<void()> run;
};
std::vector<Work> to_do;  // in the order in which it was given

Fibre& current() { return fibres[static_cast<std::size_t>(block.thread)]; }

void leave() {
  if (_setjmp(current().place) == 0) _longjmp(scheduler, 1);
}

void resume(Fibre& fibre) {
  if (_setjmp(scheduler) != 0) return;  // it left
  if (fibre.started) _longjmp(fibre.place, 1);
  fibre.started = true;
  setcontext(&fibre.context);
}

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

// Does piece `i` of what is to do.
void work(std::size_t i) {
  const Work piece = std::move(to_do[i]);
  to_do.erase(to_do.begin() + static_cast<std::ptrdiff_t>(i));
  block.thread = -1;
  piece.run();
}

std::size_t below(std::size_t n) { return random_numbers() % n; }

void work_when_all_wait() {
  std::size_t best = 0;
  if (chance(2)) {
    best = below(to_do.size());
  } else {
    for (std::size_t i = 1; i < to_do.size(); ++i) {
      if (newest_first ? to_do[i].kind >= to_do[best].kind : to_do[i].kind < to_do[best].kind) best = i;
    }
  }
  work(best);
}

bool all_ended() {
  return std::all_of(fibres.begin(), fibres.begin() + block.threads, [](const Fibre& f) { return f.ended; });
}

}  // namespace

void run_block(int threads, Schedule schedule, const std::function<void()>& body,
               const std::function<void(int thread)>& resumed, unsigned number) {
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

  const auto count = static_cast<std::size_t>(threads);
  schedule_now = schedule;
  random_numbers.seed(seed * 0x9e3779b9u + number);
  const bool backward = schedule == Schedule::backward, early = chance(2);
  newest_first = backward || chance(2);
  // A warp that goes on when all others wait: one of the first four in half of the blocks, since these have roles of their
  // own.
  const std::size_t slow_warp = below(chance(2) ? std::min<std::size_t>(4, count / WARP) : count / WARP);
  const unsigned slow = chance(4) || schedule != Schedule::shuffled ? 0 : 1u << slow_warp;
  bool slow_turn = false;
  to_do.clear();
  reset_asynchrony();
  for (bool any = true; any;) {
    any = false;
    bool slow_waits = false;
    // In this round: the first thread, the step to the next one modulo their number, and warps that are held back.
    std::size_t first = backward ? count - 1 : 0, step = backward ? count - 1 : 1;
    unsigned held = 0;
    if (schedule == Schedule::shuffled) {
      constexpr std::array<std::size_t, 8> STEPS = {1, 17, 19, 23, 29, 31, 37, 41};  // coprime to all numbers of threads
      first = below(count);
      step = STEPS[below(STEPS.size())];
      held = random_numbers();
      held &= random_numbers();  // a quarter of them
      while (early && !to_do.empty() && chance(4)) work(below(to_do.size()));
    }
    for (std::size_t i = 0; i < count; ++i) {
      Fibre& fibre = fibres[(first + i * step) % count];
      const int thread = static_cast<int>(&fibre - fibres.data());
      if (!fibre.ready()) continue;
      if (!slow_turn && (slow >> thread / WARP & 1) != 0) {
        slow_waits = true;
        continue;
      }
      any = true;
      if ((held >> thread / WARP & 1) != 0) continue;
      fibre.word = nullptr;
      block.thread = thread;
      resumed(thread);
      resume(fibre);
      if (!failure.empty()) throw std::runtime_error("thread " + std::to_string(thread) + ": " + failure);
    }
    slow_turn = false;
    if (!any && to_do.empty() && slow_waits) {
      any = slow_turn = true;
    } else if (!any && !to_do.empty()) {
      if (all_ended() && std::any_of(to_do.begin(), to_do.end(), [](const Work& w) { return w.kind <= Kind::store; }))
        throw std::runtime_error("the block ended while its shared memory was in use");
      work_when_all_wait();
      any = true;
    }
  }
  const std::string waiting = who_waits();
  if (!waiting.empty()) throw std::runtime_error("nobody can go on; these warps wait:" + waiting);
  block.thread = -1;
  check_warpgroups();
}

void later(Kind kind, std::function<void()> run) { to_do.push_back({kind, std::move(run)}); }

bool chance(unsigned one_in) { return schedule_now == Schedule::shuffled && random_numbers() % one_in == 0; }

void pause() {
  unsigned gone_by = 0;
  later(Kind::pause, [&gone_by] { gone_by = 1; });
  wait_while(gone_by, 0);
}

void fault(const std::string& what) {
  if (block.thread < 0) throw std::runtime_error(what);
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
