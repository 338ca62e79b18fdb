// CUDA C++ as far as the kernels in csrc/cuda use it, for a C++ compiler: takes the place of the toolkit's header. Each thread
// of a block is a fiber, so that barriers and warp functions are function calls here (simulator.cpp).
#pragma once

#include <bit>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "simulator.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
// One copy per host thread, all of them side by side in the library's thread-local block, which the simulator therefore finds.
// Blocks run one after another.
#define __shared__ static thread_local

constexpr int warpSize = 32;

// Host functions. Two multiprocessors, so that loops over more work than one wave are entered by small tensors.
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 2, cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t = nullptr) {
  return std::memset(to, value, bytes), cudaSuccess;
}

// Vector types.
#define SIM_VECTOR(T, name, bytes)                                                              \
  struct alignas(bytes / 2) name##2 { T x, y; };                                                \
  struct name##3 { T x, y, z; };                                                                \
  struct alignas(bytes < 16 ? bytes : 16) name##4 { T x, y, z, w; };                            \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                                    \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                            \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
SIM_VECTOR(char, char, 4)
SIM_VECTOR(unsigned char, uchar, 4)
SIM_VECTOR(short, short, 8)
SIM_VECTOR(unsigned short, ushort, 8)
SIM_VECTOR(int, int, 16)
SIM_VECTOR(float, float, 16)
SIM_VECTOR(long long, longlong, 32)
SIM_VECTOR(unsigned long long, ulonglong, 32)
SIM_VECTOR(double, double, 32)
struct alignas(8) uint2 { unsigned x, y; };  // uint3 is threadIdx's type
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
#undef SIM_VECTOR

// Block and warp functions.
inline void __syncthreads(sim::Site site = sim::Site::current()) { sim::block_barrier("__syncthreads", false, site); }
inline int __syncthreads_count(int predicate, sim::Site site = sim::Site::current()) {
  return sim::block_barrier("__syncthreads_count", predicate != 0, site);
}
inline int __syncthreads_or(int predicate, sim::Site site = sim::Site::current()) {
  return sim::block_barrier("__syncthreads_or", predicate != 0, site) > 0;
}
inline int __syncthreads_and(int predicate, sim::Site site = sim::Site::current()) {
  return sim::block_barrier("__syncthreads_and", predicate == 0, site) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, sim::Site site = sim::Site::current()) {
  sim::warp_collective("__syncwarp", mask, 0, sim::lane(), site);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, sim::Site site = sim::Site::current()) {
  return sim::warp_collective("__ballot_sync", mask, predicate != 0, sim::lane(), site).ballot;
}
inline int __any_sync(unsigned mask, int predicate, sim::Site site = sim::Site::current()) {
  return sim::warp_collective("__any_sync", mask, predicate != 0, sim::lane(), site).ballot != 0;
}
inline int __all_sync(unsigned mask, int predicate, sim::Site site = sim::Site::current()) {
  return sim::warp_collective("__all_sync", mask, predicate == 0, sim::lane(), site).ballot == 0;
}

namespace sim {

// CUDA shuffles numbers of 4 and 8 bytes; smaller integers become int.
template <typename T>
auto shuffle(const char* what, unsigned mask, T value, unsigned source, Site site) {
  using Wide = decltype(+value);
  static_assert(std::is_arithmetic_v<T> && (sizeof(Wide) == 4 || sizeof(Wide) == 8), "__shfl_sync takes no such type");
  const Wide wide = value;
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &wide, sizeof(Wide));
  bits = warp_collective(what, mask, bits, source, site).value;
  Wide result;
  __builtin_memcpy(&result, &bits, sizeof(Wide));
  return result;
}

inline unsigned first_of_segment(int width) { return lane() / width * width; }

}  // namespace sim

template <typename T>
auto __shfl_sync(unsigned mask, T value, int source, int width = 32, sim::Site site = sim::Site::current()) {
  return sim::shuffle("__shfl_sync", mask, value, sim::first_of_segment(width) + (static_cast<unsigned>(source) & (width - 1)), site);
}
template <typename T>
auto __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, sim::Site site = sim::Site::current()) {
  const unsigned source = sim::lane() ^ static_cast<unsigned>(bits);
  return sim::shuffle("__shfl_xor_sync", mask, value, source < sim::first_of_segment(width) + width ? source : sim::lane(), site);
}
template <typename T>
auto __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, sim::Site site = sim::Site::current()) {
  const unsigned within = sim::lane() - sim::first_of_segment(width);
  return sim::shuffle("__shfl_up_sync", mask, value, within >= delta ? sim::lane() - delta : sim::lane(), site);
}
template <typename T>
auto __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, sim::Site site = sim::Site::current()) {
  const unsigned within = sim::lane() - sim::first_of_segment(width);
  return sim::shuffle(
      "__shfl_down_sync", mask, value, within + delta < static_cast<unsigned>(width) ? sim::lane() + delta : sim::lane(), site);
}

