// The kernel of src/cuda/chain_sm90.cu on the emulated device against float64. What it reads of scratch memory is rounded
// float64 as well.
#include "tests/emulation/chain_sm90.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "check.hpp"
#include "tests/emulation/wave.hpp"
#include "tests/support/call.hpp"
#include "tests/support/compare.hpp"

namespace flashdelta::emulation {
namespace {

using testing::Case;
using testing::Data;
using testing::Gates;
using testing::Keys;
using testing::Memory;
using testing::Results;
using testing::Strengths;

constexpr int C = cuda::CHUNK, K = cuda::KEYS;
constexpr double LOG2E = 1.4426950408889634;
constexpr int FEW_SMS = 1, SOME_SMS = 3, MANY_SMS = 132;

class Error {
 public:
  void add(double got, double expected) {
    error_ += (got - expected) * (got - expected);
    norm_ += expected * expected;
  }
  double relative() const { return std::sqrt(error_ / norm_); }

 private:
  double error_ = 0, norm_ = 1e-30;
};

// How a case is run, beside what its call says.
struct Options {
  int wave_slots = 1 << 30;  // slots of a wave
  bool dv = true;
  int sm_count = SOME_SMS;
  Schedule schedule = Schedule::forward;
};

// A case's data, the float64 of all its heads, and the scratch memory that the kernel finds.
class Chain {
 public:
  Chain(const Case& c, Data d)
      : c_(c),
        d_(std::move(d)),
        vectors_(bytes(sizeof(cuda::ChunkVectors), 1)),
        t_(bytes(cuda::TILE, 1)),
        p_(bytes(cuda::TILE, 1)) {
    scratch_.value_heads = static_cast<int>(c.HV);
    scratch_.value_blocks = blocks();
    scratch_.vectors = reinterpret_cast<cuda::ChunkVectors*>(vectors_.data());
    scratch_.t = t_.data();
    scratch_.p = p_.data();
    for (int n = 0; n < c.N(); ++n) {
      for (int hv = 0; hv < c.HV; ++hv) fill(n, hv);
    }
  }

  // What the kernel wrote.
  struct Run {
    Memory ds, dv;
    std::vector<unsigned> stored;
    Results results;
  };

  Run run(const Options& options) const {
    Run out{Memory(bytes(cuda::STATE_TILE, blocks())),
            Memory(bytes(cuda::TILE, blocks())),
            std::vector<unsigned>(slots() * static_cast<std::size_t>(c_.HV)),
            {}};
    cuda::Scratch scratch = scratch_;
    scratch.ds = out.ds.data();
    scratch.dv = out.dv.data();
    scratch.stored = out.stored.data();
    static const Chain* chain_now;
    static const cuda::Scratch* scratch_now;
    static const Options* options_now;
    chain_now = this, scratch_now = &scratch, options_now = &options;
    out.results = testing::backward(
        c_, d_, {.backend = FD_BACKEND_REFERENCE, .backward = [](const fd_backward_args* args, void*, std::size_t, void*) {
                   return chain_now->call(*args, *scratch_now, *options_now);
                 }});
    EXPECT_TRUE(out.ds.guards_intact() && out.dv.guards_intact());
    return out;
  }

