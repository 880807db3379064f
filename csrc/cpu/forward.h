// Merge and norm.

// 1 / rms of a row.
inline float reciprocal_rms(const float* row, int64_t h, float eps) {
  Block squares = zeros();
  for_blocks(h, [&](int64_t i, auto extent) MERGE_NORM_ALWAYS {
    const Block b = read(row + i, extent);
    multiply_add(squares, b, b);
  });
  return 1.f / std::sqrt(sum(squares) / static_cast<float>(h) + eps);
}

template <Store kStore, typename S>
inline void norm_row(const float* row, const float* weight, float rstd, int64_t h, S* normed, const S* ahead) {
  for_blocks(h, [&](int64_t i, auto extent) MERGE_NORM_ALWAYS {
    if (ahead) prefetch(ahead + i);
    write<kStore>(normed + i, multiply(multiply(rstd, read(row + i, extent)), read(weight + i, extent)), extent);
  });
}

template <Store kStore, typename S>
void forward_rows(const ForwardArgs& a, int64_t begin, int64_t end) {
  const int64_t T = a.rows, h = a.hidden, R = a.coefficient_rows, k = a.n_increments;
  const int64_t group = std::max<int64_t>(1, kTile / h);
  const auto* weights = static_cast<const float*>(a.norm_weight.data);
  const auto* residual = static_cast<const S*>(a.residual);
  auto* const* increments = reinterpret_cast<const S* const*>(a.increments);
  std::vector<float> sums(whole_blocks(group * h));
  const std::vector<float> ones(a.coefficients ? 0 : k, 1.f);  // multiplying by one is exact
  for (int64_t t = begin; t < end; t += group) {
    const int64_t rows = std::min(group, end - t), span = rows * h;
    for (int64_t r = 0; r < R; ++r) {
      if (k == 0) read_tile(residual + t * h, span, sums.data());
      for (int64_t i = 0; k > 0 && i < span; i += kTile) {  // once, but for rows longer than a tile
        // With a norm, the residual's next tile is prefetched while there is nothing else to read.
        const TileSum<S> tile{residual,
                              a.normed ? nullptr : residual,
                              increments,
                              k,
                              a.coefficients ? a.coefficients + r * k : ones.data(),
                              static_cast<S*>(a.merged) + r * T * h,
                              sums.data() + i,
                              nullptr,
                              nullptr};
        sum_tile<false, kStore>(tile, t * h + i, std::min(kTile, span - i));
      }
    }
    for (int64_t row = 0; a.normed && row < rows; ++row) {  // then R is 1
      const float* of_stream = sums.data() + row * h;
      const int64_t at = (t + row) * h;
      a.rstd[t + row] = reciprocal_rms(of_stream, h, a.eps);
      norm_row<kStore>(of_stream, weights, a.rstd[t + row], h, static_cast<S*>(a.normed) + at,
                       residual ? residual + at + span : nullptr);
    }
  }
  if (kStore == Store::kStreaming) finish_streaming();
}

template <typename S>
void forward(const ForwardArgs& a) {
  const bool stream = may_stream<S>(a.rows * a.hidden, a.hidden, {a.merged, a.normed});
  const int64_t grain = std::max<int64_t>(1, kElementsPerPartial / (a.hidden * (a.n_increments + 1)));
  at::parallel_for(0, a.rows, grain, [&](int64_t begin, int64_t end) {
    stream ? forward_rows<Store::kStreaming, S>(a, begin, end) : forward_rows<Store::kCached, S>(a, begin, end);
  });
}
