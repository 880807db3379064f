// Best-fit packing of documents; cut() and pack() of megatron_iiet/data/loader/packing.py say what it does, and
// must give the same pieces in the same order: runs resume by it.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>
#include <vector>

namespace {

using at::Tensor;

struct Piece {
  int64_t start, length, bin;
};

struct Bin {
  int64_t room, number;
};

void check(const Tensor& documents, int64_t start, int64_t stop, int64_t bins, int64_t capacity) {
  TORCH_CHECK_VALUE(documents.dim() == 1 && documents.scalar_type() == at::kLong && documents.is_contiguous(),
                    "documents is ", documents.sizes(), " ", documents.scalar_type(), ", expected int64 [documents]");
  TORCH_CHECK_VALUE(capacity > 0 && start < stop && (stop - start - 1) / capacity < bins, "the tokens [", start, ", ",
                    stop, ") do not fill or do not fit ", bins, " bins of ", capacity);
  const int64_t* starts = documents.const_data_ptr<int64_t>();
  int64_t lowest = start;
  for (int64_t i = 0; i < documents.numel(); lowest = starts[i++] + 1) {
    TORCH_CHECK_VALUE(lowest <= starts[i] && starts[i] < stop, "documents[", i, "] starts at ", starts[i],
                      ", expected from ", lowest, " to below ", stop);
  }
}

// The longest pieces first, equally long ones in order.
std::vector<Piece> cut(const Tensor& documents, int64_t start, int64_t stop, int64_t capacity) {
  std::vector<Piece> pieces;
  pieces.reserve(documents.numel() + 1 + (stop - start) / capacity);
  const auto add = [&](int64_t end) {
    for (; start < end; start += pieces.back().length) {
      pieces.push_back({start, std::min(capacity, end - start), 0});
    }
  };
  const int64_t* starts = documents.const_data_ptr<int64_t>();
  std::for_each(starts, starts + documents.numel(), add);
  add(stop);
  std::stable_sort(pieces.begin(), pieces.end(), [](auto& a, auto& b) { return a.length > b.length; });
  return pieces;
}

// Every piece, or its parts, with its bin, in the order of filling.
std::vector<Piece> best_fit(const std::vector<Piece>& pieces, int64_t bins, int64_t capacity) {
  std::vector<Bin> open;  // with room, ascending; of equal ones the one filled last comes first
  for (int64_t bin = 0; bin < bins; ++bin) open.push_back({capacity, bin});
  const auto find = [&](int64_t room) {
    return std::lower_bound(open.begin(), open.end(), room, [](auto& bin, int64_t size) { return bin.room < size; });
  };
  std::vector<Piece> placed;
  placed.reserve(pieces.size() + bins);
  for (auto [start, length, _] : pieces) {
    while (length > 0) {
      const auto fits = find(length);
      const auto at = fits == open.end() ? find(open.back().room) : fits;
      const Bin bin = *at;
      const int64_t size = std::min(bin.room, length), left = bin.room - size;
      open.erase(at);
      if (left > 0) open.insert(find(left), {left, bin.number});
      placed.push_back({start, size, bin.number});
      start += size;
      length -= size;
    }
  }
  return placed;
}

// Bounds, starts and lengths, one behind the other: a tensor costs Python as much as a dozen pieces.
Tensor pack_documents(const Tensor& documents, int64_t start, int64_t stop, int64_t bins, int64_t capacity) {
  check(documents, start, stop, bins, capacity);
  const auto pieces = best_fit(cut(documents, start, stop, capacity), bins, capacity);
  const auto count = static_cast<int64_t>(pieces.size());
  Tensor result = at::empty({bins + 1 + 2 * count}, at::kLong);
  int64_t* bounds = result.mutable_data_ptr<int64_t>();
  int64_t* starts = bounds + bins + 1;
  std::fill(bounds, starts, 0);
  for (const Piece& piece : pieces) ++bounds[piece.bin + 1];
  std::partial_sum(bounds, starts, bounds);
  std::vector<int64_t> places(bounds, bounds + bins);
  for (const Piece& piece : pieces) {
    const int64_t place = places[piece.bin]++;
    starts[place] = piece.start;
    starts[count + place] = piece.length;
  }
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(megatron_iiet, CPU, m) { m.impl("pack_documents", pack_documents); }
