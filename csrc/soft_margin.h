// Shared by the CPU and the CUDA half of fastdynat::soft_margin: the arithmetic, the checks, the outputs.
#pragma once

#include "rows.h"

namespace fastdynat {

// `own` is the logit of the label, `top` the largest of the others, `sum` that of e = exp(T (z_k - top)) over
// the others: at least 1, so that nothing overflows and the logarithm is harmless, whatever the logits.
template <typename A>
struct SoftMargin {
  A temperature;

  FASTDYNAT_INLINE A exponential(A x, A top) const { return exp_nonpositive((x - top) * temperature); }

  // The sum, which decides whether a row means anything: NaN already where one of the others is NaN or +inf,
  // or all are -inf.
  FASTDYNAT_INLINE A valid(A sum, A own) const { return own < kInfinity<A> ? sum : kNaN<A>; }

  FASTDYNAT_INLINE A margin(A own, A top, A sum) const {
    return (own - top) - log1p_nonnegative(sum - A(1)) / temperature;
  }

  // The gradient: minus the softmax over the others, and 1 at the label.
  FASTDYNAT_INLINE A factor(A sum) const { return A(-1) / sum; }
  FASTDYNAT_INLINE A label_grad(A sum) const { return sum == sum ? A(1) : sum; }
};

struct SoftMarginRows {
  Tensor logits, labels;  // contiguous
  int64_t n;
  int32_t classes;
  Tensor margin, grad;  // grad of size 0 where it is not asked for
};

// Calls launch(SoftMarginRows&) with checked, contiguous tensors; returns what the operator returns.
template <typename Launch>
std::tuple<Tensor, Tensor> run_soft_margin(
    const Tensor& logits, const Tensor& labels, double temperature, bool with_grad, const Launch& launch) {
  const char* op = "soft_margin";
  const Checker check{op, "logits", logits};
  check_logits(check);
  STD_TORCH_CHECK(
      logits.size(1) >= 2, op, ": logits must be (N, K) with K >= 2, got shape ", shape_of(logits));
  check.one_per_row("labels", labels, ScalarType::Long, "int64");
  STD_TORCH_CHECK(
      temperature >= 1e-30 && temperature <= 1e30, op, ": temperature must be in [1e-30, 1e30], got ",
      temperature);
  const ScalarType wide = wide_type(logits);
  const int64_t n = logits.size(0);
  SoftMarginRows rows{
      torch::stable::contiguous(logits),
      torch::stable::contiguous(labels),
      n,
      static_cast<int32_t>(logits.size(1)),
      torch::stable::new_empty(logits, {n}, wide),
      with_grad ? torch::stable::new_empty(logits, {n, logits.size(1)}, wide)
                : torch::stable::new_empty(logits, {0}, wide)};
  if (n > 0) launch(rows);
  return {rows.margin, rows.grad};
}

}  // namespace fastdynat
