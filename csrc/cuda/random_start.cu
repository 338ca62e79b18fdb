// fastdynat::random_start on CUDA devices.
#include "../random_start.h"

#include "launch.cuh"

namespace fastdynat {
namespace {

// The memory layout of an image, and the order in which its groups of four elements are processed.
struct Walk {
  uint32_t row, groups, channels, pixels;
  bool fours;  // channels-last, whole groups in each channel: four pixels through all channels, so that
               // neighbours stay near

  __device__ __forceinline__ uint32_t group(uint32_t item) const {
    return fours ? item % channels * (pixels / 4) + item / channels : item;
  }

  __device__ __forceinline__ uint32_t offset(uint32_t element) const {
    return element % pixels * channels + element / pixels;
  }
};

// A block works on one part of one image; under L2 on the whole image, whose numbers it draws twice instead
// of storing them.
template <typename T, Noise kNoise, bool kPacked>
__global__ void __launch_bounds__(kThreads) random_start_kernel(
    const T* __restrict__ x, const int64_t* __restrict__ state, const int64_t* __restrict__ images,
    T* __restrict__ out, Walk walk, uint32_t parts, uint32_t total_parts,
    StartAt<T> start_at) {
  using Four = Pack<T, 16 / sizeof(T)>;  // of a group's elements, or half of them
  constexpr int kPacks = sizeof(T) / 4;
  const Philox random(state);
  const Start<T> start = start_at.read();
  for (uint32_t part = blockIdx.x; part < total_parts; part += gridDim.x) {
    const uint32_t n = part / parts;
    const uint32_t image = image_of(images, n);
    const uint32_t first = part % parts * blockDim.x + threadIdx.x;
    const uint32_t stride = parts * blockDim.x;
    Start<T> mine = start;
    if constexpr (kNoise == Noise::kL2) {
      __shared__ T shared[32];
      T squares = 0;
      for (uint32_t group = first; group < walk.groups; group += stride) {
        const Floats4 z = noise<kNoise>(random, group, image);
#pragma unroll
        for (uint32_t lane = 0; lane < 4; ++lane) {
          if (4 * group + lane < walk.row) squares += static_cast<T>(z.v[lane]) * static_cast<T>(z.v[lane]);
        }
      }
      squares = block_reduce(squares, shared, T(0), [](T a, T b) { return a + b; });
      mine = start.to_radius(random, image, squares);
    }
    const T* from = x + int64_t{n} * walk.row;
    T* to = out + int64_t{n} * walk.row;
    for (uint32_t item = first; item < walk.groups; item += stride) {
      const uint32_t group = walk.group(item);
      const Floats4 z = noise<kNoise>(random, group, image);
      if constexpr (kPacked) {
#pragma unroll
        for (int k = 0; k < kPacks; ++k) {
          Four four = reinterpret_cast<const Four*>(from)[group * kPacks + k];
#pragma unroll
          for (int i = 0; i < 4 / kPacks; ++i)
            four.v[i] = mine.template apply<kNoise>(four.v[i], z.v[4 / kPacks * k + i]);
          reinterpret_cast<Four*>(to)[group * kPacks + k] = four;
        }
      } else {
#pragma unroll
        for (uint32_t lane = 0; lane < 4; ++lane) {
          const uint32_t element = 4 * group + lane;
          if (element < walk.row) {
            const uint32_t at = walk.offset(element);
            to[at] = mine.template apply<kNoise>(from[at], z.v[lane]);
          }
        }
      }
    }
  }
}

template <typename T, Noise kNoise>
void launch_start(StartTensors& s, const int64_t* state, StartAt<T> start, cudaStream_t stream) {
  const T* x = data<T>(s.x);
  T* out = mutable_data<T>(s.out);
  const auto u32 = [](int64_t value) { return static_cast<uint32_t>(value); };
  const int64_t groups = (s.row + 3) / 4;
  const Walk walk{
      u32(s.row), u32(groups), u32(s.channels), u32(s.pixels), s.channels > 1 && s.pixels % 4 == 0};
  const bool packed = s.channels == 1 && s.row % 4 == 0 && aligned(x, 16) && aligned(out, 16);
  const int64_t parts = kNoise == Noise::kL2 ? 1 : (groups + kThreads - 1) / kThreads;
  const int64_t total = parts * s.count;  // fits 32 bits: each is an image or hundreds of elements
  auto* kernel = packed ? random_start_kernel<T, kNoise, true> : random_start_kernel<T, kNoise, false>;
  launch(
      kernel, std::min<int64_t>(total, kMaxBlocks), kThreads, stream, x, state, s.images, out, walk,
      u32(parts), u32(total), start);
}

Tensor random_start_cuda(
    const Tensor& x, const Tensor& state, int64_t kind, double scale, double lo, double hi,
    const std::optional<Tensor>& images, const std::optional<Tensor>& device_scale) {
  const OnDevice device(x);
  const Size size = size_of({kStartName, "x", x}, "device_scale", scale, device_scale);
  return run_start(x, state, kind, images, [&](StartTensors& s) {
    with_start_types(x, kind, [&](auto image, auto noise_kind) {
      using T = decltype(image);
      const StartAt<T> start{size, static_cast<T>(lo), static_cast<T>(hi)};
      launch_start<T, decltype(noise_kind)::value>(s, data<int64_t>(state), start, device.stream);
    });
  });
}

}  // namespace
}  // namespace fastdynat

STABLE_TORCH_LIBRARY_IMPL(FASTDYNAT_LIBRARY, FASTDYNAT_KEY, m) {
  m.impl("random_start", TORCH_BOX(&fastdynat::random_start_cuda));
}
