// fastdynat::pgd_step_l1 on the CPU.
#include "pgd_step_l1.h"

#include "parallel.h"

namespace fastdynat {
namespace {

constexpr int kLanes = 16;  // independent sums: enough to hide an addition's latency

// `gradient` and `delta` are scratch for one image.
template <typename T, typename G>
FASTDYNAT_INLINE void step_image(
    const T* x_adv, const G* grad, const T* x0, T* out, T* gradient, T* delta, int64_t row,
    const StepSizes& sizes, int64_t count, L1Ball<T> ball) {
  const double eps = sizes.eps();
  for (int64_t i = 0; i < row; ++i) gradient[i] = finite_gradient<T>(grad[i]);
  const auto at_least = [&](T v) FASTDYNAT_INLINE_BODY {
    int32_t found = 0;
    for (int64_t i = 0; i < row; ++i) found += absolute(gradient[i]) >= v ? 1 : 0;
    return found;
  };
  const T threshold =
      from_bits<T>(largest_that<T>([&](T v) FASTDYNAT_INLINE_BODY { return at_least(v) >= count; }));
  int32_t chosen = 0;
  for (int64_t i = 0; i < row; ++i)
    chosen += absolute(gradient[i]) >= threshold && gradient[i] != T(0) ? 1 : 0;
  const double move = sizes.step_size() / static_cast<double>(chosen > 0 ? chosen : 1);
  for (int64_t i = 0; i < row; ++i) delta[i] = moved_delta(x_adv[i], gradient[i], x0[i], threshold, move);

  const auto beyond = [&](T tau) FASTDYNAT_INLINE_BODY {
    double lanes[kLanes] = {};
    const int64_t whole = row / kLanes * kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane)
        lanes[lane] += static_cast<double>(ball.kept(delta[i + lane], x0[i + lane], tau));
    }
    double length = 0;
    for (int lane = 0; lane < kLanes; ++lane) length += lanes[lane];
    for (int64_t i = whole; i < row; ++i) length += static_cast<double>(ball.kept(delta[i], x0[i], tau));
    return length > eps;
  };
  const T tau = beyond(T(0)) ? from_bits<T>(largest_that<T>(beyond) + 1) : T(0);
  for (int64_t i = 0; i < row; ++i) out[i] = ball.point(delta[i], x0[i], tau);
}

template <typename T, typename G>
void step_images(StepTensors& s, StepSizes sizes, int64_t count, L1Ball<T> ball) {
  const T* x_adv = data<T>(s.x_adv);
  const G* grad = data<G>(s.grad);
  const T* x0 = data<T>(s.x0);
  T* out = mutable_data<T>(s.out);
  const int64_t row = s.row;
  parallel<T>(s.rows, 16 * row, [=](int64_t begin, int64_t end) FASTDYNAT_INLINE_BODY {
    std::vector<T> scratch(2 * row);
    for (int64_t n = begin; n < end; ++n) {
      const int64_t at = n * row;
      step_image(
          x_adv + at, grad + at, x0 + at, out + at, scratch.data(), scratch.data() + row, row, sizes, count,
          ball);
    }
  });
}

Tensor pgd_step_l1_cpu(
    const Tensor& x_adv, const Tensor& grad, const Tensor& x0, double step_size, double eps, int64_t count,
    double lo, double hi, const std::optional<Tensor>& device_step_size,
    const std::optional<Tensor>& device_eps) {
  const StepSizes sizes("pgd_step_l1", x_adv, step_size, eps, device_step_size, device_eps);
  return run_l1_step(x_adv, grad, x0, count, [&](StepTensors& s) {
    with_step_types("pgd_step_l1", s.x_adv, s.grad, [&](auto image, auto gradient) {
      using T = decltype(image);
      step_images<T, decltype(gradient)>(
          s, sizes, count, L1Ball<T>{static_cast<T>(lo), static_cast<T>(hi)});
    });
  });
}

}  // namespace
}  // namespace fastdynat

STABLE_TORCH_LIBRARY_IMPL(fastdynat, CPU, m) {
  m.impl("pgd_step_l1", TORCH_BOX(&fastdynat::pgd_step_l1_cpu));
}
