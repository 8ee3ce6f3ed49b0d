// Instructions of Hopper alone (sm_90a): matrix multiplication by warpgroups, bulk tensor copies, barriers in shared memory.
// With ptx.cuh the only inline assembly.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstdio>

#include "cuda/ptx.cuh"

namespace flashdelta::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Registers of the calling warpgroup from here on. All warpgroups of a block together: at most 512.
template <int REGISTERS>
__device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// The same value, but the compiler does not know it: what follows from it is not computed early and kept in registers.
__device__ __forceinline__ int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Named barrier `id` (1 to 15) of `threads` threads.
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// --- mbarrier
// ---------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives, and keeps the phase open until `bytes` more bytes of bulk copies have landed.
__device__ __forceinline__ void barrier_arrive_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// False if the phase has not ended after a while, in which the warp sleeps: with HINT (a register) so long that it hardly
// ever takes turns from others.
template <bool HINT = true>
__device__ __forceinline__ bool barrier_try(uint32_t barrier, uint32_t parity) {
  constexpr uint32_t NANOSECONDS = 10'000'000;
  uint32_t done;
  if constexpr (HINT) {
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2, %3;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity), "n"(NANOSECONDS)
                 : "memory");
  } else {
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
  }
  return done != 0;
}
// The same without sleeping.
__device__ __forceinline__ bool barrier_test(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
               : "=r"(done)
               : "r"(barrier), "r"(parity)
               : "memory");
  return done != 0;
}
// Waits for the end of the phase of this parity. With FLASHDELTA_SPIN_LIMIT a wait that takes too long is a trap, not a
// hang.
template <bool HINT = true>
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
#if defined(FLASHDELTA_SPIN_LIMIT)
  for (uint32_t i = 0; !barrier_try<HINT>(barrier, parity); ++i) {
    if (i > FLASHDELTA_SPIN_LIMIT) {
      printf("block %d thread %d: barrier at %u, parity %u\n", blockIdx.x, threadIdx.x, barrier, parity);
      __trap();
    }
  }
#else
  while (!barrier_try<HINT>(barrier, parity)) {
  }
#endif
}

// Writes to shared memory by this thread come before reads of it by wgmma and bulk copies that follow.
__device__ __forceinline__ void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// The same for what others wrote to these bytes before they arrived at a barrier that this thread has waited for: one fence
// on the way from their writes to the copy that reads them is enough.
__device__ __forceinline__ void fence_async_shared(uint32_t, int) { fence_async_shared(); }

// --- bulk copies
// -----------------------------------------------------------------------------------------------------

__device__ __forceinline__ void tensor_load(uint32_t shared, const CUtensorMap* map, uint32_t barrier, int c0, int c1,
                                            int c2, int c3, int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], "
      "[%2];" ::"r"(shared),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}
__device__ __forceinline__ void tensor_store(const CUtensorMap* map, uint32_t shared, int c0, int c1, int c2, int c3,
                                             int c4) {
  asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(map),
               "r"(shared), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
               : "memory");
}
// `bytes` contiguous bytes, a multiple of 16; both addresses aligned to 16.
__device__ __forceinline__ void bulk_load(uint32_t shared, const void* global, int bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
               "l"(global), "r"(bytes), "r"(barrier)
               : "memory");
}
// Brings to L2 what one of the loads above will want.
__device__ __forceinline__ void tensor_prefetch(const CUtensorMap* map, int c0, int c1, int c2, int c3, int c4) {
  asm volatile("cp.async.bulk.prefetch.tensor.5d.L2.global.tile [%0, {%1, %2, %3, %4, %5}];" ::"l"(map), "r"(c0), "r"(c1),
               "r"(c2), "r"(c3), "r"(c4)
               : "memory");
}
__device__ __forceinline__ void bulk_prefetch(const void* global, int bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(global), "r"(bytes) : "memory");
}
__device__ __forceinline__ void bulk_store(void* global, uint32_t shared, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global), "r"(shared), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void stores_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until at most PENDING groups of stores still read shared memory.
template <int PENDING>
__device__ __forceinline__ void stores_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}
// Until at most PENDING groups of stores are not written.
template <int PENDING = 0>
__device__ __forceinline__ void stores_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(PENDING) : "memory");
}

