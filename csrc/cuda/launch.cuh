// Parts of every kernel launch: the device and stream of the tensors, 16-byte accesses, block sizes.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <cstdint>

#include "../tensor.h"

namespace fastdynat {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 16;  // loops in the kernels cover the rest

// The library and dispatch key under which a .cu file registers. tests/support/cuda_sim compiles the same
// files for the CPU, where a simulation runs them, and registers them elsewhere.
#ifndef FASTDYNAT_LIBRARY
#define FASTDYNAT_LIBRARY fastdynat
#define FASTDYNAT_KEY CUDA
#endif

// Makes the device of `t` current for its lifetime; `stream` is torch's current stream there.
struct OnDevice {
#ifdef FASTDYNAT_SIMULATE
  explicit OnDevice(const Tensor&) {}
#else
  explicit OnDevice(const Tensor& t) : guard(t.get_device_index()) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }
  torch::stable::accelerator::DeviceGuard guard;
#endif
  cudaStream_t stream = nullptr;
};

// Launches kernel(args...) on `grid` blocks of `block` threads. Every launch goes through here.
template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), int64_t grid, int block, cudaStream_t stream, Args... args) {
#ifdef FASTDYNAT_SIMULATE
  simulate_launch(grid, block, [&] { kernel(static_cast<Params>(args)...); });
#else
  kernel<<<static_cast<unsigned>(grid), block, 0, stream>>>(static_cast<Params>(args)...);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
#endif
}

inline int64_t blocks_for(int64_t items, int64_t per_block) {
  return std::min((items + per_block - 1) / per_block, kMaxBlocks);
}

// N values that are loaded and stored as one.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T v[N];
};

inline bool aligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// The dtype of the half-precision output: an argument of kernels, so that they are not compiled for each.
enum class Low : int { kNone, kHalf, kBFloat16 };

inline Low low_of(std::optional<ScalarType> dtype) {
  return !dtype ? Low::kNone : *dtype == ScalarType::Half ? Low::kHalf : Low::kBFloat16;
}

__device__ __forceinline__ uint16_t low_bits(float value, Low low) {
  return low == Low::kHalf ? Half(value).x : BFloat16(value).x;
}

// The sum, or another reduction, over a block of kThreads threads; every thread gets it. `shared` holds 32.
template <typename T, typename Combine>
__device__ __forceinline__ T block_reduce(T value, T* shared, T identity, const Combine& combine) {
  for (int offset = 16; offset > 0; offset >>= 1)
    value = combine(value, __shfl_xor_sync(0xffffffffu, value, offset));
  const int warps = static_cast<int>(blockDim.x + 31) / 32;
  __syncthreads();  // the last call's values may still be read
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  value = static_cast<int>(threadIdx.x % 32) < warps ? shared[threadIdx.x % 32] : identity;
  for (int offset = 16; offset > 0; offset >>= 1)
    value = combine(value, __shfl_xor_sync(0xffffffffu, value, offset));
  return value;
}

}  // namespace fastdynat
