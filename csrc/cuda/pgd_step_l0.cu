// fastdynat::pgd_step_l0 on CUDA devices: a block per image.
#include "../pgd_step_l0.h"

#include "launch.cuh"

namespace fastdynat {
namespace {

constexpr int kMaxThreads = 1024;

template <typename T, typename G>
struct L0Pointers {
  const T* __restrict__ x_adv;
  const G* __restrict__ grad;
  const T* __restrict__ x0;
  T* __restrict__ out;
  T* __restrict__ score;  // (rows, pixels) scratch; a thread reads only what it wrote itself, from the
                          // first-level cache
};

template <typename T, typename G>
__global__ void __launch_bounds__(kMaxThreads) pgd_step_l0_kernel(
    L0Pointers<T, G> p, int64_t rows, PixelGrid grid, double step_size, int64_t pixels, T lo, T hi) {
  __shared__ double shared[32];
  __shared__ int shared_count[32];
  const auto plus = [](auto a, auto b) { return a + b; };
  const int64_t row = grid.channels * grid.pixels;
  for (int64_t image = blockIdx.x; image < rows; image += gridDim.x) {
    const T* x_adv = p.x_adv + image * row;
    const G* grad = p.grad + image * row;
    const T* x0 = p.x0 + image * row;
    T* score = p.score + image * grid.pixels;
    double length = 0;
    for (int64_t i = threadIdx.x; i < row; i += blockDim.x)
      length += static_cast<double>(absolute(finite_gradient<T>(grad[i])));
    length = block_reduce(length, shared, 0.0, plus);
    const L0Step<T> step{length > 0 ? step_size / length : 0.0, lo, hi};
    for (int64_t i = threadIdx.x; i < grid.pixels; i += blockDim.x) {
      score[i] = pixel_score(x_adv, grad, x0, i * grid.pixel_stride, grid, step);
    }
    // The number of pixels, in the whole block, of which predicate(score, index) is true.
    const auto count = [&](const auto& predicate) {
      int found = 0;
      for (int64_t i = threadIdx.x; i < grid.pixels; i += blockDim.x) found += predicate(score[i], i);
      return block_reduce(found, shared_count, 0, plus);
    };
    const T threshold = from_bits<T>(
        largest_that<T>([&](T v) { return count([=](T s, int64_t) { return s >= v; }) >= pixels; }));
    // Of the pixels on the threshold, the first: those up to the last index that has fewer than are wanted
    // before it.
    const int64_t wanted = pixels - count([=](T s, int64_t) { return s > threshold; });
    int64_t last = wanted > 0 ? grid.pixels : -1;
    if (wanted > 0 && count([=](T s, int64_t) { return s == threshold; }) > wanted) {
      last = 0;
      for (int64_t bit = int64_t{1} << 30; bit > 0; bit >>= 1) {
        const int64_t candidate = last | bit;
        if (candidate < grid.pixels &&
            count([=](T s, int64_t i) { return s == threshold && i < candidate; }) < wanted)
          last = candidate;
      }
    }
    for (int64_t i = threadIdx.x; i < grid.pixels; i += blockDim.x) {
      const bool kept = score[i] > threshold || (score[i] == threshold && i <= last);
      write_pixel(x_adv, grad, x0, p.out + image * row, i * grid.pixel_stride, grid, step, kept);
    }
  }
}

Tensor pgd_step_l0_cuda(
    const Tensor& x_adv, const Tensor& grad, const Tensor& x0, double step_size, int64_t pixels, double lo,
    double hi) {
  const OnDevice device(x_adv);
  return run_l0_step(x_adv, grad, x0, pixels, [&](StepTensors& s, PixelGrid grid) {
    with_step_types("pgd_step_l0", s.x_adv, s.grad, [&](auto image, auto gradient) {
      using T = decltype(image);
      using G = decltype(gradient);
      Tensor score = torch::stable::new_empty(s.x_adv, {s.rows, grid.pixels});
      const L0Pointers<T, G> p{
          data<T>(s.x_adv), data<G>(s.grad), data<T>(s.x0), mutable_data<T>(s.out), mutable_data<T>(score)};
      // Four pixels per thread of a CIFAR image.
      const int threads = static_cast<int>(std::min<int64_t>(kMaxThreads, (grid.pixels + 127) / 128 * 32));
      launch(
          pgd_step_l0_kernel<T, G>, std::min(s.rows, kMaxBlocks), threads, device.stream, p, s.rows, grid,
          step_size, pixels, static_cast<T>(lo), static_cast<T>(hi));
    });
  });
}

}  // namespace
}  // namespace fastdynat

STABLE_TORCH_LIBRARY_IMPL(FASTDYNAT_LIBRARY, FASTDYNAT_KEY, m) {
  m.impl("pgd_step_l0", TORCH_BOX(&fastdynat::pgd_step_l0_cuda));
}