// --- between blocks. A count in global memory says what bulk copies have written: one thread adds to it after stores_wait,
// another waits for it before it starts copies that read.
__device__ __forceinline__ void count_written(unsigned* count, unsigned written) {
  asm volatile("fence.proxy.async.global;\nred.release.gpu.global.add.u32 [%0], %1;" ::"l"(count), "r"(written) : "memory");
}
__device__ __forceinline__ bool is_written(const unsigned* count, unsigned wanted) {
  unsigned written;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];\nfence.proxy.async.global;" : "=r"(written) : "l"(count) : "memory");
  return written >= wanted;
}
// False after about ten milliseconds.
__device__ __forceinline__ bool wait_written(const unsigned* count, unsigned wanted) {
  constexpr int TRIES = 1 << 14;
  for (int i = 0; i < TRIES; ++i) {
    if (is_written(count, wanted)) return true;
    __nanosleep(100);
  }
  return false;
}

// --- shared memory by address
// -------------------------------------------------------------------------------------------------

__device__ __forceinline__ float4 load_shared_float4(uint32_t address) {
  float4 x;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(address)
               : "memory");
  return x;
}
__device__ __forceinline__ void store_shared(uint32_t address, float x) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(x) : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t address, float2 x) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(x.x), "f"(x.y) : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t address, uint32_t x) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t address, uint4 x) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}

// --- 8 x 8 matrices of 16-bit elements between shared memory and fragments
// ----------------------------------------------------

__device__ __forceinline__ void load_matrices(uint32_t (&x)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&x)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void store_matrices(uint32_t address, uint32_t x0, uint32_t x1, uint32_t x2, uint32_t x3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x0), "r"(x1), "r"(x2),
               "r"(x3)
               : "memory");
}
__device__ __forceinline__ void store_matrices_transposed(uint32_t address, uint32_t x0, uint32_t x1, uint32_t x2,
                                                          uint32_t x3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x0), "r"(x1),
               "r"(x2), "r"(x3)
               : "memory");
}

// --- arithmetic
// ---------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two floats rounded to 16 bits, `low` in the lower half.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
  uint32_t x;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
  return x;
}
template <>
__device__ __forceinline__ uint32_t pack<__half>(float low, float high) {
  uint32_t x;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
  return x;
}
template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t x);
template <>
__device__ __forceinline__ float2 unpack<__nv_bfloat16>(uint32_t x) {
  return {__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u)};
}
template <>
__device__ __forceinline__ float2 unpack<__half>(uint32_t x) {
  return __half22float2(*reinterpret_cast<const __half2*>(&x));
}

__device__ __forceinline__ void mma_half(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma<__half>(d, a, b0, b1);
}

// --- wgmma
// --------------------------------------------------------------------------------------------------------------------

// Accumulators and register operands written before are seen by the wgmma that follow.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most PENDING groups are in flight.
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// Keeps the compiler from moving reads of accumulators above the wait.
template <int COUNT>
__device__ __forceinline__ void accumulators_ready(float (&d)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// The values are computed before anything that follows: not between the wgmma that use them, whose start that would delay.
template <int COUNT>
__device__ __forceinline__ void computed(uint32_t (&x)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+r"(x[i])::"memory");
}

// Matrix in shared memory with rows of 128 bytes, swizzled by 128 bytes; 8 rows every 1024 bytes. `leading`: bytes between
// blocks of 64 columns where columns run along M or N (transposed operand); any number where they run along the depth.
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t address, uint32_t leading) {
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | static_cast<uint64_t>(leading >> 4) << 16 |
         static_cast<uint64_t>(1024 >> 4) << 32 | static_cast<uint64_t>(1) << 62;
}

// d (64 x 2 COUNT) += a b, 16 deep, both of type T, sums in fp32. b from shared memory; a from registers (four per 64 x 16
// block) or shared memory. FIRST: d = a b; then d is an output only, so that its old value need not live. TRANSPOSED_B: b
// lies with N contiguous; TRANSPOSED_A: a lies with M contiguous (else: the depth).

template <typename T>
constexpr bool IS_BFLOAT16 = false;
template <>
constexpr bool IS_BFLOAT16<__nv_bfloat16> = true;

