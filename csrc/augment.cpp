// fastdynat::augment on the CPU.
#include "augment.h"

#include "parallel.h"

#include <cstring>

namespace fastdynat {
namespace {

// Writes the crop of one image, (channels, height, width): rows are copied or mirrored, pixels outside the
// stored image are 0.
FASTDYNAT_INLINE void cut_out(
    const uint8_t* image, uint8_t* to, const Cut& cut, int64_t channels, int64_t height, int64_t width) {
  // Columns [left, right) of the cut lie in the image.
  const int64_t left = std::min(width, std::max<int64_t>(0, -cut.right));
  const int64_t right = std::max(left, std::min(width, width - cut.right));
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t y = 0; y < height; ++y, to += width) {
      const int64_t source = y + cut.down;
      const bool inside = source >= 0 && source < height && left < right;
      if (!inside || right - left < width) std::memset(to, 0, width);
      if (!inside) continue;
      const uint8_t* from = image + (c * height + source) * width + cut.right;
      if (cut.flip) {
        for (int64_t x = left; x < right; ++x) to[width - 1 - x] = from[x];
      } else {
        std::memcpy(to + left, from + left, right - left);
      }
    }
  }
}

template <typename T>
void augment_images(const uint8_t* store, AugmentTensors& s, bool channels_last) {
  T* out = mutable_data<T>(s.out);
  const Draws draws = s.draws;
  const int64_t channels = s.channels, height = s.height, width = s.width, plane = height * width,
                row = channels * plane;
  parallel<T>(s.images, row, [=](int64_t begin, int64_t end) FASTDYNAT_INLINE_BODY {
    std::vector<uint8_t> buffer(row);
    const uint8_t* bytes = buffer.data();
    for (int64_t n = begin; n < end; ++n) {
      const Cut cut = draws.cut(n);
      cut_out(store + cut.index * row, buffer.data(), cut, channels, height, width);
      T* to = out + n * row;
      if (!channels_last) {
        for (int64_t i = 0; i < row; ++i) to[i] = unit<T>(bytes[i]);
      } else if (channels == 3) {
        for (int64_t i = 0; i < plane; ++i) {
          for (int64_t c = 0; c < 3; ++c) to[3 * i + c] = unit<T>(bytes[c * plane + i]);
        }
      } else {
        for (int64_t i = 0; i < plane; ++i) {
          for (int64_t c = 0; c < channels; ++c) to[channels * i + c] = unit<T>(bytes[c * plane + i]);
        }
      }
    }
  });
}

Tensor augment_cpu(
    const Tensor& images, const Tensor& indices, const std::optional<Tensor>& shifts,
    const std::optional<Tensor>& flips, int64_t pad, ScalarType dtype, bool channels_last) {
  return run_augment(images, indices, shifts, flips, pad, dtype, channels_last, [&](AugmentTensors& s) {
    const Draws& draws = s.draws;
    for (int64_t n = 0; n < s.images; ++n) {
      STD_TORCH_CHECK(
          draws.is_stored(n), "augment: index ", draws.indices[n], " is outside [0, ", draws.stored,
          "), the images of the store");
      STD_TORCH_CHECK(
          draws.is_padded(n), "augment: shift (", draws.tops[n], ", ", draws.lefts[n], ") is outside [0, ",
          2 * pad, "], twice the padding");
    }
    with_float_type("augment", "dtype", dtype, [&](auto type) {
      augment_images<decltype(type)>(data<uint8_t>(images), s, channels_last);
    });
  });
}

}  // namespace
}  // namespace fastdynat

STABLE_TORCH_LIBRARY_IMPL(fastdynat, CPU, m) {
  m.impl("augment", TORCH_BOX(&fastdynat::augment_cpu));
}
