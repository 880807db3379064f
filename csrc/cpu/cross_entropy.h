// Cross-entropy over rows of logits: what the loss needs of a row, and its gradient in the row's place. In fp32, rounded
// once.

// exp to the last bit or two of fp32, or for 16 bits to 20 ulp, which may take a NaN for a number.
template <typename S>
MERGE_NORM_INLINE Vf exponential(const Vf& x) {
  if constexpr (std::is_same_v<S, float>) return x.exp();
  return x.exp_u20();
}

// The maximum, the sum of exponentials below it, and the logit of a column (0 where that is negative).
template <typename S>
inline void cross_entropy_row(const S* logits, int64_t width, int64_t column, float* top, float* sum_of, float* own) {
  const int64_t whole = width / kBlock * kBlock;
  Block highest;
  MERGE_NORM_UNROLL for (int j = 0; j < kUnroll; ++j) highest.v[j] = Vf(-std::numeric_limits<float>::infinity());
  for (int64_t i = 0; i < whole; i += kBlock) {
    const Block x = read(logits + i);
    MERGE_NORM_UNROLL for (int j = 0; j < kUnroll; ++j) highest.v[j] = at::vec::maximum(highest.v[j], x.v[j]);
  }
  Vf lanes = highest.v[0];
  MERGE_NORM_UNROLL for (int j = 1; j < kUnroll; ++j) lanes = at::vec::maximum(lanes, highest.v[j]);
  alignas(64) float each[kWidth];
  lanes.store(each);
  float most = -std::numeric_limits<float>::infinity();
  const auto raise = [&](float x) { most = x > most || std::isnan(x) ? x : most; };
  for (float x : each) raise(x);
  for (int64_t i = whole; i < width; ++i) raise(static_cast<float>(logits[i]));

  Block total = zeros();
  const Vf above(most);
  for (int64_t i = 0; i < whole; i += kBlock) {
    const Block x = read(logits + i);
    MERGE_NORM_UNROLL for (int j = 0; j < kUnroll; ++j) {
      total.v[j] = total.v[j] + exponential<S>(x.v[j] - above);
    }
  }
  float below = sum(total);
  for (int64_t i = whole; i < width; ++i) below += std::exp(static_cast<float>(logits[i]) - most);
  *top = most;
  *sum_of = std::isfinite(most) ? below : std::numeric_limits<float>::quiet_NaN();
  *own = column < 0 ? 0.f : static_cast<float>(logits[column]);
}

// exp(logit - top) · share - [column] · factor, in place, where share is factor / sum: to go by the logarithm of the
// sum would be wrong by as much in all columns of a row. A row whose factor is 0 does not count.
template <typename S>
inline void cross_entropy_gradient_row(S* logits, int64_t width, int64_t column, float top, float share, float factor) {
  if (factor == 0.f) {
    std::memset(logits, 0, width * sizeof(S));
    return;
  }
  if (!std::isfinite(top)) share = std::numeric_limits<float>::quiet_NaN();
  const float own = column < 0 ? 0.f : std::exp(static_cast<float>(logits[column]) - top) * share - factor;
  const Vf below(top), times(share);
  for_blocks(width, [&](int64_t i, auto extent) MERGE_NORM_ALWAYS {
    Block x = read(logits + i, extent);
    MERGE_NORM_UNROLL for (int j = 0; j < kUnroll; ++j) x.v[j] = exponential<S>(x.v[j] - below) * times;
    write(logits + i, x, extent);
  });
  if (column >= 0) logits[column] = static_cast<S>(own);
}

template <typename S>
void cross_entropy(const CrossEntropyArgs& a) {
  auto* logits = static_cast<S*>(a.logits);
  const int64_t grain = std::max<int64_t>(1, kElementsPerPartial / std::max<int64_t>(1, a.width));
  at::parallel_for(0, a.rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      S* mine = logits + row * a.width;
      if (a.factors) {
        cross_entropy_gradient_row(mine, a.width, a.columns[row], a.tops[row], a.shares[row], a.factors[row]);
      } else {
        float* parts = a.parts + row;
        cross_entropy_row(mine, a.width, a.columns[row], parts, parts + a.rows, parts + 2 * a.rows);
      }
    }
  });
}
