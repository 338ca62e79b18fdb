// fastdynat::pgd_step_l2 on CUDA devices: one kernel where an image fits in a block's registers, two where it
// does not.
#include "../pgd_step_l2.h"

#include "launch.cuh"

namespace fastdynat {
namespace {

constexpr int kHeld = 3;            // packs per thread that stay in registers: CIFAR images in 256 threads
constexpr int kMaxThreads = 512;  // so a block holds up to 6144 floats, and a thread's registers do not spill
constexpr int kPacksPerThread = 8;  // of an image split over blocks: 64 ImageNet images make 1216 blocks

template <typename T, typename G>
struct L2Pointers {
  const T* __restrict__ x_adv;
  const G* __restrict__ grad;
  const T* __restrict__ x0;
  T* __restrict__ out;
  uint16_t* __restrict__ low;
  bool* __restrict__ moved;
  Low low_kind;
};

// kPack elements of the three inputs.
template <typename T, typename G, int kPack>
struct L2Pack {
  Pack<T, kPack> x_adv, x0;
  Pack<G, kPack> grad;

  __device__ __forceinline__ void load(const L2Pointers<T, G>& p, int64_t pack) {
    x_adv = reinterpret_cast<const Pack<T, kPack>*>(p.x_adv)[pack];
    x0 = reinterpret_cast<const Pack<T, kPack>*>(p.x0)[pack];
    grad = reinterpret_cast<const Pack<G, kPack>*>(p.grad)[pack];
  }

  __device__ __forceinline__ void add_to(L2Sums& sums) const {
#pragma unroll
    for (int k = 0; k < kPack; ++k) {
      const double g = finite_gradient<T>(grad.v[k]);
      const double d = static_cast<double>(x_adv.v[k]) - static_cast<double>(x0.v[k]);
      sums.gg = fma(g, g, sums.gg);
      sums.dg = fma(d, g, sums.dg);
      sums.dd = fma(d, d, sums.dd);
    }
  }

  __device__ __forceinline__ void step(
      const L2Pointers<T, G>& p, int64_t pack, const L2Step<T>& step, L2Scales scales) const {
    Pack<T, kPack> result;
#pragma unroll
    for (int k = 0; k < kPack; ++k)
      result.v[k] = step(x_adv.v[k], finite_gradient<T>(grad.v[k]), x0.v[k], scales);
    reinterpret_cast<Pack<T, kPack>*>(p.out)[pack] = result;
    if (p.low_kind != Low::kNone) {
      Pack<uint16_t, kPack> narrow;
#pragma unroll
      for (int k = 0; k < kPack; ++k) narrow.v[k] = low_bits(static_cast<float>(result.v[k]), p.low_kind);
      reinterpret_cast<Pack<uint16_t, kPack>*>(p.low)[pack] = narrow;
    }
  }
};

// The sums of all threads, to every thread.
__device__ __forceinline__ L2Sums block_sums(L2Sums sums) {
  __shared__ double shared[32];
  const auto plus = [](double a, double b) { return a + b; };
  sums.gg = block_reduce(sums.gg, shared, 0.0, plus);
  sums.dg = block_reduce(sums.dg, shared, 0.0, plus);
  sums.dd = block_reduce(sums.dd, shared, 0.0, plus);
  return sums;
}

// A block per image, which is read once.
template <typename T, typename G, int kPack>
__global__ void __launch_bounds__(kMaxThreads)
    pgd_step_l2_kernel(L2Pointers<T, G> p, int64_t rows, int64_t packs, L2Step<T> step) {
  for (int64_t image = blockIdx.x; image < rows; image += gridDim.x) {
    const int64_t base = image * packs;
    L2Pack<T, G, kPack> held[kHeld];
    L2Sums sums;
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
      const int64_t i = threadIdx.x + h * blockDim.x;
      if (i < packs) {
        held[h].load(p, base + i);
        held[h].add_to(sums);
      }
    }
    sums = block_sums(sums);
    const L2Scales scales = step.scales(sums);
    if (threadIdx.x == 0) p.moved[image] = sums.gg > 0;
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
      const int64_t i = threadIdx.x + h * blockDim.x;
      if (i < packs) held[h].step(p, base + i, step, scales);
    }
  }
}

// The sums over each part of each image. No atomics: the same input gives the same bits.
template <typename T, typename G, int kPack>
__global__ void __launch_bounds__(kThreads) pgd_step_l2_sums_kernel(
    L2Pointers<T, G> p, int64_t packs, int64_t parts, int64_t total_parts, L2Sums* __restrict__ partial) {
  for (int64_t part = blockIdx.x; part < total_parts; part += gridDim.x) {
    const int64_t base = part / parts * packs;
    L2Sums sums;
    for (int64_t i = (part % parts) * blockDim.x + threadIdx.x; i < packs; i += parts * blockDim.x) {
      L2Pack<T, G, kPack> pack;
      pack.load(p, base + i);
      pack.add_to(sums);
    }
    sums = block_sums(sums);
    if (threadIdx.x == 0) partial[part] = sums;
  }
}

