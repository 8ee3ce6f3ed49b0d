// What the emulation shows of asynchrony: a small kernel of one producer warp and one warpgroup, right in every order, and
// wrong or faulty with each of the mistakes that a GPU may forgive most of the time.
#include "tests/emulation/asynchrony.hpp"

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "backend.hpp"
#include "dtype.hpp"

// In a build with CUDA the real namespace is in the same program.
#define cuda emulated_cuda
#include "cuda/ptx_sm90.cuh"

namespace flashdelta::emulated_cuda {
namespace {

enum class Mistake {
  none,
  tile_read_before_the_copy,        // no wait for the load
  tile_freed_before_the_wait,       // its next load starts while it is multiplied
  sums_read_before_the_wait,        // no wgmma_wait
  sums_used_before_the_wait,        // wgmma_wait after accumulators_ready
  sums_written_before_the_wait,     // something is added to accumulators in flight
  operand_written_before_the_wait,  // a register operand
  no_register_fence,
  no_commit,
  other_order_in_one_warp,
  no_proxy_fence,           // before the store of the results
  proxy_fence_too_late,     // after the arrival that lets the store begin
  proxy_fence_by_one_lane,  // not by those who wrote
  no_wait_for_the_store,    // its tile is written again while it is read
  store_not_committed,      // hence not waited for
  block_ends_before_the_store,
  store_read_back_too_early,  // its bytes are waited for in shared memory only
};

constexpr int TILES = 3, THREADS = 160;
enum { FULL = 8 * 1024, FREE = FULL + 8, OUTPUT_FULL = FREE + 8, OUTPUT_FREE = OUTPUT_FULL + 8, OUTPUT = 16 * 1024 };

struct Memory {
  alignas(16) std::array<std::array<uint16_t, 64 * 64>, TILES> tiles;  // images in shared memory: rows of 64 bfloat16
  alignas(16) std::array<std::array<uint16_t, 64 * 64>, TILES> results{};
  uint16_t read_back = 0;
};

// Results: a tile's sums over each row's columns, 1 * (64 x 64 of ones) * tile^T, in every row.
void kernel(Memory& memory, Mistake mistake) {
  const int thread = emulation::block.thread, warp = thread / 32, lane = thread % 32;
  const auto is = [&](Mistake m) { return mistake == m; };
  if (thread == 0) {
    barrier_init(FULL, 1);
    barrier_init(FREE, 4);
    barrier_init(OUTPUT_FULL, 128);
    barrier_init(OUTPUT_FREE, 1);
  }
  __syncthreads();
  if (warp == 4) {
    if (lane == 0) {
      for (uint32_t i = 0; i < TILES; ++i) {
        barrier_wait(FREE, i % 2 ^ 1);
        barrier_arrive_expect(FULL, TILE_BYTES);
        bulk_load(0, memory.tiles[i].data(), TILE_BYTES, FULL);
      }
    } else if (lane == 1) {
      for (uint32_t i = 0; i < TILES; ++i) {
        barrier_wait(OUTPUT_FULL, i % 2);
        bulk_store(memory.results[i].data(), OUTPUT, TILE_BYTES);
        if (!is(Mistake::store_not_committed)) stores_commit();
        const bool last = i == TILES - 1;
        if (!is(Mistake::no_wait_for_the_store) && !(last && is(Mistake::block_ends_before_the_store)))
          stores_wait_read<0>();
        barrier_arrive(OUTPUT_FREE);
      }
      if (is(Mistake::store_read_back_too_early)) memory.read_back = memory.results[TILES - 1][0];
      if (!is(Mistake::block_ends_before_the_store)) stores_wait();
    }
    return;
  }
  for (uint32_t i = 0; i < TILES; ++i) {
    uint32_t a[4];
    for (uint32_t& x : a) x = pack<__nv_bfloat16>(1, 1);
    float d[32];
    if (!is(Mistake::tile_read_before_the_copy)) barrier_wait(FULL, i % 2);
    if (!is(Mistake::no_register_fence)) wgmma_fence();
    for (uint32_t k = 0; k < 4; ++k) {
      const uint32_t part = is(Mistake::other_order_in_one_warp) && warp == 2 ? 3 - k : k;
      const uint64_t b = matrix_descriptor(32 * part, 16);
      k == 0 ? wgmma<__nv_bfloat16, true, 0>(d, a[0], a[1], a[2], a[3], b)
             : wgmma<__nv_bfloat16, false, 0>(d, a[0], a[1], a[2], a[3], b);
    }
    if (!is(Mistake::no_commit)) wgmma_commit();
    if (is(Mistake::operand_written_before_the_wait)) a[1] = 0;
    if (is(Mistake::sums_written_before_the_wait)) d[3] += 1;
    if (is(Mistake::sums_used_before_the_wait)) accumulators_ready(d);
    if (is(Mistake::tile_freed_before_the_wait)) {
      __syncwarp();
      if (lane == 0) barrier_arrive(FREE);
    }
    float sum[32];
    if (is(Mistake::sums_read_before_the_wait)) std::copy(d, d + 32, sum);
    wgmma_wait<0>();
    accumulators_ready(d);
    if (!is(Mistake::sums_read_before_the_wait)) std::copy(d, d + 32, sum);
    if (!is(Mistake::tile_freed_before_the_wait)) {
      __syncwarp();
      if (lane == 0) barrier_arrive(FREE);
    }
    barrier_wait(OUTPUT_FREE, i % 2 ^ 1);
    for (uint32_t j = 0; j < 4; ++j) {
      const auto row = static_cast<uint32_t>(16 * warp + lane % 16);
      store_matrices(OUTPUT + swizzle(row * 128 + j * 32 + static_cast<uint32_t>(lane / 16 * 16)),
                     pack<__nv_bfloat16>(sum[8 * j], sum[8 * j + 1]), pack<__nv_bfloat16>(sum[8 * j + 2], sum[8 * j + 3]),
                     pack<__nv_bfloat16>(sum[8 * j + 4], sum[8 * j + 5]),
                     pack<__nv_bfloat16>(sum[8 * j + 6], sum[8 * j + 7]));
    }
    const bool late = is(Mistake::proxy_fence_too_late);
    if (!late && !is(Mistake::no_proxy_fence) && (lane == 0 || !is(Mistake::proxy_fence_by_one_lane))) fence_async_shared();
    barrier_arrive(OUTPUT_FULL);
    if (late) fence_async_shared();
  }
}

// What is wrong with a run: the fault, "wrong results", or nothing.
std::string run(Mistake mistake, emulation::Schedule schedule, uint32_t seed = 1) {
  static Memory memory;
  memory = {};
  for (std::size_t t = 0; t < TILES; ++t) {
    for (std::size_t i = 0; i < memory.tiles[t].size(); ++i)
      memory.tiles[t][i] = float_to_bfloat16(static_cast<float>((i * 7 + t * 3) % 5));
  }
  emulation::seed = seed;
  std::memset(raw, 0xff, sizeof(raw));
  try {
    emulation::run_block(
        THREADS, schedule, [&] { kernel(memory, mistake); }, [](int) {});
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  for (std::size_t t = 0; t < TILES; ++t) {
    for (std::size_t column = 0; column < 64; ++column) {
      float sum = 0;
      for (std::size_t i = 0; i < 64; ++i) {
        const auto at = swizzle(static_cast<uint32_t>(column * 128 + i * 2)) / 2;
        sum += bfloat16_to_float(memory.tiles[t][at]);
      }
      for (std::size_t row = 0; row < 64; ++row) {
        const auto at = swizzle(static_cast<uint32_t>(row * 128 + column * 2)) / 2;
        const float got = bfloat16_to_float(memory.results[t][at]);
        if (!(std::fabs(got - sum) <= sum / 128)) return "wrong results";
      }
    }
  }
  return mistake == Mistake::store_read_back_too_early && memory.read_back != memory.results[TILES - 1][0] ? "wrong results"
                                                                                                           : "";
}

constexpr emulation::Schedule SCHEDULES[] = {emulation::Schedule::forward, emulation::Schedule::backward,
                                             emulation::Schedule::shuffled};

TEST(Asynchrony, ARightKernelIsRightInEveryOrder) {
  for (const auto schedule : SCHEDULES) EXPECT_EQ(run(Mistake::none, schedule), "");
  for (uint32_t seed = 1; seed <= 40; ++seed) EXPECT_EQ(run(Mistake::none, emulation::Schedule::shuffled, seed), "") << seed;
}

struct Expected {
  Mistake mistake;
  const char* what;  // part of the message
};

TEST(Asynchrony, MistakesAreFoundInEveryOrder) {
  const Expected list[] = {
      {Mistake::tile_freed_before_the_wait, "wrong results"},
      {Mistake::sums_read_before_the_wait, "wrong results"},
      {Mistake::sums_used_before_the_wait, "accumulators are read while a multiplication has them"},
      {Mistake::sums_written_before_the_wait, "accumulators were written while a multiplication had them"},
      {Mistake::operand_written_before_the_wait, "a register operand was written while a multiplication had it"},
      {Mistake::no_register_fence, "a group of multiplications begins without a fence of registers"},
      {Mistake::no_commit, "accumulators are read while a multiplication has them"},
      {Mistake::other_order_in_one_warp, "warps of a warpgroup multiplied different matrices"},
      {Mistake::no_proxy_fence, "without a fence for those who read it asynchronously"},
      {Mistake::proxy_fence_by_one_lane, "without a fence for those who read it asynchronously"},
  };
  for (const Expected& expected : list) {
    for (const auto schedule : SCHEDULES) {
      const std::string got = run(expected.mistake, schedule);
      EXPECT_NE(got.find(expected.what), std::string::npos)
          << static_cast<int>(expected.mistake) << ", schedule " << static_cast<int>(schedule) << ": " << got;
    }
  }
}

// What they bring depends on the order.
TEST(Asynchrony, OtherMistakesAreFoundInSomeOrder) {
  for (const Mistake mistake :
       {Mistake::tile_read_before_the_copy, Mistake::proxy_fence_too_late, Mistake::no_wait_for_the_store,
        Mistake::store_not_committed, Mistake::store_read_back_too_early, Mistake::block_ends_before_the_store}) {
    int found = 0;
    for (const auto schedule : SCHEDULES) found += run(mistake, schedule).empty() ? 0 : 1;
    for (uint32_t seed = 2; seed <= 20; ++seed) found += run(mistake, emulation::Schedule::shuffled, seed).empty() ? 0 : 1;
    EXPECT_GE(found, 3) << static_cast<int>(mistake);
  }
}

}  // namespace
}  // namespace flashdelta::emulated_cuda
