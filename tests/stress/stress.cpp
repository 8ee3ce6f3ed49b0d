// Random batches one after another, lengths 0 to 3,000, over all head configurations, types and options. Of each: two runs
// have the same bits, nothing is written outside the outputs, rows past the last sequence are zero, everything is finite. Of
// a sample: a sequence alone has the same bits as in its batch, and the results agree with another backend on the host (the
// cpu backend; for that one itself: the reference).
//
//     stress [--device cuda|cpu] [--seed S] [--first I] [--batches N] [--seconds X] [--operations forward,backward,step]
//            [--output FILE.json] [--commit C]
//
// Ends after so many batches or seconds, at once with exit status 1 when something is wrong; the line it prints then repeats
// that batch. A device that hangs is given up after 30 seconds. The file holds what was counted, in Google Benchmark's
// format, so that bench/compare.py puts it together with the times; it is written only where all is right.
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>
#include <numeric>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "tests/stress/call.hpp"

namespace flashdelta::stress {
namespace {

constexpr double PATIENCE = 30;       // seconds
constexpr std::uint64_t SAMPLE = 16;  // one batch in so many is compared with the host
constexpr std::size_t MOVES = 6;      // so many times are the inputs moved, to see how far results that seem wrong move
// So many times their movement may results be off: a head's, a whole tensor's (docs/numerics.md, "Where dg cancels").
constexpr double HEAD_MOVEMENT = 8, TENSOR_MOVEMENT = 6;

struct Options {
  std::string device = "cuda";
  std::uint64_t seed = 1, first = 0, batches = 10000;
  double seconds = 60;
  std::set<std::string> operations = {"forward", "backward", "step"};
  std::string output, commit = "unknown";
};

struct Wrong : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum Counter : unsigned { second_run, guards, not_finite, padding, untouched, alone };
constexpr const char* COUNTED[] = {"bytes differ between two runs",
                                   "bytes are written outside the tensors",
                                   "elements are not finite",
                                   "bytes past the last sequence are not zero",
                                   "bytes of rows that were not to be written have changed",
                                   "bytes of a sequence differ when it is alone"};

double norm(const std::vector<double>& x) { return std::sqrt(std::inner_product(x.begin(), x.end(), x.begin(), 0.0)); }

double distance(std::vector<double> a, const std::vector<double>& b) {
  for (std::size_t i = 0; i < a.size(); ++i) a[i] -= b[i];
  return norm(a);
}

struct Counts {
  unsigned long long batches = 0, alone = 0, compared = 0;
};

class Stress {
 public:
  Stress(Machine& machine, const Options& options)
      : machine_(machine),
        options_(options),
        on_gpu_(machine.device() == FD_CUDA),
        work_(on_gpu_ ? 1 << 20 : 4000),
        arena_(machine, std::size_t{on_gpu_ ? 24U : 1U} << 30),
        noise_(machine) {}

  // Throws Wrong.
  int run() {
    const auto begin = std::chrono::steady_clock::now();
    const auto elapsed = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count(); };
    double said = 0;
    for (index_ = options_.first; index_ < options_.first + options_.batches && elapsed() < options_.seconds; ++index_) {
      for (const auto& [name, operation] :
           {std::pair{"forward", Operation::forward}, {"backward", Operation::backward}, {"step", Operation::step}}) {
        if (options_.operations.contains(name)) run_batch(name, operation);
      }
      if (elapsed() > said + 5) {
        said = elapsed();
        std::printf("%6.0f s: batch %llu\n", said, static_cast<unsigned long long>(index_));
        std::fflush(stdout);
      }
    }
    return summary(elapsed());
  }

  // The command that repeats the batch at hand.
  std::string again() const {
    return "stress --device " + options_.device + " --seed " + std::to_string(options_.seed) + " --first " +
           std::to_string(index_) + " --batches 1 --operations " + operation_;
  }

 private:
  void run_batch(const std::string& name, Operation operation) {
    operation_ = name;
    const bool sampled = index_ % SAMPLE == 0;
    const Batch batch = draw(operation, options_.seed, index_, sampled && on_gpu_ ? work_ / 32 : work_, machine_.device());
    description_ = batch.describe();
    fd_backend backend;
    const fd_problem& p = batch.problem;
    const fd_status planned = operation == Operation::forward    ? fd_forward_backend(&p, &backend)
                              : operation == Operation::backward ? fd_backward_backend(&p, &backend)
                                                                 : fd_step_backend(&p, &backend);
    if (planned == FD_UNSUPPORTED) {
      if (++refused_[name][fd_last_error()] == 1) std::printf("%s: skipped, %s\n", name.c_str(), fd_last_error());
      return;
    }
    must(planned);
    try {
      run_call(batch, sampled);
    } catch (const Wrong&) {
      throw;
    } catch (const std::exception& failure) {
      throw Wrong(description_ + "\n" + failure.what());
    }
    ++counted_[name].batches;
  }

