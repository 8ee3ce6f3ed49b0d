#include "tests/emulation/chunk_reference.hpp"

#include <algorithm>
#include <cmath>

#include "dtype.hpp"

namespace flashdelta::emulation {
namespace {

constexpr int K = 128, C = 64;

using Matrix = std::vector<double>;

// c (rows x columns) += factor * a b; element (i, k) of a is a[i * ai + k * ak], (k, j) of b is b[k * bk + j * bj].
void add_product(Matrix& c, int rows, int columns, int depth, const Matrix& a, int ai, int ak, const Matrix& b, int bk,
                 int bj, double factor = 1) {
  for (int i = 0; i < rows; ++i) {
    for (int k = 0; k < depth; ++k) {
      const double x = factor * a[static_cast<std::size_t>(i * ai + k * ak)];
      if (x == 0) continue;
      for (int j = 0; j < columns; ++j) {
        c[static_cast<std::size_t>(i * columns + j)] += x * b[static_cast<std::size_t>(k * bk + j * bj)];
      }
    }
  }
}

Matrix zeros(int rows, int columns) { return Matrix(static_cast<std::size_t>(rows * columns)); }

void scale_rows(Matrix& a, const std::vector<double>& factors) {
  const std::size_t columns = a.size() / factors.size();
  for (std::size_t i = 0; i < a.size(); ++i) a[i] *= factors[i / columns];
}

double row_dot(const Matrix& a, const Matrix& b, int columns, int row) {
  double sum = 0;
  for (int j = 0; j < columns; ++j) {
    sum += a[static_cast<std::size_t>(row * columns + j)] * b[static_cast<std::size_t>(row * columns + j)];
  }
  return sum;
}

// Rows of one chunk, zeros past the end.
Matrix rows_of(const Matrix& all, int columns, int chunk, int tokens) {
  Matrix rows = zeros(C, columns);
  std::copy_n(all.begin() + chunk * C * columns, tokens * columns, rows.begin());
  return rows;
}

struct Inputs {
  Matrix q, k, v, do_, beta;
  Matrix kk, qk;  // K K^T, Q K^T
};

Inputs inputs_of(const HeadInputs& h, int chunk, int tokens) {
  Inputs in{rows_of(h.q, K, chunk, tokens),
            rows_of(h.k, K, chunk, tokens),
            rows_of(h.v, h.V, chunk, tokens),
            rows_of(h.do_, h.V, chunk, tokens),
            rows_of(h.beta, 1, chunk, tokens),
            zeros(C, C),
            zeros(C, C)};
  add_product(in.kk, C, C, K, in.k, K, 1, in.k, 1, K);
  add_product(in.qk, C, C, K, in.q, K, 1, in.k, 1, K);
  return in;
}

double decay(const ChunkTiles& t, int i, int j) {
  return std::exp(t.gam[static_cast<std::size_t>(i)] - t.gam[static_cast<std::size_t>(j)]);
}

// Tiles that do not depend on the state.
ChunkTiles make_tiles(const HeadInputs& h, const Inputs& in, int chunk, int tokens) {
  ChunkTiles t;
  t.tokens = tokens;
  t.gam.resize(C);
  for (int i = 0; i < C; ++i) {
    const auto at = static_cast<std::size_t>(i);
    t.gam[at] = (i > 0 ? t.gam[at - 1] : 0) + (i < tokens ? h.g[static_cast<std::size_t>(chunk * C + i)] : 0);
  }
  for (const double gam : t.gam) {
    t.rise.push_back(std::exp(gam));
    t.end.push_back(std::exp(t.gam.back() - gam));
  }
  t.T = t.P = zeros(C, C);
  for (int j = 0; j < C; ++j) {  // column j of the inverse by substitution
    for (int i = j; i < C; ++i) {
      double x = i == j ? 1 : 0;
      for (int m = j; m < i; ++m) {
        x -= in.kk[static_cast<std::size_t>(i * C + m)] * in.beta[static_cast<std::size_t>(m)] *
             t.T[static_cast<std::size_t>(m * C + j)];
      }
      t.T[static_cast<std::size_t>(i * C + j)] = x;
    }
  }
  for (int i = 0; i < C; ++i) {
    for (int j = 0; j <= i; ++j) {
      const auto at = static_cast<std::size_t>(i * C + j);
      t.T[at] *= decay(t, i, j);
      t.P[at] = h.scale * decay(t, i, j) * in.qk[at];
    }
  }
  return t;
}

void forward_chunk(const HeadInputs& h, const Inputs& in, ChunkTiles& t, Matrix& S, Matrix& o, int chunk) {
  const int V = h.V;
  t.S = S;
  Matrix x = zeros(C, V), inter = zeros(C, V);
  add_product(x, C, V, K, in.k, K, 1, S, V, 1, -1);
  scale_rows(x, t.rise);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] += in.v[i];
  t.R = zeros(C, V);
  add_product(t.R, C, V, C, t.T, C, 1, x, V, 1);
  Matrix written = t.R;
  scale_rows(written, in.beta);
  add_product(inter, C, V, K, in.q, K, 1, S, V, 1, h.scale);
  scale_rows(inter, t.rise);
  add_product(inter, C, V, C, t.P, C, 1, written, V, 1);
  std::copy_n(inter.begin(), t.tokens * V, o.begin() + chunk * C * V);
  scale_rows(written, t.end);
  for (double& s : S) s *= t.rise.back();
  add_product(S, K, V, C, in.k, 1, K, written, V, 1);
}

void backward_chunk(const HeadInputs& h, const Inputs& in, ChunkTiles& t, Matrix& dS, HeadReference& out, int chunk) {
  const int V = h.V;
  t.dS1 = dS;
  t.dV = zeros(C, V);
  add_product(t.dV, C, V, K, in.k, K, 1, dS, V, 1);
  scale_rows(t.dV, t.end);
  add_product(t.dV, C, V, C, t.P, 1, C, in.do_, V, 1);
  for (int i = 0; i < C; ++i) t.dbeta_part.push_back(row_dot(t.dV, t.R, V, i));
  Matrix scaled = t.dV;
  scale_rows(scaled, in.beta);
  t.dv = zeros(C, V);
  add_product(t.dv, C, V, C, t.T, 1, C, scaled, V, 1);
  Matrix dU = t.dv, outputs = in.do_;
  scale_rows(dU, t.rise);
  for (double& x : dU) x = -x;
  scale_rows(outputs, t.rise);
  for (double& s : dS) s *= t.rise.back();
  add_product(dS, K, V, C, in.q, 1, K, outputs, V, 1, h.scale);
  add_product(dS, K, V, C, in.k, 1, K, dU, V, 1);

  Matrix written = t.R, dP = zeros(C, C), X = zeros(C, C), E = zeros(C, C);
  scale_rows(written, in.beta);
  add_product(dP, C, C, V, in.do_, V, 1, written, 1, V);
  add_product(X, C, C, V, t.dv, V, 1, t.R, 1, V);
  for (int i = 0; i < C; ++i) {
    for (int j = 0; j < C; ++j) {
      const auto at = static_cast<std::size_t>(i * C + j);
      dP[at] *= j <= i ? h.scale * decay(t, i, j) : 0;
      X[at] *= j < i ? decay(t, i, j) : 0;
      E[at] = -X[at] * in.beta[static_cast<std::size_t>(j)];
    }
  }
  Matrix read_q = zeros(C, K), read_k = zeros(C, K), write = zeros(C, K);
  add_product(read_q, C, K, V, outputs, V, 1, t.S, 1, V, h.scale);
  add_product(read_k, C, K, V, dU, V, 1, t.S, 1, V);
  scale_rows(written, t.end);
  add_product(write, C, K, V, written, V, 1, t.dS1, 1, V);
  Matrix dq = read_q, dk = read_k;
  add_product(dq, C, K, C, dP, C, 1, in.k, K, 1);
  add_product(dk, C, K, C, E, C, 1, in.k, K, 1);
  add_product(dk, C, K, C, dP, 1, C, in.q, K, 1);
  add_product(dk, C, K, C, E, 1, C, in.k, K, 1);
  for (std::size_t i = 0; i < dk.size(); ++i) dk[i] += write[i];

  double last = 0;
  for (std::size_t i = 0; i < t.S.size(); ++i) last += t.S[i] * t.dS1[i];
  last *= t.rise.back();
  std::vector<double> a(C), w(C);
  for (int i = 0; i < C; ++i) {
    const auto at = static_cast<std::size_t>(i);
    a[at] += row_dot(in.q, read_q, K, i) + row_dot(in.k, read_k, K, i);
    w[at] = row_dot(in.k, write, K, i);
    for (int j = 0; j < i; ++j) {
      const auto ij = static_cast<std::size_t>(i * C + j);
      const double m = dP[ij] * in.qk[ij] + E[ij] * in.kk[ij];
      a[at] += m;
      a[static_cast<std::size_t>(j)] -= m;
    }
  }
  for (int i = 0; i < t.tokens; ++i) {
    double dg = last, dbeta = t.dbeta_part[static_cast<std::size_t>(i)];
    for (int j = 0; j < C; ++j) {
      dg += j >= i ? a[static_cast<std::size_t>(j)] : w[static_cast<std::size_t>(j)];
      dbeta -= in.kk[static_cast<std::size_t>(j * C + i)] * X[static_cast<std::size_t>(j * C + i)];
    }
    const auto token = static_cast<std::size_t>(chunk * C + i);
    out.dg[token] = dg;
    out.dbeta[token] = dbeta;
  }
  std::copy_n(dq.begin(), t.tokens * K, out.dq.begin() + chunk * C * K);
  std::copy_n(dk.begin(), t.tokens * K, out.dk.begin() + chunk * C * K);
}

double element(const std::uint8_t* at, fd_dtype dtype) {
  const auto bits = static_cast<std::uint16_t>(at[0] | at[1] << 8);
  return dtype == FD_BFLOAT16 ? bfloat16_to_float(bits) : float16_to_float(bits);
}
void set_element(std::uint8_t* at, fd_dtype dtype, double x) {
  const auto value = static_cast<float>(x);
  const std::uint16_t bits = dtype == FD_BFLOAT16 ? float_to_bfloat16(value) : float_to_float16(value);
  at[0] = static_cast<std::uint8_t>(bits);
  at[1] = static_cast<std::uint8_t>(bits >> 8);
}

// Byte of an element in a tile: 16-byte blocks of a row are exchanged by the row's last three bits.
int offset(int row, int column) { return row * 128 + ((column / 8 ^ row % 8) * 16) + column % 8 * 2; }

}  // namespace

