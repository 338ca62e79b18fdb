// fastdynat::pgd_step_linf on the CPU.
#include "pgd_step_linf.h"

#include "parallel.h"

namespace fastdynat {
namespace {

constexpr int64_t kTile = 1024;  // elements; small enough for the first-level cache

// Steps one image, or any range where `moved` is not asked for. Returns whether any gradient moves a pixel.
template <typename T, typename G>
FASTDYNAT_INLINE bool step_range(
    const T* x_adv, const G* grad, const T* x0, T* out, LowCopy low, int64_t from, int64_t to,
    PgdStep<T> step) {
  int moved = 0;
  for (int64_t begin = from; begin < to; begin += kTile) {
    const int64_t n = to - begin < kTile ? to - begin : kTile;
    T* tile = out + begin;
    for (int64_t i = 0; i < n; ++i) {
      const int s = sign(grad[begin + i]);
      moved |= s;
      tile[i] = step(x_adv[begin + i], s, x0[begin + i]);
    }
    low.write(tile, begin, n);
  }
  return moved != 0;
}

template <typename T, typename G>
void step_images(StepTensors& s, PgdStep<T> step) {
  const T* x_adv = data<T>(s.x_adv);
  const G* grad = data<G>(s.grad);
  const T* x0 = data<T>(s.x0);
  T* out = mutable_data<T>(s.out);
  const LowCopy low(s);
  bool* moved = s.moved.numel() > 0 ? mutable_data<bool>(s.moved) : nullptr;
  const int64_t row = s.row;
  if (moved == nullptr) {
    parallel<T>(row, 1, [=](int64_t begin, int64_t end) FASTDYNAT_INLINE_BODY {
      step_range(x_adv, grad, x0, out, low, begin, end, step);
    });
    return;
  }
  parallel<T>(s.rows, row, [=](int64_t begin, int64_t end) FASTDYNAT_INLINE_BODY {
    for (int64_t n = begin; n < end; ++n)
      moved[n] = step_range(x_adv, grad, x0, out, low, n * row, (n + 1) * row, step);
  });
}

std::tuple<Tensor, Tensor, Tensor> pgd_step_linf_cpu(
    const Tensor& x_adv, const Tensor& grad, const Tensor& x0, double step_size, double eps, double lo,
    double hi, std::optional<ScalarType> low_dtype, bool count,
    const std::optional<Tensor>& device_step_size, const std::optional<Tensor>& device_eps) {
  const StepSizes sizes(kStepName, x_adv, step_size, eps, device_step_size, device_eps);
  return run_step(kStepName, x_adv, signs_of(x_adv, grad), x0, low_dtype, count, [&](StepTensors& s) {
    with_types(s.x_adv, s.grad, [&](auto image, auto gradient) {
      using T = decltype(image);
      const PgdStepAt<T> step{sizes, static_cast<T>(lo), static_cast<T>(hi)};
      step_images<T, decltype(gradient)>(s, step.read());
    });
  });
}

}  // namespace
}  // namespace fastdynat

// The schema is defined in fastdynat/ops, which also works where this library is not built.
STABLE_TORCH_LIBRARY_IMPL(fastdynat, CPU, m) {
  m.impl("pgd_step_linf", TORCH_BOX(&fastdynat::pgd_step_linf_cpu));
}
