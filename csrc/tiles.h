// How the CPU walks rows of class scores: kLanes values side by side, which are kLanes rows where rows are short (the tile is
// transposed, so that no vector straddles two rows) and kLanes consecutive classes of one row where they are long.
#pragma once

#include <memory>

#include "parallel.h"
#include "rows.h"

namespace fastdynat {

constexpr int32_t kLanes = 32;
constexpr int64_t kShortRow = 64;  // classes up to which lanes are rows

template <typename A>
using Lanes = A[kLanes];

template <bool kAcrossRows>
struct Tile {
  static constexpr int64_t kRows = kAcrossRows ? kLanes : 1;

  int64_t first;  // row
  int64_t rows;   // that exist: at most kRows
  int32_t classes;

  // Values, which come in steps of kLanes.
  FASTDYNAT_INLINE int64_t end() const { return kAcrossRows ? int64_t{classes} * kLanes : (int64_t{classes} + kLanes - 1) / kLanes * kLanes; }
  FASTDYNAT_INLINE int32_t class_of(int64_t i, int32_t lane) const { return static_cast<int32_t>(kAcrossRows ? i / kLanes : i) + (kAcrossRows ? 0 : lane); }
  FASTDYNAT_INLINE int64_t row_of(int32_t lane) const { return kAcrossRows && lane < rows ? first + lane : first; }

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
      for (int32_t lane = 0; lane < kLanes; ++lane) {
        const auto* row = data + row_of(lane) * k;
        for (int64_t i = 0; i < k; ++i) values[i * kLanes + lane] = static_cast<A>(row[i]);
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
    for (int32_t lane = 0; lane < rows; ++lane) {
      for (int64_t i = 0; i < k; ++i) to[(first + lane) * k + i] = static_cast<T>(values[i * kLanes + lane]);
    }
  }

  // The first largest value of each row and its class.
  template <typename A>
  FASTDYNAT_INLINE void best(const A* values, A* value, int32_t* index) const {
    for (int32_t j = 0; j < kLanes; ++j) {
      value[j] = values[j];
      index[j] = class_of(0, j);
    }
    for (int64_t i = kLanes; i < end(); i += kLanes) {
      const A* x = values + i;
      for (int32_t j = 0; j < kLanes; ++j) {
        const bool better = beats(x[j], value[j]);
        index[j] = better ? class_of(i, j) : index[j];
        value[j] = better ? x[j] : value[j];
      }
    }
    if (kAcrossRows) return;
    for (int32_t j = 1; j < kLanes; ++j) {
      if (beats(value[j], value[0]) || (same_place(value[j], value[0]) && index[j] < index[0])) {
        value[0] = value[j];
        index[0] = index[j];
      }
    }
    for (int32_t j = 1; j < kLanes; ++j) {
      value[j] = value[0];
      index[j] = index[0];
    }
  }

  // values = softmax(values * factor), given the largest value of each row.
  template <typename A>
  FASTDYNAT_INLINE void softmax(A* values, const A* top, A factor) const {
    Lanes<A> sum;
    for (int32_t j = 0; j < kLanes; ++j) sum[j] = A(0);
    for (int64_t i = 0; i < end(); i += kLanes) {
      A* x = values + i;
      for (int32_t j = 0; j < kLanes; ++j) {
        x[j] = exp_nonpositive((x[j] - top[j]) * factor);
        sum[j] += x[j];
      }
    }
    total(sum);
    for (int32_t j = 0; j < kLanes; ++j) sum[j] = A(1) / sum[j];
    for (int64_t i = 0; i < end(); i += kLanes) {
      A* x = values + i;
      for (int32_t j = 0; j < kLanes; ++j) x[j] *= sum[j];
    }
  }

  // Sums over lanes, into every lane, where the lanes are of one row.
  template <typename A>
  FASTDYNAT_INLINE void total(A* sums) const {
    if (kAcrossRows) return;
    for (int32_t width = kLanes / 2; width > 0; width /= 2) {
      for (int32_t j = 0; j < width; ++j) sums[j] += sums[j + width];
    }
    for (int32_t j = 1; j < kLanes; ++j) sums[j] = sums[0];
  }
};

// Calls body(tile, scratch) for every tile of (n, classes), in parallel; scratch holds `buffers` tiles of A.
template <typename A, bool kAcrossRows, typename Body>
void for_tiles_of(int64_t n, int32_t classes, int32_t buffers, const Body& body) {
  using T = Tile<kAcrossRows>;
  const int64_t tile_size = T{0, 0, classes}.end();
  constexpr int64_t kWork = 4;  // an exponential is worth about four elements of an ordinary loop
  parallel((n + T::kRows - 1) / T::kRows, kWork * tile_size, [=, &body](int64_t begin, int64_t end) FASTDYNAT_INLINE_BODY {
    const std::unique_ptr<A[]> scratch(new A[buffers * tile_size]);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * T::kRows;
      body(T{first, std::min<int64_t>(T::kRows, n - first), classes}, scratch.get(), tile_size);
    }
  });
}

template <typename A, typename Body>
void for_tiles(int64_t n, int32_t classes, int32_t buffers, const Body& body) {
  if (classes <= kShortRow) {
    for_tiles_of<A, true>(n, classes, buffers, body);
  } else {
    for_tiles_of<A, false>(n, classes, buffers, body);
  }
}

}  // namespace fastdynat
