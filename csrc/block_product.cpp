// Products of float32 matrices: a panel of the right factor is copied side by side, and a kernel per
// instruction set keeps the sums of a few rows in registers.
#include "block_product.h"

#include "parallel.h"

#include <algorithm>
#include <cstring>

#if FASTDYNAT_X86
#include <immintrin.h>
#endif

namespace fastdynat {
namespace {

// c (kRows, kPanel) = a panel, or with `add` c += a panel, over `depth` terms.
using Kernel = void (*)(
    const float* a, const float* panel, int64_t depth, float* c, int64_t c_stride, bool add);

#if FASTDYNAT_X86
constexpr int kRows512 = 14, kRows256 = 6;  // their sums leave registers for the factors

template <int kRows>
__attribute__((target("avx512f"))) void kernel_avx512(
    const float* a, const float* panel, int64_t depth, float* c, int64_t c_stride, bool add) {
  __m512 left[kRows], right[kRows];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    left[r] = add ? _mm512_loadu_ps(c + r * c_stride) : _mm512_setzero_ps();
    right[r] = add ? _mm512_loadu_ps(c + r * c_stride + 16) : _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < depth; ++k, ++a, panel += kPanel) {
    const __m512 b0 = _mm512_loadu_ps(panel), b1 = _mm512_loadu_ps(panel + 16);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const __m512 x = _mm512_set1_ps(a[r * kRowStride]);
      left[r] = _mm512_fmadd_ps(x, b0, left[r]);
      right[r] = _mm512_fmadd_ps(x, b1, right[r]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    _mm512_storeu_ps(c + r * c_stride, left[r]);
    _mm512_storeu_ps(c + r * c_stride + 16, right[r]);
  }
}

template <int kRows>
__attribute__((target("avx2,fma"))) void kernel_avx2(
    const float* a, const float* panel, int64_t depth, float* c, int64_t c_stride, bool add) {
  for (int64_t half = 0; half < kPanel; half += 16) {
    __m256 left[kRows], right[kRows];
    float* to = c + half;
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      left[r] = add ? _mm256_loadu_ps(to + r * c_stride) : _mm256_setzero_ps();
      right[r] = add ? _mm256_loadu_ps(to + r * c_stride + 8) : _mm256_setzero_ps();
    }
    const float *x = a, *b = panel + half;
    for (int64_t k = 0; k < depth; ++k, ++x, b += kPanel) {
      const __m256 b0 = _mm256_loadu_ps(b), b1 = _mm256_loadu_ps(b + 8);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const __m256 one = _mm256_broadcast_ss(x + r * kRowStride);
        left[r] = _mm256_fmadd_ps(one, b0, left[r]);
        right[r] = _mm256_fmadd_ps(one, b1, right[r]);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      _mm256_storeu_ps(to + r * c_stride, left[r]);
      _mm256_storeu_ps(to + r * c_stride + 8, right[r]);
    }
  }
}

constexpr Kernel kAvx512[] = {
    kernel_avx512<1>,  kernel_avx512<2>,  kernel_avx512<3>,  kernel_avx512<4>,  kernel_avx512<5>,
    kernel_avx512<6>,  kernel_avx512<7>,  kernel_avx512<8>,  kernel_avx512<9>,  kernel_avx512<10>,
    kernel_avx512<11>, kernel_avx512<12>, kernel_avx512<13>, kernel_avx512<14>};
constexpr Kernel kAvx2[] = {kernel_avx2<1>, kernel_avx2<2>, kernel_avx2<3>,
                            kernel_avx2<4>, kernel_avx2<5>, kernel_avx2<6>};
static_assert(sizeof(kAvx512) == kRows512 * sizeof(Kernel) && sizeof(kAvx2) == kRows256 * sizeof(Kernel));
#endif

// Other processors: the compiler's vectors, one row at a time.
void kernel_baseline(
    const float* a, const float* panel, int64_t depth, float* c, int64_t, bool add) {
  float sum[kPanel];
  for (int64_t j = 0; j < kPanel; ++j) sum[j] = add ? c[j] : 0.0f;
  for (int64_t k = 0; k < depth; ++k, panel += kPanel) {
#ifdef __FP_FAST_FMAF
    for (int64_t j = 0; j < kPanel; ++j) sum[j] = __builtin_fmaf(a[k], panel[j], sum[j]);
#else
    for (int64_t j = 0; j < kPanel; ++j) sum[j] += a[k] * panel[j];
#endif
  }
  for (int64_t j = 0; j < kPanel; ++j) c[j] = sum[j];
}

constexpr Kernel kBaseline[] = {kernel_baseline};

// The kernels of 1, 2, ... `most` rows.
struct Kernels {
  const Kernel* of;
  int64_t most;
};

Kernels kernels() {
#if FASTDYNAT_X86
  if (isa() == Isa::kAvx512) return {kAvx512, kRows512};
  if (isa() == Isa::kAvx2) return {kAvx2, kRows256};
#endif
  return {kBaseline, 1};
}

// panel (depth, kPanel) = b (depth, columns), with zeros. The panel beside it is asked for: processors do not
// foresee steps of whole rows.
void copy_panel(const float* b, int64_t stride, int64_t depth, int64_t columns, float* panel) {
  for (int64_t k = 0; k < depth; ++k, b += stride, panel += kPanel) {
    __builtin_prefetch(b + kPanel, 0, 2);
    __builtin_prefetch(b + kPanel + 16, 0, 2);
    if (columns == kPanel) {
      std::memcpy(panel, b, kPanel * sizeof(float));
    } else {
      for (int64_t j = 0; j < kPanel; ++j) panel[j] = j < columns ? b[j] : 0.0f;
    }
  }
}

}  // namespace

void block_product(
    const float* a, const float* b, int64_t b_stride, float* c, int64_t rows, int64_t depth, int64_t columns,
    float* panel) {
  const Kernels kernel = kernels();
  const int64_t c_stride = padded_columns(columns);
  const int64_t parts = (rows + kernel.most - 1) / kernel.most;  // about equally tall
  if (depth == 0) std::fill(c, c + rows * c_stride, 0.0f);
  for (int64_t k = 0; k < depth; k += kDepth) {
    const int64_t terms = std::min(kDepth, depth - k);
    for (int64_t j = 0; j < columns; j += kPanel) {
      copy_panel(b + k * b_stride + j, b_stride, terms, std::min(kPanel, columns - j), panel);
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t r = rows * part / parts, some = rows * (part + 1) / parts - r;
        kernel.of[some - 1](
            a + left_position(rows, r, k), panel, terms, c + r * c_stride + j, c_stride, k > 0);
      }
    }
  }
}

}  // namespace fastdynat
