// Causal attention (Dao et al. 2022) on CPUs with AVX512-BF16: scores in fp32 a block at a time, never whole.
//
// A product C += A B takes its A as rows, of which two neighbours at a time are multiplied, so B is packed in pairs
// of rows: [rows / 2][columns] of 32 bits. Which way round each of the seven products is written follows from that.
//
//   i a query, j a key, d a column of a head:
//   scores   S[i, j]  = q[i, :] · k[j, :]         A = q, B = k in pairs of d
//   output   O[i, d] += P[i, :] · v[:, d]         A = P, B = v in pairs of j
//   backward S'[j, i] = k[j, :] · q[i, :]         A = k, B = q in pairs of d      (' is transposed)
//            dP'[j, i] = v[j, :] · dO[i, :]       A = v, B = dO in pairs of d
//            dV[j, d] += P'[j, :] · dO[:, d]      A = P', B = dO in pairs of i
//            dK[j, d] += dS'[j, :] · q[:, d]      A = dS', B = q in pairs of i
//            dQ'[d, i] += k'[d, :] · dS'[:, i]    A = k', B = dS' in pairs of j
#include "attention.h"

#if defined(__AVX512BF16__)

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/vec.h>
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

namespace merge_norm::cpu {
namespace {

using bf16 = uint16_t;
using pair = uint32_t;  // of bf16, the first in the lower half

constexpr int64_t kLanes = 16;
constexpr int64_t kQueries = 96, kKeys = 256;           // of a block of the forward pass
constexpr int64_t kKeysBack = 96, kQueriesBack = 128;   // of the backward pass
constexpr float kInfinity = std::numeric_limits<float>::infinity();

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// To 20 ulp; of a NaN a NaN.
__m512 exponential(__m512 x) {
  const __m512 power = at::vec::Vectorized<float>(x).exp_u20();
  return _mm512_mask_mov_ps(power, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), x);
}

__m512 widen(const bf16* p) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}

__m256i narrow(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

void store(bf16* p, __m256i x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }

// Lanes [0, n) of 16; all or none where n is beyond them.
__mmask16 first(int64_t n) { return n >= kLanes ? 0xffff : n <= 0 ? 0 : static_cast<__mmask16>((1u << n) - 1); }

// ------------------------------------------------------------------------------------------- products

// Of so many rows of A, and 16 · kVectors columns of B and C.
template <int kRows, int kVectors>
void tile(const bf16* a, int64_t lda, const pair* b, int64_t ldb, float* c, int64_t ldc, int64_t pairs, bool add) {
  __m512 sums[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) sums[r][v] = add ? _mm512_loadu_ps(c + r * ldc + v * kLanes) : _mm512_setzero_ps();
  }
  for (int64_t p = 0; p < pairs; ++p, a += 2, b += ldb) {
    __m512bh columns[kVectors];
    for (int v = 0; v < kVectors; ++v) columns[v] = (__m512bh)_mm512_loadu_si512(b + v * kLanes);
    for (int r = 0; r < kRows; ++r) {
      int both;
      std::memcpy(&both, a + r * lda, sizeof(both));
      const __m512bh row = (__m512bh)_mm512_set1_epi32(both);
      for (int v = 0; v < kVectors; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], row, columns[v]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) _mm512_storeu_ps(c + r * ldc + v * kLanes, sums[r][v]);
  }
}

template <int kVectors>
void panel(int64_t rows, const bf16* a, int64_t lda, const pair* b, int64_t ldb, float* c, int64_t ldc, int64_t pairs,
           bool add) {
  constexpr int64_t kRows = 6;  // 24 sums and 4 columns in 32 registers
  for (; rows >= kRows; rows -= kRows, a += kRows * lda, c += kRows * ldc) {
    tile<kRows, kVectors>(a, lda, b, ldb, c, ldc, pairs, add);
  }
  switch (rows) {
    case 5: return tile<5, kVectors>(a, lda, b, ldb, c, ldc, pairs, add);
    case 4: return tile<4, kVectors>(a, lda, b, ldb, c, ldc, pairs, add);
    case 3: return tile<3, kVectors>(a, lda, b, ldb, c, ldc, pairs, add);
    case 2: return tile<2, kVectors>(a, lda, b, ldb, c, ldc, pairs, add);
    case 1: return tile<1, kVectors>(a, lda, b, ldb, c, ldc, pairs, add);
  }
}

