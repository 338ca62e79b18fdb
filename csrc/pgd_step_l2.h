// What the CPU and the CUDA half of fastdynat::pgd_step_l2 share, and the other steps that need a whole image: the arithmetic,
// the checks, the outputs.
#pragma once

#include "inline.h"
#include "tensor.h"

#include <cmath>
#include <cstring>
#include <tuple>

namespace fastdynat {

// A gradient entry as float: NaN is 0 and infinity the largest finite value, whose square is safe in double. In integers,
// which vectorise better than three chained comparisons of floats.
FASTDYNAT_INLINE float finite(float g) {
  constexpr int32_t kInfinity = 0x7f800000;
  int32_t bits;
  std::memcpy(&bits, &g, sizeof(bits));
  int32_t magnitude = bits & 0x7fffffff;
  const bool nan = magnitude > kInfinity;
  magnitude = magnitude < kInfinity ? magnitude : kInfinity - 1;
  bits = nan ? 0 : (bits & INT32_MIN) | magnitude;
  std::memcpy(&g, &bits, sizeof(bits));
  return g;
}

// The same as double, in the range whose squares neither overflow nor vanish.
FASTDYNAT_INLINE double finite(double g) {
  const double magnitude = g < 0 ? -g : g;
  const double kept = magnitude < 1e-150 ? 0.0 : magnitude > 1e150 ? 1e150 : magnitude;
  return g != g ? 0.0 : g < 0 ? -kept : kept;
}

// A gradient entry in the images' type T.
template <typename T, typename G>
FASTDYNAT_INLINE T finite_gradient(G g) {
  if constexpr (sizeof(G) == 2) {
    return finite(static_cast<T>(static_cast<float>(g)));
  } else {
    return finite(static_cast<T>(g));
  }
}

// Sums over one image, with d = x_adv - x0 and g the gradient: they give the norm of d + a g for any a, so that the moved
// point is not needed to know how far it is out of the ball.
struct L2Sums {
  double gg = 0, dg = 0, dd = 0;
};

struct L2Scales {
  double gradient, delta;
};

template <typename T>
struct L2Step {
  double step_size, eps;
  T lo, hi;

  FASTDYNAT_INLINE L2Scales scales(const L2Sums& sums) const {
    const double a = sums.gg > 0 ? step_size / std::sqrt(sums.gg) : 0.0;
    // Cancellation matters only where the result is far shorter than its parts, and then it is not scaled. Rounding may
    // leave less than 0; a NaN stays.
    const double squared = sums.dd + a * (2 * sums.dg + a * sums.gg);
    const double norm = std::sqrt(squared < 0 ? 0.0 : squared);
    return {a, norm <= eps ? 1.0 : eps / norm};
  }

  FASTDYNAT_INLINE T operator()(T x_adv, T gradient, T x0, L2Scales scales) const {
    const double clean = static_cast<double>(x0);
    const double delta = static_cast<double>(x_adv) - clean + scales.gradient * static_cast<double>(gradient);
    T x = static_cast<T>(clean + scales.delta * delta);
    x = x < lo ? lo : x;
    x = x > hi ? hi : x;
    return x;
  }
};

// What a step is asked for and gives back, a row being an image. `low` is of size 0 where it is not asked for.
struct ImageStep {
  Tensor x_adv, grad, x0;  // dense, of one memory order, each image one block
  Tensor out, low, moved;
  int64_t rows, row;
};

// Calls launch(ImageStep&) with tensors in an order that the kernels can walk; returns (out, low, moved), laid out as x_adv.
template <typename Launch>
std::tuple<Tensor, Tensor, Tensor> run_image_step(
    const char* op, const Tensor& x_adv, const Tensor& grad, const Tensor& x0, std::optional<ScalarType> low_dtype,
    const Launch& launch) {
  const Checker check{op, "x_adv", x_adv};
  STD_TORCH_CHECK(x_adv.dim() > 0, op, ": x_adv needs a first dimension of images");
  check.same_shape_and_device("grad", grad);
  check.same_shape_and_device("x0", x0);
  check.same_dtype("x0", x0);
  STD_TORCH_CHECK(
      !low_dtype || *low_dtype == ScalarType::BFloat16 || *low_dtype == ScalarType::Half,
      op, ": low_dtype must be bfloat16 or float16");
  Tensor out = torch::stable::empty_like(x_adv);
  Tensor low = low_dtype ? empty_like(out, *low_dtype) : torch::stable::new_empty(x_adv, {0});
  Tensor moved = torch::stable::new_zeros(x_adv, {x_adv.size(0)}, ScalarType::Bool);
  if (x_adv.numel() == 0) return {out, low, moved};
  const int64_t rows = x_adv.size(0);
  const int64_t row = x_adv.numel() / rows;
  if (is_dense(x_adv) && images_are_blocks(x_adv) && same_order(x_adv, grad) && same_order(x_adv, x0) && same_order(out, x_adv) &&
      (!low_dtype || same_order(low, x_adv))) {
    ImageStep step{x_adv, grad, x0, out, low, moved, rows, row};
    launch(step);
    return {out, low, moved};
  }
  const Tensor plain = torch::stable::contiguous(x_adv);
  ImageStep step{
      plain, torch::stable::contiguous(grad), torch::stable::contiguous(x0), torch::stable::empty_like(plain),
      low_dtype ? empty_like(plain, *low_dtype) : low, moved, rows, row};
  launch(step);
  torch::stable::copy_(out, step.out);
  if (low_dtype) torch::stable::copy_(low, step.low);
  return {out, low, moved};
}

// Calls f(T{}, G{}) with the types of the images and of the gradient.
template <typename F>
void with_step_types(const char* op, const Tensor& x_adv, const Tensor& grad, const F& f) {
  with_image_type(op, "x_adv", x_adv.scalar_type(), [&](auto t) {
    with_float_type(op, "grad", grad.scalar_type(), [&](auto g) { f(t, g); });
  });
}

}  // namespace fastdynat