  // Worst relative error of a (sequence, value head), by name. Fails where something else was written.
  std::map<std::string, double> errors(const Run& run, const Options& options) const {
    std::map<std::string, double> worst;
    const auto judge = [&](const char* name, const Error& error) {
      double& w = worst[name];
      if (!(error.relative() <= w)) w = error.relative();
    };
    std::vector<bool> used(slots());
    for (int n = 0; n < c_.N(); ++n) {
      for (int hv = 0; hv < c_.HV; ++hv) {
        const HeadReference& reference = references_.at({n, hv});
        Error ds, dv, dinitial;
        for (std::size_t chunk = 0; chunk < reference.chunks.size(); ++chunk) {
          const int slot = first_slot(n) + static_cast<int>(chunk);
          used[static_cast<std::size_t>(slot)] = true;
          compare_chunk(run, reference.chunks[chunk], slot, hv, ds, dv);
          EXPECT_EQ(run.stored[static_cast<std::size_t>(slot * c_.HV + hv)], 2 * static_cast<unsigned>(blocks()));
        }
        judge("ds", ds);
        judge("dv", dv);
        if (options.dv) compare_tensor(run, reference, n, hv);
        if (!c_.initial_state) continue;
        const std::vector<double>& got = run.results.at("dinitial_state").values.x;
        const bool has_row = !c_.pool || d_.has_row[static_cast<std::size_t>(n)];
        for (std::int64_t k = 0; k < K; ++k) {
          for (std::int64_t v = 0; v < c_.V; ++v) {
            const std::int64_t at = (n * c_.HV + hv) * K * c_.V + (c_.v_first ? v * K + k : k * c_.V + v);
            dinitial.add(got[static_cast<std::size_t>(at)],
                         has_row ? reference.dstate[static_cast<std::size_t>(k * c_.V + v)] : 0);
          }
        }
        judge("dinitial", dinitial);
      }
    }
    for (std::size_t slot = 0; slot < used.size(); ++slot) {
      EXPECT_TRUE(used[slot] || untouched(run, slot)) << "slot " << slot;
    }
    return worst;
  }

  const Case& parameters() const { return c_; }

 private:
  int blocks() const { return static_cast<int>(c_.V / cuda::VALUES); }
  std::size_t slots() const { return static_cast<std::size_t>((c_.B() * c_.T() + C - 1) / C + c_.N()); }
  std::size_t bytes(std::size_t each, int per_head) const {
    return slots() * static_cast<std::size_t>(c_.HV * per_head) * each;
  }
  int tokens(int n) const { return static_cast<int>(c_.lengths[static_cast<std::size_t>(n)]); }
  int first_slot(int n) const {
    int position = 0;
    for (int i = 0; i < n; ++i) position += tokens(i);
    return position / C + n;
  }

  void fill(int n, int hv) {
    HeadInputs h = head_inputs(c_, d_, n, hv);
    if (!c_.do_) std::fill(h.do_.begin(), h.do_.end(), 0.0);
    const HeadReference& reference = references_[{n, hv}] = chunk_reference(h);
    const std::int64_t key_head = hv / (c_.HV / c_.H);
    for (std::size_t chunk = 0; chunk < reference.chunks.size(); ++chunk) {
      const ChunkTiles& tiles = reference.chunks[chunk];
      const int slot = first_slot(n) + static_cast<int>(chunk);
      const std::int64_t head = scratch_.head(slot, hv);
      write_tile(scratch_.t + head * cuda::TILE, c_.dtype, tiles.T.data(), C, true);
      write_tile(scratch_.p + head * cuda::TILE, c_.dtype, tiles.P.data(), C);
      cuda::ChunkVectors& v = scratch_.vectors[head];
      for (int i = 0; i < C; ++i) {
        const auto at = static_cast<std::size_t>(i);
        const bool inside = i < tiles.tokens;
        const std::int64_t token = d_.first_token(c_, n) + static_cast<std::int64_t>(chunk) * C + i;
        v.gam[i] = static_cast<float>(tiles.gam[at] * LOG2E);
        v.rise[i] = static_cast<float>(tiles.rise[at]);
        v.end[i] = static_cast<float>(tiles.end[at]);
        v.beta[i] = inside ? static_cast<float>(h.beta[chunk * C + at]) : 0.0f;
        const auto norm = [&](const testing::Array& rows) {
          if (!c_.l2norm) return 1.0;
          return inside ? inverse_norm(rows, token, key_head) : 1e3;
        };
        v.key[i] = static_cast<float>(norm(d_.k));
        v.query[i] = static_cast<float>(norm(d_.q));
      }
    }
  }

