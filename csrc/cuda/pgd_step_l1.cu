// fastdynat::pgd_step_l1 on CUDA devices: a block per image, in registers where it fits.
#include "../pgd_step_l1.h"

#include "launch.cuh"

namespace fastdynat {
namespace {

constexpr int kHeld = 6;         // packs per thread that stay in registers: CIFAR images in 128 threads
constexpr int kMaxThreads =
    512;  // so a block holds up to 12288 floats; larger images are read again in every pass

template <typename T, typename G>
struct L1Pointers {
  const T* __restrict__ x_adv;
  const G* __restrict__ grad;
  const T* __restrict__ x0;
  T* __restrict__ out;
};

// kPack elements of an image. `delta` is x_adv until the step is made.
template <typename T, int kPack>
struct L1Pack {
  Pack<T, kPack> gradient, delta, x0;

  template <typename G>
  __device__ __forceinline__ void load(const L1Pointers<T, G>& p, int64_t pack) {
    delta = reinterpret_cast<const Pack<T, kPack>*>(p.x_adv)[pack];
    x0 = reinterpret_cast<const Pack<T, kPack>*>(p.x0)[pack];
    const Pack<G, kPack> grad = reinterpret_cast<const Pack<G, kPack>*>(p.grad)[pack];
#pragma unroll
    for (int k = 0; k < kPack; ++k) gradient.v[k] = finite_gradient<T>(grad.v[k]);
  }

  __device__ __forceinline__ int at_least(T threshold) const {
    int count = 0;
#pragma unroll
    for (int k = 0; k < kPack; ++k) count += absolute(gradient.v[k]) >= threshold && gradient.v[k] != T(0);
    return count;
  }

  __device__ __forceinline__ void step(T threshold, double move) {
#pragma unroll
    for (int k = 0; k < kPack; ++k)
      delta.v[k] = moved_delta(delta.v[k], gradient.v[k], x0.v[k], threshold, move);
  }

  __device__ __forceinline__ double length(const L1Ball<T>& ball, T tau) const {
    double sum = 0;
#pragma unroll
    for (int k = 0; k < kPack; ++k) sum += static_cast<double>(ball.kept(delta.v[k], x0.v[k], tau));
    return sum;
  }

