// fastdynat::dynamic_label_cross_entropy on CUDA devices: one kernel for the rows, one block for their sum
// and the counts.
#include "../dynamic_label_cross_entropy.h"

#include "rows.cuh"

namespace fastdynat {
namespace {

template <typename A>
struct Arguments {
  FloatRows logits, guide;  // guide.data is null where the guide gives class indices
  const int64_t* given;     // those indices
  const A* weights;         // may be null
  A* loss;
  int64_t *predictions, *dynamic_labels;
  A* grad;  // may be null
  int64_t n;
  int32_t classes;
  SmoothedLabel<A> smooth;
  A inverse_temperature, grad_scale;
};

template <typename Walk, bool kSoft>
__global__ void __launch_bounds__(kThreads, 1) cross_entropy_kernel(Arguments<typename Walk::A> a) {
  using A = typename Walk::A;
  using View = typename Walk::View;
  const bool exists = Walk::row() < a.n;
  const int64_t row =
      exists ? Walk::row() : a.n - 1;  // the rest of a last block computes along, for the shuffles
  const View z(a.logits, row, a.classes);
  const View g(a.guide, row, a.classes);

  int32_t prediction = 0, label = 0;
  const A top = Walk::best(z, &prediction);
  A poison = top - top;  // NaN where the maximum is infinite or NaN: all of that row becomes NaN
  A guide_top = 0, guide_inverse = 0;
  int64_t dynamic = 0;
  if (a.guide.data != nullptr) {
    guide_top = Walk::best(g, &label);
    dynamic = label;
  } else {
    dynamic = a.given[row];
    const bool known = dynamic >= 0 && dynamic < a.classes;
    label = known ? static_cast<int32_t>(dynamic) : 0;
    poison += known ? A(0) : kNaN<A>;
  }

  A others = 0, cost = 0;
  Walk::each(z, [&](int32_t k, A x) { others += k == prediction ? A(0) : exp_nonpositive(x - top); });
  others = Walk::sum(others) + poison;
  if (kSoft) {
    A sum = 0;
    Walk::each(g, [&](int32_t k, A x) {
      sum += k == label ? A(0) : exp_nonpositive((x - guide_top) * a.inverse_temperature);
    });
    guide_inverse = a.smooth.inverse(Walk::sum(sum) + (guide_top - guide_top));
  }
  const auto target = [&](A guide) {
    return kSoft
               ? a.smooth.target(exp_nonpositive((guide - guide_top) * a.inverse_temperature) * guide_inverse)
               : a.smooth.uniform;
  };
  if (kSoft || a.smooth.uniform != A(0)) {
    Walk::template each_pair<kSoft>(
        z, g, [&](int32_t, A x, A guide) { cost += a.smooth.cost(target(guide), x - top); });
    cost = Walk::sum(cost);
  }
  const A at_label = z.at(label) - top;
  if (!kSoft) cost += a.smooth.cost(a.smooth.keep, at_label);

  if (!exists) return;
  const A weight = a.weights != nullptr ? a.weights[row] : A(1);
  if (Walk::leads()) {
    a.loss[row] = weight * (log1p_nonnegative(others) + cost);
    a.predictions[row] = prediction;
    a.dynamic_labels[row] = dynamic;
  }
  if (a.grad == nullptr) return;
  const A inverse = a.smooth.inverse(others);
  const A scale = weight * a.grad_scale;
  const A label_grad = a.smooth.label_grad(others, exp_nonpositive(at_label), label == prediction, a.classes);
  Walk::template write<kSoft>(a.grad, z, g, [&](int32_t k, A x, A guide) {
    const A value = exp_nonpositive(x - top) * inverse - target(guide);
    return scale * (!kSoft && k == label ? label_grad : value);
  });
}

// One block, so that the order of the sum is fixed. `loss` and `counts` may be null; inputs are where there
// are no rows.
template <typename A>
__global__ void __launch_bounds__(kThreads) reduce_kernel(
    const A* __restrict__ row_loss, const int64_t* __restrict__ predictions,
    const int64_t* __restrict__ dynamic_labels, const int64_t* __restrict__ labels, A* __restrict__ loss,
    int64_t* __restrict__ counts, int64_t n, bool mean) {
  __shared__ double sums[32];
  __shared__ long long shared_counts[32];
  double sum = 0;
  long long target_correct = 0, guide_correct = 0;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
    if (loss != nullptr) sum += static_cast<double>(row_loss[i]);
    if (counts != nullptr) {
      target_correct += predictions[i] == labels[i];
      guide_correct += dynamic_labels[i] == labels[i];
    }
  }
  const auto plus = [](auto x, auto y) { return x + y; };
  sum = block_reduce(sum, sums, 0.0, plus);
  target_correct = block_reduce(target_correct, shared_counts, 0LL, plus);
  guide_correct = block_reduce(guide_correct, shared_counts, 0LL, plus);
  if (threadIdx.x != 0) return;
  if (loss != nullptr) *loss = static_cast<A>(mean ? sum / static_cast<double>(n) : sum);
  if (counts != nullptr) {
    counts[0] = target_correct;
    counts[1] = guide_correct;
  }
}

template <typename A>
void launch_cross_entropy(CrossEntropy& c, cudaStream_t stream) {
  Arguments<A> a{};
  a.logits = FloatRows(c.logits);
  if (c.hard_guide) {
    a.given = data<int64_t>(c.guide);
  } else {
    a.guide = FloatRows(c.guide);
  }
  a.weights = c.weights ? data<A>(*c.weights) : nullptr;
  a.loss = mutable_data<A>(c.row_loss);
  a.predictions = mutable_data<int64_t>(c.predictions);
  a.dynamic_labels = mutable_data<int64_t>(c.dynamic_labels);
  a.grad = c.grad.dim() == 2 ? mutable_data<A>(c.grad) : nullptr;
  a.n = c.n;
  a.classes = c.classes;
  a.smooth = c.smoothed<A>();
  a.inverse_temperature = static_cast<A>(1.0 / c.temperature);
  a.grad_scale = c.grad_scale<A>();
  if (c.n > 0) {
    with_walk<A>(c.classes, [&](auto walk) {
      using Walk = decltype(walk);
      auto* kernel = c.soft ? cross_entropy_kernel<Walk, true> : cross_entropy_kernel<Walk, false>;
      launch(kernel, Walk::blocks(c.n), kThreads, stream, a);
    });
  }
  const bool reduce = c.reduction != Reduction::kNone;
  if (!reduce && !c.labels) return;
  launch(
      reduce_kernel<A>, 1, kThreads, stream, a.loss, a.predictions, a.dynamic_labels,
      c.labels ? data<int64_t>(*c.labels) : nullptr, reduce ? mutable_data<A>(c.loss) : nullptr,
      c.labels ? mutable_data<int64_t>(c.counts) : nullptr, c.n, c.reduction == Reduction::kMean);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> dynamic_label_cross_entropy_cuda(
    const Tensor& logits, const Tensor& guide, const std::optional<Tensor>& labels,
    const std::optional<Tensor>& weights, bool soft, double temperature, double smoothing, int64_t reduction,
    bool with_grad) {
  const OnDevice device(logits);
  return run_cross_entropy(
      logits, guide, labels, weights, soft, temperature, smoothing, reduction, with_grad,
      [&](CrossEntropy& c) {
        with_wide_type(c.logits, [&](auto wide) { launch_cross_entropy<decltype(wide)>(c, device.stream); });
      });
}

}  // namespace
}  // namespace fastdynat

STABLE_TORCH_LIBRARY_IMPL(FASTDYNAT_LIBRARY, FASTDYNAT_KEY, m) {
  m.impl("dynamic_label_cross_entropy", TORCH_BOX(&fastdynat::dynamic_label_cross_entropy_cuda));
}
