// fastdynat::pgd_step_l0 on the CPU.
#include "pgd_step_l0.h"

#include "parallel.h"

namespace fastdynat {
namespace {

constexpr int kLanes = 16;  // independent sums: enough to hide an addition's latency

template <typename T, typename G>
FASTDYNAT_INLINE double gradient_length(const G* grad, int64_t row) {
  double lanes[kLanes] = {};
  const int64_t whole = row / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane)
      lanes[lane] += static_cast<double>(absolute(finite_gradient<T>(grad[i + lane])));
  }
  double length = 0;
  for (int lane = 0; lane < kLanes; ++lane) length += lanes[lane];
  for (int64_t i = whole; i < row; ++i) length += static_cast<double>(absolute(finite_gradient<T>(grad[i])));
  return length;
}

// `score` is scratch for one image.
template <typename T, typename G>
FASTDYNAT_INLINE void step_image(
    const T* x_adv, const G* grad, const T* x0, T* out, T* score, const PixelGrid& grid, double step_size,
    int64_t pixels, T lo, T hi) {
  const double length = gradient_length<T>(grad, grid.channels * grid.pixels);
  const L0Step<T> step{length > 0 ? step_size / length : 0.0, lo, hi};
  for (int64_t p = 0; p < grid.pixels; ++p)
    score[p] = pixel_score(x_adv, grad, x0, p * grid.pixel_stride, grid, step);
  const T threshold = from_bits<T>(largest_that<T>([&](T v) FASTDYNAT_INLINE_BODY {
    int32_t found = 0;
    for (int64_t p = 0; p < grid.pixels; ++p) found += score[p] >= v ? 1 : 0;
    return found >= pixels;
  }));
  int64_t equal_left =
      pixels;  // what the pixels above the threshold leave to those on it, the first of which are kept
  for (int64_t p = 0; p < grid.pixels; ++p) equal_left -= score[p] > threshold ? 1 : 0;
  for (int64_t p = 0; p < grid.pixels; ++p) {
    const bool kept = score[p] > threshold || (score[p] == threshold && equal_left-- > 0);
    write_pixel(x_adv, grad, x0, out, p * grid.pixel_stride, grid, step, kept);
  }
}

template <typename T, typename G>
void step_images(StepTensors& s, PixelGrid grid, double step_size, int64_t pixels, T lo, T hi) {
  const T* x_adv = data<T>(s.x_adv);
  const G* grad = data<G>(s.grad);
  const T* x0 = data<T>(s.x0);
  T* out = mutable_data<T>(s.out);
  const int64_t row = s.row;
  parallel<T>(s.rows, 4 * row, [=](int64_t begin, int64_t end) FASTDYNAT_INLINE_BODY {
    std::vector<T> score(grid.pixels);
    for (int64_t n = begin; n < end; ++n) {
      const int64_t at = n * row;
      step_image(x_adv + at, grad + at, x0 + at, out + at, score.data(), grid, step_size, pixels, lo, hi);
    }
  });
}

Tensor pgd_step_l0_cpu(
    const Tensor& x_adv, const Tensor& grad, const Tensor& x0, double step_size, int64_t pixels, double lo,
    double hi) {
  return run_l0_step(x_adv, grad, x0, pixels, [&](StepTensors& s, PixelGrid grid) {
    with_step_types("pgd_step_l0", s.x_adv, s.grad, [&](auto image, auto gradient) {
      using T = decltype(image);
      step_images<T, decltype(gradient)>(s, grid, step_size, pixels, static_cast<T>(lo), static_cast<T>(hi));
    });
  });
}

}  // namespace
}  // namespace fastdynat

STABLE_TORCH_LIBRARY_IMPL(fastdynat, CPU, m) {
  m.impl("pgd_step_l0", TORCH_BOX(&fastdynat::pgd_step_l0_cpu));
}
