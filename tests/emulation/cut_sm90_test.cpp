// Every chunk, segment and piece of every sequence is in exactly one wave and one slot, and slots agree.
#include "tests/emulation/cut_sm90.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>
#include <set>
#include <utility>

namespace flashdelta::emulation {
namespace {

constexpr int CHUNK = 64, SEGMENT_CHUNKS = 32;

int chunks_of(std::int64_t tokens) { return static_cast<int>((tokens + CHUNK - 1) / CHUNK); }

// Checks all tables; `begins`, `lengths` in the sequences' own batch entries.
void expect_cut(const std::vector<CutWave>& waves, const std::vector<std::int64_t>& begins,
                const std::vector<std::int64_t>& lengths) {
  std::set<std::pair<int, int>> chunks, segments;
  std::map<int, int> next_piece_end;  // of each sequence, from the last wave to the first
  std::set<int> empty, empty_segments;
  int across = 0;
  for (std::size_t w = waves.size(); w-- > 0;) {
    std::map<std::pair<int, int>, int> slots;
    for (std::size_t slot = 0; slot < waves[w].chunks.size(); ++slot) {
      const CutChunk& c = waves[w].chunks[slot];
      ASSERT_GE(c.sequence, -1);
      if (c.sequence < 0) continue;
      const auto n = static_cast<std::size_t>(c.sequence);
      ASSERT_LT(n, lengths.size());
      EXPECT_EQ(c.begin, begins[n] + int64_t{c.chunk} * CHUNK);
      EXPECT_EQ(c.tokens, std::min<std::int64_t>(CHUNK, lengths[n] - int64_t{c.chunk} * CHUNK));
      EXPECT_GT(c.tokens, 0);
      EXPECT_TRUE(chunks.insert({c.sequence, c.chunk}).second);
      slots[{c.sequence, c.chunk}] = static_cast<int>(slot);
    }
    const auto expect_slots = [&](const CutRun& run) {
      for (int i = 0; i < run.chunks; ++i) {
        const auto found = slots.find({run.sequence, run.first_chunk + i});
        ASSERT_NE(found, slots.end());
        EXPECT_EQ(found->second, run.slot + i);
      }
    };
    std::map<int, int> in_segments;
    for (std::size_t i = 0; i < waves[w].segments.size(); ++i) {
      const CutRun& run = waves[w].segments[i];
      ASSERT_GE(run.sequence, -1);
      if (run.sequence < 0) continue;
      const int all = chunks_of(lengths[static_cast<std::size_t>(run.sequence)]);
      if (all == 0) {
        EXPECT_TRUE(empty_segments.insert(run.sequence).second);
        EXPECT_EQ(run.chunks, 0);
        continue;
      }
      EXPECT_EQ(run.first_chunk % SEGMENT_CHUNKS, 0);
      if (in_segments[run.sequence] > 0) {  // they lie next to each other
        EXPECT_EQ(waves[w].segments[i - 1].sequence, run.sequence);
        EXPECT_EQ(waves[w].segments[i - 1].first_chunk + SEGMENT_CHUNKS, run.first_chunk);
      }
      EXPECT_EQ(run.chunks, std::min(SEGMENT_CHUNKS, all - run.first_chunk));
      EXPECT_TRUE(segments.insert({run.sequence, run.first_chunk}).second);
      in_segments[run.sequence] += run.chunks;
      expect_slots(run);
    }
    for (const CutRun& run : waves[w].pieces) {
      ASSERT_GE(run.sequence, -1);
      if (run.sequence < 0) continue;
      const int all = chunks_of(lengths[static_cast<std::size_t>(run.sequence)]);
      if (all == 0) {
        EXPECT_TRUE(empty.insert(run.sequence).second);
        EXPECT_EQ(run.chunks, 0);
        continue;
      }
      const auto [end, first_seen] = next_piece_end.insert({run.sequence, all});
      EXPECT_EQ(run.first_chunk + run.chunks, end->second);
      end->second = run.first_chunk;
      across += run.first_chunk > 0 ? 1 : 0;
      EXPECT_EQ(in_segments[run.sequence], run.chunks);
      in_segments.erase(run.sequence);
      expect_slots(run);
    }
    EXPECT_TRUE(in_segments.empty());
  }
  std::size_t all_chunks = 0, all_empty = 0;
  for (std::size_t n = 0; n < lengths.size(); ++n) {
    all_chunks += static_cast<std::size_t>(chunks_of(lengths[n]));
    all_empty += lengths[n] == 0 ? 1 : 0;
    if (lengths[n] > 0) {
      EXPECT_EQ(next_piece_end[static_cast<int>(n)], 0);
    }
  }
  EXPECT_EQ(chunks.size(), all_chunks);
  EXPECT_EQ(empty.size(), all_empty);
  EXPECT_EQ(empty_segments.size(), all_empty);
  EXPECT_LT(across, static_cast<int>(waves.size()));  // one sequence at most goes on from wave to wave
}

void expect_packed(const std::vector<std::int64_t>& lengths, std::int64_t padding, std::int64_t wave_tokens) {
  std::vector<std::int64_t> bounds = {0};
  for (const std::int64_t length : lengths) bounds.push_back(bounds.back() + length);
  const auto waves = cut(bounds, 1, bounds.back() + padding, wave_tokens);
  expect_cut(waves, {bounds.begin(), bounds.end() - 1}, lengths);
}

TEST(Cut, CoversEveryChunkOnce) {
  expect_packed({0}, 0, 2048);
  expect_packed({1}, 0, 2048);
  expect_packed({2048, 2048, 2049, 0, 4096}, 0, 4096);
  expect_packed({9000}, 0, 2048);
  expect_packed({9000}, 3000, 4096);
  expect_packed({0, 0, 5, 0, 9000, 0, 63, 64, 65, 0}, 100, 2048);
  expect_packed({100, 100, 100, 20000, 1, 1}, 0, 6144);
  expect_packed({5000, 5000, 5000}, 0, 1 << 20);
}

TEST(Cut, BatchEntriesFollowEachOther) {
  for (const std::int64_t T : {1, 64, 3000, 4096}) {
    for (const std::int64_t B : {1, 3, 5})
      expect_cut(cut({}, B, T, 4096), std::vector<std::int64_t>(B, 0), std::vector<std::int64_t>(B, T));
  }
}

TEST(Cut, RandomLengths) {
  std::mt19937 random(3);
  for (int i = 0; i < 40; ++i) {
    std::vector<std::int64_t> lengths(1 + random() % 40);
    for (std::int64_t& length : lengths)
      length = random() % 4 == 0 ? 0 : random() % 7 == 0 ? random() % 9000 : random() % 200;
    expect_packed(lengths, random() % 3000, 2048 * (1 + random() % 4));
  }
}

TEST(Cut, GarbageBoundsGiveEntriesInsideTheTables) {
  std::mt19937_64 random(4);
  for (int i = 0; i < 200; ++i) {
    const std::int64_t T = random() % 10000;
    std::vector<std::int64_t> bounds(1 + random() % 10 + 1);
    for (std::int64_t& bound : bounds)
      bound = i % 2 == 0 ? static_cast<std::int64_t>(random()) : static_cast<std::int64_t>(random() % 20000) - 5000;
    for (const CutWave& wave : cut(bounds, 1, T, 4096)) {
      const auto N = static_cast<int>(bounds.size()) - 1;
      for (const CutChunk& c : wave.chunks) {
        if (c.sequence == -1) continue;
        EXPECT_TRUE(c.sequence >= 0 && c.sequence < N && c.tokens >= 1 && c.tokens <= CHUNK);
        EXPECT_TRUE(c.begin >= 0 && c.begin + c.tokens <= T && c.chunk >= 0);
      }
      for (const auto* runs : {&wave.segments, &wave.pieces}) {
        for (const CutRun& run : *runs) {
          if (run.sequence == -1) continue;
          EXPECT_TRUE(run.sequence >= 0 && run.sequence < N && run.slot >= 0 && run.chunks >= 0 && run.first_chunk >= 0);
          EXPECT_LE(static_cast<std::size_t>(run.slot + run.chunks), wave.chunks.size());
          EXPECT_LT(std::int64_t{run.first_chunk + run.chunks - 1} * CHUNK, T);
        }
      }
    }
  }
}

}  // namespace
}  // namespace flashdelta::emulation
