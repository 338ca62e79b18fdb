// Shared by the CPU and the CUDA half of fastdynat::dynamic_label_cross_entropy: the arithmetic, the checks,
// the outputs.
#pragma once

#include "rows.h"

namespace fastdynat {

// The label's distribution after smoothing is t = p * keep + uniform. With shifted = z - max z and e =
// exp(shifted), `others` is the sum of e over all classes but the prediction, whose e is 1. No sum holds a
// large number from which a small one would have to be recovered, so that losses and gradients near zero keep
// all their digits.
template <typename A>
struct SmoothedLabel {
  A keep, uniform;  // 1 - s and s / K

  FASTDYNAT_INLINE A target(A p) const { return p * keep + uniform; }

  // t log(1 / q) but for the normalisation. 0 * log 0 = 0: a class that has no weight may have no
  // probability.
  FASTDYNAT_INLINE A cost(A t, A shifted) const { return t == A(0) ? A(0) : -t * shifted; }

  FASTDYNAT_INLINE A inverse(A others) const { return A(1) / (A(1) + others); }

  // The gradient's entry at a hard label: minus the sum of the other entries, as p - 1 vanishes where p is
  // nearly 1.
  FASTDYNAT_INLINE A label_grad(A others, A e, bool predicted, int32_t classes) const {
    const A rest = predicted ? others : A(1) + (others - e);
    return uniform * static_cast<A>(classes - 1) - rest * inverse(others);
  }
};

enum class Reduction : int64_t { kNone, kMean, kSum };

struct CrossEntropy {
  Tensor logits, guide;
  std::optional<Tensor> labels, weights;  // (N,) int64, and (N,) of the type computed in
  bool hard_guide;                        // class indices instead of logits
  bool soft;
  double temperature, smoothing;
  Reduction reduction;
  int64_t n;
  int32_t classes;
  Tensor row_loss, loss, counts, predictions, dynamic_labels,
      grad;  // counts and grad of size 0 where they are not asked for

  template <typename A>
  SmoothedLabel<A> smoothed() const {
    return {static_cast<A>(1.0 - smoothing), static_cast<A>(smoothing / classes)};
  }

  // The constant factor in the gradient of every row.
  template <typename A>
  A grad_scale() const {
    return reduction == Reduction::kMean ? A(1) / static_cast<A>(n) : A(1);
  }
};

// Calls launch(CrossEntropy&) with checked, contiguous tensors; returns what the operator returns.
template <typename Launch>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> run_cross_entropy(
    const Tensor& logits, const Tensor& guide, const std::optional<Tensor>& labels,
    const std::optional<Tensor>& weights, bool soft, double temperature, double smoothing, int64_t reduction,
    bool with_grad, const Launch& launch) {
  const char* op = "dynamic_label_cross_entropy";
  const Checker check{op, "target_logits", logits};
  check_logits(check);
  const bool hard_guide = guide.scalar_type() == ScalarType::Long;
  if (hard_guide) {
    check.one_per_row("guide", guide, ScalarType::Long, "int64");
  } else {
    check.same_shape_and_device("guide", guide);
    STD_TORCH_CHECK(
        is_float(guide.scalar_type()), op, ": guide must be logits of a floating dtype, or int64 classes");
  }
  const ScalarType wide = wide_type(logits);
  if (labels) check.one_per_row("labels", *labels, ScalarType::Long, "int64");
  if (weights) check.one_per_row("weights", *weights, wide, "float32, or float64 with float64 logits");
  STD_TORCH_CHECK(
      !soft || !hard_guide, op, ": soft labels need the guide's logits, guide holds class indices");
  STD_TORCH_CHECK(temperature > 0, op, ": temperature must be positive, got ", temperature);
  STD_TORCH_CHECK(
      smoothing >= 0 && smoothing <= 1, op, ": label_smoothing must be in [0, 1], got ", smoothing);
  STD_TORCH_CHECK(
      reduction >= 0 && reduction <= 2, op, ": reduction must be 0 (none), 1 (mean) or 2 (sum), got ",
      reduction);
  const auto contiguous = [](const std::optional<Tensor>& t) {
    return t ? std::optional<Tensor>(torch::stable::contiguous(*t)) : std::nullopt;
  };
  const auto how = static_cast<Reduction>(reduction);
  const int64_t n = logits.size(0);
  const auto empty = [&](std::initializer_list<int64_t> size, ScalarType dtype) {
    return torch::stable::new_empty(logits, size, dtype);
  };
  Tensor row_loss = empty({n}, wide);
  CrossEntropy c{
      torch::stable::contiguous(logits),
      torch::stable::contiguous(guide),
      contiguous(labels),
      contiguous(weights),
      hard_guide,
      soft,
      temperature,
      smoothing,
      how,
      n,
      static_cast<int32_t>(logits.size(1)),
      row_loss,
      how == Reduction::kNone ? row_loss : empty({}, wide),
      empty({labels ? 2 : 0}, ScalarType::Long),
      empty({n}, ScalarType::Long),
      empty({n}, ScalarType::Long),
      with_grad ? empty({n, logits.size(1)}, wide) : empty({0}, wide)};
  launch(c);
  return {c.loss, c.counts, c.predictions, c.dynamic_labels, c.grad};
}

}  // namespace fastdynat
