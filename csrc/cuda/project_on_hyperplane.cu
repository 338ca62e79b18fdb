// fastdynat::project_on_hyperplane on CUDA devices: a block per image, in registers where it fits.
#include "../project_on_hyperplane.h"

#include "launch.cuh"

namespace fastdynat {
namespace {

constexpr int kHeld = 3;           // packs per thread that stay in registers: CIFAR images in 256 threads
constexpr int kMaxThreads =
    1024;  // so a block holds up to 12288 floats; larger images are read again in every step

template <typename T, typename W>
struct PlanePointers {
  const T* __restrict__ x;
  const W* __restrict__ w;
  const T* __restrict__ value;
  const T* __restrict__ at;
  T* __restrict__ out;
};

// kPack entries of an image: where they start and, once the plane is known, their direction.
template <typename T, int kPack>
struct PlanePack {
  Pack<T, kPack> x, direction;

  template <typename W>
  __device__ __forceinline__ void load(const PlanePointers<T, W>& p, int64_t pack, Box<T> box, T factor) {
    x = reinterpret_cast<const Pack<T, kPack>*>(p.x)[pack];
    const Pack<W, kPack> w = reinterpret_cast<const Pack<W, kPack>*>(p.w)[pack];
#pragma unroll
    for (int k = 0; k < kPack; ++k) {
      x.v[k] = box.clip(x.v[k]);
      direction.v[k] = weight<T>(w.v[k]) * factor;
    }
  }

  __device__ __forceinline__ void add_to(
      const T* at_pointer, int64_t pack, double& product, T& largest) const {
    const Pack<T, kPack> at = reinterpret_cast<const Pack<T, kPack>*>(at_pointer)[pack];
#pragma unroll
    for (int k = 0; k < kPack; ++k) {
      product =
          fma(static_cast<double>(direction.v[k]), static_cast<double>(x.v[k]) - static_cast<double>(at.v[k]),
              product);
      largest = magnitude(direction.v[k]) > largest ? magnitude(direction.v[k]) : largest;
    }
  }

  template <bool kL2>
  __device__ __forceinline__ void add_reached(T t, Box<T> box, double& reached, double& slope) const {
    T way = 0, rate = 0;  // few enough entries for the type of the images
#pragma unroll
    for (int k = 0; k < kPack; ++k) fastdynat::add_reached<kL2>(x.v[k], direction.v[k], t, box, way, rate);
    reached += static_cast<double>(way);
    slope += static_cast<double>(rate);
  }