  // The pieces of waves of so many slots; between them what a wave's table may also have.
  std::vector<std::vector<cuda::Run>> waves(const Options& options) const {
    std::vector<std::vector<cuda::Run>> list;
    const int all = static_cast<int>(slots());
    for (int begin = 0; begin < all; begin += std::min(options.wave_slots, all)) {
      const int end = begin + std::min(options.wave_slots, all - begin);
      std::vector<cuda::Run>& wave = list.emplace_back();
      wave.push_back({-1, 0, 0, 0});
      for (int n = 0; n < c_.N(); ++n) {
        const int slot = first_slot(n), chunks = (tokens(n) + C - 1) / C;
        if (tokens(n) == 0) {
          if (slot >= begin && slot < end) wave.push_back({n, 0, 0, slot});
          continue;
        }
        const int first = std::max(begin, slot), last = std::min(end, slot + chunks);
        wave.push_back({n, std::max(first - slot, 0), std::max(last - first, 0), first});
      }
    }
    return list;
  }

  fd_status call(const fd_backward_args& given, const cuda::Scratch& scratch, const Options& options) const {
    fd_backward_args args = given;
    const fd_problem problem = normalise(Operation::backward, *given.problem);
    args.problem = &problem;
    check(args, given.problem->N > 0, {"saved", nullptr, 0, true}, {"workspace", nullptr, 0, true});
    if (!options.dv) args.dv.data = nullptr;
    return chain(args, scratch, waves(options), options.sm_count, options.schedule);
  }

  void compare_chunk(const Run& run, const ChunkTiles& tiles, int slot, int hv, Error& ds, Error& dv) const {
    const int V = static_cast<int>(c_.V);
    std::vector<double> state(static_cast<std::size_t>(K * V)), rows(static_cast<std::size_t>(C * V));
    for (int b = 0; b < blocks(); ++b) {
      const std::int64_t block = scratch_.block(slot, hv, b);
      read_state_tile(run.ds.data() + block * cuda::STATE_TILE, c_.dtype, state, V, b * cuda::VALUES);
      read_tile(run.dv.data() + block * cuda::TILE, c_.dtype, rows.data() + b * cuda::VALUES, V);
    }
    for (std::size_t i = 0; i < state.size(); ++i) ds.add(state[i], tiles.dS1[i]);
    for (std::size_t i = 0; i < rows.size(); ++i) dv.add(rows[i], tiles.dv[i]);
  }

  // The tensor has what scratch memory has.
  void compare_tensor(const Run& run, const HeadReference& reference, int n, int hv) const {
    const std::vector<double>& dv = run.results.at("dv").values.x;
    const auto V = static_cast<std::size_t>(c_.V);
    for (std::size_t chunk = 0; chunk < reference.chunks.size(); ++chunk) {
      std::vector<double> rows(C * V);
      for (int b = 0; b < blocks(); ++b) {
        const std::int64_t block = scratch_.block(first_slot(n) + static_cast<int>(chunk), hv, b);
        read_tile(run.dv.data() + block * cuda::TILE, c_.dtype, rows.data() + b * cuda::VALUES, static_cast<int>(V));
      }
      const std::int64_t token = d_.first_token(c_, n) + static_cast<std::int64_t>(chunk) * C;
      for (int i = 0; i < reference.chunks[chunk].tokens; ++i) {
        const auto from = rows.begin() + i * c_.V;
        EXPECT_TRUE(std::equal(from, from + c_.V, dv.begin() + ((token + i) * c_.HV + hv) * c_.V))
            << "sequence " << n << ", value head " << hv << ", chunk " << chunk << ", row " << i;
      }
    }
  }

  bool untouched(const Run& run, std::size_t slot) const {
    const auto poison = [&](const Memory& memory) {
      const std::size_t each = memory.size() / slots();
      const unsigned char* from = memory.data() + slot * each;
      return std::all_of(from, from + each, [](unsigned char x) { return x == 0xff; });
    };
    return poison(run.ds) && poison(run.dv);
  }