template <typename T, typename G, int kPack>
__global__ void __launch_bounds__(kThreads) pgd_step_l2_apply_kernel(
    L2Pointers<T, G> p, int64_t packs, int64_t parts, int64_t total_parts, const L2Sums* __restrict__ partial,
    L2Step<T> step) {
  for (int64_t part = blockIdx.x; part < total_parts; part += gridDim.x) {
    const int64_t image = part / parts;
    L2Sums sums;
    for (int64_t other = threadIdx.x; other < parts; other += blockDim.x) {
      const L2Sums more = partial[image * parts + other];
      sums = {sums.gg + more.gg, sums.dg + more.dg, sums.dd + more.dd};
    }
    sums = block_sums(sums);
    const L2Scales scales = step.scales(sums);
    if (threadIdx.x == 0 && part % parts == 0) p.moved[image] = sums.gg > 0;
    for (int64_t i = (part % parts) * blockDim.x + threadIdx.x; i < packs; i += parts * blockDim.x) {
      L2Pack<T, G, kPack> pack;
      pack.load(p, image * packs + i);
      pack.step(p, image * packs + i, step, scales);
    }
  }
}

template <typename T, typename G, int kPack>
void launch_step(StepTensors& s, const L2Pointers<T, G>& p, const L2Step<T>& step, cudaStream_t stream) {
  const int64_t packs = s.row / kPack;
  if (packs <= kHeld * kMaxThreads) {
    const int threads = static_cast<int>((packs + kHeld * 32 - 1) / (kHeld * 32)) * 32;
    launch(
        pgd_step_l2_kernel<T, G, kPack>, std::min(s.rows, kMaxBlocks), threads, stream, p, s.rows, packs,
        step);
    return;
  }
  constexpr int64_t kPart = kThreads * kPacksPerThread;
  const int64_t parts = (packs + kPart - 1) / kPart;
  const int64_t total = parts * s.rows;
  const int64_t grid = std::min(total, kMaxBlocks);
  Tensor partial = torch::stable::new_empty(s.x_adv, {total, 3}, ScalarType::Double);
  auto* sums = static_cast<L2Sums*>(partial.mutable_data_ptr());
  launch(pgd_step_l2_sums_kernel<T, G, kPack>, grid, kThreads, stream, p, packs, parts, total, sums);
  launch(pgd_step_l2_apply_kernel<T, G, kPack>, grid, kThreads, stream, p, packs, parts, total, sums, step);
}

std::tuple<Tensor, Tensor, Tensor> pgd_step_l2_cuda(
    const Tensor& x_adv, const Tensor& grad, const Tensor& x0, double step_size, double eps, double lo,
    double hi, std::optional<ScalarType> low_dtype, const std::optional<Tensor>& device_step_size,
    const std::optional<Tensor>& device_eps) {
  const OnDevice device(x_adv);
  const Low low_kind = low_of(low_dtype);
  const StepSizes sizes("pgd_step_l2", x_adv, step_size, eps, device_step_size, device_eps);
  return run_step(
      "pgd_step_l2", x_adv, beside("pgd_step_l2", "grad", x_adv, grad), x0, low_dtype, true,
      [&](StepTensors& s) {
        with_step_types("pgd_step_l2", s.x_adv, s.grad, [&](auto image, auto gradient) {
          using T = decltype(image);
          using G = decltype(gradient);
          constexpr int kPack = 16 / sizeof(T);
          const L2Step<T> step{sizes, static_cast<T>(lo), static_cast<T>(hi)};
          auto* low = low_dtype ? static_cast<uint16_t*>(s.low.mutable_data_ptr()) : nullptr;
          const L2Pointers<T, G> p{data<T>(s.x_adv),
                                   data<G>(s.grad),
                                   data<T>(s.x0),
                                   mutable_data<T>(s.out),
                                   low,
                                   mutable_data<bool>(s.moved),
                                   low_kind};
          const bool packed = s.row % kPack == 0 && aligned(p.x_adv, 16) && aligned(p.x0, 16) &&
                              aligned(p.out, 16) && aligned(p.grad, sizeof(Pack<G, kPack>)) &&
                              aligned(low, sizeof(Pack<uint16_t, kPack>));
          packed ? launch_step<T, G, kPack>(s, p, step, device.stream)
                 : launch_step<T, G, 1>(s, p, step, device.stream);
        });
      });
}

}  // namespace
}  // namespace fastdynat

STABLE_TORCH_LIBRARY_IMPL(FASTDYNAT_LIBRARY, FASTDYNAT_KEY, m) {
  m.impl("pgd_step_l2", TORCH_BOX(&fastdynat::pgd_step_l2_cuda));
}