  void run_call(const Batch& batch, bool sampled) {
    arena_.clear();
    Call call(machine_, arena_, noise_, batch, options_.seed + index_);
    Run first = call.prepare(), second = call.prepare();
    // Everything that the host reads and writes lies before the first run's workspace.
    std::vector<unsigned char> mirror(sampled ? static_cast<std::size_t>(first.workspace.data - arena_.base()) : 0);
    if (sampled) machine_.download(mirror.data(), arena_.base(), mirror.size());
    must(call.enqueue(first));
    must(call.enqueue(second));
    const std::int64_t tokens = batch.problem.B * batch.problem.T;
    for (std::size_t i = 0; i < first.outputs.size(); ++i) {
      const Output& output = first.outputs[i];
      machine_.count_different(output.buffer.data, second.outputs[i].buffer.data, output.buffer.bytes, second_run);
      if (output.rows.empty() && !is_state(output)) {
        count_tokens(batch, output, tokens);
      } else {
        count_rows(first, call, output);
      }
    }
    const std::int64_t n = static_cast<std::int64_t>(index_ % static_cast<std::uint64_t>(batch.N()));
    if (batch.operation == Operation::forward && batch.problem.context_parallel == FD_CONTEXT_OFF) {
      must(call.enqueue_alone(first, n, alone));
      ++counted_[operation_].alone;
    }
    arena_.count_guards(guards);
    const std::vector<std::uint64_t> counts = machine_.counts(PATIENCE);
    for (unsigned i = 0; i < std::size(COUNTED); ++i) {
      if (counts[i] == 0) continue;
      const std::string where = i == second_run ? differing_outputs(first, second) : "";
      throw Wrong(description_ + "\n" + std::to_string(counts[i]) + " " + COUNTED[i] + where);
    }
    if (sampled) compare_with_host(call, first, mirror);
  }

  // ": dk 12 of 4194304 from byte 4096, ...". The workspace tells which kernel was the first that differed.
  std::string differing_outputs(const Run& first, const Run& second) {
    std::string text;
    const auto compare = [&](const std::string& name, const Buffer& a, const Buffer& b) {
      std::vector<unsigned char> x(a.bytes), y(b.bytes);
      if (x.empty()) return;
      machine_.download(x.data(), a.data, x.size());
      machine_.download(y.data(), b.data, y.size());
      const auto at = static_cast<std::size_t>(std::mismatch(x.begin(), x.end(), y.begin()).first - x.begin());
      if (at == x.size()) return;
      std::size_t different = 0;
      for (std::size_t j = at; j < x.size(); ++j) different += x[j] != y[j] ? 1 : 0;
      text += (text.empty() ? ": " : ", ") + name + " " + std::to_string(different) + " of " + std::to_string(x.size()) +
              " from byte " + std::to_string(at);
    };
    for (std::size_t i = 0; i < first.outputs.size(); ++i) {
      compare(first.outputs[i].name, first.outputs[i].buffer, second.outputs[i].buffer);
    }
    compare("workspace", first.workspace, second.workspace);
    return text;
  }

  static bool is_state(const Output& output) {
    return output.name == "checkpoints" || output.name.find("state") != std::string::npos;
  }

  void count_tokens(const Batch& batch, const Output& output, std::int64_t tokens) {
    const std::size_t element = size_of(output.type);
    machine_.count_not_finite(output.buffer.data, output.type, output.buffer.bytes / element, not_finite);
    if (output.buffer.bytes != static_cast<std::size_t>(tokens * output.heads * output.width) * element) return;
    const auto used = static_cast<std::size_t>((tokens - batch.padding) * output.heads * output.width) * element;
    machine_.count_other(output.buffer.data + used, 0, output.buffer.bytes - used, padding);
  }

  void count_rows(const Run& run, const Call& call, const Output& output) {
    const auto elements = static_cast<std::size_t>(output.heads * output.width);
    const std::size_t bytes = elements * size_of(output.type);
    std::vector<bool> written(output.buffer.bytes / std::max<std::size_t>(bytes, 1));
    for (const std::int64_t row : output.rows) written[static_cast<std::size_t>(row)] = true;
    const bool in_place = output.buffer.data == run.state.data;
    for (std::size_t row = 0; row < written.size(); ++row) {
      unsigned char* const data = output.buffer.data + row * bytes;
      if (written[row]) {
        machine_.count_not_finite(data, output.type, elements, not_finite);
      } else if (in_place) {
        machine_.count_different(data, call.initial_states().data + row * bytes, bytes, untouched);
      } else {
        machine_.count_other(data, POISON, bytes, untouched);
      }
    }
  }

