// Shared by all PGD steps on the CPU and on CUDA devices: the checks, the layouts, the outputs.
#pragma once

#include <tuple>

#include "inline.h"
#include "size.h"
#include "tensor.h"

namespace fastdynat {

// The inputs and outputs of a step. `low` and `moved` have no elements where they are not asked for.
struct StepTensors {
  Tensor x_adv, grad, x0;  // dense, of one memory order; each image one block where `moved` is asked for
  Tensor out, low, moved;
  int64_t rows, row;  // images and elements per image, or 1 and all elements where `moved` is not asked for
};

// The half-precision copy of the result: none, or a tensor of either type.
struct LowCopy {
  void* to;  // may be null
  bool half;

  explicit LowCopy(StepTensors& s)
      : to(s.low.numel() > 0 ? s.low.mutable_data_ptr() : nullptr),
        half(s.low.scalar_type() == ScalarType::Half) {}

  // Copies values[0, n) to the places from `at` on.
  template <typename T>
  FASTDYNAT_INLINE void write(const T* values, int64_t at, int64_t n) const {
    if (to == nullptr) return;
    half ? copy(values, static_cast<Half*>(to) + at, n) : copy(values, static_cast<BFloat16*>(to) + at, n);
  }

 private:
  template <typename T, typename L>
  FASTDYNAT_INLINE static void copy(const T* values, L* low, int64_t n) {
    for (int64_t i = 0; i < n; ++i) low[i] = static_cast<L>(static_cast<float>(values[i]));
  }
};

// Step size and radius of a step, each as a number or, where the optional tensor is there, on the device.
struct StepSizes {
  Size step_size, eps;

  StepSizes(
      const char* op, const Tensor& x_adv, double step_size, double eps,
      const std::optional<Tensor>& device_step_size, const std::optional<Tensor>& device_eps)
      : step_size(size_of({op, "x_adv", x_adv}, "device_step_size", step_size, device_step_size)),
        eps(size_of({op, "x_adv", x_adv}, "device_eps", eps, device_eps)) {}
};

// Calls launch(StepTensors&) with tensors in an order that the kernels can walk; returns (out, low, moved),
// laid out as x_adv.
template <typename Launch>
std::tuple<Tensor, Tensor, Tensor> run_step(
    const char* op, const Tensor& x_adv, const Tensor& grad, const Tensor& x0,
    std::optional<ScalarType> low_dtype, bool count, const Launch& launch) {
  const Checker check{op, "x_adv", x_adv};
  STD_TORCH_CHECK(!count || x_adv.dim() > 0, op, ": x_adv needs a first dimension of images");
  check.same_shape_and_device("grad", grad);
  check.same_shape_and_device("x0", x0);
  check.same_dtype("x0", x0);
  STD_TORCH_CHECK(
      !low_dtype || *low_dtype == ScalarType::BFloat16 || *low_dtype == ScalarType::Half,
      op, ": low_dtype must be bfloat16 or float16");
  Tensor out = torch::stable::empty_like(x_adv);
  Tensor low = low_dtype ? empty_like(out, *low_dtype) : torch::stable::new_empty(x_adv, {0});
  Tensor moved = count ? torch::stable::new_zeros(x_adv, {x_adv.size(0)}, ScalarType::Bool)
                       : torch::stable::new_empty(x_adv, {0}, ScalarType::Bool);
  if (x_adv.numel() == 0) return {out, low, moved};
  const bool direct = is_dense(x_adv) && same_order(x_adv, grad) && same_order(x_adv, x0) &&
                      same_order(out, x_adv) && (!low_dtype || same_order(low, x_adv)) &&
                      (!count || images_are_blocks(x_adv));
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

// Calls f(T{}, G{}) with the types of the images and of the gradient, which is `beside` them.
template <typename F>
void with_step_types(const char* op, const Tensor& x_adv, const Tensor& grad, const F& f) {
  with_types_beside(op, "x_adv", x_adv, grad, f);
}

}  // namespace fastdynat
