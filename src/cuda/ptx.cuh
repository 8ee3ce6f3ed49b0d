// Instructions that CUDA C++ has no function for. The only file with inline assembly.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace flashdelta::cuda {

// 16 bytes that are read once: not kept in L1, first to leave L2. Volatile, so that a batch of loads stays in front of what
// follows it. `address` is aligned to 16 bytes.
__device__ inline uint4 load_once(const uint4* address) {
  uint4 x;
  asm volatile("ld.global.cs.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(address));
  return x;
}
__device__ inline uint2 load_once(const uint2* address) {
  uint2 x;
  asm volatile("ld.global.cs.v2.u32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "l"(address));
  return x;
}

// Brings the line of 128 bytes that the address lies in into L2 some time.
__device__ inline void prefetch_line(const void* address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }
// 16 bytes as usual; volatile likewise.
__device__ inline uint4 load_at_once(const uint4* address) {
  uint4 x;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(address));
  return x;
}

// d += a b for one warp: a 16 x 16, b 16 x 8, both of type T, sums in fp32. Lane 4 g + c has, of a, rows g (a[0],
// a[2]) and g + 8 of columns 2 c, 2 c + 1 (a[0], a[1]) and of those 8 further on; of b, column g of the same rows; of d,
// rows g (d[0], d[1]) and g + 8 of columns 2 c, 2 c + 1.
#define FD_MMA(type)                                                         \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
      ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                       \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
template <typename T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void mma<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  FD_MMA("bf16");
}
template <>
__device__ __forceinline__ void mma<__half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  FD_MMA("f16");
}
#undef FD_MMA
// The same with 8 columns of a, in bf16.
__device__ __forceinline__ void mma_bf16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(b0));
}

// d += a b for one warp: a 16 x 8, b 8 x 8, in tf32: fp32 without the lower 13 bits. Lane 4 g + c has, of a, rows g and g +
// 8 of column c (a[0], a[1]) and of column c + 4; of b, column g of rows c and c + 4.
__device__ __forceinline__ void mma_tf32(float (&d)[4], const float (&a)[4], float b0, float b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
        "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}

// A value that the compiler may not compute with before this place: a load that is not waited for yet.
__device__ __forceinline__ void pin(uint32_t& x) { asm volatile("" : "+r"(x)); }

// Waits until the kernels that this one depends on have ended and their writes are visible. Does nothing where kernels of a
// stream do not overlap.
__device__ inline void wait_for_earlier_kernels() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets a kernel that waits as above be set up while this one still runs.
__device__ inline void allow_later_kernels() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

}  // namespace flashdelta::cuda
