#include <algorithm>

#include "bench/gpu_kernels.hpp"
#include "bench/gpu_timing.hpp"
#include "cuda/inputs.cuh"
#include "cuda/ptx.cuh"
#include "cuda/ptx_sm90.cuh"

namespace flashdelta::bench {
namespace {

__device__ uint64_t mixed(uint64_t x) {  // the finaliser of SplitMix64
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

__device__ float normal(uint64_t seed, uint64_t i) {
  const uint64_t bits = mixed(mixed(seed + 0x9e3779b97f4a7c15ull) + i);
  const float radius = sqrtf(-2 * logf((static_cast<float>(bits >> 40) + 1) * 0x1p-24f));
  return radius * cospif(static_cast<float>(bits & 0xffffff) * 0x1p-23f);
}

__device__ uint64_t first_index() { return static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ uint64_t all_threads() { return static_cast<uint64_t>(gridDim.x) * blockDim.x; }

__global__ void fill_elements(void* data, fd_dtype type, uint64_t count, Fill what, uint64_t heads, uint64_t seed) {
  for (uint64_t i = first_index(); i < count; i += all_threads()) {
    float x = normal(seed, i);
    if (what == Fill::decay || what == Fill::gate) x = -log1pf(expf(-x)) / 16;
    if (what == Fill::zero || (what == Fill::gate && i % heads % 4 == 0)) x = 0;
    if (what == Fill::strength) x = 1 / (1 + expf(-x));
    cuda::store_element(data, type, static_cast<int64_t>(i), x);
  }
}

// One warp per row of 128.
__global__ void fill_unit_rows(void* data, fd_dtype type, uint64_t rows, uint64_t seed) {
  for (uint64_t row = first_index() / 32; row < rows; row += all_threads() / 32) {
    const uint64_t first = row * 128 + threadIdx.x % 32;
    float x[4], squares = 0;
    for (int i = 0; i < 4; ++i) {
      x[i] = normal(seed, first + 32 * i);
      squares += x[i] * x[i];
    }
    for (int distance = 16; distance > 0; distance /= 2) squares += __shfl_xor_sync(~0u, squares, distance);
    for (int i = 0; i < 4; ++i)
      cuda::store_element(data, type, static_cast<int64_t>(first + 32 * i), x[i] * rsqrtf(squares));
  }
}

// Four 16-byte loads in flight per thread.
__global__ void copy_blocks(uint4* to, const uint4* from, uint64_t count) {
  for (uint64_t first = blockIdx.x * 4ull * blockDim.x + threadIdx.x; first < count; first += 4 * all_threads()) {
    uint4 x[4];
    for (int i = 0; i < 4; ++i) {
      if (first + i * blockDim.x < count) x[i] = cuda::load_once(from + first + i * blockDim.x);
    }
    for (int i = 0; i < 4; ++i) {
      if (first + i * blockDim.x < count) __stcs(to + first + i * blockDim.x, x[i]);
    }
  }
}

constexpr int TILES = 4, DEPTH = 4;  // tiles of 128 x 64 in shared memory; steps of 16 through one

__global__ void __launch_bounds__(MULTIPLY_THREADS, 1) multiply_tiles(const uint4* noise, float* sums, int rounds) {
  extern __shared__ __align__(1024) uint4 tiles[];
  for (unsigned i = threadIdx.x; i < NOISE_BYTES / sizeof(uint4); i += MULTIPLY_THREADS) tiles[i] = noise[i];
  cuda::fence_async_shared();
  __syncthreads();
  uint4 a[TILES * DEPTH];  // both operands change with every product, as in real work: that costs power, hence clock
#pragma unroll
  for (int i = 0; i < TILES * DEPTH; ++i) a[i] = noise[(threadIdx.x + i * MULTIPLY_THREADS) % (NOISE_BYTES / sizeof(uint4))];
  const uint32_t first = cuda::shared_address(tiles);
  float d[64] = {};
  for (int round = 0; round < rounds; ++round) {
    cuda::wgmma_fence();
#pragma unroll
    for (int i = 0; i < TILES * DEPTH; ++i) {
      const uint64_t b = cuda::matrix_descriptor(first + i / DEPTH * 16384 + i % DEPTH * 32, 16);
      cuda::wgmma<__nv_bfloat16, false, 0>(d, a[i].x, a[i].y, a[i].z, a[i].w, b);
    }
    cuda::wgmma_commit();
    cuda::wgmma_wait<0>();
    cuda::accumulators_ready(d);
  }
  float sum = 0;
  for (int i = 0; i < 64; ++i) sum += d[i];
  sums[blockIdx.x * MULTIPLY_THREADS + threadIdx.x] = sum;
}

__global__ void write_stamps(Stamp* stamps) {
  unsigned sm;
  unsigned long long now;
  asm volatile("mov.u32 %0, %%smid;" : "=r"(sm));
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  stamps[blockIdx.x] = {sm, static_cast<unsigned long long>(clock64()), now};
}

constexpr unsigned BLOCKS = 4096, THREADS = 256;

}  // namespace

void fill(void* data, fd_dtype type, std::size_t count, Fill what, std::int64_t heads, std::uint64_t seed,
          cudaStream_t stream) {
  if (what == Fill::unit_rows) {
    fill_unit_rows<<<BLOCKS, THREADS, 0, stream>>>(data, type, count / 128, seed);
  } else {
    fill_elements<<<BLOCKS, THREADS, 0, stream>>>(data, type, count, what, static_cast<uint64_t>(heads), seed);
  }
  must(cudaGetLastError(), "fill");
}

void copy(void* to, const void* from, std::size_t bytes, cudaStream_t stream) {
  copy_blocks<<<BLOCKS, THREADS, 0, stream>>>(static_cast<uint4*>(to), static_cast<const uint4*>(from), bytes / 16);
  must(cudaGetLastError(), "copy");
}

double multiply(const void* noise, float* sums, int sm_count, int rounds, cudaStream_t stream) {
  must(cudaFuncSetAttribute(multiply_tiles, cudaFuncAttributeMaxDynamicSharedMemorySize, NOISE_BYTES), "multiply");
  multiply_tiles<<<static_cast<unsigned>(sm_count), MULTIPLY_THREADS, NOISE_BYTES, stream>>>(
      static_cast<const uint4*>(noise), sums, rounds);
  must(cudaGetLastError(), "multiply");
  return 2.0 * 64 * 128 * 16 * TILES * DEPTH * (MULTIPLY_THREADS / 128) * rounds * sm_count;
}

void stamp(Stamp* stamps, int blocks, cudaStream_t stream) {
  write_stamps<<<static_cast<unsigned>(blocks), 1, 0, stream>>>(stamps);
  must(cudaGetLastError(), "stamp");
}

double clock_between(const std::vector<Stamp>& before, const std::vector<Stamp>& after) {
  std::vector<double> clocks;
  for (const Stamp& start : before) {
    const auto same = [&](const Stamp& s) { return s.sm == start.sm && s.nanoseconds > start.nanoseconds; };
    const auto stop = std::find_if(after.begin(), after.end(), same);
    if (stop == after.end()) continue;
    clocks.push_back(static_cast<double>(stop->cycles - start.cycles) /
                     static_cast<double>(stop->nanoseconds - start.nanoseconds) * 1e3);
  }
  return clocks.empty() ? 0 : quantile(clocks, 0.5);
}

}  // namespace flashdelta::bench
