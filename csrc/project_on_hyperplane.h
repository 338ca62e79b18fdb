// Shared by the CPU and the CUDA half of fastdynat::project_on_hyperplane: the arithmetic, Newton's method,
// the checks.
#pragma once

#include "inline.h"
#include "tensor.h"

#include <cmath>
#include <cstring>
#include <limits>

namespace fastdynat {

// The largest power of two that does not exceed x > 0: dividing by it is exact.
FASTDYNAT_INLINE float power_of_two_below(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  bits &= 0x7f800000u;
  bits = bits == 0 ? 0x00800000u : bits;  // below the normal numbers the smallest of them will do
  std::memcpy(&x, &bits, sizeof(bits));
  return x;
}

FASTDYNAT_INLINE double power_of_two_below(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  bits &= uint64_t{0x7ff} << 52;
  bits = bits == 0 ? uint64_t{1} << 52 : bits;
  std::memcpy(&x, &bits, sizeof(bits));
  return x;
}

// An entry of w in the images' type T.
template <typename T, typename W>
FASTDYNAT_INLINE T weight(W w) {
  if constexpr (sizeof(W) == 2) {
    return static_cast<T>(static_cast<float>(w));
  } else {
    return static_cast<T>(w);
  }
}

template <typename T>
FASTDYNAT_INLINE T magnitude(T x) {
  return x < T(0) ? -x : x;
}

template <typename T>
struct Box {
  T lo, hi;

  // A NaN stays.
  FASTDYNAT_INLINE T clip(T x) const {
    x = x < lo ? lo : x;
    return x > hi ? hi : x;
  }
};

// `direction` below is w times the side of the plane that x is on, so that x moves against it, scaled so that
// its largest entry is in [1, 2): squares then neither overflow nor vanish.

// One entry's share of the distance that multiplier t covers towards the plane, and of its slope in t.
template <bool kL2, typename T>
FASTDYNAT_INLINE void add_reached(T x, T direction, T t, Box<T> box, T& reached, T& slope) {
  const T size = magnitude(direction);
  const T room = direction > T(0) ? x - box.lo : box.hi - x;
  const T move = kL2 ? t * size : t;
  const bool free = move < room;
  const T rate = kL2 ? size * size : size;
  reached += direction == T(0) ? T(0) : size * (free ? move : room);  // 0 * infinity in a box without bounds
  slope += free ? rate : T(0);
}

// The projected entry. The direction may be NaN where t is 0.
template <bool kL2, typename T>
FASTDYNAT_INLINE T moved(T x, T direction, double t, Box<T> box) {
  const double by = kL2 ? t * static_cast<double>(direction) : direction > T(0) ? t : -t;
  return direction == T(0) || t == 0 ? x : box.clip(static_cast<T>(static_cast<double>(x) - by));
}

// Newton's method for the multiplier t at which the way made is `target`. It is concave and piecewise linear
// in t, so the steps climb towards the root, and one that meets no further bound is the last. Each leaves
// (missing way) * (slope) at a quarter or less, hence the limit, which images do not come near.
template <typename T>
struct Newton {
  double target;
  double t = 0;
  double slope_before = -1;
  int steps_left = 64;

  // The multiplier to evaluate at: finite, so that it can be multiplied by 0.
  FASTDYNAT_INLINE T at() const {
    constexpr double kLargest = static_cast<double>(std::numeric_limits<T>::max());
    return static_cast<T>(t < kLargest ? t : kLargest);
  }

  // Takes what was found at at(); returns whether to go on.
  FASTDYNAT_INLINE bool advance(double reached, double slope) {
    const double missing = target - reached;
    if (!(missing > 0)) return false;
    if (!(slope > 0)) {
      t = std::numeric_limits<double>::infinity();  // the box ends before the plane: all entries go to their
                                                    // bounds
      return false;
    }
    t = static_cast<double>(at()) + missing / slope;
    const bool same_piece = slope == slope_before;
    slope_before = slope;
    return !same_piece && --steps_left > 0;
  }
};

// The signed factor that makes w the direction, and how far the plane is in those units: 0 where there is no
// plane to go to.
template <typename T>
struct Plane {
  T factor;
  double target;

  FASTDYNAT_INLINE Plane(double c, T largest) {
    const bool usable = largest > T(0) && magnitude(c) <= std::numeric_limits<double>::max();
    const T unit = power_of_two_below(usable ? largest : T(1));
    factor = (c < 0 ? T(-1) : T(1)) / unit;
    target = usable ? magnitude(c) / static_cast<double>(unit) : 0.0;
  }
};

struct Projection {
  Tensor x, w, value, at;  // x, w and at dense, of one memory order, each image one block
  Tensor out;
  int64_t rows, row;
};

constexpr const char* kProjectName = "project_on_hyperplane";

// Calls launch(Projection&) with tensors in an order that the kernels can walk; returns the result, laid out
// as x.
template <typename Launch>
Tensor run_projection(
    const Tensor& x, const Tensor& given_w, const Tensor& value, const Tensor& at, const Launch& launch) {
  const Checker check{kProjectName, "x", x};
  STD_TORCH_CHECK(x.dim() > 0, kProjectName, ": x needs a first dimension of images");
  const Tensor w = beside(kProjectName, "w", x, given_w);
  check.same_shape_and_device("w", w);
  check.same_shape_and_device("at", at);
  check.same_dtype("at", at);
  check.one_per_row("value", value, x.scalar_type(), "of the dtype of x");
  Tensor out = torch::stable::empty_like(x);
  if (x.numel() == 0) return out;
  const Tensor values = torch::stable::contiguous(value);
  const int64_t rows = x.size(0);
  const int64_t row = x.numel() / rows;
  if (is_dense(x) && images_are_blocks(x) && same_order(x, w) && same_order(x, at) && same_order(out, x)) {
    Projection projection{x, w, values, at, out, rows, row};
    launch(projection);
    return out;
  }
  const Tensor plain = torch::stable::contiguous(x);
  Projection projection{
      plain,
      torch::stable::contiguous(w),
      values,
      torch::stable::contiguous(at),
      torch::stable::empty_like(plain),
      rows,
      row};
  launch(projection);
  torch::stable::copy_(out, projection.out);
  return out;
}

// Calls f(T{}, W{}) with the types of the images and of w, which is `beside` them.
template <typename F>
void with_projection_types(const Tensor& x, const Tensor& w, const F& f) {
  with_types_beside(kProjectName, "x", x, w, f);
}

}  // namespace fastdynat
