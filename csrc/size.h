// A step size, radius or other length that may change from one replay of a captured graph to the next.
#pragma once

#include "inline.h"
#include "tensor.h"

namespace fastdynat {

// A number, or the address at which the device keeps it when the kernel runs.
struct Size {
  double number;
  const double* kept;  // may be null

  FASTDYNAT_INLINE double operator()() const { return kept == nullptr ? number : *kept; }
};

// `number`, or what `tensor` holds: a float64 scalar beside the first argument.
inline Size size_of(
    const Checker& check, const char* name, double number, const std::optional<Tensor>& tensor) {
  if (!tensor) return {number, nullptr};
  STD_TORCH_CHECK(
      tensor->dim() == 0 && tensor->scalar_type() == ScalarType::Double, check.op, ": ", name,
      " must be a float64 scalar, got shape ", shape_of(*tensor));
  check.same_device(name, *tensor);
  return {number, data<double>(*tensor)};
}

}  // namespace fastdynat
