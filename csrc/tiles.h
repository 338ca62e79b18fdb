// The loops of the CPU over rows of class scores: kLanes values side by side, which are kLanes rows where
// rows are short (the tile is transposed, so that no vector straddles two rows) and kLanes consecutive
// classes of one row where they are long.
#pragma once

#include <memory>

#include "parallel.h"
#include "rows.h"

namespace fastdynat {

// More than compilers unroll, so that loops over lanes are still loops when the vectoriser sees them. Offsets
// are int64: Python's flags define the overflow of int, which hides from the vectoriser that i + 1 follows i.
constexpr int32_t kLanes = 32;
constexpr int64_t kShortRow = 128;  // classes up to which lanes are rows

template <typename A>
using Lanes = A[kLanes];

template <bool kAcrossRows>
struct Tile {
  static constexpr int32_t kRows = kAcrossRows ? kLanes : 1;

  int64_t first;  // row
  int32_t rows;   // that exist: at most kRows
  int32_t classes;

  // Values, in steps of kLanes.
  FASTDYNAT_INLINE int64_t end() const {
    return kAcrossRows ? int64_t{classes} * kLanes : (int64_t{classes} + kLanes - 1) / kLanes * kLanes;
  }
  // The class of lane j in the step that begins at value i.
  FASTDYNAT_INLINE int32_t class_of(int64_t i, int32_t j) const {
    return kAcrossRows ? static_cast<int32_t>(i / kLanes) : static_cast<int32_t>(i) + j;
  }
  // The position of a class of the row in lane j.
  FASTDYNAT_INLINE int64_t value_of(int32_t k, int32_t j) const {
    return kAcrossRows ? int64_t{k} * kLanes + j : k;
  }
  FASTDYNAT_INLINE int64_t row_of(int32_t j) const { return kAcrossRows && j < rows ? first + j : first; }

  // Values of the tile; lanes without a class get -inf, lanes without a row repeat the first one.
  template <typename A>
  FASTDYNAT_INLINE void load(const FloatRows& from, A* values) const {
    const int64_t k = classes;
    with_pointer(from, [&](const auto* data) FASTDYNAT_INLINE_BODY {
      if (!kAcrossRows) {
        for (int64_t i = 0; i < k; ++i) values[i] = static_cast<A>(data[first * k + i]);
        for (int64_t i = k; i < end(); ++i) values[i] = -kInfinity<A>;
        return;
      }
      for (int32_t j = 0; j < kLanes; ++j) {
        const auto* row = data + row_of(j) * k;
        for (int64_t i = 0; i < k; ++i) values[i * kLanes + j] = static_cast<A>(row[i]);
      }
    });
  }

  template <typename A, typename T>
  FASTDYNAT_INLINE void store(const A* values, T* to) const {
    const int64_t k = classes;
    if (!kAcrossRows) {
      for (int64_t i = 0; i < k; ++i) to[first * k + i] = static_cast<T>(values[i]);
      return;
    }
    for (int32_t j = 0; j < rows; ++j) {
      for (int64_t i = 0; i < k; ++i) to[(first + j) * k + i] = static_cast<T>(values[i * kLanes + j]);
    }
  }

  // Combines the lanes of one row, and gives every lane the result; lanes that are rows stay as they are.
  template <typename T, typename Combine>
  FASTDYNAT_INLINE void across(T* lanes, const Combine& combine) const {
    if (kAcrossRows) return;
    Lanes<T> half;
    for (int32_t j = 0; j < kLanes / 2; ++j) half[j] = combine(lanes[j], lanes[j + kLanes / 2]);
    T result = half[0];
    for (int32_t j = 1; j < kLanes / 2; ++j) result = combine(result, half[j]);
    for (int32_t j = 0; j < kLanes; ++j) lanes[j] = result;
  }

  template <typename A>
  FASTDYNAT_INLINE void total(A* sums) const {
    across(sums, [](A a, A b) FASTDYNAT_INLINE_BODY { return a + b; });
  }

