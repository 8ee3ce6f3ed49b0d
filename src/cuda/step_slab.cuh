// The decode step where it is fastest: 128 keys, states that can be copied by 16 bytes. See docs/kernels/step.md.
//
// A slab is all keys of 32 values of one head's state, and belongs to one warp from the first token to the last: the warp
// copies it to shared memory without waiting (so what is in flight costs no registers), and reads it there twice:
//
//   state -> slab --+-> S^T k_t, S^T q_t of all tokens: a lane sums 32 keys of 4 values --> d_t, o_t: one value per lane
//                   '-> S = D S + sum k_t d_t^T, by 16 bytes -> memory
//
// The warps of a block share k, q and the gates, staged while the slabs are on their way; that is the block's one barrier.
// The formulas are those of step.cu, for 1 or 4 tokens at once; more tokens take turns on the slab.
#pragma once

#include <type_traits>

#include "cuda/ptx.cuh"
#include "cuda/step.cuh"

namespace flashdelta::cuda {

constexpr int SLAB_KEYS = 128;
constexpr int SLAB_VALUES = 32;  // one per lane between the two passes over the slab
constexpr int SLAB_TOKENS = 4;   // at most, at once

// 1, or some multiple of 4, numbers.
template <int COUNT>
__device__ void load_aligned(float (&x)[COUNT], const float* from) {
  if constexpr (COUNT == 1) {
    x[0] = from[0];
  } else {
#pragma unroll
    for (int i = 0; i < COUNT / 4; ++i) {
      const float4 y = reinterpret_cast<const float4*>(from)[i];
      x[4 * i] = y.x, x[4 * i + 1] = y.y, x[4 * i + 2] = y.z, x[4 * i + 3] = y.w;
    }
  }
}

// VECTOR: elements of 16 bytes, 4 (fp32) or 8 (bf16). TOKENS at once; fewer are filled up with tokens that change nothing.
template <bool V_FIRST_, int VECTOR_, int TOKENS_>
struct Slab {
  static constexpr bool V_FIRST = V_FIRST_;
  static constexpr int VECTOR = VECTOR_;
  static constexpr int TOKENS = TOKENS_;
  static constexpr int ELEMENT = 16 / VECTOR;  // bytes
  static constexpr int BYTES = SLAB_KEYS * SLAB_VALUES * ELEMENT;
  static constexpr int COLUMNS = (V_FIRST ? SLAB_KEYS : SLAB_VALUES) / VECTOR;  // vectors of a row
  static constexpr int LANE_ROWS = 32 / COLUMNS;                                // rows the warp's lanes cover
  static constexpr int QUARTERS = SLAB_KEYS * SLAB_VALUES / VECTOR / 32 / 4;    // a lane's vectors, by 4
  static constexpr int PITCH = SLAB_KEYS + 4;                                   // of k and q: no bank conflicts
  static constexpr int PER_BLOCK = TOKENS * (2 * PITCH + 2);                    // floats
  static constexpr int PER_WARP = TOKENS * TOKENS + TOKENS * SLAB_VALUES;       // floats

  static constexpr int WARPS = VECTOR == 8 && TOKENS > 1 ? 4 : 2;  // of a block, at most
  // One less where the registers of so many would spill.
  static constexpr int BLOCKS_PER_SM = (VECTOR == 4 ? 5 : TOKENS > 1 ? 3 : 8) - (!V_FIRST && TOKENS > 1 ? 1 : 0);

  // In shared memory. A lane owns vectors (j, r), r = 0 .. 3: of column lane % COLUMNS, in this row.
  static __device__ int row(int lane, int j, int r) {
    return V_FIRST ? (4 * j + r) * LANE_ROWS + lane / COLUMNS : 4 * (LANE_ROWS * j + lane / COLUMNS) + r;
  }
  // Rows of 512 or 256 bytes (V_FIRST) are permuted, so that a column of them does not lie in the same banks.
  static __device__ int position(int row, int column) { return row * COLUMNS + (V_FIRST ? column ^ (row & 7) : column); }

  static constexpr std::size_t shared_bytes(int warps) {
    return static_cast<std::size_t>(warps * (BYTES + 4 * PER_WARP) + 4 * PER_BLOCK + 16);
  }

  uint4* vectors;   // of this warp: the slab
  float* delta;     // of this warp: d_t, V_FIRST ? [SLAB_VALUES][TOKENS] : [TOKENS][SLAB_VALUES]
  float* products;  // of this warp: [TOKENS][TOKENS]  [t][s] for s <= t: D_ts k_s . q_t; for s > t: D_st k_s . k_t
  float* k;         // [TOKENS][PITCH]
  float* q;         // [TOKENS][PITCH]
  float* decay;     // [TOKENS]  exp(g_t)
  float* strength;  // [TOKENS]  beta_t

