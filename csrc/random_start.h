// Shared by the CPU and the CUDA half of fastdynat::random_start: the arithmetic, the checks, the output.
#pragma once

#include "inline.h"
#include "philox.h"
#include "size.h"
#include "tensor.h"

#include <limits>

namespace fastdynat {

constexpr const char* kStartName = "random_start";

enum class Noise : int64_t {
  kUniform,
  kGaussian,
  kL2
};  // in the order of KINDS in fastdynat/ops/random_start.py

constexpr uint32_t kRadiusGroup =
    0xffffffff;  // holds the radius of an image's L2 start: no image has so many elements

// The number of row n in the generator's counter: the low word of the caller's, or n itself (null).
FASTDYNAT_INLINE uint32_t image_of(const int64_t* images, int64_t n) {
  return static_cast<uint32_t>(images == nullptr ? n : images[n]);
}

// Four numbers of an image: uniform in [-1, 1) or standard normal.
template <Noise kNoise>
FASTDYNAT_INLINE Floats4 noise(const Philox& random, uint32_t group, uint32_t image) {
  const Words4 words = random(group, image);
  if constexpr (kNoise == Noise::kUniform) {
    Floats4 out;
    for (int lane = 0; lane < 4; ++lane) out.v[lane] = 2.0f * unit_uniform(words.v[lane]) - 1.0f;
    return out;
  } else {
    return normals(words);
  }
}

template <typename T>
struct Start {
  T scale, lo, hi;

  // The scale that gives an image's direction its length, drawn uniformly from [0, scale).
  FASTDYNAT_INLINE Start to_radius(const Philox& random, uint32_t image, T squares) const {
    const T length = std::sqrt(squares);
    const T radius = scale * static_cast<T>(unit_uniform(random(kRadiusGroup, image).v[0]));
    const T tiny = static_cast<T>(1e-20);  // a direction of length 0 stays 0
    return {radius / (length > tiny ? length : tiny), lo, hi};
  }

  template <Noise kNoise>
  FASTDYNAT_INLINE T apply(T x, float z) const {
    T moved = x + scale * static_cast<T>(z);
    if constexpr (kNoise == Noise::kGaussian) return moved;
    moved = moved < lo ? lo : moved;  // NaN stays
    return moved > hi ? hi : moved;
  }
};

// The start with its scale still where the device keeps it.
template <typename T>
struct StartAt {
  Size scale;
  T lo, hi;

  FASTDYNAT_INLINE Start<T> read() const { return {static_cast<T>(scale()), lo, hi}; }
};

// Images in memory: element e of the C order is at (e % pixels) * channels + e / pixels.
struct StartTensors {
  Tensor x, out;
  const int64_t* images;  // the numbers of the images, or null: 0 to count - 1
  int64_t count, row, channels, pixels;  // channels is 1 and pixels is row unless x is channels-last
};

// Whether the channels of a (N, C, H, W) tensor without gaps lie innermost.
inline bool is_channels_last(const Tensor& t) {
  if (t.dim() != 4) return false;
  int64_t expected = 1;
  for (const int64_t d : {1, 3, 2, 0}) {
    if (t.size(d) != 1 && t.stride(d) != expected) return false;
    expected *= t.size(d);
  }
  return true;
}

// Calls launch(StartTensors&) and returns the output: in x's layout where that is contiguous or
// channels-last, else contiguous.
template <typename Launch>
Tensor run_start(
    const Tensor& x, const Tensor& state, int64_t kind, const std::optional<Tensor>& images,
    const Launch& launch) {
  STD_TORCH_CHECK(x.dim() >= 1, "random_start: x needs a first dimension of images, got a scalar");
  STD_TORCH_CHECK(
      state.dim() == 1 && state.size(0) == 2 && state.scalar_type() == ScalarType::Long &&
          state.is_contiguous(),
      "random_start: state must be a contiguous int64 tensor of shape (2), got shape ", shape_of(state));
  const Checker check{kStartName, "x", x};
  check.same_device("state", state);
  if (images) {
    check.one_per_row("images", *images, ScalarType::Long, "int64");
    STD_TORCH_CHECK(images->is_contiguous(), "random_start: images must be contiguous");
  }
  STD_TORCH_CHECK(kind >= 0 && kind <= 2, "random_start: kind must be 0, 1 or 2, got ", kind);
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();  // the generator counts in words of 32 bits
  STD_TORCH_CHECK(
      x.size(0) <= kMost && per_image(x) <= kMost, "random_start: x has shape ", shape_of(x),
      ", at most 2^31 - 1 images of as many elements are possible");
  const bool last = !x.is_contiguous() && is_channels_last(x);
  const Tensor source = last || x.is_contiguous() ? x : torch::stable::contiguous(x);
  const int64_t* numbers = images ? data<int64_t>(*images) : nullptr;
  const int64_t row = per_image(x);
  StartTensors s{source, torch::stable::empty_like(source), numbers, x.size(0), row, 1, row};
  if (last) {
    s.channels = x.size(1);
    s.pixels = x.size(2) * x.size(3);
  }
  if (x.numel() > 0) launch(s);
  return s.out;
}

// Calls f(T{}, std::integral_constant<Noise>{}) for the dtype of the images and the kind of noise.
template <typename F>
void with_start_types(const Tensor& x, int64_t kind, const F& f) {
  with_image_type(kStartName, "x", x.scalar_type(), [&](auto image) {
    switch (static_cast<Noise>(kind)) {
      case Noise::kUniform: return f(image, std::integral_constant<Noise, Noise::kUniform>{});
      case Noise::kGaussian: return f(image, std::integral_constant<Noise, Noise::kGaussian>{});
      case Noise::kL2: return f(image, std::integral_constant<Noise, Noise::kL2>{});
    }
  });
}

}  // namespace fastdynat
