// Products of float32 matrices that fit the processor's caches, on one thread.
#pragma once

#include "inline.h"

#include <cstdint>

namespace fastdynat {

constexpr int64_t kDepth = 128;            // terms that are added up in registers at a time
constexpr int64_t kRowStride = kDepth + 16;  // of the left factor: rows do not share the same cache sets
constexpr int64_t kPanel = 32;             // columns of the right factor that are copied side by side

FASTDYNAT_INLINE int64_t blocks_of(int64_t depth) { return (depth + kDepth - 1) / kDepth; }
FASTDYNAT_INLINE int64_t padded_columns(int64_t columns) { return (columns + kPanel - 1) / kPanel * kPanel; }

// The position of value k of row r in a left factor of `rows` rows.
FASTDYNAT_INLINE int64_t left_position(int64_t rows, int64_t r, int64_t k) {
  return (k / kDepth * rows + r) * kRowStride + k % kDepth;
}

// c = a b. a: (rows, depth) at `left_position`; b: (depth, columns), its rows `b_stride` apart; c: (rows,
// padded_columns(columns)), the padding 0. Every sum is taken in the order of the depth, however the product
// is divided into calls by rows or columns. panel: scratch of kDepth * kPanel values.
void block_product(
    const float* a, const float* b, int64_t b_stride, float* c, int64_t rows, int64_t depth, int64_t columns,
    float* panel);

}  // namespace fastdynat
