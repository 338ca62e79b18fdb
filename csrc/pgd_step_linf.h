// What the CPU and the CUDA half of fastdynat::pgd_step_linf share: the arithmetic, the checks, the outputs.
#pragma once

#include "inline.h"
#include "tensor.h"

#include <tuple>

namespace fastdynat {

// A 16-bit float seen as bits: only its sign is needed, and integer tests vectorise without conversion instructions.
template <uint16_t kInfinity>
struct Bits16 {
  uint16_t bits;
};
using HalfBits = Bits16<0x7c00>;
using BFloat16Bits = Bits16<0x7f80>;

// -1, 0 or 1; 0 for zero and for NaN.
template <typename G>
FASTDYNAT_INLINE int sign(G g) {
  return (g > G(0)) - (g < G(0));
}

template <uint16_t kInfinity>
FASTDYNAT_INLINE int sign(Bits16<kInfinity> g) {
  const uint16_t magnitude = g.bits & 0x7fff;
  const bool moves = magnitude != 0 && magnitude <= kInfinity;
  return moves ? ((g.bits & 0x8000) != 0 ? -1 : 1) : 0;
}

template <typename T>
struct PgdStep {
  T step_size, eps, lo, hi;

  // step_size * sign is exact, so contracting it into an FMA cannot change the result.
  FASTDYNAT_INLINE T operator()(T x_adv, int sign, T x0) const {
    const T lower = x0 - eps;
    const T upper = x0 + eps;
    T x = x_adv + step_size * static_cast<T>(sign);
    x = x < lower ? lower : x;
    x = x > upper ? upper : x;
    x = x < lo ? lo : x;
    x = x > hi ? hi : x;
    return x0 == x0 ? x : x0;  // comparisons with a NaN bound are false: like torch.clamp, the result is that NaN
  }
};

// What the operator is asked for and gives back. `low` and `moved` are of size 0 where they are not asked for.
struct StepTensors {
  Tensor x_adv, grad, x0;  // dense, of one memory order; each image one block where `moved` is asked for
  Tensor out, low, moved;
  int64_t rows, row;  // images and elements per image, or 1 and all elements where `moved` is not asked for
};

constexpr const char* kStepName = "pgd_step_linf";

// Calls launch(StepTensors&) with tensors in an order that the kernels can walk; returns (out, low, moved), laid out as x_adv.
template <typename Launch>
std::tuple<Tensor, Tensor, Tensor> run_step(
    const Tensor& x_adv, const Tensor& grad, const Tensor& x0, std::optional<ScalarType> low_dtype, bool count,
    const Launch& launch) {
  const Checker check{kStepName, "x_adv", x_adv};
  check.same_shape_and_device("grad", grad);
  check.same_shape_and_device("x0", x0);
  STD_TORCH_CHECK(
      x0.scalar_type() == x_adv.scalar_type(), "pgd_step_linf: x0 and x_adv must have one dtype, float32 or float64");
  STD_TORCH_CHECK(
      !low_dtype || *low_dtype == ScalarType::BFloat16 || *low_dtype == ScalarType::Half,
      "pgd_step_linf: low_dtype must be bfloat16 or float16");
  STD_TORCH_CHECK(!count || x_adv.dim() > 0, "pgd_step_linf: counting needs a dimension of images, x_adv has none");
  Tensor out = torch::stable::empty_like(x_adv);
  Tensor low = low_dtype ? empty_like(out, *low_dtype) : torch::stable::new_empty(x_adv, {0});
  Tensor moved = count ? torch::stable::new_zeros(x_adv, {x_adv.size(0)}, ScalarType::Bool)
                       : torch::stable::new_empty(x_adv, {0}, ScalarType::Bool);
  if (x_adv.numel() == 0) return {out, low, moved};
  const bool direct = is_dense(x_adv) && same_order(x_adv, grad) && same_order(x_adv, x0) && same_order(out, x_adv) &&
                      (!low_dtype || same_order(low, x_adv)) && (!count || images_are_blocks(x_adv));
  const int64_t rows = count ? x_adv.size(0) : 1;
  const int64_t row = x_adv.numel() / rows;
  if (direct) {
    StepTensors step{x_adv, grad, x0, out, low, moved, rows, row};
    launch(step);
    return {out, low, moved};
  }
  const Tensor plain = torch::stable::contiguous(x_adv);
  StepTensors step{
      plain, torch::stable::contiguous(grad), torch::stable::contiguous(x0), torch::stable::empty_like(plain),
      low_dtype ? empty_like(plain, *low_dtype) : low, moved, rows, row};
  launch(step);
  torch::stable::copy_(out, step.out);
  if (low_dtype) torch::stable::copy_(low, step.low);
  return {out, low, moved};
}

// Calls f(G{}) with the type that reads a gradient of this dtype.
template <typename F>
void with_grad_type(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::Half: return f(HalfBits{});
    case ScalarType::BFloat16: return f(BFloat16Bits{});
    default: STD_TORCH_CHECK(false, "pgd_step_linf: grad must be float32, float64, float16 or bfloat16");
  }
}

// Calls f(T{}, G{}) with the types of the images and of the gradient.
template <typename F>
void with_types(const Tensor& x_adv, const Tensor& grad, const F& f) {
  with_image_type(kStepName, "x_adv", x_adv.scalar_type(), [&](auto t) {
    with_grad_type(grad.scalar_type(), [&](auto g) { f(t, g); });
  });
}

}  // namespace fastdynat
