// Speed of the CUDA backends on a Hopper GPU, from replays of CUDA graphs: the rows of rows.txt, which says what the names
// mean. Beside each row: median, p10, p90, host time of a call, rates, the share of the floor (the larger of the bytes at
// the bandwidth of a copy and the operations at the rate of dense bf16 products, both measured first), the clock of the SMs.
//
//     bench_gpu --list      names the rows
//     bench_gpu [--operation=forward] --benchmark_out=h200.json --benchmark_out_format=json
//     [--benchmark_filter='^forward/16/64/']
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#include "bench/gpu_timing.hpp"
#include "bench/rows.hpp"
#include "bench_rows_text.hpp"

#ifndef FLASHDELTA_COMMIT
#define FLASHDELTA_COMMIT "unknown"
#endif

namespace {

using namespace flashdelta::bench;

std::string two_parts(int version, int unit) {  // 13000 -> "13.0"
  return std::to_string(version / unit) + "." + std::to_string(version % unit / 10);
}

void describe_run(const Machine& machine, const std::vector<char*>& arguments) {
  cudaDeviceProp device;
  must(cudaGetDeviceProperties(&device, 0), "cudaGetDeviceProperties");
  int driver = 0;
  must(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  std::string command = "bench_gpu";
  for (std::size_t i = 1; i < arguments.size(); ++i) command += std::string(" ") + arguments[i];
  const std::int32_t version = fd_version();
  benchmark::AddCustomContext("gpu", device.name);
  benchmark::AddCustomContext("sms", std::to_string(machine.sm_count));
  benchmark::AddCustomContext("driver_cuda", two_parts(driver, 1000));
  benchmark::AddCustomContext("cudart", two_parts(CUDART_VERSION, 1000));
  benchmark::AddCustomContext("flashdelta", std::to_string(version / 10000) + "." + std::to_string(version / 100 % 100) +
                                                "." + std::to_string(version % 100));
  benchmark::AddCustomContext("commit", FLASHDELTA_COMMIT);
  benchmark::AddCustomContext("command", command);
  benchmark::AddCustomContext("copy_GB_per_s", std::to_string(machine.bandwidth * 1e-9));
  benchmark::AddCustomContext("products_TFLOP_per_s", std::to_string(machine.rate * 1e-12));
  benchmark::AddCustomContext("products_sm_MHz", std::to_string(machine.rate_clock));
}

int run(int argc, char** argv) {
  const std::string first = argc > 1 ? argv[1] : "", prefix = "--operation=";
  auto rows = parse_rows(ROWS);
  if (first == "--list") {
    for (const Row& row : rows) std::printf("%s\n", row.name.c_str());
    return 0;
  }
  const std::vector<char*> all(argv, argv + argc);
  if (first.starts_with(prefix)) {
    std::erase_if(rows, [&](const Row& row) { return row.operation != first.substr(prefix.size()); });
    if (rows.empty()) throw std::invalid_argument("no rows for " + first);
    argv[1] = argv[0];
    ++argv, --argc;
  }
  int devices = 0, major = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::fprintf(stderr, "bench_gpu: no CUDA device\n");
    return 1;
  }
  must(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), "cudaDeviceGetAttribute");
  if (major != 9) {
    std::fprintf(stderr, "bench_gpu: the first CUDA device is no Hopper GPU\n");
    return 1;
  }
  const Machine machine = measure_machine();
  describe_run(machine, all);
  for (const Row& row : rows) {
    row.operation == "step" ? register_step(machine, row) : register_sequences(machine, row);
  }
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "bench_gpu: %s\n", error.what());
    return 1;
  }
}