  // The largest value of each row, NaN if it holds one, and the first class that has it: torch.argmax.
  template <typename A>
  FASTDYNAT_INLINE void best(const A* values, A* top, int32_t* index) const {
    constexpr int32_t kNone = std::numeric_limits<int32_t>::max();
    const auto larger = [](A a, A b) FASTDYNAT_INLINE_BODY { return (b > a) | (b != b) ? b : a; };
    for (int32_t j = 0; j < kLanes; ++j) {
      top[j] = -kInfinity<A>;
      index[j] = kNone;
    }
    for (int64_t i = 0; i < end(); i += kLanes) {
      const A* x = values + i;
      for (int32_t j = 0; j < kLanes; ++j) top[j] = larger(top[j], x[j]);
    }
    across(top, larger);
    for (int64_t i = 0; i < end(); i += kLanes) {
      const A* x = values + i;
      if (!kAcrossRows) {  // one row: nothing before its maximum has to be looked at lane by lane, nor
                           // anything after it
        int32_t here = 0;
        for (int32_t j = 0; j < kLanes; ++j) here |= (x[j] == top[j]) | ((x[j] != x[j]) & (top[j] != top[j]));
        if (here == 0) continue;
      }
      for (int32_t j = 0; j < kLanes; ++j) {
        const bool found = (x[j] == top[j]) | ((x[j] != x[j]) & (top[j] != top[j]));
        const int32_t k = found ? class_of(i, j) : kNone;
        index[j] = k < index[j] ? k : index[j];
      }
      if (!kAcrossRows) break;
    }
    across(index, [](int32_t a, int32_t b) FASTDYNAT_INLINE_BODY { return b < a ? b : a; });
  }

  // values = exp((values - top) * factor), and their sum over all classes but `without`.
  template <typename A>
  FASTDYNAT_INLINE void exponentials(
      A* values, const A* top, A factor, const int32_t* without, A* sum) const {
    for (int32_t j = 0; j < kLanes; ++j) sum[j] = A(0);
    for (int64_t i = 0; i < end(); i += kLanes) {
      A* x = values + i;
      for (int32_t j = 0; j < kLanes; ++j) {
        const A e = exp_nonpositive((x[j] - top[j]) * factor);
        x[j] = e;
        sum[j] += class_of(i, j) == without[j] ? A(0) : e;
      }
    }
    total(sum);
  }
};

// Calls body(tile, scratch, size) for every tile of (n, classes), in parallel; scratch holds `buffers` tiles
// of `size` values.
template <typename A, bool kAcrossRows, typename Body>
void for_tiles_of(int64_t n, int32_t classes, int32_t buffers, const Body& body) {
  using T = Tile<kAcrossRows>;
  const int64_t size = T{0, 0, classes}.end();
  constexpr int64_t kWork = 4;  // an exponential is worth about four elements of an ordinary loop
  parallel<A>(
      (n + T::kRows - 1) / T::kRows, kWork * size,
      [=, &body](int64_t begin, int64_t end) FASTDYNAT_INLINE_BODY {
        const std::unique_ptr<A[]> scratch(new A[buffers * size]);
        for (int64_t i = begin; i < end; ++i) {
          const int64_t first = i * T::kRows;
          body(
              T{first, static_cast<int32_t>(std::min<int64_t>(T::kRows, n - first)), classes}, scratch.get(),
              size);
        }
      });
}

template <typename A, typename Body>
void for_tiles(int64_t n, int32_t classes, int32_t buffers, const Body& body) {
  if constexpr (!std::is_same_v<A, double>) {  // in double a second walk would only make the build longer
    if (classes <= kShortRow) return for_tiles_of<A, true>(n, classes, buffers, body);
  }
  for_tiles_of<A, false>(n, classes, buffers, body);
}

}  // namespace fastdynat
