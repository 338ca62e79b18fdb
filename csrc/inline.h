// Marks for the functions that make up a kernel.
#pragma once

// Inlined into every caller, so that the CPU caller's instruction set (parallel.h) holds inside too.
#ifdef __CUDACC__
#define FASTDYNAT_INLINE __host__ __device__ __forceinline__
#else
#define FASTDYNAT_INLINE inline __attribute__((always_inline))
#endif

// The same for the body of a lambda: [=](int64_t begin, int64_t end) FASTDYNAT_INLINE_BODY { ... }
#define FASTDYNAT_INLINE_BODY __attribute__((always_inline))
