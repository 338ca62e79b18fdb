// fastdynat::pgd_step_linf on the CPU.
#include "pgd_step.h"

namespace fastdynat {
namespace {

constexpr int64_t kGrainSize = 32768;  // elements per task: small enough to share a batch, large enough to pay for it

template <typename T, typename G>
void step_range(const T* x_adv, const G* grad, const T* x0, T* out, int64_t begin, int64_t end, PgdStep<T> step) {
  for (int64_t i = begin; i < end; ++i) out[i] = step(x_adv[i], sign(grad[i]), x0[i]);
}

Tensor pgd_step_linf_cpu(
    const Tensor& x_adv, const Tensor& grad, const Tensor& x0, double step_size, double eps, double lo, double hi) {
  return run(x_adv, grad, x0, [&](const Tensor& a, const Tensor& g, const Tensor& b, Tensor& out) {
    with_types(a, g, [&](auto image, auto gradient) {
      using T = decltype(image);
      using G = decltype(gradient);
      const PgdStep<T> step{static_cast<T>(step_size), static_cast<T>(eps), static_cast<T>(lo), static_cast<T>(hi)};
      const T* a_data = static_cast<const T*>(a.const_data_ptr());
      const G* g_data = static_cast<const G*>(g.const_data_ptr());
      const T* b_data = static_cast<const T*>(b.const_data_ptr());
      T* out_data = static_cast<T*>(out.mutable_data_ptr());
      torch::stable::parallel_for(0, a.numel(), kGrainSize, [=](int64_t begin, int64_t end) {
        step_range(a_data, g_data, b_data, out_data, begin, end, step);
      });
    });
  });
}

}  // namespace
}  // namespace fastdynat

// The schema is defined in fastdynat/ops, which also works where this library is not built.
STABLE_TORCH_LIBRARY_IMPL(fastdynat, CPU, m) {
  m.impl("pgd_step_linf", TORCH_BOX(&fastdynat::pgd_step_linf_cpu));
}
