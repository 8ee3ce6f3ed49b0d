// The steps of a state's walk over a chunk, for the warpgroup that has 64 values of it, transposed, in its registers: the
// same instructions in the kernels of the forward, of context parallelism's pre-pass and of the backward's states, whose
// states have the same bits. Products are begun and committed, not waited for.
#pragma once

#include "cuda/block_sm90.cuh"

namespace flashdelta::cuda {

// The state rounded: operand of U and O.
template <typename T>
__device__ __forceinline__ void round_state(uint32_t (&a)[32], const float (&s)[64]) {
#pragma unroll
  for (int i = 0; i < 32; ++i) a[i] = pack<T>(s[2 * i], s[2 * i + 1]);
}

// d (values x tokens) = S^T b^T with the rounded state; `tile`: K or Q, two halves of 64 columns.
template <typename T>
__device__ __forceinline__ void begin_product_with_state(float (&d)[32], const uint32_t (&a)[32], uint32_t tile) {
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    const uint64_t b = advance(matrix_descriptor(tile, 16), (k / 4) * TILE + (k % 4) * 32);
    if (k == 0) {
      wgmma<T, true, 0>(d, a[4 * k], a[4 * k + 1], a[4 * k + 2], a[4 * k + 3], b);
    } else {
      wgmma<T, false, 0>(d, a[4 * k], a[4 * k + 1], a[4 * k + 2], a[4 * k + 3], b);
    }
  }
  wgmma_commit();
}

// x = V - e^gam U, rounded; `v`: fragments of V, `read`: e^gam of the thread's tokens, with |k|^-1.
template <typename T>
__device__ __forceinline__ void subtract_read(uint32_t (&x)[16], const uint32_t (&v)[4][4], const float2 (&read)[8],
                                              const float (&u)[32]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float2 f = read[i], v0 = unpack<T>(v[i / 2][i % 2 * 2]), v1 = unpack<T>(v[i / 2][i % 2 * 2 + 1]);
    x[2 * i] = pack<T>(v0.x - f.x * u[4 * i], v0.y - f.y * u[4 * i + 1]);
    x[2 * i + 1] = pack<T>(v1.x - f.x * u[4 * i + 2], v1.y - f.y * u[4 * i + 3]);
  }
  computed(x);
}

// R = X T^T: u = x t; `tile`: T transposed.
template <typename T>
__device__ __forceinline__ void begin_solve(float (&u)[32], const uint32_t (&x)[16], uint32_t tile) {
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const uint64_t b = advance(matrix_descriptor(tile, TILE), k * 2048);
    if (k == 0) {
      wgmma<T, true, 1>(u, x[4 * k], x[4 * k + 1], x[4 * k + 2], x[4 * k + 3], b);
    } else {
      wgmma<T, false, 1>(u, x[4 * k], x[4 * k + 1], x[4 * k + 2], x[4 * k + 3], b);
    }
  }
  wgmma_commit();
}

// w = R times what is left of a token's write at the chunk's end, rounded.
template <typename T>
__device__ __forceinline__ void decay_writes(uint32_t (&w)[16], const float (&u)[32], const float2 (&write)[8]) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    w[2 * j] = pack<T>(write[j].x * u[4 * j], write[j].y * u[4 * j + 1]);
    w[2 * j + 1] = pack<T>(write[j].x * u[4 * j + 2], write[j].y * u[4 * j + 3]);
  }
  computed(w);
}

// S^T += w K; `tile`: K.
template <typename T>
__device__ __forceinline__ void begin_update(float (&s)[64], const uint32_t (&w)[16], uint32_t tile) {
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    wgmma<T, false, 1>(s, w[4 * k], w[4 * k + 1], w[4 * k + 2], w[4 * k + 3],
                       advance(matrix_descriptor(tile, TILE), k * 2048));
  }
  wgmma_commit();
}

}  // namespace flashdelta::cuda
