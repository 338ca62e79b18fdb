// fastdynat::winograd_conv3x3 and fastdynat::winograd_weights: on the CPU only, as cuDNN has Winograd
// convolutions of its own.
#include "winograd.h"

#include "block_product.h"
#include "parallel.h"
#include "tensor.h"

#include <cstring>
#include <memory>
#include <type_traits>

namespace fastdynat {
namespace {

constexpr const char* kConvName = "winograd_conv3x3";
constexpr const char* kWeightsName = "winograd_weights";
// Bytes of transformed tiles that a thread works on at a time: they stay in the second cache from the first
// transform to the last. Fewer tiles than kFewTiles would read the weights too often; of weights that do not
// fit kNearBytes, twice as many are worth it.
constexpr int64_t kChunk = 3 << 18;
constexpr int64_t kFewTiles = 42;
constexpr int64_t kNearBytes = 4 << 20;
constexpr int64_t kFilters = 16;  // that are transformed side by side
constexpr int64_t kFloat = sizeof(float);

// Channels that are transformed side by side. Processors with shorter vectors split it.
constexpr int64_t kLanes = 16;
typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));

// Calls body(first, V{}) for all channels, V being a vector of them or the float of one.
template <typename Body>
FASTDYNAT_INLINE void for_channels(int64_t channels, const Body& body) {
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) body(c, Vector{});
  for (; c < channels; ++c) body(c, float{});
}

// Loads and stores of any alignment.
template <typename V>
FASTDYNAT_INLINE void load(const float* from, V& to) {
  std::memcpy(&to, from, sizeof(V));
}
template <typename V>
FASTDYNAT_INLINE void store(const V& from, float* to) {
  std::memcpy(to, &from, sizeof(V));
}

// What follows the convolution: each part as its own pass would compute it, in this order.
struct Epilogue {
  const float* bias;      // (K,), may be null
  const float* residual;  // (N, H, W, K), may be null
  bool relu;
};

// x: (N, H, W, C) -> v: for each of 36 points the left factor (count, C) of a `block_product`, of the windows
// of tiles [first, first + count). With kGated, x is 0 where the gate, of its layout, is not above 0: the
// gradient of a ReLU whose result is the gate. A gate of NaN is open, as in torch.
template <bool kGated>
void transform_input(
    const float* x, const float* gate, float* v, const Tiles& tiles, int64_t channels, int64_t first,
    int64_t count) {
  const auto body = [=](int64_t begin, int64_t end) FASTDYNAT_INLINE_BODY {
    const int64_t height = tiles.height, width = tiles.width;
    const int64_t plane = blocks_of(channels) * count * kRowStride;
    for (int64_t t = begin; t < end; ++t) {
      const Tiles::At tile = tiles.at(first + t);
      int64_t offset[kWindow][kWindow];  // of a pixel's channels; -1 in the padding
      for (int64_t i = 0; i < kWindow; ++i) {
        const int64_t row = tile.top + i - 1;
        for (int64_t j = 0; j < kWindow; ++j) {
          const int64_t column = tile.left + j - 1;
          const bool inside = row >= 0 && row < height && column >= 0 && column < width;
          offset[i][j] = inside ? ((tile.image * height + row) * width + column) * channels : -1;
        }
      }
      for_channels(channels, [&](int64_t c, auto lanes) FASTDYNAT_INLINE_BODY {
        using V = decltype(lanes);
        V half[kWindow][kWindow], d[kWindow], s[kWindow];
        for (int64_t j = 0; j < kWindow; ++j) {
#pragma GCC unroll 6
          for (int64_t i = 0; i < kWindow; ++i) {
            d[i] = V{};
            if (offset[i][j] >= 0) {
              load(x + offset[i][j] + c, d[i]);
              if constexpr (kGated) {
                V open;
                load(gate + offset[i][j] + c, open);
                d[i] = open <= V{} ? V{} : d[i];
              }
            }
          }
          input_transform(d, s);
#pragma GCC unroll 6
          for (int64_t i = 0; i < kWindow; ++i) half[i][j] = s[i];
        }
        float* to = v + left_position(count, t, c);
        for (int64_t i = 0; i < kWindow; ++i, to += kWindow * plane) {
          input_transform(half[i], s);
#pragma GCC unroll 6
          for (int64_t j = 0; j < kWindow; ++j) store(s[j], to + j * plane);
        }
      });
    }
  };
  run_vectorised<float>(body, 0, count);
}

