// fastdynat::project_on_hyperplane on the CPU.
#include "project_on_hyperplane.h"

#include "parallel.h"

namespace fastdynat {
namespace {

constexpr int kLanes = 16;  // independent sums: enough to hide an addition's latency

// Calls add(i, lane) for all i in [0, row).
template <typename Add>
FASTDYNAT_INLINE void over_lanes(int64_t row, const Add& add) {
  const int64_t whole = row / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) add(i + lane, lane);
  }
  for (int64_t i = whole; i < row; ++i) add(i, static_cast<int>(i - whole));
}

FASTDYNAT_INLINE double sum(const double (&lanes)[kLanes]) {
  double total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += lanes[lane];
  return total;
}

// `direction` is scratch for one image; `out` holds the starting point until the end.
template <bool kL2, typename T, typename W>
FASTDYNAT_INLINE void project(
    const T* x, const W* w, double value, const T* at, T* out, T* direction, int64_t row, Box<T> box) {
  double products[kLanes] = {};
  T largest_of[kLanes] = {};
  over_lanes(row, [&](int64_t i, int lane) FASTDYNAT_INLINE_BODY {
    out[i] = box.clip(x[i]);
    direction[i] = weight<T>(w[i]);
    products[lane] +=
        static_cast<double>(direction[i]) * (static_cast<double>(out[i]) - static_cast<double>(at[i]));
    largest_of[lane] =
        magnitude(direction[i]) > largest_of[lane] ? magnitude(direction[i]) : largest_of[lane];
  });
  T largest = 0;
  for (int lane = 0; lane < kLanes; ++lane) largest = largest_of[lane] > largest ? largest_of[lane] : largest;

  const Plane<T> plane(value + sum(products), largest);
  if (plane.target == 0) return;
  for (int64_t i = 0; i < row; ++i) direction[i] *= plane.factor;
  Newton<T> newton{plane.target};
  bool more = true;
  while (more) {
    const T t = newton.at();
    double reached[kLanes] = {}, slope[kLanes] = {};
    over_lanes(row, [&](int64_t i, int lane) FASTDYNAT_INLINE_BODY {
      T way = 0, rate = 0;
      add_reached<kL2>(out[i], direction[i], t, box, way, rate);
      reached[lane] += static_cast<double>(way);
      slope[lane] += static_cast<double>(rate);
    });
    more = newton.advance(sum(reached), sum(slope));
  }
  const double t = newton.t;
  for (int64_t i = 0; i < row; ++i) out[i] = moved<kL2>(out[i], direction[i], t, box);
}

template <bool kL2, typename T, typename W>
void project_images(Projection& p, Box<T> box) {
  const T* x = data<T>(p.x);
  const W* w = data<W>(p.w);
  const T* value = data<T>(p.value);
  const T* at = data<T>(p.at);
  T* out = mutable_data<T>(p.out);
  const int64_t row = p.row;
  parallel<T>(p.rows, 8 * row, [=](int64_t begin, int64_t end) FASTDYNAT_INLINE_BODY {
    std::vector<T> direction(row);
    for (int64_t n = begin; n < end; ++n) {
      const int64_t from = n * row;
      project<kL2>(
          x + from, w + from, static_cast<double>(value[n]), at + from, out + from, direction.data(), row,
          box);
    }
  });
}

Tensor project_on_hyperplane_cpu(
    const Tensor& x, const Tensor& w, const Tensor& value, const Tensor& at, bool l2, double lo, double hi) {
  return run_projection(x, w, value, at, [&](Projection& p) {
    with_projection_types(p.x, p.w, [&](auto image, auto normal) {
      using T = decltype(image);
      using W = decltype(normal);
      const Box<T> box{static_cast<T>(lo), static_cast<T>(hi)};
      l2 ? project_images<true, T, W>(p, box) : project_images<false, T, W>(p, box);
    });
  });
}

}  // namespace
}  // namespace fastdynat

STABLE_TORCH_LIBRARY_IMPL(fastdynat, CPU, m) {
  m.impl("project_on_hyperplane", TORCH_BOX(&fastdynat::project_on_hyperplane_cpu));
}
