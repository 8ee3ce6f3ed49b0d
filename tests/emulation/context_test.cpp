// The states that the Hopper forward leaves for the backward, and its context parallelism: on the CPU, as
// emulation_test.cpp.
#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "tests/emulation/sm90.hpp"
#include "tests/support/compare.hpp"

namespace flashdelta::testing {
namespace {

using emulation::hopper;

constexpr double BFLOAT16_LIMIT = 0.004;
constexpr int FEW_SMS = 2, MANY_SMS = 132;

Case emulated_case(std::vector<std::int64_t> lengths) {
  Case c;
  c.lengths = std::move(lengths);
  c.packed = true;
  c.HV = 2;
  c.K = c.V = 128;
  c.dtype = FD_BFLOAT16;
  return c;
}

// `saved` of the call that runs, between two guard bands.
Memory* saved_memory = nullptr;

fd_status forward_with_saved(const fd_forward_args* call, void* workspace, std::size_t bytes, void* stream) {
  fd_forward_args args = *call;
  args.saved = saved_memory->data();
  args.saved_bytes = saved_memory->size();
  return emulation::forward(&args, workspace, bytes, stream);
}

TEST(EmulatedSavedStates, AreThoseBeforeEverySegmentButTheFirst) {
  constexpr std::int64_t SEGMENT = 2048;
  for (const bool packed : {true, false}) {
    Case c = emulated_case(packed ? std::vector<std::int64_t>{100, 2 * SEGMENT, 64, SEGMENT + 1}
                                  : std::vector<std::int64_t>{SEGMENT + 70, SEGMENT + 70});
    c.packed = packed;
    c.v_first = true;
    c.V = packed ? 64 : 128;
    c.HV = packed ? 2 : 1;
    c.checkpoint_interval = SEGMENT;
    c.index_dtype = FD_INT32;
    const Data d = make_data(c, 1);
    const std::int64_t state = c.HV * c.V * c.K, rows = (c.B() * c.T() + SEGMENT - 1) / SEGMENT;
    Memory saved(static_cast<std::size_t>(rows * state) * sizeof(float));
    saved_memory = &saved;
    hopper = {packed ? FEW_SMS : MANY_SMS, emulation::Schedule::forward};
    const Results got = forward(c, d, {.backend = FD_BACKEND_REFERENCE, .forward = forward_with_saved});
    EXPECT_TRUE(saved.guards_intact());
    expect_close(c, d, got, forward(c, d, reference), BFLOAT16_LIMIT);

    // The same bits as the checkpoints at these tokens; nothing in other rows.
    std::vector<bool> written(static_cast<std::size_t>(rows));
    const std::vector<float> values = [&] {
      std::vector<float> x(static_cast<std::size_t>(rows * state));
      std::memcpy(x.data(), saved.data(), saved.size());
      return x;
    }();
    const Array& checkpoints = got.at("checkpoints").values;
    const std::int64_t slots = checkpoints.shape[0] / c.N();
    std::int64_t compared = 0;
    for (std::int64_t n = 0; n < c.N(); ++n) {
      const std::int64_t begin = packed ? d.cu_seqlens[static_cast<std::size_t>(n)] : n * c.T();
      for (std::int64_t token = SEGMENT; token < c.lengths[static_cast<std::size_t>(n)]; token += SEGMENT) {
        const std::int64_t row = (begin + token) / SEGMENT;
        written[static_cast<std::size_t>(row)] = true;
        const double* want = checkpoints.x.data() + (n * slots + token / SEGMENT - 1) * state;
        for (std::int64_t i = 0; i < state; ++i) {
          const float x = values[static_cast<std::size_t>(row * state + i)];
          if (n % 3 == 2) {  // these sequences have no checkpoints
            ASSERT_EQ(x, x);
          } else {
            ASSERT_EQ(x, static_cast<float>(want[i])) << "sequence " << n << ", token " << token << ", element " << i;
            ++compared;
          }
        }
      }
    }
    EXPECT_EQ(compared, 2 * state);
    for (std::int64_t i = 0; i < rows * state; ++i) {
      if (!written[static_cast<std::size_t>(i / state)]) {
        ASSERT_NE(values[static_cast<std::size_t>(i)], values[static_cast<std::size_t>(i)]);
      }
    }
  }
}

}  // namespace
}  // namespace flashdelta::testing