inline void __threadfence() { sim::fence(); }
inline void __threadfence_block() {}

// Memory.
template <typename T>
__forceinline__ T __ldg(const T* p) { return *p; }
template <typename T>
__forceinline__ T __ldcs(const T* p) { return *p; }
template <typename T>
__forceinline__ T __ldcg(const T* p) { return *p; }
template <typename T>
__forceinline__ void __stcs(T* p, T value) { *p = value; }
template <typename T>
__forceinline__ void __stcg(T* p, T value) { *p = value; }

namespace sim {

template <typename T, typename Change>
__attribute__((no_sanitize_thread)) T atomic(T* p, const Change& change) {
  atomic_access(p, sizeof(T));
  T before;
  __builtin_memcpy(&before, p, sizeof(T));
  const T after = change(before);
  __builtin_memcpy(p, &after, sizeof(T));
  return before;
}

template <typename T>
concept AtomicInt = std::same_as<T, int> || std::same_as<T, unsigned> || std::same_as<T, unsigned long long>;
template <typename T>
concept AtomicMinMax = AtomicInt<T> || std::same_as<T, long long>;
template <typename T>
concept AtomicAdd = AtomicInt<T> || std::same_as<T, float> || std::same_as<T, double>;

}  // namespace sim

template <sim::AtomicAdd T>
T atomicAdd(T* p, std::type_identity_t<T> v) { return sim::atomic(p, [v](T old) { return old + v; }); }
template <sim::AtomicInt T>
T atomicSub(T* p, std::type_identity_t<T> v) { return sim::atomic(p, [v](T old) { return old - v; }); }
template <sim::AtomicMinMax T>
T atomicMax(T* p, std::type_identity_t<T> v) { return sim::atomic(p, [v](T old) { return old < v ? v : old; }); }
template <sim::AtomicMinMax T>
T atomicMin(T* p, std::type_identity_t<T> v) { return sim::atomic(p, [v](T old) { return v < old ? v : old; }); }
template <sim::AtomicInt T>
T atomicOr(T* p, std::type_identity_t<T> v) { return sim::atomic(p, [v](T old) { return old | v; }); }
template <sim::AtomicInt T>
T atomicAnd(T* p, std::type_identity_t<T> v) { return sim::atomic(p, [v](T old) { return old & v; }); }
template <typename T>
  requires sim::AtomicInt<T> || std::same_as<T, float>
T atomicExch(T* p, std::type_identity_t<T> v) { return sim::atomic(p, [v](T) { return v; }); }
template <sim::AtomicInt T>
T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> v) {
  return sim::atomic(p, [=](T old) { return old == expected ? v : old; });
}

// Bits.
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1; }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((static_cast<uint64_t>(a) * b) >> 32); }
inline int __mulhi(int a, int b) { return static_cast<int>((static_cast<int64_t>(a) * b) >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>((static_cast<unsigned __int128>(a) * b) >> 64);
}

// Arithmetic. The compiler contracts nothing (-ffp-contract=off), so a rounded operation is the operation.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double a) { return std::sqrt(a); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __double2float_rn(double x) { return static_cast<float>(x); }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
// Approximate on the GPU.
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __sinf(float x) { return std::sin(x); }
inline float __cosf(float x) { return std::cos(x); }
inline float sinpif(float x) { return static_cast<float>(std::sin(x * 3.14159265358979323846)); }
inline float cospif(float x) { return static_cast<float>(std::cos(x * 3.14159265358979323846)); }

template <typename A, typename B>
  requires std::is_arithmetic_v<A> && std::is_arithmetic_v<B>
constexpr auto max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmax(T(a), T(b));
  else return T(a) < T(b) ? T(b) : T(a);
}
template <typename A, typename B>
  requires std::is_arithmetic_v<A> && std::is_arithmetic_v<B>
constexpr auto min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmin(T(a), T(b));
  else return T(b) < T(a) ? T(b) : T(a);
}

// Integer reductions of a warp, by shuffles.
namespace sim {
template <typename T, typename Combine>
T reduce(unsigned mask, T value, const Combine& combine, Site site) {
  T result = 0;
  for (unsigned lane = 0, first = 1; lane < 32; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    const T other = shuffle("__reduce_sync", mask, value, lane, site);
    result = first ? other : combine(result, other);
    first = 0;
  }
  return result;
}
}  // namespace sim
template <typename T>
T __reduce_add_sync(unsigned mask, T v, sim::Site site = sim::Site::current()) {
  return sim::reduce(mask, v, [](T a, T b) { return a + b; }, site);
}
template <typename T>
T __reduce_max_sync(unsigned mask, T v, sim::Site site = sim::Site::current()) {
  return sim::reduce(mask, v, [](T a, T b) { return a < b ? b : a; }, site);
}
template <typename T>
T __reduce_min_sync(unsigned mask, T v, sim::Site site = sim::Site::current()) {
  return sim::reduce(mask, v, [](T a, T b) { return b < a ? b : a; }, site);
}
