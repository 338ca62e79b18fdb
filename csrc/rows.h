// Rows of class scores, shared by the operators on logits. A is the type computed in: float, or double for
// float64 logits.
#pragma once

#include <tuple>

#include "inline.h"
#include "math.h"
#include "tensor.h"

namespace fastdynat {

// (N, K) of any floating dtype, contiguous. The dtype is a run-time value, so that kernels are compiled
// once per A and not once per combination of dtypes.
struct FloatRows {
  const void* data;
  ScalarType dtype;

  FloatRows() : data(nullptr), dtype(ScalarType::Float) {}
  explicit FloatRows(const Tensor& t) : data(t.const_data_ptr()), dtype(t.scalar_type()) {}

  // Whether `count` values may be loaded as one, at any multiple of `count` values.
  FASTDYNAT_INLINE bool aligned_for(int count) const {
    const uintptr_t size = dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
    return reinterpret_cast<uintptr_t>(data) % (size * static_cast<uintptr_t>(count)) == 0;
  }
};

// Calls f(typed pointer) for the data of `rows`. Inlines, unlike with_float_type.
template <typename F>
FASTDYNAT_INLINE void with_pointer(const FloatRows& rows, const F& f) {
  switch (rows.dtype) {
    case ScalarType::Double: return f(static_cast<const double*>(rows.data));
    case ScalarType::Half: return f(static_cast<const Half*>(rows.data));
    case ScalarType::BFloat16: return f(static_cast<const BFloat16*>(rows.data));
    default: return f(static_cast<const float*>(rows.data));
  }
}

// Value i of `rows` as A: one copy of the code around it serves every dtype.
template <typename A>
FASTDYNAT_INLINE A load_value(const FloatRows& rows, int64_t i) {
  A value;
  with_pointer(rows, [&](const auto* data) { value = static_cast<A>(data[i]); });
  return value;
}

// Whether x comes before `best` in the order of torch.argmax: greater, or the first NaN.
template <typename A>
FASTDYNAT_INLINE bool beats(A x, A best) {
  return (x > best) | ((x != x) & (best == best));
}

template <typename A>
FASTDYNAT_INLINE bool same_place(A x, A y) {
  return (x == y) | ((x != x) & (y != y));
}

// The dtype computed in.
inline ScalarType wide_type(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Calls f(A{}) with the type computed in.
template <typename F>
void with_wide_type(const Tensor& logits, const F& f) {
  if (logits.scalar_type() == ScalarType::Double) return f(double{});
  return f(float{});
}

inline void check_logits(const Checker& check) {
  const Tensor& logits = check.first;
  STD_TORCH_CHECK(
      logits.dim() == 2 && logits.size(1) > 0 && logits.size(1) <= std::numeric_limits<int32_t>::max(),
      check.op, ": ", check.first_name, " must be (N, K) with K >= 1, got shape ", shape_of(logits));
  STD_TORCH_CHECK(
      is_float(logits.scalar_type()), check.op, ": ", check.first_name,
      " must be float32, float64, float16 or bfloat16");
}

// Refuses classes out of range, on the CPU only: on a GPU reading them would wait for the device.
inline void check_classes(
    const char* op, const char* name, const int64_t* classes, int64_t count, int64_t known) {
  for (int64_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(
        classes[i] >= 0 && classes[i] < known, op, ": ", name, "[", i, "] is ", classes[i],
        ", expected a class in [0, ", known, ")");
  }
}

}  // namespace fastdynat