// C [rows, columns] (+)= A B; columns a multiple of 16, strides in elements of each.
void product(int64_t rows, int64_t columns, int64_t pairs, const bf16* a, int64_t lda, const pair* b, int64_t ldb,
             float* c, int64_t ldc, bool add) {
  for (; columns >= 4 * kLanes; columns -= 4 * kLanes, b += 4 * kLanes, c += 4 * kLanes) {
    panel<4>(rows, a, lda, b, ldb, c, ldc, pairs, add);
  }
  switch (columns / kLanes) {
    case 3: return panel<3>(rows, a, lda, b, ldb, c, ldc, pairs, add);
    case 2: return panel<2>(rows, a, lda, b, ldb, c, ldc, pairs, add);
    case 1: return panel<1>(rows, a, lda, b, ldb, c, ldc, pairs, add);
  }
}

// ------------------------------------------------------------------------------------------- packing

struct Rows {  // of one head
  bf16* data;
  int64_t stride;
  bf16* operator[](int64_t t) const { return data + t * stride; }
};

Rows rows_of(const HeadsView& view, int64_t batch, int64_t head) {
  auto* data = static_cast<bf16*>(const_cast<void*>(view.data));
  return {data + batch * view.strides[0] + head * view.strides[1], view.strides[2]};
}

void transpose(__m512i (&rows)[16]) {  // 16 x 16 of 32 bits
  __m512i other[16];
  for (int i = 0; i < 16; i += 2) {
    other[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    other[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    rows[i] = _mm512_unpacklo_epi64(other[i], other[i + 2]);
    rows[i + 1] = _mm512_unpackhi_epi64(other[i], other[i + 2]);
    rows[i + 2] = _mm512_unpacklo_epi64(other[i + 1], other[i + 3]);
    rows[i + 3] = _mm512_unpackhi_epi64(other[i + 1], other[i + 3]);
  }
  for (int half = 0; half < 16; half += 8) {
    for (int i = 0; i < 4; ++i) {
      other[half + i] = _mm512_shuffle_i32x4(rows[half + i], rows[half + i + 4], 0x88);
      other[half + i + 4] = _mm512_shuffle_i32x4(rows[half + i], rows[half + i + 4], 0xdd);
    }
  }
  for (int i = 0; i < 8; ++i) {
    rows[i] = _mm512_shuffle_i32x4(other[i], other[i + 8], 0x88);
    rows[i + 8] = _mm512_shuffle_i32x4(other[i], other[i + 8], 0xdd);
  }
}

// Tokens as columns: out [width / 2, padded]; zeros behind the last token.
void pack_columns(const Rows& rows, int64_t length, int64_t padded, int64_t width, pair* out) {
  for (int64_t t = 0; t < padded; t += kLanes) {
    for (int64_t p = 0; p < width / 2; p += kLanes) {
      const __mmask16 there = first(width / 2 - p);
      __m512i block[16];
      for (int64_t i = 0; i < kLanes; ++i) {
        block[i] = t + i < length ? _mm512_maskz_loadu_epi32(there, rows[t + i] + 2 * p) : _mm512_setzero_si512();
      }
      transpose(block);
      for (int64_t i = 0; i < std::min(kLanes, width / 2 - p); ++i) {
        _mm512_storeu_si512(out + (p + i) * padded + t, block[i]);
      }
    }
  }
}

// Pairs of tokens: out [padded / 2, width].
void pack_tokens(const Rows& rows, int64_t length, int64_t padded, int64_t width, pair* out) {
  for (int64_t t = 0; t < padded; t += 2, out += width) {
    for (int64_t d = 0; d < width; d += kLanes) {
      const auto token = [&](int64_t n) {
        if (n >= length) return _mm512_setzero_si512();
        return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[n] + d)));
      };
      _mm512_storeu_si512(out + d, _mm512_or_si512(token(t), _mm512_slli_epi32(token(t + 1), 16)));
    }
  }
}

