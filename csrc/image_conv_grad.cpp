// fastdynat::image_conv_grad: on the CPU only. The input gradient of a convolution of the few channels of an image:
// a product with the filters, whose windows are added up at the pixels. Libraries compute whole vectors of channels
// and keep three.
#include "block_product.h"
#include "parallel.h"
#include "tensor.h"

#include <cstring>
#include <memory>
#include <vector>

namespace fastdynat {
namespace {

constexpr const char* kName = "image_conv_grad";
constexpr int64_t kPixels = 112;  // of the result that are worked on at a time: they stay in the second cache
constexpr int64_t kMost = 1 << 20;  // of sides, strides and paddings, in pixels: nothing overflows
constexpr int64_t kLanes = 8;
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));

struct Geometry {
  int64_t images, channels, height, width;  // of the images
  int64_t outputs, down, across;            // of the result: channels, rows, columns
  int64_t rows, columns;                    // of a filter
  int64_t stride_down, stride_across, pad_down, pad_across;

  int64_t window() const { return rows * columns * channels; }
  // Rows of the result that are worked on at a time.
  int64_t band() const { return std::max<int64_t>(1, kPixels / std::max<int64_t>(across, 1)); }
  int64_t bands() const { return (down + band() - 1) / band(); }
};

// to += from, `count` values.
FASTDYNAT_INLINE void add(const float* from, float* to, int64_t count) {
  for (; count >= kLanes; count -= kLanes, from += kLanes, to += kLanes) {
    Lanes one, other;
    std::memcpy(&one, from, sizeof(Lanes));
    std::memcpy(&other, to, sizeof(Lanes));
    other += one;
    std::memcpy(to, &other, sizeof(Lanes));
  }
  for (int64_t i = 0; i < count; ++i) to[i] += from[i];
}

struct Backward {
  Geometry g;
  const float* grad;    // (N, H', W', K)
  const float* gate;    // (N, H', W', K), may be null: where it is not positive, the gradient counts as 0
  const float* filter;  // (K, window)
  float* to;            // (N, H, W, C)

  int64_t scratch() const {
    const int64_t count = g.band() * g.across;
    return kDepth * kPanel + count * (blocks_of(g.outputs) * kRowStride + padded_columns(g.window()));
  }

  void run(int64_t image, float* scratch) const {
    float* out = to + image * g.height * g.width * g.channels;
    std::memset(out, 0, static_cast<size_t>(g.height * g.width * g.channels) * sizeof(float));
    for (int64_t band = 0; band < g.bands(); ++band) {
      const int64_t first = band * g.band(), end = std::min(g.down, first + g.band());
      const int64_t count = (end - first) * g.across, at = (image * g.down + first) * g.across * g.outputs;
      float *panel = scratch, *a = panel + kDepth * kPanel;
      float* m = a + count * blocks_of(g.outputs) * kRowStride;
      run_vectorised<float>(
          [&](int64_t, int64_t) FASTDYNAT_INLINE_BODY {
            pass(grad + at, gate == nullptr ? nullptr : gate + at, count, a);
          },
          0, 1);
      block_product(a, filter, g.window(), m, count, g.outputs, g.window(), panel);
      run_vectorised<float>(
          [&](int64_t, int64_t) FASTDYNAT_INLINE_BODY { scatter(m, first, end, out); }, 0, 1);
    }
  }

  // The gradients that pass the ReLU, as a left factor.
  FASTDYNAT_INLINE void pass(const float* from, const float* open, int64_t count, float* a) const {
    const int64_t outputs = g.outputs;
    for (int64_t block = 0; block < outputs; block += kDepth) {
      const int64_t some = std::min(kDepth, outputs - block);
      for (int64_t pixel = 0; pixel < count; ++pixel) {
        const float* source = from + pixel * outputs + block;
        float* put = a + left_position(count, pixel, block);
        if (open == nullptr) {
          for (int64_t k = 0; k < some; ++k) put[k] = source[k];
        } else {
          const float* o = open + pixel * outputs + block;
          for (int64_t k = 0; k < some; ++k) put[k] = o[k] <= 0 ? 0.0f : source[k];  // as torch, for NaN too
        }
      }
    }
  }

