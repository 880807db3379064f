// The norm's gradient, and what increments and coefficients receive from it.

// Gradient of one row with regard to its merge, rounded, into `result` and `gradient`; the weight's is added to
// `for_weight`.
template <Store kStore, typename S>
inline void norm_gradient_row(const S* grad_merged, const S* grad_normed, const S* merged, float rstd,
                              const float* weight, int64_t h, S* result, float* gradient, float* for_weight) {
  Block products = zeros();
  for_blocks(h, [&](int64_t i, auto extent) MERGE_NORM_ALWAYS {
    if (grad_merged) prefetch(grad_merged + i);
    multiply_add(products, multiply(read(grad_normed + i, extent), read(weight + i, extent)), read(merged + i, extent));
  });
  const float pull = -rstd * rstd * rstd * (sum(products) / static_cast<float>(h));
  for_blocks(h, [&](int64_t i, auto extent) MERGE_NORM_ALWAYS {
    prefetch(grad_normed + h + i);  // the next row's
    prefetch(merged + h + i);
    const Block scaled = multiply(rstd, read(grad_normed + i, extent)), m = read(merged + i, extent);
    Block total = grad_merged ? read(grad_merged + i, extent) : zeros();
    multiply_add(total, scaled, read(weight + i, extent));
    multiply_add(total, pull, m);
    write(gradient + i, write<kStore>(result + i, total, extent), extent);
    Block sum = read(for_weight + i, extent);
    multiply_add(sum, m, scaled);
    write(for_weight + i, sum, extent);
  });
}

// One increment's tile: its gradient Σ_r coefficients[r·k] · gradients[r] into `result` (if wanted), and the inner
// products for the coefficients, from R tiles `stride` apart. `next`: the increment that is read after this one.
template <Store kStore, bool kDots, typename S>
inline void increment_tile(const float* gradients, int64_t stride, int64_t R, const float* coefficients, int64_t k,
                           int64_t count, const S* increment, const S* next, Dot* dots, S* result) {
  Dot first;
  for_blocks(count, [&](int64_t i, auto extent) MERGE_NORM_ALWAYS {
    const Block g = read(gradients + i, extent);  // behind the end are numbers of an earlier tile
    if constexpr (kDots) {
      prefetch(next + i);
      first.add(read(increment + i, extent), g);
    }
    if (!result) return;
    Block total = multiply(coefficients[0], g);
    for (int64_t r = 1; r < R; ++r) multiply_add(total, coefficients[r * k], read(gradients + r * stride + i, extent));
    write<kStore>(result + i, total, extent);
  });
  if constexpr (kDots) dots[0].add(first);
  for (int64_t r = 1; kDots && r < R; ++r) {  // the increment comes from the cache now
    Dot dot;
    for_blocks(count, [&](int64_t i, auto extent) MERGE_NORM_ALWAYS {
      dot.add(read(increment + i, extent), read(gradients + r * stride + i, extent));
    });
    dots[r * k].add(dot);
  }
}

template <Store kStore, typename S>
void backward_rows(const BackwardArgs& a, int64_t begin, int64_t end, float* for_weight, float* for_coefficients) {
  const int64_t T = a.rows, h = a.hidden, R = a.coefficient_rows, k = a.n_increments;
  const int64_t group = std::max<int64_t>(1, kTile / h);
  const auto* weights = static_cast<const float*>(a.norm_weight.data);
  const auto* grad_merged = static_cast<const S*>(a.grad_merged);
  const auto* grad_normed = static_cast<const S*>(a.grad_normed);
  const auto* merged = static_cast<const S*>(a.merged);
  auto* const* increments = reinterpret_cast<const S* const*>(a.increments);
  const int64_t stride = whole_blocks(group * h);
  std::vector<float> gradients(R * stride);
  std::vector<Dot> dots(for_coefficients ? R * k : 0);
  for (int64_t t = begin; t < end; t += group) {
    const int64_t rows = std::min(group, end - t), span = rows * h;
    for (int64_t r = 0; !grad_normed && r < R; ++r) {
      read_tile(grad_merged + (r * T + t) * h, span, gradients.data() + r * stride);
    }
    for (int64_t row = 0; grad_normed && row < rows; ++row) {  // then R is 1
      const int64_t at = (t + row) * h;
      norm_gradient_row<kStore>(grad_merged ? grad_merged + at : nullptr, grad_normed + at, merged + at,
                                a.rstd[t + row], weights, h, static_cast<S*>(a.grad_base) + at,
                                gradients.data() + row * h, for_weight);
    }
    for (int64_t j = 0; j < k; ++j) {
      S* result = a.grad_increments ? static_cast<S*>(a.grad_increments[j]) + t * h : nullptr;
      const S* increment = increments[j] + t * h;
      const S* next = j + 1 < k ? increments[j + 1] + t * h : increments[0] + t * h + span;
      const auto tile = for_coefficients ? increment_tile<kStore, true, S> : increment_tile<kStore, false, S>;
      tile(gradients.data(), stride, R, a.coefficients + j, k, span, increment, next, dots.data() + j, result);
    }
  }
  for (size_t i = 0; i < dots.size(); ++i) for_coefficients[i] = dots[i].value();
  if (kStore == Store::kStreaming) finish_streaming();
}

template <typename S>
void backward(const BackwardArgs& a) {
  const int64_t T = a.rows, h = a.hidden, R = a.coefficient_rows, k = a.n_increments;
  const int64_t weights = a.grad_normed ? h : 0;
  const int64_t coefficients = a.grad_coefficients ? R * k : 0;
  const int64_t P = partial_count(T * h, T);
  bool stream = may_stream<S>(T * h, h, {a.grad_base});
  for (int64_t j = 0; a.grad_increments && j < k; ++j) {
    stream = stream && may_stream<S>(T * h, h, {a.grad_increments[j]});
  }
  std::vector<float> for_weight(P * weights), for_coefficients(P * coefficients);
  at::parallel_for(0, P, 1, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) {
      const int64_t begin = T * p / P, end = T * (p + 1) / P;
      float* weight = for_weight.data() + p * weights;
      float* coefficient = coefficients ? for_coefficients.data() + p * coefficients : nullptr;
      stream ? backward_rows<Store::kStreaming, S>(a, begin, end, weight, coefficient)
             : backward_rows<Store::kCached, S>(a, begin, end, weight, coefficient);
    }
  });
  if (weights) add_up(for_weight, P, weights, a.grad_norm_weight);
  if (coefficients) add_up(for_coefficients, P, coefficients, a.grad_coefficients);
}
