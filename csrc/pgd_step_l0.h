// Shared by the CPU and the CUDA half of fastdynat::pgd_step_l0: the arithmetic, where the pixels lie, the
// checks.
#pragma once

#include "pgd_step_l1.h"

namespace fastdynat {

// Channel c of pixel p of an image is at c * channel_stride + p * pixel_stride.
struct PixelGrid {
  int64_t channels, pixels, channel_stride, pixel_stride;
};

// The grid of a tensor (N, C, H, W), if its pixels are evenly spaced: contiguous and channels-last ones are.
inline std::optional<PixelGrid> pixel_grid(const Tensor& t) {
  const int64_t height = t.size(2), width = t.size(3);
  const int64_t step = width > 1 ? t.stride(3) : height > 1 ? t.stride(2) : 1;
  if (height > 1 && t.stride(2) != width * step) return std::nullopt;
  return PixelGrid{t.size(1), height * width, t.size(1) > 1 ? t.stride(1) : 1, step};
}

template <typename T>
struct L0Step {
  double scale;  // step size over the gradient's norm
  T lo, hi;

  FASTDYNAT_INLINE T operator()(T x_adv, T gradient) const {
    T x = static_cast<T>(static_cast<double>(x_adv) + scale * static_cast<double>(gradient));
    x = x < lo ? lo : x;
    return x > hi ? hi : x;
  }
};

// The squared displacement of a pixel from x0; 0 for a NaN.
template <typename T, typename G>
FASTDYNAT_INLINE T pixel_score(
    const T* x_adv, const G* grad, const T* x0, int64_t at, const PixelGrid& grid, const L0Step<T>& step) {
  T score = 0;
  for (int64_t c = 0; c < grid.channels; ++c) {
    const int64_t i = at + c * grid.channel_stride;
    const T d = step(x_adv[i], finite_gradient<T>(grad[i])) - x0[i];
    score += d * d;
  }
  return score == score ? score : T(0);
}

template <typename T, typename G>
FASTDYNAT_INLINE void write_pixel(
    const T* x_adv, const G* grad, const T* x0, T* out, int64_t at, const PixelGrid& grid,
    const L0Step<T>& step, bool kept) {
  for (int64_t c = 0; c < grid.channels; ++c) {
    const int64_t i = at + c * grid.channel_stride;
    const T x = step(x_adv[i], finite_gradient<T>(grad[i]));
    out[i] = kept || x != x ? x : x0[i];
  }
}

// Calls launch(StepTensors&, PixelGrid) as run_step does; returns the new point.
template <typename Launch>
Tensor run_l0_step(
    const Tensor& x_adv, const Tensor& grad, const Tensor& x0, int64_t pixels, const Launch& launch) {
  STD_TORCH_CHECK(x_adv.dim() == 4, "pgd_step_l0: x_adv must be (N, C, H, W), has shape ", shape_of(x_adv));
  STD_TORCH_CHECK(pixels >= 0, "pgd_step_l0: pixels must not be negative, got ", pixels);
  STD_TORCH_CHECK(
      x_adv.numel() == 0 || per_image(x_adv) <= INT32_MAX, "pgd_step_l0: images of 2**31 entries or more");
  const Tensor read = beside("pgd_step_l0", "grad", x_adv, grad);
  const auto on_grid = [&](StepTensors& s) { launch(s, *pixel_grid(s.x_adv)); };
  if (pixel_grid(x_adv))
    return std::get<0>(run_step("pgd_step_l0", x_adv, read, x0, std::nullopt, true, on_grid));
  Tensor out = torch::stable::empty_like(x_adv);
  const Tensor plain = torch::stable::contiguous(x_adv);
  torch::stable::copy_(
      out, std::get<0>(run_step("pgd_step_l0", plain, read, x0, std::nullopt, true, on_grid)));
  return out;
}

}  // namespace fastdynat
