// Stores that bypass the caches, for outputs too large to be found there by whoever reads them next: an ordinary store first
// reads the line that it overwrites, a quarter of the traffic of a PGD step.
#pragma once

#include <cstdint>
#include <cstring>

#include "inline.h"
#include "parallel.h"

#if FASTDYNAT_X86
#include <emmintrin.h>
#endif

namespace fastdynat {

constexpr int64_t kStreamBytes = int64_t{16} << 20;  // outputs from this size on: more than the caches keep for the next reader

// Writes `count` bytes from a small buffer to `to`.
FASTDYNAT_INLINE void stream(void* to, const void* from, int64_t count) {
#if FASTDYNAT_X86
  if (reinterpret_cast<uintptr_t>(to) % sizeof(__m128i) == 0) {
    const int64_t whole = count / static_cast<int64_t>(sizeof(__m128i));
    for (int64_t i = 0; i < whole; ++i) {
      _mm_stream_si128(static_cast<__m128i*>(to) + i, _mm_loadu_si128(static_cast<const __m128i*>(from) + i));
    }
    const int64_t done = whole * static_cast<int64_t>(sizeof(__m128i));
    std::memcpy(static_cast<char*>(to) + done, static_cast<const char*>(from) + done, count - done);
    return;
  }
#endif
  std::memcpy(to, from, count);
}

// Makes streamed data visible to other threads; once at the end of a thread's range.
FASTDYNAT_INLINE void stream_fence() {
#if FASTDYNAT_X86
  _mm_sfence();
#endif
}

}  // namespace fastdynat
