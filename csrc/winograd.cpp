// fastdynat::winograd_conv3x3 and fastdynat::winograd_weights: on the CPU only, as cuDNN has Winograd
// convolutions of its own.
#include "winograd.h"

#include "parallel.h"
#include "tensor.h"

#include <type_traits>

namespace fastdynat {
namespace {

constexpr const char* kConvName = "winograd_conv3x3";
constexpr const char* kWeightsName = "winograd_weights";
// Bytes per thread of transformed tiles that are worked on at a time: they stay in the second cache from the
// first transform to the last. Fewer tiles than kFewTiles would read the weights too often.
constexpr int64_t kChunk = 1 << 20;
constexpr int64_t kFewTiles = 64;
constexpr int64_t kLanes = 16;  // filters that are transformed side by side

// Calls body(first, count) for blocks of channels; count is a constant in whole blocks.
template <typename Body>
FASTDYNAT_INLINE void for_blocks(int64_t channels, const Body& body) {
  int64_t c = 0;
  for (; c + kChannels <= channels; c += kChannels) body(c, std::integral_constant<int64_t, kChannels>{});
  if (c < channels) body(c, channels - c);
}

// x: (N, H, W, C) -> v: (36, count, C), the windows of tiles [first, first + count).
void transform_input(
    const float* x, float* v, const Tiles& tiles, int64_t channels, int64_t first, int64_t count) {
  parallel<float>(count, kPoints * channels, [=](int64_t begin, int64_t end) FASTDYNAT_INLINE_BODY {
    const int64_t height = tiles.height, width = tiles.width, plane = count * channels;
    for (int64_t t = begin; t < end; ++t) {
      const Tiles::At at = tiles.at(first + t);
      for_blocks(channels, [&](int64_t c0, auto lanes) FASTDYNAT_INLINE_BODY {
        const int64_t n = lanes;
        float window[kWindow][kChannels], half[kWindow][kWindow][kChannels];
        for (int64_t j = 0; j < kWindow; ++j) {
          const int64_t column = at.left + j - 1;
          for (int64_t i = 0; i < kWindow; ++i) {
            const int64_t row = at.top + i - 1;
            if (row >= 0 && row < height && column >= 0 && column < width) {
              const float* from = x + ((at.image * height + row) * width + column) * channels + c0;
              for (int64_t c = 0; c < n; ++c) window[i][c] = from[c];
            } else {
              for (int64_t c = 0; c < n; ++c) window[i][c] = 0;
            }
          }
          for (int64_t c = 0; c < n; ++c) {
            const float d[kWindow] = {window[0][c], window[1][c], window[2][c],
                                      window[3][c], window[4][c], window[5][c]};
            float s[kWindow];
            input_transform(d, s);
            for (int64_t i = 0; i < kWindow; ++i) half[i][j][c] = s[i];
          }
        }
        for (int64_t i = 0; i < kWindow; ++i) {
          const float(*q)[kChannels] = half[i];
          float* to = v + i * kWindow * plane + t * channels + c0;
          for (int64_t c = 0; c < n; ++c) {
            const float d[kWindow] = {q[0][c], q[1][c], q[2][c], q[3][c], q[4][c], q[5][c]};
            float s[kWindow];
            input_transform(d, s);
            for (int64_t j = 0; j < kWindow; ++j) to[j * plane + c] = s[j];
          }
        }
      });
    }
  });
}

// m: (36, count, K) -> y: (N, H, W, K) at the tiles [first, first + count).
void transform_output(
    const float* m, const float* bias, float* y, const Tiles& tiles, int64_t channels, int64_t first,
    int64_t count) {
  parallel<float>(count, kPoints * channels, [=](int64_t begin, int64_t end) FASTDYNAT_INLINE_BODY {
    const int64_t height = tiles.height, width = tiles.width, plane = count * channels;
    for (int64_t t = begin; t < end; ++t) {
      const Tiles::At at = tiles.at(first + t);
      for_blocks(channels, [&](int64_t c0, auto lanes) FASTDYNAT_INLINE_BODY {
        const int64_t n = lanes;
        float half[kTile][kWindow][kChannels], line[kTile][kChannels];
        for (int64_t j = 0; j < kWindow; ++j) {
          const float* q = m + j * plane + t * channels + c0;
          const int64_t next = kWindow * plane;
          for (int64_t c = 0; c < n; ++c) {
            const float d[kWindow] = {
                q[c], q[next + c], q[2 * next + c], q[3 * next + c], q[4 * next + c], q[5 * next + c]};
            float s[kTile];
            output_transform(d, s);
            for (int64_t i = 0; i < kTile; ++i) half[i][j][c] = s[i];
          }
        }
        for (int64_t i = 0; i < kTile && at.top + i < height; ++i) {
          const float(*q)[kChannels] = half[i];
          for (int64_t c = 0; c < n; ++c) {
            const float d[kWindow] = {q[0][c], q[1][c], q[2][c], q[3][c], q[4][c], q[5][c]};
            float s[kTile];
            output_transform(d, s);
            for (int64_t j = 0; j < kTile; ++j) line[j][c] = bias == nullptr ? s[j] : s[j] + bias[c0 + c];
          }
          for (int64_t j = 0; j < kTile && at.left + j < width; ++j) {
            float* to = y + ((at.image * height + at.top + i) * width + at.left + j) * channels + c0;
            for (int64_t c = 0; c < n; ++c) to[c] = line[j][c];
          }
        }
      });
    }
  });
}

Tensor bmm(const Tensor& a, const Tensor& b) {
  using torch::stable::detail::from;
  std::array<StableIValue, 2> stack{from(a), from(b)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::bmm", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

void check_float(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, op, ": ", name, " must be float32");
}

Tensor winograd_conv3x3_cpu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const Checker check{kConvName, "x", x};
  STD_TORCH_CHECK(x.dim() == 4, kConvName, ": x has shape ", shape_of(x), ", expected (N, C, H, W)");
  STD_TORCH_CHECK(
      weight.dim() == 3 && weight.size(0) == kPoints && weight.size(1) == x.size(1), kConvName,
      ": weight has shape ", shape_of(weight), ", expected (36, ", x.size(1), ", K)");
  const int64_t outputs = weight.size(2);
  check_float(kConvName, "x", x);
  check.same_dtype("weight", weight);
  check.same_device("weight", weight);
  std::optional<Tensor> shift;
  if (bias) {
    STD_TORCH_CHECK(
        bias->dim() == 1 && bias->size(0) == outputs, kConvName, ": bias has shape ", shape_of(*bias),
        ", expected (", outputs, ",)");
    check.same_dtype("bias", *bias);
    check.same_device("bias", *bias);
    shift = torch::stable::contiguous(*bias);
  }
  using torch::stable::new_empty;
  using torch::stable::transpose;
  const int64_t images = x.size(0), channels = x.size(1), height = x.size(2), width = x.size(3);
  Tensor y = new_empty(x, {images, height, width, outputs});
  Tensor out = transpose(transpose(y, 1, 3), 2, 3);
  if (y.numel() == 0) return out;
  // Not the channels-last memory format, whose strides are ambiguous where a size is 1.
  const Tensor nhwc = torch::stable::contiguous(transpose(transpose(x, 1, 3), 1, 2));
  const Tensor u = torch::stable::contiguous(weight);
  const float* b = shift ? data<float>(*shift) : nullptr;
  const Tiles tiles(height, width);
  const int64_t count = images * tiles.down * tiles.across;
  const int64_t bytes = kPoints * (channels + outputs) * static_cast<int64_t>(sizeof(float));
  const int64_t most = std::max(kFewTiles, kChunk * torch::stable::get_num_threads() / bytes);
  const int64_t parts = (count + most - 1) / most;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t first = count * part / parts, some = count * (part + 1) / parts - first;
    Tensor v = new_empty(x, {kPoints, some, channels});
    transform_input(data<float>(nhwc), mutable_data<float>(v), tiles, channels, first, some);
    const Tensor m = bmm(v, u);
    transform_output(data<float>(m), b, mutable_data<float>(y), tiles, outputs, first, some);
  }
  return out;
}

// w: `to` filters of 3 x 3 taps for each of `from` channels -> u: (36, from, to).
// Filter (f, t) begins at w[f * from_stride + t * to_stride]; `step` is 1, or -1 from the last tap for
// filters turned by 180 degrees.
void transform_weights(
    const float* w, int64_t from_stride, int64_t to_stride, int64_t step, float* u, int64_t from,
    int64_t to) {
  parallel<float>(from, kPoints * to, [=](int64_t begin, int64_t end) FASTDYNAT_INLINE_BODY {
    for (int64_t f = begin; f < end; ++f) {
      for (int64_t t0 = 0; t0 < to; t0 += kLanes) {
        const int64_t n = std::min(kLanes, to - t0);
        double taps[9][kLanes] = {}, half[kWindow][3][kLanes];
        float points[kPoints][kLanes];
        for (int64_t t = 0; t < n; ++t) {
          const float* filter = w + f * from_stride + (t0 + t) * to_stride;
          for (int64_t i = 0; i < 9; ++i) taps[i][t] = static_cast<double>(filter[i * step]);
        }
        for (int64_t j = 0; j < 3; ++j) {
          for (int64_t t = 0; t < kLanes; ++t) {
            const double column[3] = {taps[j][t], taps[3 + j][t], taps[6 + j][t]};
            double s[kWindow];
            filter_transform(column, s);
            for (int64_t i = 0; i < kWindow; ++i) half[i][j][t] = s[i];
          }
        }
        for (int64_t i = 0; i < kWindow; ++i) {
          for (int64_t t = 0; t < kLanes; ++t) {
            const double row[3] = {half[i][0][t], half[i][1][t], half[i][2][t]};
            double s[kWindow];
            filter_transform(row, s);
            for (int64_t j = 0; j < kWindow; ++j) points[i * kWindow + j][t] = static_cast<float>(s[j]);
          }
        }
        for (int64_t p = 0; p < kPoints; ++p) {
          float* line = u + (p * from + f) * to + t0;
          for (int64_t t = 0; t < n; ++t) line[t] = points[p][t];
        }
      }
    }
  });
}

void check_points(const char* name, const Tensor& t, int64_t from, int64_t to) {
  const bool fits = t.dim() == 3 && t.size(0) == kPoints && t.size(1) == from && t.size(2) == to;
  // Strides of dimensions of size 1 do not matter, nor any of an empty tensor.
  const bool contiguous =
      fits && (t.numel() == 0 || (t.stride(0) == from * to && (from == 1 || t.stride(1) == to) &&
                                  (to == 1 || t.stride(2) == 1)));
  STD_TORCH_CHECK(
      contiguous, kWeightsName, ": ", name, " has shape ", shape_of(t), ", expected contiguous (36, ", from,
      ", ", to, ")");
}

void winograd_weights_cpu(const Tensor& weight, Tensor forward, Tensor backward) {
  STD_TORCH_CHECK(
      weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3, kWeightsName, ": weight has shape ",
      shape_of(weight), ", expected (K, C, 3, 3)");
  const Checker check{kWeightsName, "weight", weight};
  const int64_t outputs = weight.size(0), channels = weight.size(1);
  check_float(kWeightsName, "weight", weight);
  check_points("forward", forward, channels, outputs);
  check_points("backward", backward, outputs, channels);
  for (const Tensor* t : {&forward, &backward}) {
    check.same_dtype("what is written to", *t);
    check.same_device("what is written to", *t);
  }
  if (weight.numel() == 0) return;
  const Tensor plain = torch::stable::contiguous(weight);
  const float* w = data<float>(plain);
  transform_weights(w, 9, 9 * channels, 1, mutable_data<float>(forward), channels, outputs);
  transform_weights(w + 8, 9 * channels, 9, -1, mutable_data<float>(backward), outputs, channels);
}

}  // namespace
}  // namespace fastdynat

STABLE_TORCH_LIBRARY_IMPL(fastdynat, CPU, m) {
  m.impl("winograd_conv3x3", TORCH_BOX(&fastdynat::winograd_conv3x3_cpu));
  m.impl("winograd_weights", TORCH_BOX(&fastdynat::winograd_weights_cpu));
}