  void compare_with_host(const Call& call, const Run& run, std::vector<unsigned char>& mirror) {
    const Batch& batch = call.batch();
    const fd_backend backend = on_gpu_ ? FD_BACKEND_CPU : FD_BACKEND_REFERENCE;
    const bool hard = batch.keys == Keys::correlated || batch.gates == Gates::strong || batch.problem.beta == FD_BETA_ONE;
    const double limit = (batch.operation == Operation::backward ? 0.05 : 0.02) * (hard ? 4 : 1);
    const std::vector<unsigned char> inputs = mirror;  // the host's results come into the mirror
    must(call.run_on_host(run, mirror, backend));
    std::vector<std::vector<unsigned char>> moved;
    for (const Output& output : run.outputs) {
      std::vector<unsigned char> got(output.buffer.bytes);
      if (got.empty()) continue;
      machine_.download(got.data(), output.buffer.data, got.size());
      const std::ptrdiff_t at = output.buffer.data - arena_.base();
      if (wrong_in(batch, output, got.data(), mirror.data() + at, {}, limit).empty()) continue;
      if (moved.empty()) {
        moved.assign(MOVES, inputs);
        for (std::size_t i = 0; i < moved.size(); ++i) {
          call.move_inputs(moved[i], i);
          must(call.run_on_host(run, moved[i], backend));
        }
      }
      std::vector<const unsigned char*> others;
      for (const auto& other : moved) others.push_back(other.data() + at);
      const std::string wrong = wrong_in(batch, output, got.data(), mirror.data() + at, others, limit);
      if (!wrong.empty()) throw Wrong(wrong);
    }
    ++counted_[operation_].compared;
  }

  // Relative L2 error of every head of every sequence; heads much smaller than the others count as a share of these. Results
  // may also be off in proportion to their movement (root mean square) with the last bits of the inputs: dg of a head
  // without decay is a sum of terms of either sign over all tokens that follow, and what correlated keys read is a
  // difference of what they wrote, of which little may be left. Where that lets a head be off by its own size, the tensor's
  // heads together still may not. Returns what is wrong, or nothing.
  std::string wrong_in(const Batch& batch, const Output& output, const unsigned char* got, const unsigned char* want,
                       const std::vector<const unsigned char*>& moved, double limit) const {
    struct Stretch {
      std::int64_t first, tokens;  // in units of heads x width elements
    };
    std::vector<Stretch> stretches;
    if (is_state(output)) {
      for (const std::int64_t row : output.rows) stretches.push_back({row, 1});
    } else if (output.name == "dA_log" || output.name == "ddt_bias") {
      stretches.push_back({0, 1});
    } else {
      for (std::int64_t n = 0; n < batch.N(); ++n) {
        stretches.push_back({batch.first_token(n), batch.lengths[static_cast<std::size_t>(n)]});
      }
    }
    const std::int64_t unit = output.heads * output.width;
    double squares = 0, count = 0;
    for (const Stretch& s : stretches) {
      for (std::int64_t i = s.first * unit; i < (s.first + s.tokens) * unit; ++i) {
        const double x = load(want, output.type, i);
        squares += x * x;
        ++count;
      }
    }
    const double typical = count == 0 ? 0 : std::sqrt(squares / count);
    double all_off = 0, all_movement = 0;  // squares
    for (const Stretch& s : stretches) {
      for (std::int64_t head = 0; head < output.heads; ++head) {
        const auto values = [&](const unsigned char* data) {
          std::vector<double> x;
          for (std::int64_t t = s.first; t < s.first + s.tokens; ++t) {
            for (std::int64_t i = 0; i < output.width; ++i) {
              x.push_back(load(data, output.type, t * unit + head * output.width + i));
            }
          }
          return x;
        };
        const std::vector<double> wanted = values(want);
        const double off = distance(values(got), wanted);
        const double size = std::max(norm(wanted), 0.05 * typical * std::sqrt(static_cast<double>(wanted.size())));
        double movement = 0;
        for (const unsigned char* other : moved) movement += std::pow(distance(values(other), wanted), 2) / MOVES;
        all_off += off * off;
        all_movement += movement;
        if (off <= std::max(limit * size, HEAD_MOVEMENT * std::sqrt(movement))) continue;
        return description_ + "\n" + output.name + ": error " + std::to_string(off / size) + " against the host, limit " +
               std::to_string(limit) + ", at token or row " + std::to_string(s.first) + ", head " + std::to_string(head);
      }
    }
    const double off = std::sqrt(all_off), size = std::sqrt(squares);
    if (!moved.empty() && off > std::max(limit * size, TENSOR_MOVEMENT * std::sqrt(all_movement))) {
      return description_ + "\n" + output.name + ": error " + std::to_string(off / size) +
             " of all heads together against the host, limit " + std::to_string(limit);
    }
    return {};
  }