// The operand lists of the instruction, which takes each register by itself.
#define FD_NAMES_32                                                                                                      \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, " \
  "%25, %26, %27, %28, %29, %30, %31}, "
#define FD_NAMES_64                                                                                                      \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, " \
  "%25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "  \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
#define FD_4(mode, d, i) mode(d[i]), mode(d[i + 1]), mode(d[i + 2]), mode(d[i + 3])
#define FD_16(mode, d, i) FD_4(mode, d, i), FD_4(mode, d, i + 4), FD_4(mode, d, i + 8), FD_4(mode, d, i + 12)
#define FD_32(mode, d) FD_16(mode, d, 0), FD_16(mode, d, 16)
#define FD_64(mode, d) FD_32(mode, d), FD_16(mode, d, 32), FD_16(mode, d, 48)
// `accumulate`: "0" or "1". `rest`: the other operands.
#define FD_WGMMA(shape, type, names, accumulate, rest)                                                             \
  "{\n.reg .pred p;\nsetp.ne.b32 p, " accumulate ", 0;\nwgmma.mma_async.sync.aligned." shape ".f32." type "." type \
  " " names rest ";\n}"
#define FD_WGMMA_ALL(shape, names, outputs, rest, ...)                                        \
  if constexpr (IS_BFLOAT16<T> && FIRST) {                                                    \
    asm volatile(FD_WGMMA(shape, "bf16", names, "0", rest) : outputs("=f", d) : __VA_ARGS__); \
  } else if constexpr (IS_BFLOAT16<T>) {                                                      \
    asm volatile(FD_WGMMA(shape, "bf16", names, "1", rest) : outputs("+f", d) : __VA_ARGS__); \
  } else if constexpr (FIRST) {                                                               \
    asm volatile(FD_WGMMA(shape, "f16", names, "0", rest) : outputs("=f", d) : __VA_ARGS__);  \
  } else {                                                                                    \
    asm volatile(FD_WGMMA(shape, "f16", names, "1", rest) : outputs("+f", d) : __VA_ARGS__);  \
  }

template <typename T, bool FIRST, int TRANSPOSED_B>
__device__ __forceinline__ void wgmma(float (&d)[32], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b) {
  FD_WGMMA_ALL("m64n64k16", FD_NAMES_32, FD_32, "{%32, %33, %34, %35}, %36, p, 1, 1, %37", "r"(a0), "r"(a1), "r"(a2),
               "r"(a3), "l"(b), "n"(TRANSPOSED_B))
}
template <typename T, bool FIRST, int TRANSPOSED_B>
__device__ __forceinline__ void wgmma(float (&d)[64], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b) {
  FD_WGMMA_ALL("m64n128k16", FD_NAMES_64, FD_64, "{%64, %65, %66, %67}, %68, p, 1, 1, %69", "r"(a0), "r"(a1), "r"(a2),
               "r"(a3), "l"(b), "n"(TRANSPOSED_B))
}
template <typename T, bool FIRST, int TRANSPOSED_A = 0, int TRANSPOSED_B = 0>
__device__ __forceinline__ void wgmma(float (&d)[32], uint64_t a, uint64_t b) {
  FD_WGMMA_ALL("m64n64k16", FD_NAMES_32, FD_32, "%32, %33, p, 1, 1, %34, %35", "l"(a), "l"(b), "n"(TRANSPOSED_A),
               "n"(TRANSPOSED_B))
}
template <typename T, bool FIRST, int TRANSPOSED_A = 0, int TRANSPOSED_B = 0>
__device__ __forceinline__ void wgmma(float (&d)[64], uint64_t a, uint64_t b) {
  FD_WGMMA_ALL("m64n128k16", FD_NAMES_64, FD_64, "%64, %65, p, 1, 1, %66, %67", "l"(a), "l"(b), "n"(TRANSPOSED_A),
               "n"(TRANSPOSED_B))
}

#undef FD_WGMMA_ALL
#undef FD_WGMMA
#undef FD_64
#undef FD_32
#undef FD_16
#undef FD_4
#undef FD_NAMES_64
#undef FD_NAMES_32

}  // namespace flashdelta::cuda
