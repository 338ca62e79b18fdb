// Tensors of the operators: checks whose messages name the argument, layouts, dtypes. torch.ops can be called
// directly, so the checks of fastdynat.ops are repeated. Nothing here waits for the device.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace fastdynat {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_of(const Tensor& t) {
  std::string text = "(";
  for (int64_t d = 0; d < t.dim(); ++d) text += (d ? ", " : "") + std::to_string(t.size(d));
  return text + ")";
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  return a.dim() == b.dim() && std::equal(a.sizes().begin(), a.sizes().end(), b.sizes().begin());
}

// An operator's name and first argument, against which the others are checked.
struct Checker {
  const char* op;
  const char* first_name;
  const Tensor& first;

  void same_device(const char* name, const Tensor& t) const {
    STD_TORCH_CHECK(
        t.is_cuda() == first.is_cuda() && t.get_device_index() == first.get_device_index(),
        op, ": ", name, " and ", first_name, " must be on one device");
  }

  void same_shape_and_device(const char* name, const Tensor& t) const {
    STD_TORCH_CHECK(
        same_shape(t, first), op, ": ", name, " has shape ", shape_of(t), " but ", first_name, " has shape ",
        shape_of(first));
    same_device(name, t);
  }

  void same_dtype(const char* name, const Tensor& t) const {
    STD_TORCH_CHECK(
        t.scalar_type() == first.scalar_type(), op, ": ", name, " and ", first_name, " must have one dtype");
  }

  // (N,) for a first argument of N rows.
  void one_per_row(const char* name, const Tensor& t, ScalarType dtype, const char* dtype_name) const {
    STD_TORCH_CHECK(
        t.dim() == 1 && first.dim() >= 1 && t.size(0) == first.size(0), op, ": ", name, " has shape ",
        shape_of(t), ", expected one entry per row of ", first_name, ", which has shape ", shape_of(first));
    STD_TORCH_CHECK(t.scalar_type() == dtype, op, ": ", name, " must be ", dtype_name);
    same_device(name, t);
  }
};

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

// Whether each image (entry of dimension 0) is one block of a dense tensor: contiguous and channels-last both
// are.
inline bool images_are_blocks(const Tensor& t) {
  return t.dim() > 0 && (t.size(0) == 1 || t.numel() == 0 || t.stride(0) * t.size(0) == t.numel());
}

// Whether element i in memory order is the same pixel in both; strides of dimensions of size 1 do not matter.
inline bool same_order(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

// Images (N, C, H, W) of any layout as contiguous (N, H, W, C).
inline Tensor as_nhwc(const Tensor& t) {
  using torch::stable::transpose;
  return torch::stable::contiguous(transpose(transpose(t, 1, 3), 1, 2));
}

// Images (N, H, W, C) seen as (N, C, H, W).
inline Tensor as_nchw(const Tensor& t) {
  using torch::stable::transpose;
  return transpose(transpose(t, 1, 3), 2, 3);
}

inline void check_float(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, op, ": ", name, " must be float32");
}

// An uninitialised tensor with the layout of `t` and another dtype.
inline Tensor empty_like(const Tensor& t, ScalarType dtype) {
  using torch::stable::detail::from;
  const std::optional<torch::headeronly::Layout> layout;
  const std::optional<torch::stable::Device> device;
  const std::optional<bool> pin_memory;
  const std::optional<torch::headeronly::MemoryFormat> memory_format;
  std::array<StableIValue, 6> stack{from(t),          from(std::optional<ScalarType>(dtype)),
                                    from(layout),     from(device),
                                    from(pin_memory), from(memory_format)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::empty_like", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

inline bool is_float(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Half ||
         dtype == ScalarType::BFloat16;
}

// `t`, of any floating dtype, as kernels for `images` read it. float64 stands only beside float64: `t` is
// converted otherwise, which is all that kernels would do to its values, and they need not exist for every
// pair of types.
inline Tensor beside(const char* op, const char* name, const Tensor& images, const Tensor& t) {
  STD_TORCH_CHECK(
      is_float(t.scalar_type()), op, ": ", name, " must be float32, float64, float16 or bfloat16");
  const ScalarType type = images.scalar_type();
  if (t.scalar_type() == type || (type != ScalarType::Double && t.scalar_type() != ScalarType::Double))
    return t;
  Tensor out = empty_like(t, type);
  torch::stable::copy_(out, t);
  return out;
}

inline int64_t per_image(const Tensor& t) { return t.size(0) == 0 ? 0 : t.numel() / t.size(0); }

template <typename T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <typename T>
T* mutable_data(Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Calls f(T{}) with the C++ type of a floating dtype.
template <typename F>
void with_float_type(const char* op, const char* name, ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::Half: return f(Half{});
    case ScalarType::BFloat16: return f(BFloat16{});
    default: STD_TORCH_CHECK(false, op, ": ", name, " must be float32, float64, float16 or bfloat16");
  }
}

// Calls f(T{}) with the C++ type of images, which are never kept in half precision.
template <typename F>
void with_image_type(const char* op, const char* name, ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    default: STD_TORCH_CHECK(false, op, ": ", name, " must be float32 or float64");
  }
}

// Calls f(T{}, G{}) with the types of images and of what has been put `beside` them.
template <typename F>
void with_types_beside(
    const char* op, const char* images_name, const Tensor& images, const Tensor& other, const F& f) {
  with_image_type(op, images_name, images.scalar_type(), [&](auto t) {
    using T = decltype(t);
    if constexpr (std::is_same_v<T, double>) {
      f(t, double{});
    } else {
      switch (other.scalar_type()) {
        case ScalarType::Half: return f(t, Half{});
        case ScalarType::BFloat16: return f(t, BFloat16{});
        default: return f(t, float{});
      }
    }
  });
}

}  // namespace fastdynat
