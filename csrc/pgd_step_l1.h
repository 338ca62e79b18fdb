// Shared by the CPU and the CUDA half of fastdynat::pgd_step_l1: the arithmetic, bisection on the bits of a
// float, the checks.
#pragma once

#include "pgd_step_l2.h"

namespace fastdynat {

// Non-negative floats are ordered as their bits are. kTop is the highest bit below the sign.
template <typename T>
struct FloatBits;

template <>
struct FloatBits<float> {
  using Type = uint32_t;
  static constexpr int kTop = 30;
};

template <>
struct FloatBits<double> {
  using Type = uint64_t;
  static constexpr int kTop = 62;
};

template <typename T>
FASTDYNAT_INLINE T from_bits(typename FloatBits<T>::Type bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// The bits of the largest T >= 0 of which holds() is true. It has to be true of 0, and of all T below one
// that it is true of.
template <typename T, typename Holds>
FASTDYNAT_INLINE typename FloatBits<T>::Type largest_that(const Holds& holds) {
  using Bits = typename FloatBits<T>::Type;
  Bits bits = 0;
  for (int bit = FloatBits<T>::kTop; bit >= 0; --bit) {
    const Bits candidate = bits | Bits{1} << bit;
    if (holds(from_bits<T>(candidate))) bits = candidate;
  }
  return bits;
}

template <typename T>
FASTDYNAT_INLINE T absolute(T x) {
  return x < T(0) ? -x : x;
}

template <typename T>
struct L1Ball {
  T lo, hi;

  // The projection of |delta| at multiplier tau; 0 for a NaN.
  FASTDYNAT_INLINE T kept(T delta, T x0, T tau) const {
    const T size = absolute(delta);
    const T room = delta > T(0) ? hi - x0 : x0 - lo;
    T length = size > tau ? size - tau : T(0);
    length = length > room ? room : length;
    return length > T(0) ? length : T(0);
  }

  FASTDYNAT_INLINE T point(T delta, T x0, T tau) const {
    const T length = kept(delta, x0, tau);
    T x = x0 + (delta > T(0) ? length : -length);
    x = x < lo ? lo : x;
    x = x > hi ? hi : x;
    return delta == delta ? x : delta;
  }
};

// The difference to x0 after the step, in which entries with gradients of at least `threshold` move by
// `move`.
template <typename T>
FASTDYNAT_INLINE T moved_delta(T x_adv, T gradient, T x0, T threshold, double move) {
  const bool chosen = absolute(gradient) >= threshold && gradient != T(0);
  const double by = chosen ? (gradient > T(0) ? move : -move) : 0.0;
  return static_cast<T>(static_cast<double>(x_adv) - static_cast<double>(x0) + by);
}

// Calls launch(StepTensors&) as run_step does; returns the new point.
template <typename Launch>
Tensor run_l1_step(
    const Tensor& x_adv, const Tensor& grad, const Tensor& x0, int64_t count, const Launch& launch) {
  STD_TORCH_CHECK(count >= 1, "pgd_step_l1: count must be at least 1, got ", count);
  STD_TORCH_CHECK(
      x_adv.numel() == 0 || per_image(x_adv) <= INT32_MAX, "pgd_step_l1: images of 2**31 entries or more");
  return std::get<0>(run_step(
      "pgd_step_l1", x_adv, beside("pgd_step_l1", "grad", x_adv, grad), x0, std::nullopt, true, launch));
}

}  // namespace fastdynat
