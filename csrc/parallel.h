// CPU loops: split over torch's threads; those that compute in float are compiled for several instruction
// sets, the best of which is taken at run time. Loops in double are for checking, not for speed: one copy of
// them saves a third of the build.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "inline.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define FASTDYNAT_X86 1
#else
#define FASTDYNAT_X86 0
#endif

namespace fastdynat {

constexpr int64_t kGrainSize =
    32768;  // elements per task: small enough to share a batch, large enough to pay for it

#if FASTDYNAT_X86
// `body` is a template argument marked always_inline, so each of these holds a copy of it with its own
// instructions.
template <typename Body>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))) void run_avx512(
    const Body& body, int64_t a, int64_t b) {
  body(a, b);
}
template <typename Body>
__attribute__((target("avx2,fma"))) void run_avx2(const Body& body, int64_t a, int64_t b) {
  body(a, b);
}

enum class Isa { kBaseline, kAvx2, kAvx512 };

inline Isa detect_isa() {
  __builtin_cpu_init();
  const char* asked = std::getenv("ATEN_CPU_CAPABILITY");  // torch's own switch for its kernels
  const bool baseline = asked != nullptr && std::strcmp(asked, "default") == 0;
  if (baseline || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::kBaseline;
  if (asked != nullptr && std::strcmp(asked, "avx2") == 0) return Isa::kAvx2;
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return wide ? Isa::kAvx512 : Isa::kAvx2;
}

inline Isa isa() {
  static const Isa found = detect_isa();
  return found;
}
#endif

// Calls body(begin, end) with the widest vectors that this machine has, where it computes in float (T).
template <typename T, typename Body>
void run_vectorised(const Body& body, int64_t begin, int64_t end) {
#if FASTDYNAT_X86
  if constexpr (!std::is_same_v<T, double>) {
    if (isa() == Isa::kAvx512) return run_avx512(body, begin, end);
    if (isa() == Isa::kAvx2) return run_avx2(body, begin, end);
  }
#endif
  body(begin, end);
}

// Calls body(begin, end), which computes in T, on parts of [0, count) in parallel; an item is `cost` elements
// of work.
template <typename T, typename Body>
void parallel(int64_t count, int64_t cost, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, kGrainSize / std::max<int64_t>(1, cost));
  if (count <= grain) return run_vectorised<T>(body, 0, count);
  torch::stable::parallel_for(
      0, count, grain, [&](int64_t begin, int64_t end) { run_vectorised<T>(body, begin, end); });
}

}  // namespace fastdynat