  __device__ Slab(float4* shared, int warp, int warps) {
    vectors = reinterpret_cast<uint4*>(shared) + warp * (BYTES / 16);
    k = reinterpret_cast<float*>(shared) + warps * (BYTES / 4);
    q = k + TOKENS * PITCH;
    delta = q + TOKENS * PITCH + warp * TOKENS * SLAB_VALUES;
    products = q + TOKENS * PITCH + warps * TOKENS * SLAB_VALUES + warp * TOKENS * TOKENS;
    decay = q + TOKENS * PITCH + warps * PER_WARP;
    strength = decay + TOKENS;
  }

  // visit(address in a pool's row, position in the slab, j, r) for each vector of this lane.
  template <typename Visit>
  static __device__ void visit(const View& states, int64_t state_row, int value_head, int first_value, int lane,
                               Visit&& visit_vector) {
    const int64_t first = state_row * states.stride[0] + value_head * states.stride[1] +
                          (V_FIRST ? first_value * states.stride[2] : first_value) + row(lane, 0, 0) * states.stride[2];
    char* address = static_cast<char*>(states.data) + first * ELEMENT + lane % COLUMNS * 16;
    const int64_t pitch = states.stride[2] * ELEMENT;
    const int64_t next = V_FIRST ? LANE_ROWS * pitch : pitch;  // from r to r + 1
#pragma unroll 1
    for (int j = 0; j < QUARTERS; ++j) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        visit_vector(address, position(row(lane, j, r), lane % COLUMNS), j, r);
        address += r < 3 || V_FIRST ? next : (4 * LANE_ROWS - 3) * pitch;
      }
    }
  }

  // Elements 4 column .. of a row.
  __device__ void load4(float (&x)[4], int row, int column) const {
    if constexpr (VECTOR == 4) {
      const uint4 raw = vectors[position(row, column)];
      x[0] = __uint_as_float(raw.x), x[1] = __uint_as_float(raw.y);
      x[2] = __uint_as_float(raw.z), x[3] = __uint_as_float(raw.w);
    } else {
      const uint2 raw = reinterpret_cast<const uint2*>(vectors + position(row, column / 2))[column % 2];
      x[0] = __uint_as_float(raw.x << 16), x[1] = __uint_as_float(raw.x & 0xffff0000u);
      x[2] = __uint_as_float(raw.y << 16), x[3] = __uint_as_float(raw.y & 0xffff0000u);
    }
  }

  static __device__ void unpack(float (&x)[VECTOR], const uint4& raw) {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
      x[i] = __uint_as_float(VECTOR == 4 ? words[i % 4] : i % 2 == 0 ? words[i / 2] << 16 : words[i / 2] & 0xffff0000u);
    }
  }
  static __device__ uint4 pack(const float (&x)[VECTOR]) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (VECTOR == 4) {
        words[i] = __float_as_uint(x[i]);
      } else {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
        words[i] = static_cast<uint32_t>(__bfloat16_as_ushort(pair.y)) << 16 | __bfloat16_as_ushort(pair.x);
      }
    }
    return {words[0], words[1], words[2], words[3]};
  }

  // Tokens begin .. begin + count on their way: loaded all at once, waited for later.
  struct Loads {
    static constexpr int COUNT = SLAB_KEYS / 32;
    uint32_t rows[2 * TOKENS][COUNT];  // keys lane + 32 i of k_t, then of q_t: for the warp that `owns` the row
    uint32_t v[TOKENS];                // of the lane's value
    Gates::Bits gates;                 // of token `lane`: for warp 0
    int warp, warps;

    __device__ bool owns(int i) const { return (i & (warps - 1)) == warp; }

    __device__ void start(const StepParameters& p, int batch, int begin, int count, int value_head, int value, int lane) {
      const int64_t first_k = p.k.at(batch, begin, value_head / p.group) + lane;
      const int64_t first_q = p.q.at(batch, begin, value_head / p.group) + lane;
      const int64_t first_v = p.v.at(batch, begin, value_head) + value;
      const auto load = [&](const auto* element) {
        using Element = std::remove_reference_t<decltype(element)>;
#pragma unroll
        for (int i = 0; i < 2 * TOKENS; ++i) {
          if (i % TOKENS >= count || !owns(i)) continue;
          const Element row = static_cast<Element>(i < TOKENS ? p.k.data : p.q.data) +
                              (i < TOKENS ? first_k + i * p.k.stride[1] : first_q + (i - TOKENS) * p.q.stride[1]);
#pragma unroll
          for (int c = 0; c < COUNT; ++c) rows[i][c] = row[32 * c];
        }
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) {
          if (t < count) v[t] = static_cast<Element>(p.v.data)[first_v + t * p.v.stride[1]];
        }
      };
      if (p.k.type == FD_FLOAT32) {
        load(static_cast<const uint32_t*>(nullptr));
      } else {
        load(static_cast<const uint16_t*>(nullptr));
      }
      if (warp == 0 && lane < min(count, TOKENS)) gates = p.gates.bits(batch, begin + lane, value_head);
    }
  };

  // Brings the block's tokens into shared memory; tokens past `count` change nothing.
  __device__ void stage(const StepParameters& p, const Loads& loads, int count, int value_head, int lane) const {
#pragma unroll
    for (int i = 0; i < 2 * TOKENS; ++i) {
      if (!loads.owns(i)) continue;
      const int t = i % TOKENS;
      float x[Loads::COUNT] = {};
#pragma unroll
      for (int c = 0; c < Loads::COUNT; ++c) {
        if (t < count) x[c] = element_of(loads.rows[i][c], p.k.type);
      }
      const float factor = p.l2norm && t < count ? l2norm_factor(x, p.l2norm_eps) : 1.0f;
#pragma unroll
      for (int c = 0; c < Loads::COUNT; ++c) (i < TOKENS ? k : q)[t * PITCH + lane + 32 * c] = x[c] * factor;
    }
    if (loads.warp == 0 && lane < TOKENS) {
      decay[lane] = lane < count ? expf(p.gates.log_decay(loads.gates, value_head)) : 1.0f;
      strength[lane] = lane < count ? p.gates.write_strength(loads.gates) : 0.0f;
    }
  }

  // The table `products`: some lanes per pair of tokens.
  __device__ void multiply_tokens(int lane) const {
    constexpr int LANES = 32 / (TOKENS * TOKENS);
    const int pair = lane / LANES, t = pair / TOKENS, s = pair % TOKENS;
    const auto* a = reinterpret_cast<const float4*>((s <= t ? q : k) + t * PITCH);
    const auto* b = reinterpret_cast<const float4*>(k + s * PITCH);
    float sum = 0;
#pragma unroll 4
    for (int i = lane % LANES; i < SLAB_KEYS / 4; i += LANES) {
      const float4 x = a[i], y = b[i];
      sum = fmaf(x.x, y.x, fmaf(x.y, y.y, fmaf(x.z, y.z, fmaf(x.w, y.w, sum))));
    }
#pragma unroll
    for (int mask = LANES / 2; mask > 0; mask /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, mask);
#pragma unroll
    for (int i = 1; i < TOKENS; ++i) {
      if (i > min(s, t) && i <= max(s, t)) sum *= decay[i];
    }
    if (lane % LANES == 0) products[pair] = sum;
  }

  // S^T k_t and S^T q_t for the lane's value, see value_of().
  __device__ void read(float (&key_sums)[TOKENS], float (&query_sums)[TOKENS], int lane) const {
    float sums[2 * TOKENS][4] = {};  // of values unit + 8 i (V_FIRST) or 4 unit + i, over the 32 keys of the lane's group
    const int group = lane / 8, unit = lane % 8;
#pragma unroll(TOKENS == 1 ? 2 : 1)
    for (int i = 0; i < 8; ++i) {
      const int key = 32 * group + 4 * i;
      float x[4][4];
#pragma unroll
      for (int r = 0; r < 4; ++r) load4(x[r], V_FIRST ? unit + 8 * r : key + r, V_FIRST ? key / 4 : unit);
#pragma unroll
      for (int t = 0; t < 2 * TOKENS; ++t) {
        float factors[4];
        load_aligned(factors, (t < TOKENS ? k : q) + t % TOKENS * PITCH + key);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
#pragma unroll
          for (int v = 0; v < 4; ++v) sums[t][v] = fmaf(factors[e], V_FIRST ? x[v][e] : x[e][v], sums[t][v]);
        }
      }
    }
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
      sum_and_share<4, 16, 8>(sums[t], lane);
      sum_and_share<4, 16, 8>(sums[TOKENS + t], lane);
      key_sums[t] = sums[t][0];
      query_sums[t] = sums[TOKENS + t][0];
    }
  }
  static __device__ int value_of(int lane) { return V_FIRST ? lane : 4 * (lane % 8) + lane / 8; }
};

