// Shared by the CPU and the CUDA half of fastdynat::pgd_step_linf: the arithmetic and the types.
#pragma once

#include "inline.h"
#include "step.h"

namespace fastdynat {

// A 16-bit float seen as bits: only its sign is needed, and integer tests vectorise without conversion
// instructions.
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
  // In 32 bits and without branches, which is what vectorises: a narrower type or a && costs the CPU a factor
  // of 30.
  const int32_t bits = g.bits;
  const int32_t magnitude = bits & 0x7fff;
  const int32_t moves = static_cast<int32_t>(magnitude != 0) & static_cast<int32_t>(magnitude <= kInfinity);
  return moves * (1 - 2 * (bits >> 15));
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
    return x0 == x0 ? x
                    : x0;  // comparisons with a NaN bound are false: like torch.clamp, the result is that NaN
  }
};

// The step with its sizes still where the device keeps them.
template <typename T>
struct PgdStepAt {
  StepSizes sizes;
  T lo, hi;

  FASTDYNAT_INLINE PgdStep<T> read() const {
    return {static_cast<T>(sizes.step_size()), static_cast<T>(sizes.eps()), lo, hi};
  }
};

constexpr const char* kStepName = "pgd_step_linf";

// The gradient as the kernels for `x_adv` read it. A float64 one stays beside float32 images: converting
// could lose a sign.
inline Tensor signs_of(const Tensor& x_adv, const Tensor& grad) {
  return grad.scalar_type() == ScalarType::Double ? grad : beside(kStepName, "grad", x_adv, grad);
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

// Calls f(T{}, G{}) with the types of the images and of the gradient, which came through `signs_of`.
template <typename F>
void with_types(const Tensor& x_adv, const Tensor& grad, const F& f) {
  with_image_type(kStepName, "x_adv", x_adv.scalar_type(), [&](auto t) {
    if constexpr (std::is_same_v<decltype(t), double>) {
      f(t, double{});
    } else {
      with_grad_type(grad.scalar_type(), [&](auto g) { f(t, g); });
    }
  });
}

}  // namespace fastdynat
