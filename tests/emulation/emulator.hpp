// Runs the blocks of a CUDA kernel on one CPU thread: every thread of a block is a fibre that runs until it has to wait.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <string>

namespace flashdelta::emulation {

constexpr int WARP = 32, MAX_THREADS = 1024, MAX_WARPS = MAX_THREADS / WARP;
constexpr int SHARED_BYTES = 227 * 1024;  // what a block may have on Hopper

// In which order the threads that can go on do so, and when the copy engine and the tensor cores work. Results must not
// depend on it.
//   forward   work is done when no thread can go on: loads first, then multiplications, then stores; the oldest first
//   backward  likewise, but stores first and the newest first
//   shuffled  at random, in some blocks also at once; warps are held back at random, in some blocks one of them until all
//             others wait. `seed` says how.
enum class Schedule { forward, backward, shuffled };
extern std::uint32_t seed;

// An mbarrier object.
struct Barrier {
  int arrivals = 0;  // that complete a phase
  int pending = 0;   // of them, in this phase
  int bytes = 0;     // of copies that this phase still waits for
  unsigned phase = 0;
};

// What the lanes of a warp, or the threads at a barrier, share while they gather.
struct Gathering {
  std::array<void*, WARP> lanes;
  const void* operation = nullptr;  // of the lanes that wait
  int arrived = 0;
  unsigned generation = 0;
};

// The block that runs.
struct Block {
  int threads = 0;
  int thread = 0;  // that runs now; -1: none, the copy engine or the tensor cores work
  std::array<Gathering, MAX_WARPS> warps;
  std::array<Gathering, 16> named;                   // bar.sync; number 0 is that of all threads
  std::array<Barrier, SHARED_BYTES / 8> barriers{};  // mbarriers by shared address / 8

  int lane() const { return thread % WARP; }
};
extern Block block;

// Runs `body` once per thread of a block. `number`: of the block, to which chance gives its own order. Throws
// std::runtime_error, naming who waits, if nobody can go on, and with the message of `fault`.
void run_block(int threads, Schedule, const std::function<void()>& body, const std::function<void(int thread)>& resumed,
               unsigned number = 0);

// --- for the threads of a block

// Stops the run: the kernel did what no GPU would let it do.
[[noreturn]] void fault(const std::string& what);

// Waits while `word` has this value.
void wait_while(const unsigned& word, unsigned value);

// Gives the copy engine or the tensor cores something to do at some later time. Before the block ends all of it must be done
// that uses shared memory: the first three kinds.
enum class Kind { load, multiplication, store, write, pause };
void later(Kind, std::function<void()> run);

// True once in `one_in` times, at random, if the schedule is shuffled.
bool chance(unsigned one_in);

// The calling thread goes on at some later time.
void pause();

// Bar.sync of `threads` threads.
void gather(Gathering&, int threads);

// All lanes of the calling warp come here with their `mine`; the last one runs work(lanes), lanes[i] being a pointer to
// lane i's; then all go on. Lanes that meet must come from the same place of the same code.
template <typename Mine, typename Work>
void together(Mine& mine, Work work) {
  static const char place = 0;  // each lambda is a type, hence each place has its own
  Gathering& warp = block.warps[static_cast<std::size_t>(block.thread / WARP)];
  if (warp.arrived > 0 && warp.operation != &place) fault("lanes of a warp meet in different operations");
  warp.operation = &place;
  warp.lanes[static_cast<std::size_t>(block.lane())] = &mine;
  if (++warp.arrived < WARP) {
    wait_while(warp.generation, warp.generation);
    return;
  }
  std::array<Mine*, WARP> lanes;
  for (std::size_t i = 0; i < WARP; ++i) lanes[i] = static_cast<Mine*>(warp.lanes[i]);
  work(lanes);
  warp.arrived = 0;
  ++warp.generation;
}

// --- mbarriers: `at` is the object at a shared address

Barrier& barrier_at(std::uint32_t address);
void arrive(Barrier&, int expected_bytes);
void copied(Barrier&, int bytes);

}  // namespace flashdelta::emulation