// m: (36, count, padded_columns(some)) -> y: (N, H, W, K) at tiles [first, first + count) and `some` channels
// from `from`, with what the epilogue adds.
void transform_output(
    const float* m, const Epilogue& epilogue, float* y, const Tiles& tiles, int64_t channels, int64_t from,
    int64_t some, int64_t first, int64_t count) {
  const auto body = [=](int64_t begin, int64_t end) FASTDYNAT_INLINE_BODY {
    const int64_t height = tiles.height, width = tiles.width;
    const int64_t stride = padded_columns(some), plane = count * stride;
    for (int64_t t = begin; t < end; ++t) {
      const Tiles::At tile = tiles.at(first + t);
      const int64_t down = std::min(kTile, height - tile.top), across = std::min(kTile, width - tile.left);
      const int64_t corner = ((tile.image * height + tile.top) * width + tile.left) * channels + from;
      for_channels(some, [&](int64_t c, auto lanes) FASTDYNAT_INLINE_BODY {
        using V = decltype(lanes);
        V half[kTile][kWindow], d[kWindow], s[kTile];
        const float* q = m + t * stride + c;
        for (int64_t j = 0; j < kWindow; ++j, q += plane) {
#pragma GCC unroll 6
          for (int64_t i = 0; i < kWindow; ++i) load(q + i * kWindow * plane, d[i]);
          output_transform(d, s);
#pragma GCC unroll 6
          for (int64_t i = 0; i < kTile; ++i) half[i][j] = s[i];
        }
        V shift{};
        if (epilogue.bias != nullptr) load(epilogue.bias + from + c, shift);
        int64_t at = corner + c;
        for (int64_t i = 0; i < down; ++i, at += width * channels) {
          output_transform(half[i], s);
          for (int64_t j = 0; j < across; ++j) {
            V sum = s[j] + shift;
            if (epilogue.residual != nullptr) {
              V more;
              load(epilogue.residual + at + j * channels, more);
              sum += more;
            }
            if (epilogue.relu) sum = sum < V{} ? V{} : sum;
            store(sum, y + at + j * channels);
          }
        }
      });
    }
  };
  run_vectorised<float>(body, 0, count);
}

// A convolution in parts: each some tiles and some of the filters, from the first transform to the last on
// one thread.
struct Winograd {
  const float* x;     // (N, H, W, C)
  const float* gate;  // of x, may be null
  const float* u;     // (36, C, K)
  Epilogue epilogue;
  float* y;  // (N, H, W, K)
  Tiles tiles;
  int64_t count, channels, outputs;
  int64_t parts, slices;  // of the tiles and of the filters

  Winograd(
      const float* x, const float* gate, const float* u, Epilogue epilogue, float* y, Tiles tiles,
      int64_t count, int64_t channels, int64_t outputs, int64_t threads)
      : x(x),
        gate(gate),
        u(u),
        epilogue(epilogue),
        y(y),
        tiles(tiles),
        count(count),
        channels(channels),
        outputs(outputs) {
    const bool near = kPoints * channels * outputs * kFloat <= kNearBytes;
    const int64_t few = near ? kFewTiles : 2 * kFewTiles;
    const int64_t most = std::max(few, kChunk / (kPoints * (channels + outputs) * kFloat));
    parts = (count + most - 1) / most;
    if (parts > 1) parts = std::min(count, (parts + threads - 1) / threads * threads);
    // Every slice transforms the windows anew, so there are no more than give each thread one.
    slices = std::min((threads + parts - 1) / parts, padded_columns(outputs) / kPanel);
  }

  // The first filter of a slice: whole panels.
  int64_t filter(int64_t slice) const {
    return std::min(outputs, padded_columns(outputs) / kPanel * slice / slices * kPanel);
  }

  void run(int64_t part, int64_t slice, float* scratch) const {
    const int64_t first = count * part / parts, some = count * (part + 1) / parts - first;
    const int64_t from = filter(slice), filters = filter(slice + 1) - from;
    const int64_t plane = blocks_of(channels) * some * kRowStride, out = some * padded_columns(filters);
    float *panel = scratch, *v = panel + kDepth * kPanel, *m = v + kPoints * plane;
    if (gate == nullptr) {
      transform_input<false>(x, nullptr, v, tiles, channels, first, some);
    } else {
      transform_input<true>(x, gate, v, tiles, channels, first, some);
    }
    for (int64_t p = 0; p < kPoints; ++p) {
      const float* points = u + p * channels * outputs + from;
      block_product(v + p * plane, points, outputs, m + p * out, some, channels, filters, panel);
    }
    transform_output(m, epilogue, y, tiles, outputs, from, filters, first, some);
  }

