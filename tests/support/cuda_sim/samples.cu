// Kernels that break one rule each, which the simulator has to find, and one that uses what the others are built from.
#include <cuda_runtime.h>

#include <cstdio>
#include <exception>

namespace {

__global__ void correct(const float* x, float* out) {
  __shared__ float shared[64];
  __shared__ int total;
  const unsigned t = threadIdx.x;
  if (t == 0) total = 0;
  shared[t] = x[t];
  __syncthreads();
  atomicAdd(&total, static_cast<int>(t));
  const float other = shared[63 - t];
  __syncthreads();
  const int i = static_cast<int>(t);
  out[t] = other;
  out[64 + t] = static_cast<float>(__shfl_xor_sync(0xffffffffu, i, 5));
  out[128 + t] = static_cast<float>(__shfl_up_sync(0xffffffffu, i, 3));
  out[192 + t] = static_cast<float>(__shfl_down_sync(0xffffffffu, i, 3, 8));
  out[256 + t] = static_cast<float>(__shfl_sync(0xffffffffu, i, 9));
  out[320 + t] = static_cast<float>(__popc(__ballot_sync(0xffffffffu, i % 3 == 0)));
  out[384 + t] = static_cast<float>(__syncthreads_count(i % 3 == 0));
  out[448 + t] = static_cast<float>(2 * __syncthreads_or(i == 7) + __syncthreads_and(i < 64));
  out[512 + t] = static_cast<float>(total);
  if (t < 8) __syncwarp(0xffu);
  out[576 + t] = t < 8 ? static_cast<float>(__reduce_add_sync(0xffu, i)) : static_cast<float>(__all_sync(~0u << (t < 32 ? 8 : 0), i < 40));
}

__global__ void part_of_the_block_at_a_barrier(const float*, float*) {
  if (threadIdx.x < 32) __syncthreads();
}

__global__ void return_before_a_barrier(const float* x, float*) {
  if (x[threadIdx.x] < 0.0f) return;
  __syncthreads();
}

__global__ void two_barriers(const float*, float*) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void missing_lane(const float* x, float* out) {
  if (threadIdx.x != 5) out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, x[threadIdx.x], 1);
}

__global__ void lane_outside_the_mask(const float* x, float* out) {
  if (threadIdx.x % 32 < 8) out[threadIdx.x] = __shfl_sync(0xffu, x[threadIdx.x], 9);
}

__global__ void missing_barrier(const float* x, float* out) {
  __shared__ float shared[64];
  shared[threadIdx.x] = x[threadIdx.x];
  out[threadIdx.x] = shared[threadIdx.x ^ 32];
}

__global__ void missing_second_barrier(const float* x, float* out) {
  __shared__ float shared[64];
  for (int i = 0; i < 2; ++i) {
    shared[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = shared[threadIdx.x ^ 32];
  }
}

__global__ void write_after_read(const float* x, float* out) {
  __shared__ float shared[64];
  shared[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = shared[0];
  if (threadIdx.x == 0) shared[0] = 2.0f;
}

// The last block's values are still there, but no block may count on that.
__global__ void unwritten_shared_memory(const float* x, float* out) {
  __shared__ float shared[64];
  if (blockIdx.x == 0) shared[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  out[blockIdx.x * 64 + threadIdx.x] = shared[threadIdx.x];
}

__global__ void misaligned(const float* x, float* out) { out[threadIdx.x] = reinterpret_cast<const float4*>(x + 1)[threadIdx.x % 8].x; }

__global__ void out_of_bounds(const float* x, float* out) {
  __shared__ float shared[63];
  shared[threadIdx.x] = x[threadIdx.x];
  out[threadIdx.x] = shared[threadIdx.x];
}

__global__ void blocks_overlap(const float* x, float* out) { out[blockIdx.x * 63 + threadIdx.x] = x[threadIdx.x]; }

__global__ void blocks_write_one_value(const float*, float* out) { out[threadIdx.x] = 1.0f; }

__global__ void not_atomic(const float*, float* out) { out[0] += 1.0f; }

__global__ void atomic(const float*, float* out) { atomicAdd(out, 1.0f); }

struct Sample {
  const char* name;
  void (*kernel)(const float*, float*);
  int64_t blocks, threads;
};
#define SAMPLE(name, blocks, threads) {#name, &name, blocks, threads}
const Sample kSamples[] = {
    SAMPLE(correct, 1, 64), SAMPLE(part_of_the_block_at_a_barrier, 2, 64), SAMPLE(return_before_a_barrier, 1, 64),
    SAMPLE(two_barriers, 1, 64), SAMPLE(missing_lane, 1, 64), SAMPLE(lane_outside_the_mask, 1, 64),
    SAMPLE(missing_barrier, 1, 64), SAMPLE(missing_second_barrier, 1, 64),
    SAMPLE(write_after_read, 1, 64), SAMPLE(unwritten_shared_memory, 2, 64),
    SAMPLE(misaligned, 1, 64), SAMPLE(out_of_bounds, 1, 64), SAMPLE(blocks_overlap, 2, 64),
    SAMPLE(blocks_write_one_value, 3, 64), SAMPLE(not_atomic, 1, 64), SAMPLE(atomic, 3, 64),
    {"no_blocks", &atomic, 0, 64}, {"too_many_threads", &atomic, 1, 1025}};

}  // namespace

// Runs the sample of this name; 0, or 1 with the error in `message`, or 2 where there is none of this name.
extern "C" __attribute__((visibility("default"))) int run_sample(
    const char* name, const float* x, float* out, char* message, size_t size) {
  for (const Sample& sample : kSamples) {
    if (std::strcmp(sample.name, name) != 0) continue;
    try {
      simulate_launch(sample.blocks, sample.threads, [&] { sample.kernel(x, out); });
    } catch (const std::exception& error) {
      std::snprintf(message, size, "%s", error.what());
      return 1;
    }
    return 0;
  }
  return 2;
}