// out [width, padded]: columns of what pack_columns made, a row each.
void unpack_columns(const pair* columns, int64_t padded, int64_t width, bf16* out) {
  for (int64_t p = 0; p < width / 2; ++p) {
    for (int64_t t = 0; t < padded; t += kLanes) {
      const __m512i both = _mm512_loadu_si512(columns + p * padded + t);
      store(out + 2 * p * padded + t, _mm512_cvtepi32_epi16(both));
      store(out + (2 * p + 1) * padded + t, _mm512_cvtepi32_epi16(_mm512_srli_epi32(both, 16)));
    }
  }
}

// ------------------------------------------------------------------------------------------- forward

struct ForwardSpace {
  std::vector<pair> keys, values;
  std::vector<float> scores, sums;
  std::vector<bf16> weights;

  ForwardSpace(int64_t padded, int64_t width)
      : keys(padded * width / 2), values(padded * width / 2), scores(kQueries * kKeys), sums(kQueries * width),
        weights(kQueries * kKeys) {}
};

// One row of scores to exponentials below the maximum so far, in bf16; `valid` of its columns are seen. Returns by what
// the row's earlier sums shrink.
float soften(const float* scores, bf16* weights, int64_t columns, int64_t valid, float scale, float& top, float& total) {
  __m512 most = _mm512_set1_ps(-kInfinity);
  for (int64_t j = 0; j < valid; j += kLanes) {
    const __mmask16 seen = first(valid - j);
    most = _mm512_mask_max_ps(most, seen, most, _mm512_loadu_ps(scores + j));
  }
  const float raised = std::max(top, scale * _mm512_reduce_max_ps(most));
  const __m512 above = _mm512_set1_ps(raised), times = _mm512_set1_ps(scale);
  __m512 sum = _mm512_setzero_ps();
  for (int64_t j = 0; j < columns; j += kLanes) {
    const __m512 below = _mm512_fmsub_ps(_mm512_loadu_ps(scores + j), times, above);
    const __m512 weight = _mm512_maskz_mov_ps(first(valid - j), exponential(below));
    sum = _mm512_add_ps(sum, weight);
    store(weights + j, narrow(weight));
  }
  const float shrink = std::exp(top - raised);
  total = total * shrink + _mm512_reduce_add_ps(sum);
  top = raised;
  return shrink;
}

void forward_head(const AttentionArgs& a, int64_t b, int64_t h, ForwardSpace& space) {
  const int64_t T = a.length, K = a.width, padded = round_up(T, kLanes), g = h / (a.heads / a.groups);
  const float scale = 1.f / std::sqrt(static_cast<float>(K));
  const Rows q = rows_of(a.q, b, h), out = rows_of(a.out, b, h);
  pack_columns(rows_of(a.k, b, g), T, padded, K, space.keys.data());
  pack_tokens(rows_of(a.v, b, g), T, padded, K, space.values.data());
  float* log_sums = a.log_sums + (b * a.heads + h) * T;
  float tops[kQueries], totals[kQueries];
  for (int64_t i0 = 0; i0 < T; i0 += kQueries) {
    const int64_t queries = std::min(kQueries, T - i0);
    std::fill_n(tops, queries, -kInfinity);
    std::fill_n(totals, queries, 0.f);
    for (int64_t j0 = 0; j0 < i0 + queries; j0 += kKeys) {
      const int64_t keys = std::min(kKeys, round_up(i0 + queries - j0, kLanes));
      product(queries, keys, K / 2, q[i0], q.stride, space.keys.data() + j0, padded, space.scores.data(), kKeys, false);
      for (int64_t i = 0; i < queries; ++i) {
        const int64_t valid = std::min(keys, i0 + i - j0 + 1);
        bf16* weights = space.weights.data() + i * kKeys;
        if (valid <= 0) {  // all keys of the block are behind this query
          std::memset(weights, 0, keys * sizeof(bf16));
          continue;
        }
        const float shrink =
            soften(space.scores.data() + i * kKeys, weights, keys, valid, scale, tops[i], totals[i]);
        if (j0 > 0 && shrink != 1.f) {
          float* sums = space.sums.data() + i * K;
          for (int64_t d = 0; d < K; d += kLanes) {
            _mm512_storeu_ps(sums + d, _mm512_mul_ps(_mm512_loadu_ps(sums + d), _mm512_set1_ps(shrink)));
          }
        }
      }
      product(queries, K, keys / 2, space.weights.data(), kKeys, space.values.data() + j0 / 2 * K, K,
              space.sums.data(), K, j0 > 0);
    }
    for (int64_t i = 0; i < queries; ++i) {
      const __m512 share = _mm512_set1_ps(1.f / totals[i]);
      for (int64_t d = 0; d < K; d += kLanes) {
        store(out[i0 + i] + d, narrow(_mm512_mul_ps(_mm512_loadu_ps(space.sums.data() + i * K + d), share)));
      }
      log_sums[i0 + i] = tops[i] + std::log(totals[i]);
    }
  }
}

