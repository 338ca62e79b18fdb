// Shared by the CPU and the CUDA half of fastdynat::augment: the geometry, the checks, the output.
#pragma once

#include "inline.h"
#include "tensor.h"

#include <limits>

namespace fastdynat {

// A pixel as a number in [0, 1]. Division, because a product with 1/255 has other last bits.
template <typename T>
FASTDYNAT_INLINE T unit(uint8_t pixel) {
  return static_cast<T>(static_cast<float>(pixel) / 255.0f);
}

template <>
FASTDYNAT_INLINE double unit<double>(uint8_t pixel) {
  return pixel / 255.0;
}

// The crop of one stored image: pixel (y, x) of the result is (y + down, (flip ? width - 1 - x : x)
// + right) of image `index`, or zero outside of it.
struct Cut {
  int64_t index, down, right;
  bool flip;
};

// The arguments in memory. tops and lefts may be null: no crop; flips too: no flip.
struct Draws {
  const int64_t *indices, *tops, *lefts;
  const bool* flips;
  int64_t stored, pad;  // number of images in the store, pixels of padding

  FASTDYNAT_INLINE bool is_stored(int64_t n) const { return indices[n] >= 0 && indices[n] < stored; }

  FASTDYNAT_INLINE bool is_padded(int64_t n) const {
    return tops == nullptr || (tops[n] >= 0 && tops[n] <= 2 * pad && lefts[n] >= 0 && lefts[n] <= 2 * pad);
  }

  // Image n of the batch, for which both must hold.
  FASTDYNAT_INLINE Cut cut(int64_t n) const {
    const bool crop = tops != nullptr;
    return {indices[n], crop ? tops[n] - pad : 0, crop ? lefts[n] - pad : 0, flips != nullptr && flips[n]};
  }
};

struct AugmentTensors {
  Tensor out;
  Draws draws;
  int64_t images, channels, height, width;
};

// Calls launch(AugmentTensors&) and returns the batch, in the memory format asked for.
template <typename Launch>
Tensor run_augment(
    const Tensor& store, const Tensor& indices, const std::optional<Tensor>& shifts,
    const std::optional<Tensor>& flips, int64_t pad, ScalarType dtype, bool channels_last,
    const Launch& launch) {
  STD_TORCH_CHECK(
      store.dim() == 4 && store.scalar_type() == ScalarType::Byte && store.is_contiguous(),
      "augment: images must be a contiguous uint8 tensor of shape (M, C, H, W), got shape ", shape_of(store));
  STD_TORCH_CHECK(
      indices.dim() == 1 && indices.scalar_type() == ScalarType::Long && indices.is_contiguous(),
      "augment: indices must be a contiguous int64 tensor of shape (N), got shape ", shape_of(indices));
  Checker{"augment", "images", store}.same_device("indices", indices);
  const Checker check{"augment", "indices", indices};
  if (flips) {
    check.one_per_row("flips", *flips, ScalarType::Bool, "bool");
    STD_TORCH_CHECK(flips->is_contiguous(), "augment: flips must be contiguous");
  }
  if (shifts) {
    STD_TORCH_CHECK(
        shifts->dim() == 2 && shifts->size(0) == 2 && shifts->size(1) == indices.size(0) &&
            shifts->scalar_type() == ScalarType::Long && (shifts->size(1) <= 1 || shifts->stride(1) == 1),
        "augment: shifts must be an int64 tensor of shape (2, ", indices.size(0),
        ") with contiguous rows, got shape ", shape_of(*shifts));
    check.same_device("shifts", *shifts);
  }
  STD_TORCH_CHECK(
      pad >= 0 && pad <= std::numeric_limits<int32_t>::max(),
      "augment: pad must be 0 or more pixels, below 2^31, got ", pad);
  const int64_t images = indices.size(0), channels = store.size(1), height = store.size(2),
                width = store.size(3);
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  STD_TORCH_CHECK(
      images <= kMost && channels * height * width <= kMost, "augment: a batch of ", images,
      " images of shape ", shape_of(store), " is too large");
  using torch::stable::new_empty;
  Tensor out =
      channels_last
          ? as_nchw(new_empty(store, {images, height, width, channels}, dtype))
          : new_empty(store, {images, channels, height, width}, dtype);
  if (out.numel() == 0) return out;
  const int64_t* tops = shifts ? data<int64_t>(*shifts) : nullptr;
  const Draws draws{
      data<int64_t>(indices),
      tops,
      shifts ? tops + shifts->stride(0) : nullptr,
      flips ? data<bool>(*flips) : nullptr,
      store.size(0),
      pad};
  AugmentTensors s{out, draws, images, channels, height, width};
  launch(s);
  return out;
}

}  // namespace fastdynat
