// What the CPU and the CUDA half of fastdynat::pgd_step_linf share: the arithmetic, the checks, the layouts.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#ifdef __CUDACC__
#define FASTDYNAT_HOST_DEVICE __host__ __device__
#else
#define FASTDYNAT_HOST_DEVICE
#endif

namespace fastdynat {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A 16-bit float seen as bits: only its sign is needed, and integer tests vectorise without conversion instructions.
template <uint16_t kInfinity>
struct Bits16 {
  uint16_t bits;
};
using HalfBits = Bits16<0x7c00>;
using BFloat16Bits = Bits16<0x7f80>;

// -1, 0 or 1; 0 for zero and for NaN.
template <typename G>
FASTDYNAT_HOST_DEVICE inline int sign(G g) {
  return (g > G(0)) - (g < G(0));
}

template <uint16_t kInfinity>
FASTDYNAT_HOST_DEVICE inline int sign(Bits16<kInfinity> g) {
  const uint16_t magnitude = g.bits & 0x7fff;
  const bool moves = magnitude != 0 && magnitude <= kInfinity;
  return moves ? ((g.bits & 0x8000) != 0 ? -1 : 1) : 0;
}

template <typename T>
struct PgdStep {
  T step_size, eps, lo, hi;

  // step_size * sign is exact, so contracting it into an FMA cannot change the result.
  FASTDYNAT_HOST_DEVICE T operator()(T x_adv, int sign, T x0) const {
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

inline std::string shape_of(const Tensor& t) {
  std::string text = "(";
  for (int64_t d = 0; d < t.dim(); ++d) text += (d ? ", " : "") + std::to_string(t.size(d));
  return text + ")";
}

// torch.ops can be called directly, so what fastdynat.ops checked is checked again. Nothing here waits for the device.
inline void check(const Tensor& x_adv, const Tensor& grad, const Tensor& x0) {
  for (const auto& [name, t] : {std::pair{"grad", &grad}, std::pair{"x0", &x0}}) {
    STD_TORCH_CHECK(
        std::equal(x_adv.sizes().begin(), x_adv.sizes().end(), t->sizes().begin(), t->sizes().end()),
        "pgd_step_linf: ", name, " has shape ", shape_of(*t), " but x_adv has shape ", shape_of(x_adv));
    STD_TORCH_CHECK(
        t->is_cuda() == x_adv.is_cuda() && t->get_device_index() == x_adv.get_device_index(),
        "pgd_step_linf: ", name, " and x_adv must be on one device");
  }
  STD_TORCH_CHECK(
      x0.scalar_type() == x_adv.scalar_type(), "pgd_step_linf: x0 and x_adv must have one dtype, float32 or float64");
}

// Whether `t` fills its memory without gaps or overlaps, in whatever order of dimensions.
inline bool is_dense(const Tensor& t) {
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (int64_t d = 0; d < t.dim(); ++d) {
    if (t.size(d) != 1) dims.emplace_back(t.stride(d), t.size(d));
  }
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

// Whether element i in memory order is the same pixel in both; strides of dimensions of size 1 do not matter.
inline bool same_order(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

// Calls launch(x_adv, grad, x0, out) with dense tensors of one order and returns a tensor with the layout of x_adv.
template <typename Launch>
Tensor run(const Tensor& x_adv, const Tensor& grad, const Tensor& x0, const Launch& launch) {
  check(x_adv, grad, x0);
  Tensor out = torch::stable::empty_like(x_adv);
  if (x_adv.numel() == 0) return out;
  if (is_dense(x_adv) && same_order(x_adv, grad) && same_order(x_adv, x0)) {
    launch(x_adv, grad, x0, out);
    return out;
  }
  const Tensor plain = torch::stable::contiguous(x_adv);
  Tensor result = torch::stable::empty_like(plain);
  launch(plain, torch::stable::contiguous(grad), torch::stable::contiguous(x0), result);
  torch::stable::copy_(out, result);
  return out;
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
  switch (x_adv.scalar_type()) {
    case ScalarType::Float: return with_grad_type(grad.scalar_type(), [&](auto g) { f(float{}, g); });
    case ScalarType::Double: return with_grad_type(grad.scalar_type(), [&](auto g) { f(double{}, g); });
    default: STD_TORCH_CHECK(false, "pgd_step_linf: x_adv must be float32 or float64");
  }
}

}  // namespace fastdynat
