// The loops of CUDA kernels over rows of class scores: kGroup threads per row (part of a warp, a warp or a
// block) hold its values in registers, so that memory is read once, or read them again from the caches where
// a row is too long for that.
#pragma once

#include <limits>
#include <type_traits>

#include "../rows.h"
#include "launch.cuh"

namespace fastdynat {

constexpr int32_t kNoClass = std::numeric_limits<int32_t>::max();

// `count` values from class k on; -inf where there is no class. whole: all of them exist, and may be loaded
// as one.
template <typename A, int kCount>
__device__ __forceinline__ Pack<A, kCount> load_pack(
    const FloatRows& from, int64_t row, int32_t classes, int32_t k, bool whole) {
  Pack<A, kCount> values;
  with_pointer(from, [&](const auto* data) {
    using T = std::decay_t<decltype(*data)>;
    const T* at = data + row * classes + k;
    if (whole) {
      const auto pack = *reinterpret_cast<const Pack<T, kCount>*>(at);
#pragma unroll
      for (int i = 0; i < kCount; ++i) values.v[i] = static_cast<A>(pack.v[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) values.v[i] = k + i < classes ? static_cast<A>(at[i]) : -kInfinity<A>;
    }
  });
  return values;
}

// kPacks packs of kPack values per thread; kPacks = 0: as many as the row needs, loaded whenever they are
// looked at.
template <typename A_, int kGroup_, int kPacks, int kPack>
struct RowWalk {
  using A = A_;
  using Values = Pack<A, kPack>;
  static constexpr int kGroup = kGroup_;
  static constexpr int64_t kRowsPerBlock = kThreads / kGroup;
  static constexpr bool kHeld = kPacks > 0;

  // One row, as one thread of its group sees it.
  struct View {
    FloatRows from;
    int64_t row;
    int32_t classes;
    bool vectors;
    Values held[kHeld ? kPacks : 1];

    __device__ __forceinline__ View(const FloatRows& from, int64_t row, int32_t classes)
        : from(from),
          row(row),
          classes(classes),
          vectors(kPack > 1 && classes % kPack == 0 && from.aligned_for(kPack)) {
      if constexpr (kHeld) {
        if (from.data == nullptr) return;
#pragma unroll
        for (int i = 0; i < kPacks; ++i) held[i] = load(i);
      }
    }
    __device__ __forceinline__ Values load(int i) const {
      const int32_t k = first(i);
      return load_pack<A, kPack>(from, row, classes, k, vectors && k < classes);
    }
    __device__ __forceinline__ Values pack(int i) const {
      if constexpr (kHeld) return held[i];
      return load(i);
    }
    // Any value, from memory, where its cache line was just read.
    __device__ __forceinline__ A at(int32_t k) const {
      return load_pack<A, 1>(from, row, classes, k, false).v[0];
    }
  };

  __device__ static __forceinline__ bool leads() { return threadIdx.x % kGroup == 0; }
  __device__ static __forceinline__ int32_t first(int i) {
    return (i * kGroup + static_cast<int32_t>(threadIdx.x) % kGroup) * kPack;
  }

  // Calls f(i) for each of this thread's packs.
  template <typename F>
  __device__ static __forceinline__ void packs(int32_t classes, const F& f) {
    if constexpr (kHeld) {
#pragma unroll
      for (int i = 0; i < kPacks; ++i) f(i);
    } else {
      for (int i = 0; first(i) < classes; ++i) f(i);
    }
  }

  // Calls f(class, value) for each of this thread's classes, in rising order.
  template <typename F>
  __device__ static __forceinline__ void each(const View& view, const F& f) {
    packs(view.classes, [&](int i) {
      const Values values = view.pack(i);
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        if (first(i) + j < view.classes) f(first(i) + j, values.v[j]);
      }
    });
  }

  // The same for f(class, value, value of `second`); without a second row, its values are arbitrary.
  template <bool kSecond, typename F>
  __device__ static __forceinline__ void each_pair(const View& view, const View& second, const F& f) {
    packs(view.classes, [&](int i) {
      const Values values = view.pack(i);
      Values others = values;
      if constexpr (kSecond) others = second.pack(i);
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        if (first(i) + j < view.classes) f(first(i) + j, values.v[j], others.v[j]);
      }
    });
  }

