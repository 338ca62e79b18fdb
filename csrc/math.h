// exp and log1p for the CPU and CUDA halves alike: plain arithmetic without calls or branches, so that
// compilers vectorise the loops around them, and the same bits wherever it runs.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "inline.h"

namespace fastdynat {

template <typename A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();
template <typename A>
constexpr A kNaN = std::numeric_limits<A>::quiet_NaN();

FASTDYNAT_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

FASTDYNAT_INLINE float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// exp(x) = mantissa * 2^exponent, the mantissa between about sqrt(1/2) and sqrt(2): says what exp(-10000) is
// like.
template <typename A>
struct ExpParts {
  A mantissa;
  int32_t exponent;
};

// For |x| up to 20000. Cephes' expf: reduction by n * ln 2 in two parts, the first of which is exact, and a
// polynomial.
FASTDYNAT_INLINE ExpParts<float> exp_parts(float x) {
  constexpr float kRound =
      12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer and leaves that in the low bits
  const float shifted = x * 1.44269504088896341f + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return {p * (r * r) + r + 1.0f, static_cast<int32_t>(bits_of(shifted) - bits_of(kRound))};
}

FASTDYNAT_INLINE ExpParts<double> exp_parts(double x) {
  const double n = std::rint(x * 1.44269504088896341);
  const double r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  return {std::exp(r), n == n ? static_cast<int32_t>(n) : 0};
}

// exp(x) for x <= 0, within 2 units in the last place; 0 below -87; NaN for NaN.
FASTDYNAT_INLINE float exp_nonpositive(float x) {
  const ExpParts<float> parts = exp_parts(x);
  const float power = float_of((static_cast<uint32_t>(parts.exponent) + 127u) << 23);
  return x < -87.0f ? 0.0f : parts.mantissa * power;
}

FASTDYNAT_INLINE double exp_nonpositive(double x) { return std::exp(x); }

// log(1 + x) for 0 <= x < infinity, within 2 units in the last place; NaN for NaN. FreeBSD's log1pf without
// its branches.
FASTDYNAT_INLINE float log1p_nonnegative(float x) {
  constexpr uint32_t kOne = 0x3f800000, kRootHalf = 0x3f3504f3;
  const bool small =
      x < 0.41421354f;  // 1 + x < sqrt(2): x itself is the reduced argument, and nothing is rounded
  const float u = 1.0f + x;
  const uint32_t bits = bits_of(u) + (kOne - kRootHalf);
  const float k = small ? 0.0f : static_cast<float>(static_cast<int32_t>(bits >> 23) - 127);
  const float lost = x < 1.0f ? x - (u - 1.0f) : 1.0f - (u - x);  // what rounding 1 + x to u lost
  const float c = small ? 0.0f : lost / u;
  const float f = small ? x : float_of((bits & 0x007fffffu) + kRootHalf) - 1.0f;
  const float s = f / (2.0f + f);
  const float z = s * s;
  const float w = z * z;
  const float r = z * (0.66666662693f + w * 0.28498786688f) + w * (0.40000972152f + w * 0.24279078841f);
  const float half_square = 0.5f * f * f;
  return s * (half_square + r) + (k * 9.0580006145e-06f + c) - half_square + f + k * 6.9313812256e-01f;
}

FASTDYNAT_INLINE double log1p_nonnegative(double x) { return std::log1p(x); }

}  // namespace fastdynat