  int64_t scratch() const {
    const int64_t some = (count + parts - 1) / parts;
    const int64_t filters = ((padded_columns(outputs) / kPanel + slices - 1) / slices) * kPanel;
    return kDepth * kPanel + kPoints * some * (blocks_of(channels) * kRowStride + filters);
  }
};

void run_winograd(const Winograd& work) {
  torch::stable::parallel_for(0, work.parts * work.slices, 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> scratch(new float[work.scratch()]);
    for (int64_t i = begin; i < end; ++i) work.run(i / work.slices, i % work.slices, scratch.get());
  });
}

Tensor winograd_conv3x3_cpu(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& residual, const std::optional<Tensor>& gate, bool relu) {
  const Checker check{kConvName, "x", x};
  STD_TORCH_CHECK(x.dim() == 4, kConvName, ": x has shape ", shape_of(x), ", expected (N, C, H, W)");
  STD_TORCH_CHECK(
      weight.dim() == 3 && weight.size(0) == kPoints && weight.size(1) == x.size(1), kConvName,
      ": weight has shape ", shape_of(weight), ", expected (36, ", x.size(1), ", K)");
  const int64_t outputs = weight.size(2);
  check_float(kConvName, "x", x);
  check.same_dtype("weight", weight);
  check.same_device("weight", weight);
  const int64_t images = x.size(0), channels = x.size(1), height = x.size(2), width = x.size(3);
  std::optional<Tensor> shift, more, open;
  if (bias) {
    STD_TORCH_CHECK(
        bias->dim() == 1 && bias->size(0) == outputs, kConvName, ": bias has shape ", shape_of(*bias),
        ", expected (", outputs, ",)");
    check.same_dtype("bias", *bias);
    check.same_device("bias", *bias);
    shift = torch::stable::contiguous(*bias);
  }
  if (residual) {
    STD_TORCH_CHECK(
        residual->dim() == 4 && residual->size(0) == images && residual->size(1) == outputs &&
            residual->size(2) == height && residual->size(3) == width,
        kConvName, ": residual has shape ", shape_of(*residual), ", expected (", images, ", ", outputs, ", ",
        height, ", ", width, ")");
    check.same_dtype("residual", *residual);
    check.same_device("residual", *residual);
  }
  if (gate) {
    check.same_shape_and_device("gate", *gate);
    check.same_dtype("gate", *gate);
  }
  Tensor y = torch::stable::new_empty(x, {images, height, width, outputs});
  Tensor out = as_nchw(y);
  if (y.numel() == 0) return out;
  // Not the channels-last memory format, whose strides are ambiguous where a size is 1.
  const Tensor read = as_nhwc(x);
  if (residual) more = as_nhwc(*residual);
  if (gate) open = as_nhwc(*gate);
  const Tensor u = torch::stable::contiguous(weight);
  const auto pointer = [](const std::optional<Tensor>& t) { return t ? data<float>(*t) : nullptr; };
  const Tiles tiles(height, width);
  const int64_t count = images * tiles.down * tiles.across;
  run_winograd(Winograd(
      data<float>(read), pointer(open), data<float>(u), {pointer(shift), pointer(more), relu},
      mutable_data<float>(y), tiles, count, channels, outputs, torch::stable::get_num_threads()));
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
      for (int64_t t0 = 0; t0 < to; t0 += kFilters) {
        const int64_t n = std::min(kFilters, to - t0);
        double taps[9][kFilters] = {}, half[kWindow][3][kFilters];
        float points[kPoints][kFilters];
        for (int64_t t = 0; t < n; ++t) {
          const float* filter = w + f * from_stride + (t0 + t) * to_stride;
          for (int64_t i = 0; i < 9; ++i) taps[i][t] = static_cast<double>(filter[i * step]);
        }
        for (int64_t j = 0; j < 3; ++j) {
          for (int64_t t = 0; t < kFilters; ++t) {
            const double column[3] = {taps[j][t], taps[3 + j][t], taps[6 + j][t]};
            double s[kWindow];
            filter_transform(column, s);
            for (int64_t i = 0; i < kWindow; ++i) half[i][j][t] = s[i];
          }
        }
        for (int64_t i = 0; i < kWindow; ++i) {
          for (int64_t t = 0; t < kFilters; ++t) {
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
