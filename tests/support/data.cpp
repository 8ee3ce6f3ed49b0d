#include "tests/support/data.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <sstream>
#include <string>
#include <utility>

#include "dtype.hpp"

namespace flashdelta::testing {
namespace {

constexpr double nan = std::numeric_limits<double>::quiet_NaN();

double rounded(double x, fd_dtype type) {
  double storage = 0;
  store(&storage, type, 0, x);
  return load(&storage, type, 0);
}

void round_all(Array& a, fd_dtype type) {
  for (double& x : a.x) x = rounded(x, type);
}

class Random {
 public:
  explicit Random(std::uint64_t seed) : engine_(seed) {}
  double normal() { return normal_(engine_); }
  double uniform(double low, double high) { return low + (high - low) * uniform_(engine_); }
  Array normal(std::vector<std::int64_t> shape) {
    Array a(std::move(shape));
    for (double& x : a.x) x = normal();
    return a;
  }

 private:
  std::mt19937_64 engine_;
  std::normal_distribution<double> normal_;
  std::uniform_real_distribution<double> uniform_;
};

void make_unit(std::span<double> x) {
  double squares = 0;
  for (const double value : x) squares += value * value;
  for (double& value : x) value /= std::sqrt(squares);
}

Array make_keys(const Case& c, Random& random) {
  Array k = random.normal({c.B(), c.T(), c.H, c.K});
  const Array common = random.normal({c.B(), c.H, c.K});
  const auto K = static_cast<std::size_t>(c.K);
  for (std::size_t row = 0; row < k.x.size() / K; ++row) {
    const std::size_t H = static_cast<std::size_t>(c.H), h = row % H, b = row / H / static_cast<std::size_t>(c.T());
    const std::span<double> key(k.x.data() + row * K, K);
    for (std::size_t i = 0; i < K; ++i) {
      const double direction = common.x[(b * H + h) * K + i];
      if (c.keys == Keys::correlated) key[i] = direction + 0.1 * key[i];
      if (c.keys == Keys::identical) key[i] = direction;
    }
    if (!c.l2norm) make_unit(key);
  }
  return k;
}

double gate(const Case& c, std::int64_t value_head, Random& random) {
  const double x = random.normal();
  const bool flat = value_head % 4 == 3;
  switch (c.gates) {
    case Gates::typical: return flat ? 0 : -std::log1p(std::exp(-x)) / 16;
    case Gates::strong: return -20;
    case Gates::mixed: return flat ? 0 : -30 * std::pow(random.uniform(0, 1), 4);
    case Gates::raw: return 2 * x;
    default: return 0;
  }
}

double strength(const Case& c, Random& random) {
  const double x = random.normal(), y = 1 / (1 + std::exp(-x));
  switch (c.strengths) {
    case Strengths::typical: return y;
    case Strengths::full: return 1;
    case Strengths::twice: return 2;
    case Strengths::edges: return y < 0.3 ? 0 : y > 0.7 ? 1 : y;
    case Strengths::logit: return 2 * x;
    default: return 0;
  }
}

void poison_padding(const Case& c, Array& a) {
  const auto used = (c.T() - c.padding) * a.inner(2);
  if (c.packed) std::fill(a.x.begin() + used, a.x.end(), nan);
}

std::vector<std::int64_t> state_shape(const Case& c) {
  return c.v_first ? std::vector<std::int64_t>{c.N(), c.HV, c.V, c.K} : std::vector<std::int64_t>{c.N(), c.HV, c.K, c.V};
}

// Rows [begin, end) of the dimension after `outer` elements of the first.
Array tokens_of(const Array& a, std::int64_t first, std::int64_t count) {
  std::vector<std::int64_t> shape = a.shape;
  shape[0] = 1, shape[1] = count;
  Array result(shape);
  const auto begin = a.x.begin() + first * a.inner(2);
  std::copy(begin, begin + count * a.inner(2), result.x.begin());
  return result;
}

Array row_of(const Array& a, std::int64_t row) {
  std::vector<std::int64_t> shape = a.shape;
  shape[0] = 1;
  Array result(shape);
  std::copy_n(a.x.begin() + row * a.inner(1), a.inner(1), result.x.begin());
  return result;
}

Data tokens_of(const Data& d, std::int64_t first, std::int64_t count) {
  Data result;
  result.cu_seqlens = {0, count};
  result.q = tokens_of(d.q, first, count);
  result.k = tokens_of(d.k, first, count);
  result.v = tokens_of(d.v, first, count);
  result.do_ = tokens_of(d.do_, first, count);
  result.g = tokens_of(d.g, first, count);
  result.beta = tokens_of(d.beta, first, count);
  result.A_log = d.A_log;
  result.dt_bias = d.dt_bias;
  result.has_row = {true};
  return result;
}

}  // namespace

Data make_data(const Case& c, std::uint64_t seed) {
  Random random(seed);
  Data d;
  d.cu_seqlens = {0};
  for (const std::int64_t length : c.lengths) d.cu_seqlens.push_back(d.cu_seqlens.back() + length);

  d.q = random.normal({c.B(), c.T(), c.H, c.K});
  const auto K = static_cast<std::size_t>(c.K);
  for (std::size_t i = 0; !c.l2norm && i < d.q.x.size(); i += K) make_unit({d.q.x.data() + i, K});
  d.k = make_keys(c, random);
  if (c.l2norm && !d.k.x.empty()) {  // a zero row each has a finite norm and gradient
    std::fill_n(d.q.x.begin(), c.K, 0.0);
    std::fill_n(d.k.x.begin(), c.K, 0.0);
  }
  d.v = random.normal({c.B(), c.T(), c.HV, c.V});
  d.do_ = random.normal({c.B(), c.T(), c.HV, c.V});
  d.g = Array({c.B(), c.T(), c.HV});
  d.beta = Array({c.B(), c.T(), c.HV});
  for (std::size_t i = 0; i < d.g.x.size(); ++i) {
    d.g.x[i] = gate(c, static_cast<std::int64_t>(i) % c.HV, random);
    d.beta.x[i] = strength(c, random);
  }
  d.A_log = Array({c.HV});
  for (double& a : d.A_log.x) a = std::log(random.uniform(0.05, 4));
  d.dt_bias = random.normal({c.HV});
  d.initial_state = random.normal(state_shape(c));
  d.dfinal_state = random.normal(state_shape(c));
  for (std::int64_t n = 0; n < c.N(); ++n) {
    d.has_row.push_back(!c.pool || n % 4 != 2);
    if (!d.has_row.back()) {
      std::fill_n(d.initial_state.x.begin() + n * d.initial_state.inner(1), d.initial_state.inner(1), 0.0);
    }
  }
  for (Array* a : {&d.q, &d.k, &d.v, &d.do_}) round_all(*a, c.dtype);
  for (Array* a : {&d.g, &d.A_log, &d.dt_bias}) round_all(*a, c.gate_dtype);
  round_all(d.beta, c.beta_dtype);
  round_all(d.initial_state, c.initial_dtype);
  round_all(d.dfinal_state, c.final_dtype);
  for (Array* a : {&d.q, &d.k, &d.v, &d.do_, &d.g, &d.beta}) poison_padding(c, *a);
  return d;
}

Case alone(const Case& c, std::int64_t n) {
  Case result = c;
  result.lengths = {c.lengths[static_cast<std::size_t>(n)]};
  result.packed = false;
  result.padding = 0;
  result.pool = result.in_place = false;
  return result;
}

Data alone(const Case& c, const Data& d, std::int64_t n) {
  Data result = tokens_of(d, d.first_token(c, n), c.lengths[static_cast<std::size_t>(n)]);
  result.initial_state = row_of(d.initial_state, n);
  result.dfinal_state = row_of(d.dfinal_state, n);
  return result;
}

Case part(const Case& c, std::int64_t begin, std::int64_t end) {
  Case result = alone(c, 0);
  result.lengths = {end - begin};
  return result;
}

Data part(const Data& d, std::int64_t begin, std::int64_t end, const Array& state) {
  Data result = tokens_of(d, begin, end - begin);
  result.initial_state = state;
  result.dfinal_state = d.dfinal_state;
  return result;
}

std::string describe(const Case& c) {
  std::ostringstream s;
  s << (c.packed ? "packed lengths" : "lengths");
  for (const std::int64_t length : c.lengths) s << ' ' << length;
  s << ", padding " << c.padding << ", H " << c.H << ", HV " << c.HV << ", K " << c.K << ", V " << c.V << ", keys "
    << static_cast<int>(c.keys) << ", gates " << static_cast<int>(c.gates) << ", strengths " << static_cast<int>(c.strengths)
    << ", dtypes " << c.dtype << c.gate_dtype << c.beta_dtype << c.initial_dtype << c.final_dtype;
  const std::pair<const char*, bool> options[] = {{"l2norm", c.l2norm},
                                                  {"allow_neg_eigval", c.allow_neg_eigval},
                                                  {"initial_state", c.initial_state},
                                                  {"v_first", c.v_first},
                                                  {"pool", c.pool},
                                                  {"final_state", c.final_state},
                                                  {"in_place", c.in_place},
                                                  {"strided", c.strided},
                                                  {"do", c.do_},
                                                  {"dfinal_state", c.dfinal_state},
                                                  {"checkpoints", c.checkpoint_interval > 0},
                                                  {"slots", c.slots > 0},
                                                  {"dt_bias", c.dt_bias}};
  for (const auto& [name, on] : options) s << (on ? ", " : ", no ") << name;
  return s.str();
}

Case random_case(std::mt19937_64& engine, bool step) {
  const auto below = [&](std::int64_t n) { return static_cast<std::int64_t>(engine() % static_cast<std::uint64_t>(n)); };
  const auto chance = [&](std::int64_t one_in) { return below(one_in) == 0; };
  Case c;
  c.name = "random";
  const std::int64_t longest = step ? 6 : chance(4) ? 150 : 70;
  c.packed = chance(2);
  c.lengths.assign(static_cast<std::size_t>(1 + below(4)), below(longest));
  if (c.packed) {
    for (std::int64_t& length : c.lengths) length = chance(4) ? 0 : below(longest);
    c.padding = below(3) * below(20);
  }
  c.H = 1 + below(3);
  c.HV = c.H * (1 + below(4));
  c.K = 8 * (1 + below(chance(5) ? 16 : 4));
  c.V = 8 * (1 + below(chance(5) ? 20 : 5));
  c.keys = chance(5) ? Keys::correlated : Keys::random;
  c.gates = static_cast<Gates>(below(6));
  c.strengths = static_cast<Strengths>(below(7));
  c.dt_bias = !chance(3);
  c.l2norm = chance(2);
  c.allow_neg_eigval = c.strengths == Strengths::logit && chance(2);
  c.scale = chance(3) ? 0.5 : 0;
  c.dtype = chance(3) ? FD_BFLOAT16 : FD_FLOAT32;
  c.index_dtype = chance(2) ? FD_INT32 : FD_INT64;
  c.initial_dtype = chance(4) ? FD_BFLOAT16 : FD_FLOAT32;
  c.initial_state = !chance(4);
  c.final_state = !chance(4);
  c.v_first = chance(2);
  c.strided = chance(3);
  c.pool = chance(3);
  c.in_place = c.pool && c.initial_state && c.final_state && chance(2);
  c.final_dtype = c.in_place ? c.initial_dtype : FD_FLOAT32;
  if (step && c.pool && c.initial_state && c.final_state && chance(2)) c.slots = 1 + below(6);
  if (!step && chance(3)) c.checkpoint_interval = 64;
  c.dfinal_state = !chance(3);
  c.do_ = !c.dfinal_state || !chance(4);
  return c;
}

}  // namespace flashdelta::testing
