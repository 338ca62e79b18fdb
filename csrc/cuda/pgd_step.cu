// fastdynat::pgd_step_linf on CUDA devices.
#include "../pgd_step.h"

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

namespace fastdynat {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 16;  // the loop in the kernel covers the rest

template <typename T, typename G>
__global__ void pgd_step_linf_kernel(
    const T* __restrict__ x_adv, const G* __restrict__ grad, const T* __restrict__ x0, T* __restrict__ out,
    int64_t numel, PgdStep<T> step) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < numel; i += stride) {
    out[i] = step(x_adv[i], sign(grad[i]), x0[i]);
  }
}

template <typename T, typename G>
void launch(const Tensor& a, const Tensor& g, const Tensor& b, Tensor& out, PgdStep<T> step, cudaStream_t stream) {
  const int64_t numel = a.numel();
  const auto blocks = static_cast<unsigned>(std::min((numel + kThreads - 1) / kThreads, kMaxBlocks));
  pgd_step_linf_kernel<T, G><<<blocks, kThreads, 0, stream>>>(
      static_cast<const T*>(a.const_data_ptr()), static_cast<const G*>(g.const_data_ptr()),
      static_cast<const T*>(b.const_data_ptr()), static_cast<T*>(out.mutable_data_ptr()), numel, step);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor pgd_step_linf_cuda(
    const Tensor& x_adv, const Tensor& grad, const Tensor& x0, double step_size, double eps, double lo, double hi) {
  const torch::stable::accelerator::DeviceGuard guard(x_adv.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x_adv.get_device_index(), &stream));
  return run(x_adv, grad, x0, [&](const Tensor& a, const Tensor& g, const Tensor& b, Tensor& out) {
    with_types(a, g, [&](auto image, auto gradient) {
      using T = decltype(image);
      const PgdStep<T> step{static_cast<T>(step_size), static_cast<T>(eps), static_cast<T>(lo), static_cast<T>(hi)};
      launch<T, decltype(gradient)>(a, g, b, out, step, static_cast<cudaStream_t>(stream));
    });
  });
}

}  // namespace
}  // namespace fastdynat

STABLE_TORCH_LIBRARY_IMPL(fastdynat, CUDA, m) {
  m.impl("pgd_step_linf", TORCH_BOX(&fastdynat::pgd_step_linf_cuda));
}
