// Tiles, weighted sums of slabs, and partial sums that do not depend on the number of threads.

// Elements of a tile, and slabs read side by side.
constexpr int64_t kTile = 2048;
constexpr int64_t kGroup = 6;
// Slabs of more bytes than this are written past the cache: they would not be in it when they are read again.
constexpr int64_t kStreamingBytes = 4 << 20;
// Elements that one partial sum covers, and the most partial sums there are: fixed, so that a sum is the same
// for any number of threads.
constexpr int64_t kElementsPerPartial = 1 << 15;
constexpr int64_t kMaxPartials = 128;

inline int64_t partial_count(int64_t elements, int64_t limit) {
  return std::clamp<int64_t>(elements / kElementsPerPartial, 1, std::clamp<int64_t>(limit, 1, kMaxPartials));
}

// totals[i] = Σ_p partials[p, i]
inline void add_up(const std::vector<float>& partials, int64_t count, int64_t width, float* totals) {
  std::vector<double> sums(width);
  for (int64_t p = 0; p < count; ++p) {
    for (int64_t i = 0; i < width; ++i) sums[i] += partials[p * width + i];
  }
  for (int64_t i = 0; i < width; ++i) totals[i] = static_cast<float>(sums[i]);
}

template <typename S>
inline bool may_stream(int64_t elements, int64_t stride, std::initializer_list<const void*> results) {
  const int64_t line = 64;
  if (elements * int64_t(sizeof(S)) < kStreamingBytes || stride * sizeof(S) % line != 0) return false;
  return std::all_of(results.begin(), results.end(),
                     [](const void* p) { return reinterpret_cast<uintptr_t>(p) % line == 0; });
}

// Streaming stores are not ordered with what other threads do next.
inline void finish_streaming() {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  _mm_sfence();
#endif
}

// Asks for the lines of a block, to be read one group of slabs later.
template <typename S>
MERGE_NORM_INLINE void prefetch(const S* p) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  MERGE_NORM_UNROLL for (size_t line = 0; line < kBlock * sizeof(S) / 64; ++line) {
    _mm_prefetch(reinterpret_cast<const char*>(p) + line * 64, _MM_HINT_T1);
  }
#endif
}

// A weighted sum of slabs over one tile. Several slabs are read side by side, group after group; between groups
// the sums wait in `sums`.
template <typename S>
struct TileSum {
  const S* start;             // what the sum starts from, or null for zeros
  const S* ahead;             // start, where its next tile is to be prefetched meanwhile
  const S* const* slabs;      // k pointers
  int64_t k;
  const float* coefficients;  // [k]
  S* result;                  // where the rounded sum goes
  float* sums;                // scratch, whole blocks; holds the rounded sum in the end
  const float* with;          // with kDots: what the slabs are multiplied with, whole blocks
  Dot* dots;                  // with kDots: [k], dots[j] += ⟨with, slabs[j]⟩
};

// Slabs first … first + kSlabs - 1 over `count` elements from `at`.
template <int kSlabs, bool kDots, Store kStore, typename S>
inline void add_group(const TileSum<S>& tile, int64_t first, int64_t at, int64_t count) {
  const bool starts = first == 0, ends = first + kSlabs == tile.k;
  // Read next: the following group, or the first one of the next tile.
  const int64_t next_at = ends ? at + count : at;
  const S *slabs[kSlabs], *next[kSlabs + 1];  // a group has at most one slab more than the one before or after
  float coefficients[kSlabs];
  Dot dots[kSlabs];
  MERGE_NORM_UNROLL for (int g = 0; g < kSlabs; ++g) {
    slabs[g] = tile.slabs[first + g] + at;
    coefficients[g] = tile.coefficients[first + g];
  }
  MERGE_NORM_UNROLL for (int g = 0; g <= kSlabs; ++g) {
    next[g] = tile.slabs[std::min<int64_t>(ends ? g : first + kSlabs + g, tile.k - 1)] + next_at;
  }
  for_blocks(count, [&](int64_t i, auto extent) MERGE_NORM_ALWAYS {
    Block total = !starts ? read(tile.sums + i) : tile.start ? read(tile.start + at + i, extent) : zeros();
    Block with;
    if constexpr (kDots) with = read(tile.with + i);
    if (starts && tile.ahead) prefetch(tile.ahead + at + count + i);
    if (next[kSlabs] != next[kSlabs - 1]) prefetch(next[kSlabs] + i);
    MERGE_NORM_UNROLL for (int g = 0; g < kSlabs; ++g) {
      prefetch(next[g] + i);
      const Block slab = read(slabs[g] + i, extent);
      multiply_add(total, coefficients[g], slab);
      if constexpr (kDots) dots[g].add(with, slab);
    }
    if (ends) total = write<kStore>(tile.result + at + i, total, extent);
    write(tile.sums + i, total);
  });
  if constexpr (kDots) {
    for (int g = 0; g < kSlabs; ++g) tile.dots[first + g].add(dots[g]);
  }
}

// All of them, in groups of as equal a size as there can be.
template <bool kDots, Store kStore, typename S>
inline void sum_tile(const TileSum<S>& tile, int64_t at, int64_t count) {
  int64_t groups = (tile.k + kGroup - 1) / kGroup;
  for (int64_t first = 0, slabs; groups > 0; first += slabs, --groups) {
    slabs = (tile.k - first) / groups;
    switch (slabs) {
      case 1: add_group<1, kDots, kStore>(tile, first, at, count); break;
      case 2: add_group<2, kDots, kStore>(tile, first, at, count); break;
      case 3: add_group<3, kDots, kStore>(tile, first, at, count); break;
      case 4: add_group<4, kDots, kStore>(tile, first, at, count); break;
      case 5: add_group<5, kDots, kStore>(tile, first, at, count); break;
      default: add_group<6, kDots, kStore>(tile, first, at, count);
    }
  }
}

// `count` elements of a slab as fp32, in whole blocks.
template <typename S>
inline void read_tile(const S* slab, int64_t count, float* tile) {
  for_blocks(count, [&](int64_t i, auto extent) MERGE_NORM_ALWAYS {
    prefetch(slab + count + i);
    write(tile + i, read(slab + i, extent));
  });
}
