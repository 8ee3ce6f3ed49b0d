// The list of benchmark rows and the floors computed from it.
#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "bench/rows.hpp"

namespace flashdelta::bench {
namespace {

std::vector<Row> all_rows() {
  std::ifstream file(FLASHDELTA_ROWS);
  std::stringstream text;
  text << file.rdbuf();
  return parse_rows(text.str());
}

Row row(const std::string& name) {
  const std::vector<Row> rows = all_rows();
  const auto found = std::find_if(rows.begin(), rows.end(), [&](const Row& r) { return r.name == name; });
  if (found == rows.end()) throw std::invalid_argument("no row " + name);
  return *found;
}

TEST(BenchRows, LengthsAreReadAsWritten) {
  EXPECT_EQ(parse_lengths("4x8192"), std::vector<std::int64_t>(4, 8192));
  EXPECT_EQ(parse_lengths("28672+4096"), (std::vector<std::int64_t>{28672, 4096}));
  EXPECT_EQ(parse_lengths("7+2x3"), (std::vector<std::int64_t>{7, 3, 3}));
  for (const char* wrong : {"", "x", "4x", "4x-1", "a", "4x8y", "1++2"}) {
    EXPECT_THROW(parse_lengths(wrong), std::invalid_argument) << wrong;
  }
  EXPECT_THROW(parse_rows("forward/1/2 - -"), std::invalid_argument);
  EXPECT_THROW(parse_rows("step/1/2/1x1 - -"), std::invalid_argument);
  EXPECT_THROW(parse_rows("forward/1/2/1x1"), std::invalid_argument);
}

TEST(BenchRows, TheListHasEveryRowOnce) {
  const std::vector<Row> rows = all_rows();
  std::set<std::string> names;
  for (const Row& r : rows) {
    EXPECT_TRUE(names.insert(r.name).second) << r.name << " is there twice";
    EXPECT_EQ(r.HV % r.H, 0) << r.name;
    EXPECT_LE(r.aim_ms, r.must_ms) << r.name;
  }
  for (const char* heads : {"16/16", "32/32", "16/32", "16/48", "8/24", "16/64", "8/32", "4/16", "2/8"}) {
    for (const char* lengths : {"1x32768", "1x16384", "1x8192", "1x4096", "1x2048", "28672+4096", "2x16384", "4096+28672",
                                "6144+2048", "1024+7168", "4x8192", "8x4096", "4x2048", "8x1024"}) {
      EXPECT_TRUE(names.contains(std::string("forward/") + heads + "/" + lengths)) << heads << " " << lengths;
    }
  }
  for (const char* call : {"1x1", "8x1", "32x1", "128x1", "256x1", "1x4", "8x4", "32x4", "128x4", "256x4"}) {
    for (const char* type : {"float32", "bfloat16"}) {
      EXPECT_TRUE(names.contains(std::string("step/16/32/") + call + "/" + type + "/v_first")) << call << " " << type;
    }
  }
  for (const char* heads : {"16/32", "8/16", "4/8", "2/4"}) {
    for (const std::int64_t tokens : {8192, 32768}) {
      std::set<std::int64_t> sequences;
      for (const Row& r : rows) {
        if (r.name.starts_with(std::string("backward/") + heads + "/") && r.tokens() == tokens) {
          sequences.insert(r.sequences());
        }
      }
      for (const std::int64_t n : {1, 2, 4, 8}) EXPECT_TRUE(sequences.contains(n)) << heads << " " << tokens << " in " << n;
    }
  }
}

TEST(BenchRows, TheMixesHaveTheirTokens) {
  EXPECT_EQ(row("forward/16/32/mix24").sequences(), 24);
  EXPECT_EQ(row("forward/16/32/mix24").tokens(), 16384);
  EXPECT_EQ(row("forward/16/32/tail80").sequences(), 81);
  EXPECT_EQ(row("forward/16/32/tail80").tokens(), 27680);
}

// By hand: 512 chunks of 64 value heads with four products of 64 x 128 x 128 and of 16 query heads with one; q, k 16 heads
// and v, o 64 heads of 256 bytes a token, g and beta 8 bytes a value head, 8 MB of states a sequence in and out.
TEST(BenchRows, WorkIsWhatTheFormulasSay) {
  const Work forward = work(row("forward/16/64/4x8192"));
  EXPECT_DOUBLE_EQ(forward.flops, 512.0 * (64 * 4 + 16) * 2 * 64 * 128 * 128);
  EXPECT_DOUBLE_EQ(forward.bytes, 32768.0 * (2 * 16 * 256 + 2 * 64 * 256 + 64 * 8) + 4 * 2 * 64 * 128 * 128 * 4.0);
  EXPECT_NEAR(forward.flops / 790e12 * 1e3, 0.37, 0.005);  // ms at 790 TFLOP/s
  EXPECT_NEAR(work(row("backward/16/32/1x32768")).flops / 790e12 * 1e3, 0.57, 0.01);
  EXPECT_DOUBLE_EQ(work(row("step/16/32/8x4/bfloat16/v_first")).bytes, 2.0 * 8 * 32 * 128 * 128 * 2);
}

}  // namespace
}  // namespace flashdelta::bench
