// fastdynat::pgd_step_linf on CUDA devices.
#include "../pgd_step_linf.h"

#include "launch.cuh"

namespace fastdynat {
namespace {

// A block walks one part of one image, so that a single flag per block says whether the image moved.
template <typename T, typename G, int kPack>
__global__ void __launch_bounds__(kThreads) pgd_step_linf_kernel(
    const T* __restrict__ x_adv, const G* __restrict__ grad, const T* __restrict__ x0, T* __restrict__ out,
    uint16_t* __restrict__ low, bool* __restrict__ moved, int64_t row, int64_t parts, int64_t total_parts,
    PgdStepAt<T> step_at, Low low_kind) {
  using Images = Pack<T, kPack>;
  using Grads = Pack<G, kPack>;
  using Lows = Pack<uint16_t, kPack>;
  const int64_t packs = row / kPack;
  const PgdStep<T> step = step_at.read();
  for (int64_t part = blockIdx.x; part < total_parts; part += gridDim.x) {
    const int64_t image = part / parts;
    const int64_t base = image * packs;
    bool any = false;
    for (int64_t i = (part % parts) * blockDim.x + threadIdx.x; i < packs; i += parts * blockDim.x) {
      const Images a = reinterpret_cast<const Images*>(x_adv)[base + i];
      const Grads g = reinterpret_cast<const Grads*>(grad)[base + i];
      const Images b = reinterpret_cast<const Images*>(x0)[base + i];
      Images result;
      Lows narrow;
#pragma unroll
      for (int k = 0; k < kPack; ++k) {
        const int s = sign(g.v[k]);
        any |= s != 0;
        result.v[k] = step(a.v[k], s, b.v[k]);
      }
      reinterpret_cast<Images*>(out)[base + i] = result;
      if (low_kind != Low::kNone) {
#pragma unroll
        for (int k = 0; k < kPack; ++k) narrow.v[k] = low_bits(static_cast<float>(result.v[k]), low_kind);
        reinterpret_cast<Lows*>(low)[base + i] = narrow;
      }
    }
    if (moved != nullptr && __syncthreads_or(any) && threadIdx.x == 0)
      moved[image] = true;  // blocks write one value
  }
}

template <typename T, typename G>
void launch_step(StepTensors& s, PgdStepAt<T> step, Low low_kind, cudaStream_t stream) {
  const T* x_adv = data<T>(s.x_adv);
  const G* grad = data<G>(s.grad);
  const T* x0 = data<T>(s.x0);
  T* out = mutable_data<T>(s.out);
  auto* low = low_kind == Low::kNone ? nullptr : static_cast<uint16_t*>(s.low.mutable_data_ptr());
  bool* moved = s.moved.numel() > 0 ? mutable_data<bool>(s.moved) : nullptr;
  constexpr int kPack = 16 / sizeof(T);
  const bool packed = s.row % kPack == 0 && aligned(x_adv, 16) && aligned(x0, 16) && aligned(out, 16) &&
                      aligned(grad, sizeof(Pack<G, kPack>)) && aligned(low, sizeof(Pack<uint16_t, kPack>));
  const int64_t items = packed ? s.row / kPack : s.row;
  const int64_t parts =
      std::max<int64_t>(1, items / kThreads);  // of an image; each thread has one or two packs
  const int64_t total = parts * s.rows;
  const int64_t grid = std::min<int64_t>(total, kMaxBlocks);
  auto* kernel = packed ? pgd_step_linf_kernel<T, G, kPack> : pgd_step_linf_kernel<T, G, 1>;
  launch(
      kernel, grid, kThreads, stream, x_adv, grad, x0, out, low, moved, s.row, parts, total, step, low_kind);
}

std::tuple<Tensor, Tensor, Tensor> pgd_step_linf_cuda(
    const Tensor& x_adv, const Tensor& grad, const Tensor& x0, double step_size, double eps, double lo,
    double hi, std::optional<ScalarType> low_dtype, bool count,
    const std::optional<Tensor>& device_step_size, const std::optional<Tensor>& device_eps) {
  const OnDevice device(x_adv);
  const Low low_kind = low_of(low_dtype);
  const StepSizes sizes(kStepName, x_adv, step_size, eps, device_step_size, device_eps);
  return run_step(kStepName, x_adv, signs_of(x_adv, grad), x0, low_dtype, count, [&](StepTensors& s) {
    with_types(s.x_adv, s.grad, [&](auto image, auto gradient) {
      using T = decltype(image);
      const PgdStepAt<T> step{sizes, static_cast<T>(lo), static_cast<T>(hi)};
      launch_step<T, decltype(gradient)>(s, step, low_kind, device.stream);
    });
  });
}

}  // namespace
}  // namespace fastdynat

STABLE_TORCH_LIBRARY_IMPL(FASTDYNAT_LIBRARY, FASTDYNAT_KEY, m) {
  m.impl("pgd_step_linf", TORCH_BOX(&fastdynat::pgd_step_linf_cuda));
}
