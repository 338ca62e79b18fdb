// fastdynat::pgd_step_l2 on the CPU.
#include "pgd_step_l2.h"

#include "parallel.h"

namespace fastdynat {
namespace {

constexpr int64_t kTile = 1024;  // elements; small enough for the first-level cache
constexpr int kLanes = 16;       // independent sums: enough to hide an addition's latency

template <typename T, typename G>
FASTDYNAT_INLINE void add_lanes(
    const T* x_adv, const G* grad, const T* x0, int count, double* gg, double* dg, double* dd) {
  for (int lane = 0; lane < count; ++lane) {
    const double g = static_cast<double>(finite_gradient<T>(grad[lane]));
    const double d = static_cast<double>(x_adv[lane]) - static_cast<double>(x0[lane]);
    gg[lane] += g * g;
    dg[lane] += d * g;
    dd[lane] += d * d;
  }
}

template <typename T, typename G>
FASTDYNAT_INLINE L2Sums sum_image(const T* x_adv, const G* grad, const T* x0, int64_t row) {
  double gg[kLanes] = {}, dg[kLanes] = {}, dd[kLanes] = {};
  const int64_t whole = row / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) add_lanes(x_adv + i, grad + i, x0 + i, kLanes, gg, dg, dd);
  add_lanes(x_adv + whole, grad + whole, x0 + whole, static_cast<int>(row - whole), gg, dg, dd);
  L2Sums sums;
  for (int lane = 0; lane < kLanes; ++lane) {
    sums.gg += gg[lane];
    sums.dg += dg[lane];
    sums.dd += dd[lane];
  }
  return sums;
}

template <typename T, typename G>
FASTDYNAT_INLINE bool step_image(
    const T* x_adv, const G* grad, const T* x0, T* out, LowCopy low, int64_t at, int64_t row,
    L2Step<T> step) {
  const L2Sums sums = sum_image(x_adv, grad, x0, row);
  const L2Scales scales = step.scales(sums);
  for (int64_t begin = 0; begin < row; begin += kTile) {
    const int64_t n = row - begin < kTile ? row - begin : kTile;
    T* tile = out + begin;
    for (int64_t i = 0; i < n; ++i) {
      tile[i] = step(x_adv[begin + i], finite_gradient<T>(grad[begin + i]), x0[begin + i], scales);
    }
    low.write(tile, at + begin, n);
  }
  return sums.gg > 0;
}

template <typename T, typename G>
void step_images(StepTensors& s, L2Step<T> step) {
  const T* x_adv = data<T>(s.x_adv);
  const G* grad = data<G>(s.grad);
  const T* x0 = data<T>(s.x0);
  T* out = mutable_data<T>(s.out);
  const LowCopy low(s);
  bool* moved = mutable_data<bool>(s.moved);
  const int64_t row = s.row;
  parallel<T>(s.rows, row, [=](int64_t begin, int64_t end) FASTDYNAT_INLINE_BODY {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t at = n * row;
      moved[n] = step_image(x_adv + at, grad + at, x0 + at, out + at, low, at, row, step);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> pgd_step_l2_cpu(
    const Tensor& x_adv, const Tensor& grad, const Tensor& x0, double step_size, double eps, double lo,
    double hi, std::optional<ScalarType> low_dtype, const std::optional<Tensor>& device_step_size,
    const std::optional<Tensor>& device_eps) {
  const StepSizes sizes("pgd_step_l2", x_adv, step_size, eps, device_step_size, device_eps);
  return run_step(
      "pgd_step_l2", x_adv, beside("pgd_step_l2", "grad", x_adv, grad), x0, low_dtype, true,
      [&](StepTensors& s) {
        with_step_types("pgd_step_l2", s.x_adv, s.grad, [&](auto image, auto gradient) {
          using T = decltype(image);
          const L2Step<T> step{sizes, static_cast<T>(lo), static_cast<T>(hi)};
          step_images<T, decltype(gradient)>(s, step);
        });
      });
}

}  // namespace
}  // namespace fastdynat

STABLE_TORCH_LIBRARY_IMPL(fastdynat, CPU, m) {
  m.impl("pgd_step_l2", TORCH_BOX(&fastdynat::pgd_step_l2_cpu));
}