  __device__ __forceinline__ void store(T* out, int64_t pack, const L1Ball<T>& ball, T tau) const {
    Pack<T, kPack> result;
#pragma unroll
    for (int k = 0; k < kPack; ++k) result.v[k] = ball.point(delta.v[k], x0.v[k], tau);
    reinterpret_cast<Pack<T, kPack>*>(out)[pack] = result;
  }
};

template <bool kHold, typename T, typename G, int kPack>
__global__ void __launch_bounds__(kMaxThreads) pgd_step_l1_kernel(
    L1Pointers<T, G> p, int64_t rows, int64_t packs, StepSizes sizes, int64_t count, L1Ball<T> ball) {
  __shared__ double shared[32];
  __shared__ int shared_count[32];
  const auto plus = [](auto a, auto b) { return a + b; };
  for (int64_t image = blockIdx.x; image < rows; image += gridDim.x) {
    const int64_t base = image * packs;
    L1Pack<T, kPack> held[kHold ? kHeld : 1];
    // Calls f(L1Pack&, index) for the packs of this thread; prepare(L1Pack&) comes before where they are read
    // anew.
    const auto each = [&](const auto& prepare, const auto& f) {
      if constexpr (kHold) {
#pragma unroll
        for (int h = 0; h < kHeld; ++h) {
          const int64_t i = threadIdx.x + h * blockDim.x;
          if (i < packs) f(held[h], base + i);
        }
      } else {
        for (int64_t i = threadIdx.x; i < packs; i += blockDim.x) {
          held[0].load(p, base + i);
          prepare(held[0]);
          f(held[0], base + i);
        }
      }
    };
    const auto as_read = [](L1Pack<T, kPack>&) {};
    if constexpr (kHold) each(as_read, [&](L1Pack<T, kPack>& pack, int64_t i) { pack.load(p, i); });
    // Gradients of 0 do not count, so that with fewer others than asked for the threshold is 0 and all of
    // these move.
    const auto at_least = [&](T threshold) {
      int found = 0;
      each(as_read, [&](const L1Pack<T, kPack>& pack, int64_t) { found += pack.at_least(threshold); });
      return block_reduce(found, shared_count, 0, plus);
    };
    const T threshold = from_bits<T>(largest_that<T>([&](T v) { return at_least(v) >= count; }));
    const int chosen = at_least(threshold);
    const double move = sizes.step_size() / static_cast<double>(chosen > 0 ? chosen : 1);
    const auto stepped = [&](L1Pack<T, kPack>& pack) { pack.step(threshold, move); };
    if constexpr (kHold) each(as_read, [&](L1Pack<T, kPack>& pack, int64_t) { stepped(pack); });

    const double eps = sizes.eps();  // read where it is used: held any longer, it would spill
    const auto beyond = [&](T tau) {
      double length = 0;
      each(stepped, [&](const L1Pack<T, kPack>& pack, int64_t) { length += pack.length(ball, tau); });
      return block_reduce(length, shared, 0.0, plus) > eps;
    };
    const T tau = beyond(T(0)) ? from_bits<T>(largest_that<T>(beyond) + 1) : T(0);
    each(stepped, [&](const L1Pack<T, kPack>& pack, int64_t i) { pack.store(p.out, i, ball, tau); });
  }
}

template <int kPack, typename T, typename G>
void launch_step(
    const StepTensors& s, const L1Pointers<T, G>& p, const StepSizes& sizes, int64_t count,
    L1Ball<T> ball, cudaStream_t stream) {
  const int64_t packs = s.row / kPack;
  const bool hold = packs <= kHeld * kMaxThreads;
  const int threads = hold ? static_cast<int>((packs + kHeld * 32 - 1) / (kHeld * 32)) * 32 : kMaxThreads;
  auto* kernel = hold ? pgd_step_l1_kernel<true, T, G, kPack> : pgd_step_l1_kernel<false, T, G, kPack>;
  launch(kernel, std::min(s.rows, kMaxBlocks), threads, stream, p, s.rows, packs, sizes, count, ball);
}

Tensor pgd_step_l1_cuda(
    const Tensor& x_adv, const Tensor& grad, const Tensor& x0, double step_size, double eps, int64_t count,
    double lo, double hi, const std::optional<Tensor>& device_step_size,
    const std::optional<Tensor>& device_eps) {
  const OnDevice device(x_adv);
  const StepSizes sizes("pgd_step_l1", x_adv, step_size, eps, device_step_size, device_eps);
  return run_l1_step(x_adv, grad, x0, count, [&](StepTensors& s) {
    with_step_types("pgd_step_l1", s.x_adv, s.grad, [&](auto image, auto gradient) {
      using T = decltype(image);
      using G = decltype(gradient);
      constexpr int kPack = 16 / sizeof(T);
      const L1Ball<T> ball{static_cast<T>(lo), static_cast<T>(hi)};
      const L1Pointers<T, G> p{data<T>(s.x_adv), data<G>(s.grad), data<T>(s.x0), mutable_data<T>(s.out)};
      const bool packed = s.row % kPack == 0 && aligned(p.x_adv, 16) && aligned(p.x0, 16) &&
                          aligned(p.out, 16) && aligned(p.grad, sizeof(Pack<G, kPack>));
      packed ? launch_step<kPack>(s, p, sizes, count, ball, device.stream)
             : launch_step<1>(s, p, sizes, count, ball, device.stream);
    });
  });
}

}  // namespace
}  // namespace fastdynat

STABLE_TORCH_LIBRARY_IMPL(FASTDYNAT_LIBRARY, FASTDYNAT_KEY, m) {
  m.impl("pgd_step_l1", TORCH_BOX(&fastdynat::pgd_step_l1_cuda));
}
