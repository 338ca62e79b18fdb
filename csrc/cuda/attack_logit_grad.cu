// fastdynat::attack_logit_grad on CUDA devices: a warp per row, which it reads from memory once and from the
// cache after that.
#include "../attack_logit_grad.h"

#include "launch.cuh"

namespace fastdynat {
namespace {

constexpr int kWarp = 32;
constexpr int kRowThreads = 64;  // small blocks: a batch of 256 rows still reaches every multiprocessor
constexpr int kRowsPerBlock = kRowThreads / kWarp;

template <typename A, typename Combine>
__device__ __forceinline__ A warp_reduce(A value, const Combine& combine) {
  for (int offset = kWarp / 2; offset > 0; offset >>= 1)
    value = combine(value, __shfl_xor_sync(0xffffffffu, value, offset));
  return value;
}

template <typename A>
__device__ __forceinline__ A warp_sum(A value) {
  return warp_reduce(value, [](A a, A b) { return a + b; });
}

template <typename A>
__device__ __forceinline__ A exp_of(A x) {
  return exp_nonpositive(x);
}

// The logits of one row, and what a lane does with its share of them.
template <typename A, typename T>
struct Row {
  const T* data;
  int32_t classes, lane;

  __device__ __forceinline__ A operator[](int32_t k) const { return static_cast<A>(data[k]); }

  template <typename F>
  __device__ __forceinline__ void each(const F& f) const {
    for (int32_t k = lane; k < classes; k += kWarp) f(k, static_cast<A>(data[k]));
  }

