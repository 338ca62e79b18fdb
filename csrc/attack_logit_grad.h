// Shared by the CPU and the CUDA half of fastdynat::attack_logit_grad: the arithmetic, the checks, the
// outputs.
#pragma once

#include "rows.h"

namespace fastdynat {

enum class AttackLoss : int64_t { kCe, kKl, kMargin, kDlr, kSoftCe };

FASTDYNAT_INLINE bool is_soft(AttackLoss loss) {
  return loss == AttackLoss::kKl || loss == AttackLoss::kSoftCe;
}

// Rows whose largest entry is below are not rescaled but made anew from the logits' differences.
template <typename A>
constexpr A kFaint = A(5.421010862427522e-20);  // 2^-64

// 2^-e for x = m 2^e with m in [0.5, 1), as near as normal floats come to it at both ends; 1 for 0, NaN and
// infinity.
FASTDYNAT_INLINE float inverse_power_of_two(float x) {
  const uint32_t exponent = (bits_of(x) >> 23) & 0xffu;
  const uint32_t inverse = exponent > 252u ? 1u : 253u - exponent;
  return x > 0.0f && exponent != 255u ? float_of(inverse << 23) : 1.0f;
}

FASTDYNAT_INLINE double inverse_power_of_two(double x) {
  if (!(x > 0.0) || x > std::numeric_limits<double>::max()) return 1.0;
  int exponent = 0;
  frexp(x, &exponent);
  return ldexp(1.0, -exponent);
}

// The margin and the difference of logits ratio are sums of at most four logits with these factors.
template <typename A>
struct SparseGrad {
  int32_t at[4];  // label, best other class, first, third
  A factor[4];
  A value;

  // The entry of class k: classes may be named twice.
  FASTDYNAT_INLINE A entry(int32_t k) const {
    A sum = 0;
    for (int i = 0; i < 4; ++i) sum += at[i] == k ? factor[i] : A(0);
    return sum;
  }

  FASTDYNAT_INLINE A largest() const {
    A most = 0;
    for (int i = 0; i < 4; ++i) {
      const A size = fabs(entry(at[i]));
      most = size > most ? size : most;
    }
    return most;
  }
};

template <typename A>
FASTDYNAT_INLINE SparseGrad<A> margin_grad(int32_t label, int32_t other, A z_label, A z_other) {
  return {{label, other, -1, -1}, {A(-1), A(1), A(0), A(0)}, z_other - z_label};
}

template <typename A>
FASTDYNAT_INLINE SparseGrad<A> dlr_grad(
    int32_t label, int32_t other, int32_t first, int32_t third, A z_label, A z_other, A z_first, A z_third) {
  const A gap = z_first - z_third;
  if (gap == A(0)) return {{label, other, first, third}, {A(0), A(0), A(0), A(0)}, A(0)};
  const A ratio = (z_other - z_label) / gap;
  return {{label, other, first, third}, {A(-1) / gap, A(1) / gap, -ratio / gap, ratio / gap}, ratio};
}

struct LogitGrad {
  Tensor logits, labels, grad, value;  // contiguous
  AttackLoss loss;
  bool rescale, targeted;
  int64_t n;
  int32_t classes;
};

// Calls launch(LogitGrad&) with checked, contiguous tensors; returns (grad, value).
template <typename Launch>
std::tuple<Tensor, Tensor> run_logit_grad(
    const Tensor& logits, const Tensor& labels, int64_t loss, bool rescale, bool targeted,
    const Launch& launch) {
  const char* op = "attack_logit_grad";
  const Checker check{op, "logits", logits};
  check_logits(check);
  STD_TORCH_CHECK(loss >= 0 && loss <= 4, op, ": loss must be in [0, 4], got ", loss);
  const auto kind = static_cast<AttackLoss>(loss);
  const int64_t least = kind == AttackLoss::kDlr ? 3 : 2;
  STD_TORCH_CHECK(
      logits.size(1) >= least, op, ": logits need ", least, " classes, got shape ", shape_of(logits));
  if (is_soft(kind)) {
    check.same_shape_and_device("labels", labels);
    STD_TORCH_CHECK(is_float(labels.scalar_type()), op, ": labels must be probabilities of a floating dtype");
  } else {
    check.one_per_row("labels", labels, ScalarType::Long, "int64");
  }
  const int64_t n = logits.size(0);
  LogitGrad g{
      torch::stable::contiguous(logits),
      torch::stable::contiguous(labels),
      torch::stable::new_empty(logits, {n, logits.size(1)}),
      torch::stable::new_empty(logits, {n}, wide_type(logits)),
      kind,
      rescale,
      targeted,
      n,
      static_cast<int32_t>(logits.size(1))};
  if (n > 0) launch(g);
  return {g.grad, g.value};
}

}  // namespace fastdynat
