// What a chunk's tokens bring besides q, k, v: decays, write strengths, l2 norms (docs/math.md). For one warp: lane l has
// tokens l and l + 32.
#pragma once

#include "cuda/block_sm90.cuh"

namespace flashdelta::cuda {

// A vector in the order in which the threads of a state warpgroup need it: token 8 j + 2 q + e at [q][2 j + e], for lanes
// with lane % 4 = q; the rows are padded, so that they lie in different banks.
using StateVector = float[4][24];
static_assert(CHUNK == 64);

// As the tiles' algebra wants it, [64] each.
struct alignas(16) TileGates {
  float column[CHUNK];    // beta |k|^-1: factor of a column of K K^T
  float row[CHUNK];       // |k|^-1: factor of a row of K K^T
  float later[CHUNK];     // Gam_ij follows from later[i] and earlier[j]: e^gam and e^-gam where the chunk's decay is small
  float earlier[CHUNK];   // (`factored`); else both are gam, log2 of the decay from the chunk's start, inclusive
  float p_row[CHUNK];     // factor of a row of P: scale |q|^-1, if factored times e^gam
  float p_column[CHUNK];  // factor of a column of P: |k|^-1, if factored times e^-gam, if P is to have it times beta
  float decay;            // e^gam_C
  int factored;           // e^(gam_i - gam_j) may be computed as e^gam_i e^-gam_j
  float padding[2];
};
// The states want more.
struct ChunkGates : TileGates {
  StateVector read;   // e^gam |k|^-1: factor of K S
  StateVector write;  // beta e^(gam_C - gam) |k|^-1: factor of a row of V' in the state's update
  StateVector emit;   // scale e^gam |q|^-1: factor of Q S
};

// The lane's tokens' factors: of 8 j + 2 (lane % 4) and the next.
__device__ __forceinline__ void load_factors(float2 (&out)[8], const StateVector& vector, int lane) {
  const auto* row = reinterpret_cast<const float4*>(vector[lane & 3]);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float4 x = row[i];
    out[2 * i] = {x.x, x.y};
    out[2 * i + 1] = {x.z, x.w};
  }
}

struct TokenGates {
  float gam[2];   // log2 of the decay from the chunk's start, inclusive
  float beta[2];  // write strength
  float total;    // gam of the chunk's last token
};

// What the lane's tokens have in memory: loaded long before it is used.
struct TokenBits {
  Gates::Bits token[2];
};

// `range`: a sequence's (or chunk's) batch entry, first token `begin` and number of `tokens`, past which nothing decays and
// nothing is written; read again where needed: registers are short. `first`: the lane's first token, from `begin` on.
template <typename Range>
__device__ __forceinline__ TokenBits load_gates(const Gates& gates, const Range& range, int value_head, int first) {
  TokenBits out = {};
  const int64_t g = gates.g.at(range.batch, range.begin + first, value_head);
  const int64_t beta = gates.beta.at(range.batch, range.begin + first, value_head);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (first + 32 * i >= range.tokens) break;
    if (gates.gate != FD_GATE_NONE) out.token[i].g = load_bits(gates.g.data, gates.g.type, g + 32 * i * gates.g.stride[1]);
    if (gates.strength != FD_BETA_ONE) {
      out.token[i].beta = load_bits(gates.beta.data, gates.beta.type, beta + 32 * i * gates.beta.stride[1]);
    }
  }
  return out;
}

// Each token's own decay, in `gam`, and write strength.
template <typename Range>
__device__ __forceinline__ TokenGates own_gates(const Gates& gates, const TokenBits& bits, const Range& range,
                                                int value_head, int first) {
  constexpr float LOG2E = 1.44269504088896341f;
  TokenGates out;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const bool inside = first + 32 * i < range.tokens;
    const float g = inside ? gates.log_decay(bits.token[i], value_head) * LOG2E : 0.0f;
    out.gam[i] = g < -1e4f ? -1e4f : g;  // never -inf, so that no difference of two is NaN; a NaN stays
    out.beta[i] = inside ? gates.write_strength(bits.token[i]) : 0.0f;
  }
  return out;
}