template <typename S>
__global__ void __launch_bounds__(32 * S::WARPS, S::BLOCKS_PER_SM) slab_kernel(const __grid_constant__ StepParameters p) {
  extern __shared__ float4 shared_memory[];
  constexpr int TOKENS = S::TOKENS, VECTOR = S::VECTOR;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int warps = static_cast<int>(blockDim.x) / 32;
  const S slab(shared_memory, warp, warps);
  const int n = static_cast<int>(blockIdx.x / static_cast<unsigned>(p.value_blocks * p.HV));
  const int head_block = static_cast<int>(blockIdx.x % static_cast<unsigned>(p.value_blocks * p.HV));
  const int value_head = head_block / p.value_blocks;
  const int first_value = (head_block % p.value_blocks * warps + warp) * SLAB_VALUES;
  const int value = first_value + S::value_of(lane);

  wait_for_earlier_kernels();
  allow_later_kernels();
  const int64_t slot = p.accepted == nullptr ? 0 : load_index_element(p.accepted, p.initial.type, n) - 1;
  const int64_t initial_row = p.initial.row(n, slot);
  const TokenRange tokens = p.sequences[n];
  const int64_t final_row = p.state_per_token ? -1 : p.final.row(n, 0);
  const int batch = static_cast<int>(tokens.batch), end = static_cast<int>(tokens.end);
  int begin = static_cast<int>(tokens.begin);
  typename S::Loads loads;
  loads.warp = warp;
  loads.warps = warps;
  bool first = true;
  while (true) {
    const int count = min(end - begin, TOKENS);
    loads.start(p, batch, begin, count, value_head, value, lane);
    if (first) {
      if (initial_row >= 0) {
        S::visit(p.initial.states, initial_row, value_head, first_value, lane,
                 [&](const char* address, int position, int, int) { copy_async(slab.vectors + position, address); });
      } else {
#pragma unroll 1
        for (int i = lane; i < S::BYTES / 16; i += 32) slab.vectors[i] = {};
      }
      first = false;
    }
    slab.stage(p, loads, count, value_head, lane);
    float v[TOKENS];
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) v[t] = t < count ? element_of(loads.v[t], p.v.type) : 0.0f;
    __syncthreads();
    slab.multiply_tokens(lane);
    wait_for_copies();
    __syncwarp();

    float key_sums[TOKENS], query_sums[TOKENS], delta[TOKENS];
    slab.read(key_sums, query_sums, lane);
    float total = 1;  // D_t
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
      total *= slab.decay[t];
      float read = total * key_sums[t], output = total * query_sums[t];
#pragma unroll
      for (int s = 0; s < t; ++s) {
        read = fmaf(slab.products[s * TOKENS + t], delta[s], read);
        output = fmaf(slab.products[t * TOKENS + s], delta[s], output);
      }
      delta[t] = t < count ? slab.strength[t] * (v[t] - read) : 0.0f;
      output = fmaf(slab.products[t * TOKENS + t], delta[t], output);
      if (t < count) store_element(p.o.data, p.o.type, p.o.at(batch, begin + t, value_head) + value, p.scale * output);
    }
    float rest = 1;  // each token's contribution to the state after the last