// ------------------------------------------------------------------------------------------- backward

struct BackwardSpace {
  std::vector<pair> query_columns, query_tokens, out_columns, out_tokens, key_columns, shares;
  std::vector<bf16> keys, weights, slopes;  // k'; P' and dS' of a block
  std::vector<float> scores, products, for_q, for_k, for_v, log_sums, deltas;

  BackwardSpace(int64_t padded, int64_t width)
      : query_columns(padded * width / 2), query_tokens(padded * width / 2), out_columns(padded * width / 2),
        out_tokens(padded * width / 2), key_columns(padded * width / 2), shares(kKeysBack / 2 * kQueriesBack),
        keys(padded * width), weights(kKeysBack * kQueriesBack), slopes(kKeysBack * kQueriesBack),
        scores(kKeysBack * kQueriesBack), products(kKeysBack * kQueriesBack), for_q(padded * width),
        for_k(padded * width), for_v(padded * width), log_sums(padded), deltas(padded) {}
};

// P' and dS' of two rows of keys (the second may be behind the last one), from S' and dP' in the space.
void slopes_of(BackwardSpace& s, int64_t row, bool second, int64_t j, int64_t i0, int64_t queries, float scale) {
  const __m512 times = _mm512_set1_ps(scale);
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  for (int64_t i = 0; i < queries; i += kLanes) {
    const __m512 log_sums = _mm512_loadu_ps(s.log_sums.data() + i0 + i);
    const __m512 deltas = _mm512_loadu_ps(s.deltas.data() + i0 + i);
    __m512i both[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    for (int n = 0; n < 2; ++n) {
      const int64_t at = (row + n) * kQueriesBack + i;
      __m256i weights = _mm256_setzero_si256(), slopes = _mm256_setzero_si256();
      if (n == 0 || second) {
        const __mmask16 unseen = first(j + n - i0 - i);  // queries before the key
        const __m512 below = _mm512_fmsub_ps(_mm512_loadu_ps(s.scores.data() + at), times, log_sums);
        const __m512 weight = _mm512_maskz_mov_ps(~unseen, exponential(below));
        const __m512 apart = _mm512_sub_ps(_mm512_loadu_ps(s.products.data() + at), deltas);
        weights = narrow(weight);
        slopes = narrow(_mm512_mul_ps(_mm512_mul_ps(weight, apart), times));
        both[n] = _mm512_slli_epi32(_mm512_cvtepu16_epi32(slopes), 16);
      }
      store(s.weights.data() + at, weights);
      store(s.slopes.data() + at, slopes);
    }
    _mm512_storeu_si512(s.shares.data() + row / 2 * kQueriesBack + i,
                        _mm512_or_si512(_mm512_and_si512(both[1], upper), _mm512_srli_epi32(both[0], 16)));
  }
}

void backward_head(const AttentionArgs& a, int64_t b, int64_t h, BackwardSpace& s) {
  const int64_t T = a.length, K = a.width, padded = round_up(T, kLanes), g = h / (a.heads / a.groups);
  const float scale = 1.f / std::sqrt(static_cast<float>(K));
  const Rows q = rows_of(a.q, b, h), k = rows_of(a.k, b, g), v = rows_of(a.v, b, g);
  const Rows out = rows_of(a.out, b, h), given = rows_of(a.grad_out, b, h);
  pack_columns(q, T, padded, K, s.query_columns.data());
  pack_tokens(q, T, padded, K, s.query_tokens.data());
  pack_columns(given, T, padded, K, s.out_columns.data());
  pack_tokens(given, T, padded, K, s.out_tokens.data());
  pack_columns(k, T, padded, K, s.key_columns.data());
  unpack_columns(s.key_columns.data(), padded, K, s.keys.data());
  const float* log_sums = a.log_sums + (b * a.heads + h) * T;
  for (int64_t t = 0; t < padded; ++t) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t d = 0; t < T && d < K; d += kLanes) sum = _mm512_fmadd_ps(widen(out[t] + d), widen(given[t] + d), sum);
    s.deltas[t] = _mm512_reduce_add_ps(sum);
    s.log_sums[t] = t < T ? log_sums[t] : kInfinity;  // a query that is none has no weights
  }
  std::fill(s.for_q.begin(), s.for_q.end(), 0.f);
  for (int64_t j0 = 0; j0 < T; j0 += kKeysBack) {
    const int64_t keys = std::min(kKeysBack, T - j0);
    for (int64_t i0 = j0 / kLanes * kLanes; i0 < T; i0 += kQueriesBack) {
      const int64_t queries = std::min(kQueriesBack, padded - i0);
      product(keys, queries, K / 2, k[j0], k.stride, s.query_columns.data() + i0, padded, s.scores.data(),
              kQueriesBack, false);
      product(keys, queries, K / 2, v[j0], v.stride, s.out_columns.data() + i0, padded, s.products.data(),
              kQueriesBack, false);
      for (int64_t row = 0; row < keys; row += 2) slopes_of(s, row, row + 1 < keys, j0 + row, i0, queries, scale);
      product(keys, K, queries / 2, s.weights.data(), kQueriesBack, s.out_tokens.data() + i0 / 2 * K, K,
              s.for_v.data() + j0 * K, K, true);
      product(keys, K, queries / 2, s.slopes.data(), kQueriesBack, s.query_tokens.data() + i0 / 2 * K, K,
              s.for_k.data() + j0 * K, K, true);
      product(K, queries, (keys + 1) / 2, s.keys.data() + j0, padded, s.shares.data(), kQueriesBack,
              s.for_q.data() + i0, padded, true);
    }
  }
  const Rows grad_q = rows_of(a.grad_q, b, h);
  for (int64_t t = 0; t < T; t += kLanes) {
    for (int64_t d = 0; d < K; d += kLanes) {
      __m512i block[16];
      for (int64_t i = 0; i < kLanes; ++i) block[i] = _mm512_loadu_si512(s.for_q.data() + (d + i) * padded + t);
      transpose(block);
      for (int64_t i = 0; i < std::min(kLanes, T - t); ++i) {
        store(grad_q[t + i] + d, narrow(_mm512_castsi512_ps(block[i])));
      }
    }
  }
}

