// Shared by the CPU and the CUDA half of fastdynat::pgd_step_l2, and the other steps that need a whole
// image: the arithmetic.
#pragma once

#include "inline.h"
#include "step.h"

#include <cmath>
#include <cstring>

namespace fastdynat {

// A gradient entry as float: NaN is 0 and infinity the largest finite value, whose square is safe in double.
// In integers, which vectorise better than three chained comparisons of floats.
FASTDYNAT_INLINE float finite(float g) {
  constexpr int32_t kInfinity = 0x7f800000;
  int32_t bits;
  std::memcpy(&bits, &g, sizeof(bits));
  int32_t magnitude = bits & 0x7fffffff;
  const bool nan = magnitude > kInfinity;
  magnitude = magnitude < kInfinity ? magnitude : kInfinity - 1;
  bits = nan ? 0 : (bits & INT32_MIN) | magnitude;
  std::memcpy(&g, &bits, sizeof(bits));
  return g;
}

// The same as double, in the range whose squares neither overflow nor vanish.
FASTDYNAT_INLINE double finite(double g) {
  const double magnitude = g < 0 ? -g : g;
  const double kept = magnitude < 1e-150 ? 0.0 : magnitude > 1e150 ? 1e150 : magnitude;
  return g != g ? 0.0 : g < 0 ? -kept : kept;
}

// A gradient entry in the images' type T.
template <typename T, typename G>
FASTDYNAT_INLINE T finite_gradient(G g) {
  if constexpr (sizeof(G) == 2) {
    return finite(static_cast<T>(static_cast<float>(g)));
  } else {
    return finite(static_cast<T>(g));
  }
}

// Sums over one image, with d = x_adv - x0 and g the gradient: they give the norm of d + a g for any a, so
// that the moved point is not needed to know how far it is out of the ball.
struct L2Sums {
  double gg = 0, dg = 0, dd = 0;
};

struct L2Scales {
  double gradient, delta;
};

template <typename T>
struct L2Step {
  StepSizes sizes;
  T lo, hi;

  FASTDYNAT_INLINE L2Scales scales(const L2Sums& sums) const {
    const double a = sums.gg > 0 ? sizes.step_size() / std::sqrt(sums.gg) : 0.0;
    // Cancellation matters only where the result is far shorter than its parts, and then it is not scaled.
    // Rounding may leave less than 0; a NaN stays.
    const double squared = sums.dd + a * (2 * sums.dg + a * sums.gg);
    const double norm = std::sqrt(squared < 0 ? 0.0 : squared);
    const double eps = sizes.eps();
    return {a, norm <= eps ? 1.0 : eps / norm};
  }

  FASTDYNAT_INLINE T operator()(T x_adv, T gradient, T x0, L2Scales scales) const {
    const double clean = static_cast<double>(x0);
    const double delta = static_cast<double>(x_adv) - clean + scales.gradient * static_cast<double>(gradient);
    T x = static_cast<T>(clean + scales.delta * delta);
    x = x < lo ? lo : x;
    x = x > hi ? hi : x;
    return x;
  }
};

}  // namespace fastdynat