  template <bool kL2>
  __device__ __forceinline__ void store(T* out, int64_t pack, double t, Box<T> box) const {
    Pack<T, kPack> result;
#pragma unroll
    for (int k = 0; k < kPack; ++k) result.v[k] = moved<kL2>(x.v[k], direction.v[k], t, box);
    reinterpret_cast<Pack<T, kPack>*>(out)[pack] = result;
  }
};

template <bool kL2, bool kHold, typename T, typename W, int kPack>
__global__ void __launch_bounds__(kMaxThreads)
    project_kernel(PlanePointers<T, W> p, int64_t rows, int64_t packs, Box<T> box) {
  __shared__ double shared[32];
  __shared__ T shared_largest[32];
  const auto plus = [](double a, double b) { return a + b; };
  const auto larger = [](T a, T b) { return a > b ? a : b; };
  for (int64_t image = blockIdx.x; image < rows; image += gridDim.x) {
    const int64_t base = image * packs;
    PlanePack<T, kPack> held[kHold ? kHeld : 1];
    // Calls f(PlanePack&, index) for the packs of this thread; what is not held is read with w times
    // `factor`.
    const auto each = [&](T factor, const auto& f) {
      if constexpr (kHold) {
#pragma unroll
        for (int h = 0; h < kHeld; ++h) {
          const int64_t i = threadIdx.x + h * blockDim.x;
          if (i < packs) f(held[h], base + i);
        }
      } else {
        for (int64_t i = threadIdx.x; i < packs; i += blockDim.x) {
          held[0].load(p, base + i, box, factor);
          f(held[0], base + i);
        }
      }
    };
    double product = 0;
    T largest = 0;
    each(T(1), [&](PlanePack<T, kPack>& pack, int64_t i) {
      if constexpr (kHold) pack.load(p, i, box, T(1));
      pack.add_to(p.at, i, product, largest);
    });
    product = block_reduce(product, shared, 0.0, plus);
    largest = block_reduce(largest, shared_largest, T(0), larger);
    const Plane<T> plane(static_cast<double>(p.value[image]) + product, largest);
    if constexpr (kHold) {
      each(T(1), [&](PlanePack<T, kPack>& pack, int64_t) {
#pragma unroll
        for (int k = 0; k < kPack; ++k) pack.direction.v[k] *= plane.factor;
      });
    }
    // All threads have the same sums, so they stop together.
    Newton<T> newton{plane.target};
    bool more = plane.target > 0;
    while (more) {
      const T t = newton.at();
      double reached = 0, slope = 0;
      each(plane.factor, [&](const PlanePack<T, kPack>& pack, int64_t) {
        pack.template add_reached<kL2>(t, box, reached, slope);
      });
      reached = block_reduce(reached, shared, 0.0, plus);
      slope = block_reduce(slope, shared, 0.0, plus);
      more = newton.advance(reached, slope);
    }
    each(plane.factor, [&](const PlanePack<T, kPack>& pack, int64_t i) {
      pack.template store<kL2>(p.out, i, newton.t, box);
    });
  }
}

template <bool kL2, int kPack, typename T, typename W>
void launch_projection(
    const Projection& projection, const PlanePointers<T, W>& p, Box<T> box, cudaStream_t stream) {
  const int64_t packs = projection.row / kPack;
  const bool hold = packs <= kHeld * kMaxThreads;
  const int threads = hold ? static_cast<int>((packs + kHeld * 32 - 1) / (kHeld * 32)) * 32 : kMaxThreads;
  auto* kernel = hold ? project_kernel<kL2, true, T, W, kPack> : project_kernel<kL2, false, T, W, kPack>;
  launch(kernel, std::min(projection.rows, kMaxBlocks), threads, stream, p, projection.rows, packs, box);
}

Tensor project_on_hyperplane_cuda(
    const Tensor& x, const Tensor& w, const Tensor& value, const Tensor& at, bool l2, double lo, double hi) {
  const OnDevice device(x);
  return run_projection(x, w, value, at, [&](Projection& projection) {
    with_projection_types(projection.x, projection.w, [&](auto image, auto normal) {
      using T = decltype(image);
      using W = decltype(normal);
      constexpr int kPack = 16 / sizeof(T);
      const Box<T> box{static_cast<T>(lo), static_cast<T>(hi)};
      const PlanePointers<T, W> p{
          data<T>(projection.x), data<W>(projection.w), data<T>(projection.value), data<T>(projection.at),
          mutable_data<T>(projection.out)};
      const bool packed = projection.row % kPack == 0 && aligned(p.x, 16) && aligned(p.at, 16) &&
                          aligned(p.out, 16) && aligned(p.w, sizeof(Pack<W, kPack>));
      const auto run = [&](auto norm) {
        packed ? launch_projection<norm.value, kPack>(projection, p, box, device.stream)
               : launch_projection<norm.value, 1>(projection, p, box, device.stream);
      };
      l2 ? run(std::true_type{}) : run(std::false_type{});
    });
  });
}

}  // namespace
}  // namespace fastdynat

STABLE_TORCH_LIBRARY_IMPL(FASTDYNAT_LIBRARY, FASTDYNAT_KEY, m) {
  m.impl("project_on_hyperplane", TORCH_BOX(&fastdynat::project_on_hyperplane_cuda));
}