  // The first largest class other than a and b, to every lane; -1 if there is none.
  __device__ __forceinline__ int32_t best_but(int32_t a, int32_t b) const {
    A best = 0;
    int32_t at = -1;
    each([&](int32_t k, A z) {
      if (k != a && k != b && (at < 0 || beats(z, best))) {
        best = z;
        at = k;
      }
    });
    for (int offset = kWarp / 2; offset > 0; offset >>= 1) {
      const A their_best = __shfl_xor_sync(0xffffffffu, best, offset);
      const int32_t theirs = __shfl_xor_sync(0xffffffffu, at, offset);
      const bool first = same_place(their_best, best) && theirs < at;
      if (theirs >= 0 && (at < 0 || beats(their_best, best) || first)) {
        best = their_best;
        at = theirs;
      }
    }
    return at;
  }
};

template <typename A, typename T>
__device__ __forceinline__ void hard_row(
    const Row<A, T>& row, int32_t label, bool rescale, A sign, T* grad, A* value) {
  const int32_t first = row.best_but(-1, -1);
  const A top = row[first];
  const A ours = row[label] - top;
  A others = 0, rest = 0;
  row.each([&](int32_t k, A z) {
    const A e = exp_of(z - top);
    others += k == first ? A(0) : e;
    rest += k == label ? A(0) : e;
  });
  others =
      warp_sum(others) + (top - top);  // NaN where the maximum is infinite or NaN: all of the row becomes NaN
  const A inverse = A(1) / (A(1) + others);
  rest = warp_sum(rest) * inverse;
  if (row.lane == 0) *value = sign * (log1p_nonnegative(others) - ours);
  if (rescale && rest < kFaint<A>) {
    const A best = row[row.best_but(label, -1)];
    if (best > -kInfinity<A>) {
      A sum = 0;
      row.each([&](int32_t k, A z) { sum += k == label ? A(0) : exp_of(z - best); });
      sum = warp_sum(sum);
      const A scale = sign * inverse_power_of_two(sum);
      row.each(
          [&](int32_t k, A z) { grad[k] = static_cast<T>(scale * (k == label ? -sum : exp_of(z - best))); });
      return;
    }
  }
  const A scale = rescale ? sign * inverse_power_of_two(rest) : sign;
  row.each([&](int32_t k, A z) {
    grad[k] = static_cast<T>(scale * (k == label ? -rest : exp_of(z - top) * inverse));
  });
}

// `targets` are read from value `from` on.
template <typename A, typename T>
__device__ __forceinline__ void soft_row(
    const Row<A, T>& row, const FloatRows& targets, int64_t from, bool kl, bool rescale, A sign, T* grad,
    A* value) {
  const int32_t first = row.best_but(-1, -1);
  const A top = row[first];
  const auto log_probability = [&](int32_t k) {
    const A q = load_value<A>(targets, from + k);
    return q > A(0) ? A(0) : q;  // but for rounding
  };
  const auto probability = [&](int32_t k) {
    return kl ? exp_of(log_probability(k)) : load_value<A>(targets, from + k);
  };
  A others = 0, mass = 0;
  row.each([&](int32_t k, A z) {
    others += k == first ? A(0) : exp_of(z - top);
    mass += probability(k);
  });
  others = warp_sum(others) + (top - top);
  mass = warp_sum(mass);
  const A log_total = log1p_nonnegative(others);
  const A factor = mass / (A(1) + others);
  A sum = 0, largest = 0;
  row.each([&](int32_t k, A z) {
    const A p = probability(k);
    const A term = p * ((kl ? log_probability(k) : A(0)) - (z - top - log_total));
    sum += p == A(0) ? A(0) : term;
    const A size = fabs(exp_of(z - top) * factor - p);
    largest = size > largest ? size : largest;
  });
  sum = warp_sum(sum) + (factor - factor);
  largest = warp_reduce(largest, [](A a, A b) { return a > b ? a : b; });
  if (row.lane == 0) *value = sign * sum;
  const A scale = rescale ? sign * inverse_power_of_two(largest) : sign;
  row.each(
      [&](int32_t k, A z) { grad[k] = static_cast<T>(scale * (exp_of(z - top) * factor - probability(k))); });
}

template <typename A, typename T>
__device__ __forceinline__ void sparse_row(
    const Row<A, T>& row, int32_t label, AttackLoss loss, bool rescale, A sign, T* grad, A* value) {
  const int32_t first = row.best_but(-1, -1);
  const int32_t other = first == label ? row.best_but(first, -1) : first;
  SparseGrad<A> sparse = margin_grad(label, other, row[label], row[other]);
  if (loss == AttackLoss::kDlr) {
    const int32_t second = first == label ? other : row.best_but(first, -1);
    const int32_t third = row.best_but(first, second);
    sparse = dlr_grad(label, other, first, third, row[label], row[other], row[first], row[third]);
  }
  const A bad = row[first] - row[first];
  const A scale = rescale ? sign * inverse_power_of_two(sparse.largest()) : sign;
  row.each([&](int32_t k, A) { grad[k] = static_cast<T>(scale * sparse.entry(k) + bad); });
  if (row.lane == 0) *value = sign * sparse.value + bad;
}

template <typename A, typename T>
__global__ void __launch_bounds__(kRowThreads) attack_logit_grad_kernel(
    const T* __restrict__ logits, const int64_t* __restrict__ labels, FloatRows targets, T* __restrict__ grad,
    A* __restrict__ value, int64_t n, int32_t classes, AttackLoss loss, bool rescale, A sign) {
  for (int64_t i = int64_t{blockIdx.x} * kRowsPerBlock + threadIdx.x / kWarp; i < n;
       i += int64_t{gridDim.x} * kRowsPerBlock) {
    const Row<A, T> row{logits + i * classes, classes, static_cast<int32_t>(threadIdx.x % kWarp)};
    T* to = grad + i * classes;
    if (is_soft(loss)) {
      soft_row(row, targets, i * classes, loss == AttackLoss::kKl, rescale, sign, to, value + i);
      continue;
    }
    const int64_t label = labels[i];
    if (label < 0 || label >= classes) {
      const A nan = kInfinity<A> - kInfinity<A>;
      row.each([&](int32_t k, A) { to[k] = static_cast<T>(nan); });
      if (row.lane == 0) value[i] = nan;
    } else if (loss == AttackLoss::kCe) {
      hard_row(row, static_cast<int32_t>(label), rescale, sign, to, value + i);
    } else {
      sparse_row(row, static_cast<int32_t>(label), loss, rescale, sign, to, value + i);
    }
  }
}

std::tuple<Tensor, Tensor> attack_logit_grad_cuda(
    const Tensor& logits, const Tensor& labels, int64_t loss, bool rescale, bool targeted) {
  const OnDevice device(logits);
  return run_logit_grad(logits, labels, loss, rescale, targeted, [&](LogitGrad& g) {
    with_float_type("attack_logit_grad", "logits", g.logits.scalar_type(), [&](auto element) {
      using T = decltype(element);
      using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
      launch(
          attack_logit_grad_kernel<A, T>, blocks_for(g.n, kRowsPerBlock), kRowThreads, device.stream,
          data<T>(g.logits), is_soft(g.loss) ? nullptr : data<int64_t>(g.labels), FloatRows(g.labels),
          mutable_data<T>(g.grad), mutable_data<A>(g.value), g.n, g.classes, g.loss, g.rescale,
          g.targeted ? A(-1) : A(1));
    });
  });
}

}  // namespace
}  // namespace fastdynat

STABLE_TORCH_LIBRARY_IMPL(FASTDYNAT_LIBRARY, FASTDYNAT_KEY, m) {
  m.impl("attack_logit_grad", TORCH_BOX(&fastdynat::attack_logit_grad_cuda));
}
