// fastdynat::random_start on the CPU.
#include "random_start.h"

#include "parallel.h"

namespace fastdynat {
namespace {

constexpr int kLanes = 16;
constexpr int64_t kGroupCost = 16;  // elements of plain copying that a group of four numbers takes as long as

// The noise of one image, `groups` times four numbers.
template <Noise kNoise>
FASTDYNAT_INLINE void draw(float* out, int64_t groups, const Philox& random, uint32_t image) {
  for (int64_t group = 0; group < groups; ++group) {
    const Floats4 z = noise<kNoise>(random, static_cast<uint32_t>(group), image);
    for (int lane = 0; lane < 4; ++lane) out[4 * group + lane] = z.v[lane];
  }
}

// In several partial sums, which vectorise and round less.
template <typename T>
FASTDYNAT_INLINE T sum_of_squares(const float* z, int64_t count) {
  T partial[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane)
      partial[lane] += static_cast<T>(z[i + lane]) * static_cast<T>(z[i + lane]);
  }
  for (; i < count; ++i) partial[0] += static_cast<T>(z[i]) * static_cast<T>(z[i]);
  T sum = 0;
  for (const T part : partial) sum += part;
  return sum;
}

template <typename T, Noise kNoise>
void start_images(StartTensors& s, const int64_t* state, Start<T> start) {
  const T* x = data<T>(s.x);
  T* out = mutable_data<T>(s.out);
  const int64_t row = s.row, channels = s.channels, pixels = s.pixels, groups = (row + 3) / 4;
  const int64_t* images = s.images;
  const Philox random(state);
  parallel<T>(s.count, groups * kGroupCost, [=](int64_t begin, int64_t end) FASTDYNAT_INLINE_BODY {
    std::vector<float> buffer(4 * groups);
    float* z = buffer.data();
    for (int64_t n = begin; n < end; ++n) {
      const auto image = image_of(images, n);
      draw<kNoise>(z, groups, random, image);
      const Start<T> mine =
          kNoise == Noise::kL2 ? start.to_radius(random, image, sum_of_squares<T>(z, row)) : start;
      const T* from = x + n * row;
      T* to = out + n * row;
      if (channels == 1) {
        for (int64_t e = 0; e < row; ++e) to[e] = mine.template apply<kNoise>(from[e], z[e]);
        continue;
      }
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t p = 0; p < pixels; ++p) {
          to[p * channels + c] = mine.template apply<kNoise>(from[p * channels + c], z[c * pixels + p]);
        }
      }
    }
  });
}

Tensor random_start_cpu(
    const Tensor& x, const Tensor& state, int64_t kind, double scale, double lo, double hi,
    const std::optional<Tensor>& images, const std::optional<Tensor>& device_scale) {
  const Size size = size_of({kStartName, "x", x}, "device_scale", scale, device_scale);
  return run_start(x, state, kind, images, [&](StartTensors& s) {
    with_start_types(x, kind, [&](auto image, auto noise_kind) {
      using T = decltype(image);
      const StartAt<T> start{size, static_cast<T>(lo), static_cast<T>(hi)};
      start_images<T, decltype(noise_kind)::value>(s, data<int64_t>(state), start.read());
    });
  });
}

}  // namespace
}  // namespace fastdynat

STABLE_TORCH_LIBRARY_IMPL(fastdynat, CPU, m) {
  m.impl("random_start", TORCH_BOX(&fastdynat::random_start_cpu));
}
