// The rows of rows.txt, and the least work that each of them needs.
#pragma once

#include <cstdint>
#include <map>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace flashdelta::bench {

constexpr std::int64_t HEAD_DIM = 128, CHUNK = 64;  // K = V; tokens

struct Row {
  std::string name;
  std::string operation;              // "forward", "training_forward", "backward", "step"
  std::int64_t H, HV;                 // query and key heads, value heads
  std::vector<std::int64_t> lengths;  // tokens of each sequence
  std::string state_type, layout;     // of a step: "float32" or "bfloat16", "k_first" or "v_first"
  double must_ms, aim_ms;             // 0: no goal

  std::int64_t tokens() const { return std::accumulate(lengths.begin(), lengths.end(), std::int64_t{0}); }
  std::int64_t sequences() const { return static_cast<std::int64_t>(lengths.size()); }
};

inline std::int64_t parse_number(const std::string& text) {
  std::size_t end = 0;
  const std::int64_t number = text.empty() || text[0] < '0' || text[0] > '9' ? -1 : std::stoll(text, &end);
  if (number < 0 || end != text.size()) throw std::invalid_argument("rows: \"" + text + "\" is not a number");
  return number;
}

inline std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, separator);) parts.push_back(part);
  return parts;
}

// "28672+4096", "4x8192", "16384+16x512".
inline std::vector<std::int64_t> parse_lengths(const std::string& text) {
  std::vector<std::int64_t> lengths;
  for (const std::string& term : split(text, '+')) {
    const std::size_t times = term.find('x');
    const std::int64_t count = times == std::string::npos ? 1 : parse_number(term.substr(0, times));
    lengths.insert(lengths.end(), static_cast<std::size_t>(count),
                   parse_number(times == std::string::npos ? term : term.substr(times + 1)));
  }
  if (lengths.empty()) throw std::invalid_argument("rows: no lengths in \"" + text + "\"");
  return lengths;
}

// Every row of a text in the format of rows.txt, in its order. Throws std::invalid_argument.
inline std::vector<Row> parse_rows(const std::string& text) {
  std::vector<Row> rows;
  std::map<std::string, std::string> mixes;
  for (const std::string& line : split(text, '\n')) {
    if (line.empty() || line[0] == '#') continue;
    std::istringstream words(line);
    std::string name, must, aim;
    words >> name >> must >> aim;
    if (must == "=") {
      mixes[name] = aim;
      continue;
    }
    const std::vector<std::string> parts = split(name, '/');
    const bool step = !parts.empty() && parts[0] == "step";
    if (parts.size() != (step ? 6U : 4U) || aim.empty()) throw std::invalid_argument("rows: cannot read \"" + line + "\"");
    const auto mix = mixes.find(parts[3]);
    rows.push_back({.name = name,
                    .operation = parts[0],
                    .H = parse_number(parts[1]),
                    .HV = parse_number(parts[2]),
                    .lengths = parse_lengths(mix == mixes.end() ? parts[3] : mix->second),
                    .state_type = step ? parts[4] : "float32",
                    .layout = step ? parts[5] : "k_first",
                    .must_ms = must == "-" ? 0 : std::stod(must),
                    .aim_ms = aim == "-" ? 0 : std::stod(aim)});
  }
  return rows;
}

// What no implementation can do without.
struct Work {
  double flops;  // on the tensor cores
  double bytes;  // inputs read once, results written once
};

// Products of a 64-token chunk, K = V = 128, in units of one with 64 x 128 x 128 multiplications; those of 64 x 64 x 128
// count half. docs/math.md has the formulas.
//   forward   per value head: K S, Q S, K^T V', and halves T V, P V'; per query head: halves Q K^T, K K^T
//   backward  per value head: K S, K^T V' and half T V of the forward again; the chain's K dS, Q^T do, K^T dU and halves
//             P^T do, T^T dV'; do S^T, dU S^T, V' dS^T and halves do V'^T, dv R^T, dP K, E K, dP^T Q, E^T K; per query
//             head as forward
inline Work work(const Row& row) {
  const auto tokens = static_cast<double>(row.tokens()), H = static_cast<double>(row.H), HV = static_cast<double>(row.HV);
  const auto K = static_cast<double>(HEAD_DIM);
  const double product = 2.0 * CHUNK * K * K, chunks = tokens / CHUNK;
  const double state_bytes = static_cast<double>(row.sequences()) * HV * K * K * (row.state_type == "bfloat16" ? 2 : 4);
  const double keys = 2 * tokens * H * K * 2, values = tokens * HV * K * 2, gates = 2 * tokens * HV * 4;
  if (row.operation == "step") return {0, 2 * state_bytes};
  if (row.operation == "backward") {
    return {chunks * product * (12.5 * HV + H), 2 * keys + 3 * values + 2 * gates + 3 * state_bytes};
  }
  return {chunks * product * (4 * HV + H), keys + 2 * values + gates + 2 * state_bytes};
}

}  // namespace flashdelta::bench
