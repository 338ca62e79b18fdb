// Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
// SC 2011), and the two distributions drawn from it. Plain float32 arithmetic, so that every implementation
// gives the same bits.
#pragma once

#include "inline.h"

#include <cmath>
#include <cstdint>
#include <cstring>

namespace fastdynat {

struct Words4 {
  uint32_t v[4];
};

struct Floats4 {
  float v[4];
};

// Key and the upper half of the counter, common to all numbers of a call; the lower half is (group, image).
struct Philox {
  uint32_t key0, key1, counter_low, counter_high;

  // state: (seed, counter)
  explicit FASTDYNAT_INLINE Philox(const int64_t* state)
      : key0(static_cast<uint32_t>(state[0])),
        key1(static_cast<uint32_t>(static_cast<uint64_t>(state[0]) >> 32)),
        counter_low(static_cast<uint32_t>(state[1])),
        counter_high(static_cast<uint32_t>(static_cast<uint64_t>(state[1]) >> 32)) {}

  FASTDYNAT_INLINE Words4 operator()(uint32_t group, uint32_t image) const {
    uint32_t c0 = group, c1 = image, c2 = counter_low, c3 = counter_high, k0 = key0, k1 = key1;
#ifdef __CUDACC__
#pragma unroll
#else
#pragma GCC unroll 10
#endif
    for (int round = 0; round < 10; ++round) {
      const uint64_t a = uint64_t{0xD2511F53} * c0;
      const uint64_t b = uint64_t{0xCD9E8D57} * c2;
      c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
      c1 = static_cast<uint32_t>(b);
      c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
      c3 = static_cast<uint32_t>(a);
      k0 += 0x9E3779B9;
      k1 += 0xBB67AE85;
    }
    return {{c0, c1, c2, c3}};
  }
};

// In [0, 1), a multiple of 2^-24; 2u - 1 is exact.
FASTDYNAT_INLINE float unit_uniform(uint32_t word) {
  return static_cast<float>(static_cast<int32_t>(word >> 8)) * 0x1p-24f;
}

// log(u) for a normal u > 0, to one unit in the last place: Cephes' logf.
FASTDYNAT_INLINE float log_normal_range(float u) {
  int32_t bits;
  std::memcpy(&bits, &u, sizeof bits);
  const int32_t exponent = (bits - 0x3f3504f3) >> 23;  // so that the mantissa is in [sqrt(1/2), sqrt(2))
  bits -= exponent * (1 << 23);
  float x;
  std::memcpy(&x, &bits, sizeof x);
  x -= 1.0f;
  const float e = static_cast<float>(exponent);
  const float z = x * x;
  float y = 7.0376836292e-2f;
  y = y * x - 1.1514610310e-1f;
  y = y * x + 1.1676998740e-1f;
  y = y * x - 1.2420140846e-1f;
  y = y * x + 1.4249322787e-1f;
  y = y * x - 1.6668057665e-1f;
  y = y * x + 2.0000714765e-1f;
  y = y * x - 2.4999993993e-1f;
  y = y * x + 3.3333331174e-1f;
  y = y * x * z - 2.12194440e-4f * e - 0.5f * z;
  return x + y + 0.693359375f * e;
}

// Two independent standard normals from two words by Box-Muller: radius sqrt(-2 log u), angle 2 pi word1 /
// 2^32.
FASTDYNAT_INLINE void normal_pair(uint32_t word0, uint32_t word1, float& first, float& second) {
  // Multiples of 2^-31, moved off zero: the tail reaches 6.6 standard deviations.
  const float u = static_cast<float>(static_cast<int32_t>(word0 >> 1)) * 0x1p-31f + 0x1p-32f;
  const float radius = std::sqrt(-2.0f * log_normal_range(u));
  // The nearest quarter turn, exactly, and the rest, in [-pi/4, pi/4], for which Cephes' polynomials are
  // made.
  const uint32_t quarter = (word1 + (1u << 29)) >> 30;
  const float t = static_cast<float>(static_cast<int32_t>(word1 - (quarter << 30))) * 1.4629180792671596e-9f;
  const float z = t * t;
  const float sine = ((-1.9515295891e-4f * z + 8.3321608736e-3f) * z - 1.6666654611e-1f) * z * t + t;
  const float cosine =
      ((2.443315711809948e-5f * z - 1.388731625493765e-3f) * z + 4.166664568298827e-2f) * z * z - 0.5f * z +
      1.0f;
  const bool odd = (quarter & 1) != 0;
  const float c = odd ? sine : cosine;
  const float s = odd ? cosine : sine;
  first = radius * (((quarter + 1) & 2) != 0 ? -c : c);
  second = radius * ((quarter & 2) != 0 ? -s : s);
}

FASTDYNAT_INLINE Floats4 normals(const Words4& words) {
  Floats4 out;
  normal_pair(words.v[0], words.v[1], out.v[0], out.v[1]);
  normal_pair(words.v[2], words.v[3], out.v[2], out.v[3]);
  return out;
}

}  // namespace fastdynat