  static void must(fd_status status) {
    if (status != FD_OK) throw std::runtime_error(fd_last_error());
  }

  int summary(double seconds) {
    Counts all;
    int missing = 0;
    for (const std::string& name : options_.operations) {
      std::uint64_t refused = 0;
      for (const auto& [reason, count] : refused_[name]) refused += count;
      const Counts& counts = counted_[name];
      std::printf("%s: %llu batches, %llu refused\n", name.c_str(), counts.batches,
                  static_cast<unsigned long long>(refused));
      all.batches += counts.batches, all.alone += counts.alone, all.compared += counts.compared;
      missing += counts.batches == 0 && name != "backward" ? 1 : 0;
    }
    const bool right = missing == 0 && all.batches > 0;
    std::printf(
        "%llu batches in %.0f s (%.0f a second), each run twice with the same bits, %llu sequences also alone, "
        "%llu compared with the host; seed %llu: %s\n",
        all.batches, seconds, static_cast<double>(all.batches) / seconds, all.alone, all.compared,
        static_cast<unsigned long long>(options_.seed), right ? "all right" : "an operation never ran");
    if (right && !options_.output.empty()) write(seconds);
    return right ? 0 : 1;
  }

  void write(double seconds) {
    std::ofstream file(options_.output);
    file << "{\"context\": {\"executable\": \"stress\", \"commit\": \"" << options_.commit
         << "\", \"command\": \"stress --device " << options_.device << " --seed " << options_.seed
         << "\"},\n \"benchmarks\": [";
    const char* separator = "\n";
    for (const auto& [name, counts] : counted_) {
      file << separator << "  {\"name\": \"stress/" << options_.device << "/" << name
           << "\", \"run_type\": \"iteration\", \"iterations\": " << counts.batches << ", \"real_time\": " << seconds
           << ", \"time_unit\": \"s\", \"alone\": " << counts.alone << ", \"compared\": " << counts.compared
           << ", \"first\": " << options_.first << ", \"seed\": " << options_.seed << "}";
      separator = ",\n";
    }
    file << "\n]}\n";
    if (!file.flush()) throw std::runtime_error("cannot write " + options_.output);
  }

  Machine& machine_;
  const Options& options_;
  bool on_gpu_;
  std::int64_t work_;  // tokens times value heads of a batch, at most; on a GPU a 32nd of it in what the host computes, too
  Arena arena_;
  Noise noise_;
  std::uint64_t index_ = 0;
  std::string operation_, description_;
  std::map<std::string, Counts> counted_;
  std::map<std::string, std::map<std::string, std::uint64_t>> refused_;
};

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; i += 2) {
    const std::string name = argv[i];
    if (i + 1 == argc) throw std::invalid_argument(name + " needs a value");
    const std::string value = argv[i + 1];
    if (name == "--device" && (value == "cuda" || value == "cpu")) {
      options.device = value;
    } else if (name == "--seed") {
      options.seed = std::stoull(value);
    } else if (name == "--first") {
      options.first = std::stoull(value);
    } else if (name == "--batches") {
      options.batches = std::stoull(value);
    } else if (name == "--seconds") {
      options.seconds = std::stod(value);
    } else if (name == "--output") {
      options.output = value;
    } else if (name == "--commit") {
      options.commit = value;
    } else if (name == "--operations") {
      options.operations.clear();
      for (std::size_t at = 0; at <= value.size();) {
        const std::size_t comma = std::min(value.find(',', at), value.size());
        const std::string operation = value.substr(at, comma - at);
        if (operation != "forward" && operation != "backward" && operation != "step") {
          throw std::invalid_argument("\"" + operation + "\" is no operation");
        }
        options.operations.insert(operation);
        at = comma + 1;
      }
    } else {
      throw std::invalid_argument("cannot read " + name + " " + value);
    }
  }
  return options;
}

}  // namespace
}  // namespace flashdelta::stress

int main(int argc, char** argv) {
  using namespace flashdelta::stress;
  try {
    const Options options = parse(argc, argv);
#if defined(FLASHDELTA_CUDA)
    const auto machine = options.device == "cuda" ? cuda_machine() : host_machine();
#else
    if (options.device == "cuda") throw std::runtime_error("built without CUDA: --device cpu");
    const auto machine = host_machine();
#endif
    Stress stress(*machine, options);
    try {
      return stress.run();
    } catch (const Wrong& wrong) {
      std::printf("WRONG %s\nrepeat: %s\n", wrong.what(), stress.again().c_str());
      std::fflush(stdout);
      _exit(1);  // a device that hangs would not let go of its memory
    }
  } catch (const std::exception& failure) {
    std::fprintf(stderr, "stress: %s\n", failure.what());
    return 1;
  }
}