void write_rows(const std::vector<float>& from, int64_t length, int64_t width, const Rows& to) {
  for (int64_t t = 0; t < length; ++t) {
    for (int64_t d = 0; d < width; d += kLanes) store(to[t] + d, narrow(_mm512_loadu_ps(from.data() + t * width + d)));
  }
}

}  // namespace

bool attention_runs() { return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512dq"); }

void attention_forward(const AttentionArgs& a) {
  at::parallel_for(0, a.batch * a.heads, 1, [&](int64_t begin, int64_t end) {
    ForwardSpace space(round_up(a.length, kLanes), a.width);
    for (int64_t n = begin; n < end; ++n) forward_head(a, n / a.heads, n % a.heads, space);
  });
}

void attention_backward(const AttentionArgs& a) {
  // Heads that share keys and values add to the same gradients, in fp32.
  at::parallel_for(0, a.batch * a.groups, 1, [&](int64_t begin, int64_t end) {
    BackwardSpace space(round_up(a.length, kLanes), a.width);
    for (int64_t n = begin; n < end; ++n) {
      const int64_t b = n / a.groups, g = n % a.groups, each = a.heads / a.groups;
      std::fill(space.for_k.begin(), space.for_k.end(), 0.f);
      std::fill(space.for_v.begin(), space.for_v.end(), 0.f);
      for (int64_t h = g * each; h < (g + 1) * each; ++h) backward_head(a, b, h, space);
      write_rows(space.for_k, a.length, a.width, rows_of(a.grad_k, b, g));
      write_rows(space.for_v, a.length, a.width, rows_of(a.grad_v, b, g));
    }
  });
}

}  // namespace merge_norm::cpu

#else

namespace merge_norm::cpu {

bool attention_runs() { return false; }
void attention_forward(const AttentionArgs&) {}
void attention_backward(const AttentionArgs&) {}

}  // namespace merge_norm::cpu

#endif