  const Case c_;
  const Data d_;
  std::map<std::pair<int, int>, HeadReference> references_;
  mutable Memory vectors_, t_, p_;
  cuda::Scratch scratch_{};
};

bool same_scratch(const Chain::Run& a, const Chain::Run& b) {
  const auto same = [](const Memory& x, const Memory& y) {
    return x.size() == y.size() && std::equal(x.data(), x.data() + x.size(), y.data());
  };
  return same(a.ds, b.ds) && same(a.dv, b.dv);
}

Case chain_case(std::vector<std::int64_t> lengths) {
  Case c;
  c.lengths = std::move(lengths);
  c.packed = true;
  c.HV = 2;
  c.K = K;
  c.V = 128;
  c.dtype = FD_BFLOAT16;
  return c;
}

std::vector<Case> chain_cases() {
  std::vector<Case> list;
  const auto add = [&](const char* name, std::vector<std::int64_t> lengths, auto change) {
    Case c = chain_case(std::move(lengths));
    c.name = name;
    change(c);
    list.push_back(c);
  };
  add("Edges", {130, 0, 1, 63, 65, 0, 64}, [](Case& c) { c.padding = 70, c.H = 2; });
  add("Batch", {70, 70}, [](Case& c) { c.packed = false, c.index_dtype = FD_INT32; });
  add("NoTokens", {0, 0}, [](Case& c) { c.packed = false; });
  add("Groups", {100, 30}, [](Case& c) { c.H = 2, c.HV = 6, c.V = 64; });
  add("OneValueBlock", {100, 70}, [](Case& c) { c.V = 64; });
  add("ThreeValueBlocks", {100, 70}, [](Case& c) { c.V = 192, c.padding = 3; });
  add("FourValueBlocks", {70}, [](Case& c) { c.V = 256, c.padding = 3; });
  add("CorrelatedKeys", {200}, [](Case& c) { c.keys = Keys::correlated, c.strengths = Strengths::full; });
  add("IdenticalKeys", {200}, [](Case& c) { c.keys = Keys::identical, c.strengths = Strengths::full; });
  add("StrongDecay", {100, 70}, [](Case& c) { c.gates = Gates::strong; });
  add("Float16StrongDecay", {100, 70}, [](Case& c) { c.dtype = FD_FLOAT16, c.gates = Gates::strong; });
  add("MixedDecay", {100, 70}, [](Case& c) { c.gates = Gates::mixed, c.HV = 4, c.V = 64; });
  add("NoGatesNoStrengths", {100}, [](Case& c) { c.gates = Gates::none, c.strengths = Strengths::none; });
  add("StrengthsAtTheEdges", {100}, [](Case& c) { c.strengths = Strengths::edges, c.scale = 0.5; });
  add("Float16", {100, 70}, [](Case& c) { c.dtype = FD_FLOAT16; });
  add("Norm", {100, 70}, [](Case& c) { c.l2norm = true, c.padding = 9; });
  add("Float16Norm", {100, 70}, [](Case& c) { c.dtype = FD_FLOAT16, c.l2norm = true; });
  add("ValueFirst", {100, 70}, [](Case& c) { c.v_first = true; });
  add("BFloat16States", {100, 0, 70}, [](Case& c) { c.initial_dtype = c.final_dtype = FD_BFLOAT16; });
  add("BFloat16StatesValueFirst", {100, 70},
      [](Case& c) { c.initial_dtype = c.final_dtype = FD_BFLOAT16, c.v_first = true; });
  add("NoInitialState", {100, 0, 70}, [](Case& c) { c.initial_state = false; });
  add("NoGradientOfTheFinalState", {100, 0, 70}, [](Case& c) { c.dfinal_state = false; });
  add("GradientOfTheFinalStateAlone", {100, 0, 70}, [](Case& c) { c.do_ = false; });
  add("Pools", {40, 65, 7, 0, 1, 20, 0, 0, 66}, [](Case& c) { c.pool = true, c.HV = 1, c.index_dtype = FD_INT32; });
  return list;
}

// Relative error of dS, dv and the initial state's gradient: what is rounded to 16 bits, on the way and at the end.
void expect_close(const Chain& chain, const Chain::Run& run, const Options& options) {
  const Case& c = chain.parameters();
  const double limit = (c.hard() ? 0.01 : 0.005) / (c.dtype == FD_FLOAT16 ? 8 : 1);
  for (const auto& [name, error] : chain.errors(run, options)) EXPECT_LE(error, limit) << name;
}

class EmulatedChainCases : public ::testing::TestWithParam<Case> {};

TEST_P(EmulatedChainCases, MatchesFloat64WithBothShapesOfBlocks) {
  const Chain chain(GetParam(), make_data(GetParam(), 1));
  const Options half{.sm_count = MANY_SMS}, full{.sm_count = FEW_SMS, .schedule = Schedule::shuffled};
  seed = static_cast<std::uint32_t>(GetParam().name.size());  // another order in most cases
  const Chain::Run got = chain.run(half), same = chain.run(full);
  expect_close(chain, got, half);
  testing::expect_same_bits(got.results, same.results);
  EXPECT_TRUE(same_scratch(got, same));
}

INSTANTIATE_TEST_SUITE_P(, EmulatedChainCases, ::testing::ValuesIn(chain_cases()),
                         testing::case_name<::testing::TestParamInfo<Case>>);

TEST(EmulatedChain, WavesAndTheOrderOfThreadsDoNotMatter) {
  Case c = chain_case({40, 300, 0, 1, 90});
  c.l2norm = true;
  const Chain chain(c, make_data(c, 2));
  const Chain::Run expected = chain.run({});
  const auto check = [&](const Options& options) {
    const Chain::Run got = chain.run(options);
    testing::expect_same_bits(got.results, expected.results);
    EXPECT_TRUE(same_scratch(got, expected));
  };
  for (const int sm_count : {FEW_SMS, MANY_SMS}) {
    for (const int wave_slots : {2, 5}) {
      check({.wave_slots = wave_slots, .sm_count = sm_count, .schedule = Schedule::backward});
    }
    for (seed = 1; seed <= 6; ++seed) {
      SCOPED_TRACE(seed);
      check({.wave_slots = seed % 3 == 0 ? 1 : 100, .sm_count = sm_count, .schedule = Schedule::shuffled});
    }
  }
}

TEST(EmulatedChain, TheGradientOfVMayBeUnwanted) {
  const Case c = chain_case({100, 30});
  const Chain chain(c, make_data(c, 3));
  const Options options{.dv = false};
  const Chain::Run got = chain.run(options);
  expect_close(chain, got, options);
  for (const double x : got.results.at("dv").values.x) EXPECT_TRUE(std::isnan(x));
}

// Worst (sequence, value head) on data by the recipes of the peers' table (docs/kernels.md).
TEST(EmulatedChain, AccuracyOfLongSequences) {
  struct Row {
    const char* name;
    Keys keys;
    double decay;  // added to the log decays
    fd_dtype dtype;
    double dv, dinitial;
  };
  const Row rows[] = {{"random", Keys::random, 0, FD_BFLOAT16, .0038, .0026},
                      {"correlated", Keys::correlated, 0, FD_BFLOAT16, .0099, .00095},
                      {"decay", Keys::random, -4, FD_BFLOAT16, .0031, .00095},
                      {"random_fp16", Keys::random, 0, FD_FLOAT16, .0006, .0004},
                      {"correlated_fp16", Keys::correlated, 0, FD_FLOAT16, .0014, .0002},
                      {"decay_fp16", Keys::random, -4, FD_FLOAT16, .0005, .0002}};
  for (const Row& row : rows) {
    SCOPED_TRACE(row.name);
    Case c = chain_case({1000, 1048});
    c.HV = 4;
    c.V = 64;
    c.keys = row.keys;
    c.dtype = row.dtype;
    Data d = make_data(c, 3);
    for (double& g : d.g.x) g = static_cast<float>((row.keys == Keys::correlated ? .01 : 1) * g + row.decay);
    for (double& beta : d.beta.x) {
      if (row.keys == Keys::correlated) beta = static_cast<float>(.9 + .1 * beta);
    }
    for (double& x : d.dfinal_state.x) x /= 8;
    const Chain chain(c, d);
    const Options options{.sm_count = MANY_SMS};
    const auto errors = chain.errors(chain.run(options), options);
    for (const auto& [name, error] : errors) RecordProperty(std::string(row.name) + "_" + name, std::to_string(error));
    EXPECT_LE(errors.at("dv"), row.dv);
    EXPECT_LE(errors.at("dinitial"), row.dinitial);

    c.initial_state = false;  // whose gradient alone needs operands in two parts
    const Chain without(c, d);
    EXPECT_LE(without.errors(without.run(options), options).at("dv"), row.dv);
  }
}

}  // namespace
}  // namespace flashdelta::emulation
