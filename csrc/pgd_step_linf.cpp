// fastdynat::pgd_step_linf on the CPU.
#include "pgd_step_linf.h"

#include "parallel.h"

namespace fastdynat {
namespace {

constexpr int64_t kTile = 1024;  // elements; small enough for the first-level cache

// One image, or a part of everything where images are not counted. Returns whether any gradient moves a pixel.
template <typename T, typename G, typename L>
FASTDYNAT_INLINE bool step_range(const T* x_adv, const G* grad, const T* x0, T* out, L* low, int64_t count, PgdStep<T> step) {
  int moved = 0;
  for (int64_t begin = 0; begin < count; begin += kTile) {
    const int64_t n = count - begin < kTile ? count - begin : kTile;
    T* tile = out + begin;
    for (int64_t i = 0; i < n; ++i) {
      const int s = sign(grad[begin + i]);
      moved |= s;
      tile[i] = step(x_adv[begin + i], s, x0[begin + i]);
    }
    if (low != nullptr) {
      for (int64_t i = 0; i < n; ++i) low[begin + i] = static_cast<L>(static_cast<float>(tile[i]));
    }
  }
  return moved != 0;
}

template <typename T, typename G, typename L>
void step_images(StepTensors& s, PgdStep<T> step) {
  const T* x_adv = data<T>(s.x_adv);
  const G* grad = data<G>(s.grad);
  const T* x0 = data<T>(s.x0);
  T* out = mutable_data<T>(s.out);
  L* low = s.low.numel() > 0 ? mutable_data<L>(s.low) : nullptr;
  bool* moved = s.moved.numel() > 0 ? mutable_data<bool>(s.moved) : nullptr;
  const int64_t row = s.row;
  if (moved == nullptr) {
    parallel(row, 1, [=](int64_t begin, int64_t end) FASTDYNAT_INLINE_BODY {
      step_range(x_adv + begin, grad + begin, x0 + begin, out + begin, low ? low + begin : nullptr, end - begin, step);
    });
    return;
  }
  parallel(s.rows, row, [=](int64_t begin, int64_t end) FASTDYNAT_INLINE_BODY {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t at = n * row;
      moved[n] = step_range(x_adv + at, grad + at, x0 + at, out + at, low ? low + at : nullptr, row, step);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> pgd_step_linf_cpu(
    const Tensor& x_adv, const Tensor& grad, const Tensor& x0, double step_size, double eps, double lo, double hi,
    std::optional<ScalarType> low_dtype, bool count) {
  return run_step(kStepName, x_adv, grad, x0, low_dtype, count, [&](StepTensors& s) {
    with_types(s.x_adv, s.grad, [&](auto image, auto gradient) {
      using T = decltype(image);
      using G = decltype(gradient);
      const PgdStep<T> step{static_cast<T>(step_size), static_cast<T>(eps), static_cast<T>(lo), static_cast<T>(hi)};
      if (low_dtype == ScalarType::Half) {
        step_images<T, G, Half>(s, step);
      } else {
        step_images<T, G, BFloat16>(s, step);
      }
    });
  });
}

}  // namespace
}  // namespace fastdynat

// The schema is defined in fastdynat/ops, which also works where this library is not built.
STABLE_TORCH_LIBRARY_IMPL(fastdynat, CPU, m) {
  m.impl("pgd_step_linf", TORCH_BOX(&fastdynat::pgd_step_linf_cpu));
}