#pragma unroll
    for (int t = TOKENS - 1; t >= 0; --t) {
      slab.delta[S::V_FIRST ? S::value_of(lane) * TOKENS + t : t * SLAB_VALUES + S::value_of(lane)] = delta[t] * rest;
      rest *= slab.decay[t];
    }
    __syncwarp();

    const bool last = begin + count >= end;
    int64_t row = last ? final_row : -1;
    if (p.state_per_token && count > 0) row = p.final.row(n, begin - tokens.begin);
    // What lies along the columns of the slab, which stay the same: k (V_FIRST) or d.
    float column[TOKENS][VECTOR];
    float4 keys[TOKENS];  // of four rows, where the columns are values
    const float* columns = S::V_FIRST ? slab.k : slab.delta;
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
      load_aligned(column[t], columns + t * (S::V_FIRST ? S::PITCH : SLAB_VALUES) + lane % S::COLUMNS * VECTOR);
    }
    S::visit(p.final.states, row, value_head, first_value, lane, [&](char* address, int position, int j, int r) {
      float x[VECTOR];
      S::unpack(x, slab.vectors[position]);
      float factor[TOKENS];
      if constexpr (S::V_FIRST) {
        load_aligned(factor, slab.delta + S::row(lane, j, r) * TOKENS);
      } else {
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) {
          if (r == 0) keys[t] = *reinterpret_cast<const float4*>(slab.k + t * S::PITCH + S::row(lane, j, 0));
          factor[t] = r == 0 ? keys[t].x : r == 1 ? keys[t].y : r == 2 ? keys[t].z : keys[t].w;
        }
      }
#pragma unroll
      for (int e = 0; e < VECTOR; ++e) {
        x[e] *= total;
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) x[e] = fmaf(factor[t], column[t][e], x[e]);
      }
      const uint4 packed = S::pack(x);
      if (!last) slab.vectors[position] = packed;
      if (row >= 0) __stcs(reinterpret_cast<uint4*>(address), packed);
    });
    begin += count;
    if (last) break;
    __syncthreads();
  }
  // Tokens of no sequence: the blocks of sequence n write zero to every N-th of them.
  for (int64_t token = p.sequences.used_tokens() + n; token < p.sequences.T; token += p.sequences.N) {
    store_element(p.o.data, p.o.type, p.o.at(batch, token, value_head) + value, 0.0f);
  }
}

}  // namespace flashdelta::cuda
