// Winograd's minimal filtering F(4x4, 3x3) (Lavin & Gray 2015, arXiv 1509.09308): the one-dimensional
// transforms and the tiles.
#pragma once

#include "inline.h"

#include <cstdint>

namespace fastdynat {

constexpr int64_t kTile = 4;             // outputs of a tile, in each direction
constexpr int64_t kWindow = kTile + 2;   // inputs that they read
constexpr int64_t kPoints = kWindow * kWindow;

// V is float, or a vector of floats of several channels.

// B^T d, of one column or row of a window.
template <typename V>
FASTDYNAT_INLINE void input_transform(const V (&d)[kWindow], V (&v)[kWindow]) {
  const V even = d[4] - 4 * d[2], odd = d[3] - 4 * d[1];
  const V even2 = d[4] - d[2], odd2 = 2 * (d[3] - d[1]);
  v[0] = 4 * d[0] - 5 * d[2] + d[4];
  v[1] = even + odd;
  v[2] = even - odd;
  v[3] = even2 + odd2;
  v[4] = even2 - odd2;
  v[5] = 4 * d[1] - 5 * d[3] + d[5];
}

// A^T m.
template <typename V>
FASTDYNAT_INLINE void output_transform(const V (&m)[kWindow], V (&y)[kTile]) {
  const V sum = m[1] + m[2], difference = m[1] - m[2];
  const V sum2 = m[3] + m[4], difference2 = m[3] - m[4];
  y[0] = m[0] + sum + sum2;
  y[1] = difference + 2 * difference2;
  y[2] = sum + 4 * sum2;
  y[3] = difference + 8 * difference2 + m[5];
}

// G w, in double: a filter is transformed once and used for many images.
FASTDYNAT_INLINE void filter_transform(const double (&w)[3], double (&u)[kWindow]) {
  const double even = w[0] + w[2], even2 = w[0] + 4 * w[2];
  u[0] = w[0] / 4;
  u[1] = -(even + w[1]) / 6;
  u[2] = -(even - w[1]) / 6;
  u[3] = (even2 + 2 * w[1]) / 24;
  u[4] = (even2 - 2 * w[1]) / 24;
  u[5] = w[2];
}

// The division of images of (height, width) into tiles, which are numbered by image, row and column.
struct Tiles {
  int64_t height, width;
  int64_t down, across;

  Tiles(int64_t height, int64_t width)
      : height(height),
        width(width),
        down((height + kTile - 1) / kTile),
        across((width + kTile - 1) / kTile) {}

  struct At {
    int64_t image, top, left;  // of its outputs
  };
  FASTDYNAT_INLINE At at(int64_t tile) const {
    const int64_t row = tile / across;
    return {row / down, row % down * kTile, tile % across * kTile};
  }
};

}  // namespace fastdynat
