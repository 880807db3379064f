// What one increment receives from all that merged it.

template <Store kStore, typename S>
void transposed_range(const TransposedArgs& a, int64_t begin, int64_t end, float* for_coefficients) {
  auto* const* gradients = reinterpret_cast<const S* const*>(a.gradients);
  std::vector<float> sums(kTile), increment(for_coefficients ? kTile : 0);
  std::vector<Dot> dots(for_coefficients ? a.n_gradients : 0);
  const auto* direct = static_cast<const S*>(a.direct);
  const TileSum<S> tile{direct, direct, gradients, a.n_gradients, a.coefficients,
                        static_cast<S*>(a.grad_increment), sums.data(), increment.data(), dots.data()};
  for (int64_t at = begin; at < end; at += kTile) {
    const int64_t count = std::min(kTile, end - at);
    if (for_coefficients) {
      read_tile(static_cast<const S*>(a.increment) + at, count, increment.data());
      sum_tile<true, kStore>(tile, at, count);
    } else {
      sum_tile<false, kStore>(tile, at, count);
    }
  }
  for (size_t m = 0; m < dots.size(); ++m) for_coefficients[m] = dots[m].value();
  if (kStore == Store::kStreaming) finish_streaming();
}

template <typename S>
void transposed(const TransposedArgs& a) {
  const int64_t size = a.rows * a.hidden, tiles = (size + kTile - 1) / kTile;
  const int64_t P = partial_count(size, tiles), width = a.grad_coefficients ? a.n_gradients : 0;
  const bool stream = may_stream<S>(size, kTile, {a.grad_increment});
  std::vector<float> partials(P * width);
  at::parallel_for(0, P, 1, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) {
      const int64_t begin = tiles * p / P * kTile, end = std::min(size, tiles * (p + 1) / P * kTile);
      float* partial = width ? partials.data() + p * width : nullptr;
      stream ? transposed_range<Store::kStreaming, S>(a, begin, end, partial)
             : transposed_range<Store::kCached, S>(a, begin, end, partial);
    }
  });
  if (width) add_up(partials, P, width, a.grad_coefficients);
}