HeadReference chunk_reference(const HeadInputs& h) {
  HeadReference out;
  const auto tokens = static_cast<std::size_t>(h.tokens);
  out.o.resize(tokens * static_cast<std::size_t>(h.V));
  out.dq.resize(tokens * K);
  out.dk.resize(tokens * K);
  out.dg.resize(tokens);
  out.dbeta.resize(tokens);
  out.state = h.state;
  const int chunks = (h.tokens + C - 1) / C;
  std::vector<Inputs> inputs;
  for (int c = 0; c < chunks; ++c) {
    const int here = std::min(C, h.tokens - c * C);
    inputs.push_back(inputs_of(h, c, here));
    out.chunks.push_back(make_tiles(h, inputs.back(), c, here));
    forward_chunk(h, inputs.back(), out.chunks.back(), out.state, out.o, c);
  }
  out.dstate = h.dstate;
  for (int c = chunks; c-- > 0;) {
    const auto at = static_cast<std::size_t>(c);
    backward_chunk(h, inputs[at], out.chunks[at], out.dstate, out, c);
  }
  return out;
}

void write_tile(std::uint8_t* tile, fd_dtype dtype, const double* matrix, int stride, bool transposed) {
  for (int i = 0; i < C; ++i) {
    for (int j = 0; j < C; ++j)
      set_element(tile + offset(i, j), dtype, transposed ? matrix[j * stride + i] : matrix[i * stride + j]);
  }
}
void read_tile(const std::uint8_t* tile, fd_dtype dtype, double* matrix, int stride, bool transposed) {
  for (int i = 0; i < C; ++i) {
    for (int j = 0; j < C; ++j)
      (transposed ? matrix[j * stride + i] : matrix[i * stride + j]) = element(tile + offset(i, j), dtype);
  }
}

void write_state_tile(std::uint8_t* tile, fd_dtype dtype, const std::vector<double>& state, int V, int first) {
  for (int half = 0; half < 2; ++half) write_tile(tile + half * 8192, dtype, state.data() + half * 64 * V + first, V, true);
}
void read_state_tile(const std::uint8_t* tile, fd_dtype dtype, std::vector<double>& state, int V, int first) {
  for (int half = 0; half < 2; ++half) read_tile(tile + half * 8192, dtype, state.data() + half * 64 * V + first, V, true);
}

}  // namespace flashdelta::emulation
