// fastdynat::soft_margin on CUDA devices: a warp per row, which its registers hold; a block for a longer row,
// read again from the caches.
#include "../soft_margin.h"

#include "launch.cuh"

namespace fastdynat {
namespace {

constexpr int kWarpsPerBlock = 4;  // few, so that a batch of some hundred rows reaches every multiprocessor
constexpr int kMostHeld = 32;      // values per lane: up to 1024 classes

// A row in the registers of a warp. Each lane has `each` see its own classes; `reduce` combines what the
// lanes have.
template <typename A, int kHeld>
struct WarpRow {
  static constexpr bool kHolds = true;
  static constexpr int kRowsPerBlock = kWarpsPerBlock, kBlock = 32 * kWarpsPerBlock;
  int32_t classes;
  A values[kHeld];

  __device__ __forceinline__ static int64_t in_block() { return threadIdx.x / 32; }
  __device__ __forceinline__ static bool first_thread() { return threadIdx.x % 32 == 0; }

  __device__ __forceinline__ WarpRow(const FloatRows& rows, int64_t row, int32_t k) : classes(k) {
    with_pointer(rows, [&](const auto* data) {
      each([&](int32_t i, A& value) { value = static_cast<A>(data[row * classes + i]); });
    });
  }

  template <typename F>
  __device__ __forceinline__ void each(const F& f) {
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
      const int32_t k = threadIdx.x % 32 + 32 * h;
      if (k < classes) f(k, values[h]);
    }
  }

  template <typename Combine>
  __device__ __forceinline__ A reduce(A value, A, const Combine& combine) const {
    for (int offset = 16; offset > 0; offset >>= 1)
      value = combine(value, __shfl_xor_sync(0xffffffffu, value, offset));
    return value;
  }
};

// A row of any length, which every `each` reads.
template <typename A>
struct BlockRow {
  static constexpr bool kHolds = false;
  static constexpr int kRowsPerBlock = 1, kBlock = kThreads;
  const FloatRows& rows;
  int64_t row;
  int32_t classes;

  __device__ __forceinline__ static int64_t in_block() { return 0; }
  __device__ __forceinline__ static bool first_thread() { return threadIdx.x == 0; }

  __device__ __forceinline__ BlockRow(const FloatRows& rows, int64_t row, int32_t k)
      : rows(rows), row(row), classes(k) {}

  template <typename F>
  __device__ __forceinline__ void each(const F& f) {
    with_pointer(rows, [&](const auto* data) {
#pragma unroll 4
      for (int64_t k = threadIdx.x; k < classes; k += kThreads) {
        A value = static_cast<A>(data[row * classes + k]);
        f(static_cast<int32_t>(k), value);
      }
    });
  }

  template <typename Combine>
  __device__ __forceinline__ A reduce(A value, A identity, const Combine& combine) const {
    __shared__ A shared[32];
    return block_reduce(value, shared, identity, combine);
  }
};

template <typename A, typename Row>
__global__ void __launch_bounds__(Row::kBlock) soft_margin_kernel(
    FloatRows logits, const int64_t* __restrict__ labels, int64_t n, int32_t classes, SoftMargin<A> soft,
    A* __restrict__ margin, A* __restrict__ grad) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * Row::kRowsPerBlock;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * Row::kRowsPerBlock + Row::in_block(); i < n;
       i += step) {
    const int64_t given = labels[i];
    const int32_t label = given >= 0 && given < classes ? static_cast<int32_t>(given) : -1;
    const A own = label >= 0 ? load_value<A>(logits, i * classes + label) : kNaN<A>;
    Row row(logits, i, classes);
    A top = -kInfinity<A>;
    row.each([&](int32_t k, A& x) { top = k != label && x > top ? x : top; });
    top = row.reduce(top, -kInfinity<A>, [](A a, A b) { return b > a ? b : a; });
    A sum = A(0);
    row.each([&](int32_t k, A& x) {
      x = k == label ? A(0) : soft.exponential(x, top);
      sum += x;
    });
    sum = soft.valid(row.reduce(sum, A(0), [](A a, A b) { return a + b; }), own);
    if (grad != nullptr) {
      const A factor = soft.factor(sum), at_label = soft.label_grad(sum);
      row.each([&](int32_t k, A& x) {
        const A e = Row::kHolds ? x : soft.exponential(x, top);
        grad[i * classes + k] = k == label ? at_label : e * factor;
      });
    }
    if (Row::first_thread()) margin[i] = soft.margin(own, top, sum);
  }
}

std::tuple<Tensor, Tensor> soft_margin_cuda(
    const Tensor& logits, const Tensor& labels, double temperature, bool with_grad) {
  const OnDevice device(logits);
  return run_soft_margin(logits, labels, temperature, with_grad, [&](SoftMarginRows& rows) {
    with_wide_type(rows.logits, [&](auto wide) {
      using A = decltype(wide);
      const auto start = [&](auto kernel, int64_t per_block, int block) {
        launch(
            kernel, blocks_for(rows.n, per_block), block, device.stream, FloatRows(rows.logits),
            data<int64_t>(rows.labels), rows.n, rows.classes, SoftMargin<A>{static_cast<A>(temperature)},
            mutable_data<A>(rows.margin), with_grad ? mutable_data<A>(rows.grad) : static_cast<A*>(nullptr));
      };
      const auto start_warps = [&](auto held) {
        using Row = WarpRow<A, decltype(held)::value>;
        start(soft_margin_kernel<A, Row>, Row::kRowsPerBlock, Row::kBlock);
      };
      if (rows.classes <= 32) return start_warps(std::integral_constant<int, 1>{});
      if (rows.classes <= 32 * 4) return start_warps(std::integral_constant<int, 4>{});
      if (rows.classes <= 32 * kMostHeld) return start_warps(std::integral_constant<int, kMostHeld>{});
      start(soft_margin_kernel<A, BlockRow<A>>, 1, kThreads);
    });
  });
}

}  // namespace
}  // namespace fastdynat

STABLE_TORCH_LIBRARY_IMPL(FASTDYNAT_LIBRARY, FASTDYNAT_KEY, m) {
  m.impl("soft_margin", TORCH_BOX(&fastdynat::soft_margin_cuda));
}
