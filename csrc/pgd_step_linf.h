// What the CPU and the CUDA half of fastdynat::pgd_step_linf share: the arithmetic and the types.
#pragma once

#include "inline.h"
#include "step.h"

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

constexpr const char* kStepName = "pgd_step_linf";

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