  // Adds the windows m of the rows [first, end) of the result to the image `out`. Windows beside each other
  // overlap: to add one right after the other would wait for the first one's stores.
  FASTDYNAT_INLINE void scatter(const float* m, int64_t first, int64_t end, float* out) const {
    const int64_t stride = padded_columns(g.window()), line = g.columns * g.channels;
    const int64_t apart = (g.columns + g.stride_across - 1) / g.stride_across;
    for (int64_t row = first; row < end; ++row, m += g.across * stride) {
      const int64_t top = row * g.stride_down - g.pad_down;
      const int64_t begin = std::max<int64_t>(0, -top), past = std::min(g.rows, g.height - top);
      for (int64_t phase = 0; phase < apart; ++phase) {
        for (int64_t column = phase; column < g.across; column += apart) {
          const int64_t left = column * g.stride_across - g.pad_across;
          const int64_t from = std::max<int64_t>(0, -left), to = std::min(g.columns, g.width - left);
          const int64_t run = (to - from) * g.channels;  // not positive in the padding
          const float* source = m + column * stride + from * g.channels;
          for (int64_t r = begin; run > 0 && r < past; ++r) {
            add(source + r * line, out + ((top + r) * g.width + left + from) * g.channels, run);
          }
        }
      }
    }
  }
};

Geometry geometry_of(
    const char* op, const Tensor& weight, int64_t images, int64_t height, int64_t width, int64_t stride_down,
    int64_t stride_across, int64_t pad_down, int64_t pad_across) {
  STD_TORCH_CHECK(
      weight.dim() == 4 && weight.numel() > 0, op, ": weight has shape ", shape_of(weight),
      ", expected (K, C, R, S), none of them 0");
  STD_TORCH_CHECK(
      stride_down > 0 && stride_across > 0 && pad_down >= 0 && pad_across >= 0, op,
      ": strides must be positive, and paddings not negative");
  STD_TORCH_CHECK(
      std::max({height, width, stride_down, stride_across, pad_down, pad_across}) <= kMost, op,
      ": sides, strides and paddings must be at most ", kMost);
  Geometry g{images,         weight.size(1), height,        width,    weight.size(0), 0,         0,
             weight.size(2), weight.size(3), stride_down,   stride_across, pad_down,  pad_across};
  const int64_t free_down = height + 2 * pad_down - g.rows, free_across = width + 2 * pad_across - g.columns;
  STD_TORCH_CHECK(
      free_down >= 0 && free_across >= 0, op, ": images of ", height, " x ", width,
      " pixels are smaller than the filters");
  g.down = free_down / stride_down + 1;
  g.across = free_across / stride_across + 1;
  return g;
}

// weight (K, C, R, S) -> (K, R, S, C).
std::vector<float> filters(const Geometry& g, const Tensor& weight) {
  const Tensor plain = torch::stable::contiguous(weight);
  const float* w = data<float>(plain);
  std::vector<float> found(static_cast<size_t>(g.window() * g.outputs));
  for (int64_t k = 0; k < g.outputs; ++k) {
    for (int64_t c = 0; c < g.channels; ++c) {
      for (int64_t tap = 0; tap < g.rows * g.columns; ++tap) {
        found[static_cast<size_t>(k * g.window() + tap * g.channels + c)] = *w++;
      }
    }
  }
  return found;
}

Tensor image_conv_grad_cpu(
    const Tensor& grad, const Tensor& weight, const std::optional<Tensor>& gate, int64_t height, int64_t width,
    int64_t stride_down, int64_t stride_across, int64_t pad_down, int64_t pad_across) {
  const Checker check{kName, "grad", grad};
  STD_TORCH_CHECK(
      grad.dim() == 4, kName, ": grad has shape ", shape_of(grad), ", expected (N, K, H', W')");
  check_float(kName, "grad", grad);
  check.same_dtype("weight", weight);
  check.same_device("weight", weight);
  const Geometry g = geometry_of(
      kName, weight, grad.size(0), height, width, stride_down, stride_across, pad_down, pad_across);
  STD_TORCH_CHECK(
      grad.size(1) == g.outputs && grad.size(2) == g.down && grad.size(3) == g.across, kName,
      ": grad has shape ", shape_of(grad), ", expected (N, ", g.outputs, ", ", g.down, ", ", g.across, ")");
  if (gate) {
    check.same_shape_and_device("gate", *gate);
    check.same_dtype("gate", *gate);
  }
  Tensor to = torch::stable::new_empty(grad, {g.images, g.height, g.width, g.channels});
  const Tensor out = as_nchw(to);
  if (to.numel() == 0) return out;
  const Tensor read = as_nhwc(grad);
  std::optional<Tensor> open;
  if (gate) open = as_nhwc(*gate);
  const std::vector<float> filter = filters(g, weight);
  const Backward work{
      g, data<float>(read), open ? data<float>(*open) : nullptr, filter.data(), mutable_data<float>(to)};
  torch::stable::parallel_for(0, g.images, 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> scratch(new float[static_cast<size_t>(work.scratch())]);
    for (int64_t image = begin; image < end; ++image) work.run(image, scratch.get());
  });
  return out;
}

}  // namespace
}  // namespace fastdynat

STABLE_TORCH_LIBRARY_IMPL(fastdynat, CPU, m) {
  m.impl("image_conv_grad", TORCH_BOX(&fastdynat::image_conv_grad_cpu));
}
