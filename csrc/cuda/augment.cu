// fastdynat::augment on CUDA devices.
#include "../augment.h"

#include "launch.cuh"

#include <cmath>

namespace fastdynat {
namespace {

struct Shape {
  uint32_t channels, height, width;
};

// A block writes one part of one image, kPack neighbours in memory per thread.
template <typename T, bool kChannelsLast, int kPack>
__global__ void __launch_bounds__(kThreads) augment_kernel(
    const uint8_t* __restrict__ store, T* __restrict__ out, Draws draws, Shape shape, uint32_t packs,
    uint32_t parts, uint32_t total_parts) {
  const int64_t row = int64_t{shape.channels} * shape.height * shape.width;
  for (uint32_t part = blockIdx.x; part < total_parts; part += gridDim.x) {
    const int64_t n = part / parts;
    const bool fits = draws.is_stored(n) && draws.is_padded(n);
    const Cut cut = fits ? draws.cut(n) : Cut{};
    const uint8_t* image = store + cut.index * row;
    const uint32_t pack = part % parts * blockDim.x + threadIdx.x;
    if (pack >= packs) continue;
    // The position of the pack's first element in the image; the others follow in memory order, innermost
    // first.
    uint32_t rest = pack * kPack, c = 0;
    if constexpr (kChannelsLast) {
      c = rest % shape.channels;
      rest /= shape.channels;
    }
    uint32_t x = rest % shape.width;
    rest /= shape.width;
    uint32_t y = rest;
    if constexpr (!kChannelsLast) {
      y = rest % shape.height;
      c = rest / shape.height;
    }
    Pack<T, kPack> result;
#pragma unroll
    for (int k = 0; k < kPack; ++k) {
      const int64_t from_y = y + cut.down;
      const int64_t from_x = (cut.flip ? shape.width - 1 - x : x) + cut.right;
      const bool inside = from_y >= 0 && from_y < shape.height && from_x >= 0 && from_x < shape.width;
      const uint8_t pixel =
          fits && inside ? image[(c * int64_t{shape.height} + from_y) * shape.width + from_x] : 0;
      result.v[k] = fits ? unit<T>(pixel) : static_cast<T>(NAN);
      if constexpr (kChannelsLast) {
        if (++c < shape.channels) continue;
        c = 0;
      }
      if (++x < shape.width) continue;
      x = 0;
      if (++y < shape.height) continue;
      y = 0;
      ++c;
    }
    reinterpret_cast<Pack<T, kPack>*>(out)[n * packs + pack] = result;
  }
}

template <typename T, bool kChannelsLast>
void launch_augment(const uint8_t* store, AugmentTensors& s, cudaStream_t stream) {
  const auto u32 = [](int64_t value) { return static_cast<uint32_t>(value); };
  T* out = mutable_data<T>(s.out);
  const int64_t row = s.channels * s.height * s.width;
  const bool packed = row % 4 == 0 && aligned(out, sizeof(Pack<T, 4>));
  const int64_t packs = packed ? row / 4 : row;
  const int64_t parts = (packs + kThreads - 1) / kThreads;
  const int64_t total = parts * s.images;  // fits 32 bits: each is an image or hundreds of elements
  auto* kernel = packed ? augment_kernel<T, kChannelsLast, 4> : augment_kernel<T, kChannelsLast, 1>;
  const Shape shape{u32(s.channels), u32(s.height), u32(s.width)};
  launch(
      kernel, std::min(total, kMaxBlocks), kThreads, stream, store, out, s.draws, shape, u32(packs),
      u32(parts), u32(total));
}

Tensor augment_cuda(
    const Tensor& images, const Tensor& indices, const std::optional<Tensor>& shifts,
    const std::optional<Tensor>& flips, int64_t pad, ScalarType dtype, bool channels_last) {
  const OnDevice device(images);
  return run_augment(images, indices, shifts, flips, pad, dtype, channels_last, [&](AugmentTensors& s) {
    with_float_type("augment", "dtype", dtype, [&](auto type) {
      using T = decltype(type);
      const uint8_t* store = data<uint8_t>(images);
      channels_last ? launch_augment<T, true>(store, s, device.stream)
                    : launch_augment<T, false>(store, s, device.stream);
    });
  });
}

}  // namespace
}  // namespace fastdynat

STABLE_TORCH_LIBRARY_IMPL(FASTDYNAT_LIBRARY, FASTDYNAT_KEY, m) {
  m.impl("augment", TORCH_BOX(&fastdynat::augment_cuda));
}
