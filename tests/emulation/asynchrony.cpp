#include "tests/emulation/asynchrony.hpp"

#include <algorithm>
#include <bit>
#include <deque>
#include <functional>
#include <list>
#include <string>
#include <utility>
#include <vector>

namespace flashdelta::emulation {
namespace {

constexpr std::uint32_t POISON = 0xff80dead;  // a NaN that no operation returns: what comes out has another bit set

// Accumulators of one warp that multiplications in flight have.
struct InFlight {
  Accumulators d;
  std::vector<float> values;  // [lane][count]
  std::size_t count;
  int multiplications = 0;
};

struct Warp {
  std::deque<std::pair<Multiplication, InFlight*>> queue;  // in order
  std::list<InFlight> in_flight;
  unsigned issued = 0, finished = 0;   // multiplications
  std::vector<unsigned> group_ends;    // how many were issued when a group was committed
  unsigned groups_finished = 0;        // of the groups committed
  std::uint64_t matrices = 0;          // a hash of all operands in shared memory so far
  std::array<unsigned, WARP> commits;  // by each lane
  std::array<bool, WARP> fenced;       // since the last commit

  void count_groups() {
    while (groups_finished < group_ends.size() && group_ends[groups_finished] <= finished) ++groups_finished;
  }
};

struct StoreGroup {
  int unread = 0, unwritten = 0;
};
struct Stores {
  std::deque<StoreGroup> groups;  // the last one is not committed
  unsigned changes = 0;
};

// Who wrote two bytes of shared memory, and after how many of its fences.
struct Writer {
  int thread = -1;
  std::uint32_t fences = 0;
};

struct State {
  std::array<Warp, MAX_WARPS> warps{};
  std::array<Stores, MAX_THREADS> stores{};
  std::array<std::uint32_t, MAX_THREADS> fences{};
  std::array<bool, SHARED_BYTES / 128> has_writers{};  // some byte of these 128 has one
};
State state;
std::array<Writer, SHARED_BYTES / 2> writers;

Warp& this_warp() { return state.warps[static_cast<std::size_t>(block.thread / WARP)]; }
std::size_t this_lane() { return static_cast<std::size_t>(block.lane()); }

bool poisoned(const InFlight& accumulators) {
  return std::all_of(accumulators.d.begin(), accumulators.d.end(), [&](const float* d) {
    return std::all_of(d, d + accumulators.count, [](float x) { return std::bit_cast<std::uint32_t>(x) == POISON; });
  });
}

InFlight* take_accumulators(Warp& warp, const Multiplication& m) {
  for (InFlight& other : warp.in_flight) {
    if (other.d[0] == m.d[0]) return &other;
  }
  InFlight& mine = warp.in_flight.emplace_back(InFlight{m.d, {}, m.count});
  for (float* d : m.d) {
    mine.values.insert(mine.values.end(), d, d + m.count);
    std::fill(d, d + m.count, std::bit_cast<float>(POISON));
  }
  return &mine;
}

void return_accumulators(Warp& warp, InFlight* accumulators) {
  if (!poisoned(*accumulators)) fault("accumulators were written while a multiplication had them");
  for (std::size_t lane = 0; lane < WARP; ++lane) {
    const auto first = accumulators->values.begin() + static_cast<std::ptrdiff_t>(lane * accumulators->count);
    std::copy(first, first + static_cast<std::ptrdiff_t>(accumulators->count), accumulators->d[lane]);
  }
  warp.in_flight.remove_if([&](const InFlight& other) { return &other == accumulators; });
}

void finish_oldest(Warp& warp) {
  const auto [m, accumulators] = std::move(warp.queue.front());
  warp.queue.pop_front();
  for (const auto& lane : m.a) {
    for (const RegisterOperand& operand : lane) {
      if (operand.at != nullptr && *operand.at != operand.value)
        fault("a register operand was written while a multiplication had it");
    }
  }
  Accumulators values;
  for (std::size_t lane = 0; lane < WARP; ++lane) values[lane] = &accumulators->values[lane * m.count];
  m.finish(values);
  ++warp.finished;
  warp.count_groups();
  if (--accumulators->multiplications == 0) return_accumulators(warp, accumulators);
}

}  // namespace

void reset_asynchrony() { state = {}; }

void check_warpgroups() {
  for (std::size_t i = 0; i < MAX_WARPS; ++i) {
    const Warp &warp = state.warps[i], &first = state.warps[i / 4 * 4];
    if (warp.issued != first.issued || warp.matrices != first.matrices)
      fault("warps of a warpgroup multiplied different matrices");
    if (warp.group_ends.empty() ? warp.issued != 0 : warp.group_ends.back() != warp.issued)
      fault("multiplications were never committed");
  }
}

// --- wgmma

void issue(Multiplication m) {
  Warp& warp = this_warp();
  if (!std::all_of(warp.fenced.begin(), warp.fenced.end(), std::identity()))
    fault("a group of multiplications begins without a fence of registers");
  m.operands(check_visible);
  InFlight* accumulators = take_accumulators(warp, m);
  ++accumulators->multiplications;
  warp.matrices = (warp.matrices ^ m.matrices) * 0x9e3779b97f4a7c15u;
  ++warp.issued;
  warp.queue.emplace_back(std::move(m), accumulators);
  later(Kind::multiplication, [&warp] { finish_oldest(warp); });
}

void fence_multiplications() { this_warp().fenced[this_lane()] = true; }

void commit_multiplications() {
  Warp& warp = this_warp();
  warp.fenced[this_lane()] = false;
  if (++warp.commits[this_lane()] <= warp.group_ends.size()) return;  // another lane was first
  warp.group_ends.push_back(warp.issued);
  warp.count_groups();
}

void wait_for_multiplications(unsigned pending) {
  Warp& warp = this_warp();
  const unsigned committed = warp.commits[this_lane()], wanted = committed > pending ? committed - pending : 0;
  while (warp.groups_finished < wanted) wait_while(warp.groups_finished, warp.groups_finished);
}

void check_accumulators(const float* d) {
  for (const InFlight& other : this_warp().in_flight) {
    if (other.d[this_lane()] == d) fault("accumulators are read while a multiplication has them");
  }
}

// --- bulk copies

void start_load(std::function<void()> finish) { later(Kind::load, std::move(finish)); }

void start_store(std::function<std::function<void()>()> read) {
  Stores& stores = state.stores[static_cast<std::size_t>(block.thread)];
  if (stores.groups.empty()) stores.groups.emplace_back();
  StoreGroup& group = stores.groups.back();
  ++group.unread;
  ++group.unwritten;
  later(Kind::store, [read = std::move(read), &stores, &group] {
    --group.unread;
    ++stores.changes;
    later(Kind::write, [write = read(), &stores, &group] {
      write();
      --group.unwritten;
      ++stores.changes;
    });
  });
}

void commit_stores() {
  Stores& stores = state.stores[static_cast<std::size_t>(block.thread)];
  if (stores.groups.empty()) stores.groups.emplace_back();
  stores.groups.emplace_back();  // a deque: references to the others stay
}

void wait_for_stores(unsigned pending, bool written) {
  const Stores& stores = state.stores[static_cast<std::size_t>(block.thread)];
  const auto done = [&] {
    for (std::size_t i = 0; i + 1 + pending < stores.groups.size(); ++i) {
      if ((written ? stores.groups[i].unwritten : stores.groups[i].unread) != 0) return false;
    }
    return true;
  };
  while (!done()) wait_while(stores.changes, stores.changes);
}

// --- what threads write to shared memory

void written_by_thread(std::uint32_t address, std::uint32_t bytes, int thread) {
  bool& known = state.has_writers[address / 128];  // aligned pieces of at most 16 bytes lie in one line
  if (!known) std::fill_n(writers.begin() + address / 128 * 64, 64, Writer{});
  known = true;
  for (std::uint32_t at = address; at < address + bytes; at += 2) {
    writers[at / 2] = {thread, state.fences[static_cast<std::size_t>(thread)]};
  }
}

void written_by_copy(std::uint32_t address, std::uint32_t bytes) {
  for (std::uint32_t line = address / 128; line * 128 < address + bytes; ++line) {
    if (!state.has_writers[line]) continue;
    const std::uint32_t begin = std::max(address, line * 128), end = std::min(address + bytes, line * 128 + 128);
    for (std::uint32_t at = begin; at < end; at += 2) writers[at / 2].thread = -1;
  }
}

void fence_writes() {
  if (chance(16)) pause();  // so that others run on who should have waited for it
  ++state.fences[static_cast<std::size_t>(block.thread)];
}

void fence_writes_of_all(std::uint32_t address, std::uint32_t bytes) { written_by_copy(address, bytes); }

void check_visible(std::uint32_t address, std::uint32_t bytes) {
  if (!state.has_writers[address / 128]) return;
  for (std::uint32_t at = address; at < address + bytes; at += 2) {
    const Writer& writer = writers[at / 2];
    if (writer.thread >= 0 && state.fences[static_cast<std::size_t>(writer.thread)] == writer.fences) {
      fault("shared memory at " + std::to_string(at) + " was written by thread " + std::to_string(writer.thread) +
            " without a fence for those who read it asynchronously");
    }
  }
}

}  // namespace flashdelta::emulation