// Adds them up over the chunk.
__device__ __forceinline__ void add_gates(TokenGates& tokens, int lane) {
  float(&g)[2] = tokens.gam;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const float a = __shfl_up_sync(~0u, g[0], step), b = __shfl_up_sync(~0u, g[1], step);
    if (lane >= step) {
      g[0] += a;
      g[1] += b;
    }
  }
  g[1] += __shfl_sync(~0u, g[0], 31);
  tokens.total = __shfl_sync(~0u, g[1], 31);
}

// 1 / sqrt(sum of squares + eps) of rows `lane` and `lane + 32` of a tile of 64 x 128.
template <typename T>
__device__ __forceinline__ float2 inverse_norms(uint32_t tile, float eps, int lane) {
  float sum[2] = {0.0f, 0.0f};
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll 4
    for (int i = 0; i < 16; ++i) {
      const float4 x = load_shared_float4(tile + (i / 8) * 8192 + swizzled(lane + 32 * r, i % 8));
      const float word[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 y = unpack<T>(__float_as_uint(word[j]));
        sum[r] = fmaf(y.x, y.x, fmaf(y.y, y.y, sum[r]));
      }
    }
  }
  return {rsqrtf(sum[0] + eps), rsqrtf(sum[1] + eps)};
}

// `key`, `query`: |k|^-1 and |q|^-1 of the lane's tokens with l2 norm, else 1. STRENGTH: the columns of P are to have beta.
template <bool STRENGTH>
__device__ __forceinline__ void fill_tile_gates(TileGates& out, const TokenGates& tokens, float2 key, float2 query,
                                                float scale, int lane) {
  constexpr float FACTORED_BOUND = 64.0f;  // log2 of the chunk's decay up to which e^-gam is harmless
  const bool factored = tokens.total > -FACTORED_BOUND;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int t = lane + 32 * i;
    const float g = tokens.gam[i], beta = tokens.beta[i];
    const float nk = i == 0 ? key.x : key.y, nq = scale * (i == 0 ? query.x : query.y);
    const float rise = factored ? exp2_fast(g) : 1.0f, fall = factored ? exp2_fast(-g) : 1.0f;
    out.column[t] = beta * nk;
    out.row[t] = nk;
    out.later[t] = factored ? rise : g;
    out.earlier[t] = factored ? fall : g;
    out.p_row[t] = rise * nq;
    out.p_column[t] = STRENGTH ? fall * nk * beta : fall * nk;
  }
  if (lane == 0) {
    out.decay = exp2_fast(tokens.total);
    out.factored = factored;
  }
}
__device__ __forceinline__ void fill_gates(ChunkGates& out, const TokenGates& tokens, float2 key, float2 query, float scale,
                                           int lane) {
  fill_tile_gates<true>(out, tokens, key, query, scale, lane);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int t = lane + 32 * i, row = t >> 1 & 3, place = 2 * (t >> 3) + (t & 1);
    const float nk = i == 0 ? key.x : key.y, nq = scale * (i == 0 ? query.x : query.y), rise = exp2_fast(tokens.gam[i]);
    out.read[row][place] = rise * nk;
    out.write[row][place] = tokens.beta[i] * exp2_fast(tokens.total - tokens.gam[i]) * nk;
    out.emit[row][place] = rise * nq;
  }
}

// The same for scratch memory.
__device__ __forceinline__ void fill_vectors(ChunkVectors& out, const TokenGates& tokens, float2 key, float2 query,
                                             int lane) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int t = lane + 32 * i;
    out.gam[t] = tokens.gam[i];
    out.rise[t] = exp2_fast(tokens.gam[i]);
    out.end[t] = exp2_fast(tokens.total - tokens.gam[i]);
    out.beta[t] = tokens.beta[i];
    out.key[t] = i == 0 ? key.x : key.y;
    out.query[t] = i == 0 ? query.x : query.y;
  }
}

}  // namespace flashdelta::cuda