  // Stores f(class, value, value of `second`) to the row of `out`.
  template <bool kSecond, typename T, typename F>
  __device__ static __forceinline__ void write(T* out, const View& view, const View& second, const F& f) {
    T* to = out + view.row * view.classes;
    const bool whole = kPack > 1 && view.classes % kPack == 0 &&
                       reinterpret_cast<uintptr_t>(out) % sizeof(Pack<T, kPack>) == 0;
    packs(view.classes, [&](int i) {
      const int32_t k = first(i);
      const Values values = view.pack(i);
      Values others = values;
      if constexpr (kSecond) others = second.pack(i);
      Pack<T, kPack> results;
#pragma unroll
      for (int j = 0; j < kPack; ++j) results.v[j] = static_cast<T>(f(k + j, values.v[j], others.v[j]));
      if (whole && k < view.classes) {
        *reinterpret_cast<Pack<T, kPack>*>(to + k) = results;
      } else {
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
          if (k + j < view.classes) to[k + j] = results.v[j];
        }
      }
    });
  }

  // A reduction over the threads of a row; every one of them gets the result.
  template <typename T, typename Combine>
  __device__ static __forceinline__ T reduce(T value, T identity, const Combine& combine) {
    if constexpr (kGroup <= 32) {
#pragma unroll
      for (int offset = kGroup / 2; offset > 0; offset >>= 1) {
        value = combine(value, __shfl_xor_sync(0xffffffffu, value, offset));
      }
      return value;
    } else {
      __shared__ T shared[32];
      return block_reduce(value, shared, identity, combine);
    }
  }
  template <typename T>
  __device__ static __forceinline__ T sum(T value) {
    return reduce(value, T(0), [](T a, T b) { return a + b; });
  }

  // The largest value of a row, NaN if there is one, and the first class that has it: torch.argmax.
  __device__ static __forceinline__ A best(const View& view, int32_t* index) {
    const auto larger = [](A a, A b) { return (b > a) | (b != b) ? b : a; };
    A top = -kInfinity<A>;
    each(view, [&](int32_t, A x) { top = larger(top, x); });
    top = reduce(top, -kInfinity<A>, larger);
    int32_t found = kNoClass;
    each(view, [&](int32_t k, A x) {
      const bool here = (x == top) | ((x != x) & (top != top));
      found = here && k < found ? k : found;
    });
    *index = reduce(found, kNoClass, [](int32_t a, int32_t b) { return b < a ? b : a; });
    return top;
  }

  // One group of threads per row and no loop over rows: the groups of a warp take part in the same shuffles.
  static int64_t blocks(int64_t n) { return (n + kRowsPerBlock - 1) / kRowsPerBlock; }
  __device__ static __forceinline__ int64_t row() {
    return int64_t{blockIdx.x} * kRowsPerBlock + threadIdx.x / kGroup;
  }
};

// Calls f(RowWalk{}) with the walk for rows of this many classes.
template <typename A, typename F>
void with_walk(int32_t classes, const F& f) {
  if constexpr (std::is_same_v<A, double>) {
    f(RowWalk<A, 32, 0, 1>{});  // for checking, not for speed
  } else if (classes <= 16) {
    f(RowWalk<A, 16, 1, 1>{});
  } else if (classes <= 32) {
    f(RowWalk<A, 32, 1, 1>{});
  } else if (classes <= 128) {
    f(RowWalk<A, 32, 1, 4>{});
  } else if (classes <= 1024) {
    f(RowWalk<A, 32, 8, 4>{});
  } else {
    f(RowWalk<A, kThreads, 0, 4>{});
  }
}

}  // namespace fastdynat
