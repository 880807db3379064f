// How work is laid out over threads and partial sums. Names: see api.h.
//
// Everything here depends on (T, h) only, never on the GPU, the storage type, the alignment or R. Hence sums run
// in the same order everywhere: the norm of a stored `merged` is bit-equal to the norm that the merge returned,
// and gradients of parameters are bit-equal on every GPU model.
#pragma once

#include <cstdint>

namespace merge_norm {

constexpr int64_t kMaxHidden = 16384;
constexpr int64_t kMaxIncrements = 128;
constexpr int kWarp = 32;
constexpr int kMaxThreads = 512;                  // of a block; leaves each thread 128 registers
constexpr int kMaxWarps = kMaxThreads / kWarp;
constexpr int kBatch = 4;                         // 16-byte loads that a thread keeps in flight

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One row is held in the registers of `threads` threads, `elements` (E) each; a block has `rows` rows.
struct RowLayout {
  int elements, threads, rows;
};

constexpr RowLayout row_layout(int64_t hidden) {
  const int elements = hidden <= 2048 ? 8 : hidden <= 4096 ? 16 : 32;
  const int64_t warps = ceil_div(hidden, int64_t{elements} * kWarp);
  const int threads = static_cast<int>(warps > 0 ? warps : 1) * kWarp;
  // Short rows share a block of 128 threads.
  return {elements, threads, threads >= 128 ? 1 : 128 / threads};
}

// Consecutive rows that add into one partial sum: few enough partials that their traffic does not count,
// enough to occupy a large GPU.
constexpr int64_t rows_per_partial(int64_t rows, int64_t hidden) {
  const int64_t wanted = ceil_div(rows, 1024 * row_layout(hidden).rows);
  return wanted > 4 ? wanted : 4;
}

constexpr int64_t row_partials(int64_t rows, int64_t hidden) {
  return ceil_div(rows, rows_per_partial(rows, hidden));
}

// A transposed merge knows no rows: it cuts the T*h elements into tiles, one tile per block at a time.
constexpr int kFlatThreads = 256;
constexpr int kFlatElements = 16;                 // per thread and tile
constexpr int64_t kFlatTile = kFlatThreads * kFlatElements;

constexpr int64_t tiles_per_partial(int64_t rows, int64_t hidden) {
  const int64_t wanted = ceil_div(ceil_div(rows * hidden, kFlatTile), 1024);
  return wanted > 1 ? wanted : 1;
}

constexpr int64_t flat_partials(int64_t rows, int64_t hidden) {
  return ceil_div(ceil_div(rows * hidden, kFlatTile), tiles_per_partial(rows, hidden));
}

}  // namespace merge_norm
