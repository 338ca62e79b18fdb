// fastdynat::soft_margin on the CPU.
#include "soft_margin.h"

#include "tiles.h"

namespace fastdynat {
namespace {

// One tile: z becomes e, 0 at the label, and then the gradient. `grad` may be null.
template <typename A, typename Tile>
FASTDYNAT_INLINE void soft_margin_tile(
    const Tile& tile, const FloatRows& logits, const int64_t* labels, SoftMargin<A> soft, A* margin, A* grad,
    A* z) {
  Lanes<A> own, top, sum;
  Lanes<int32_t> label;
  tile.load(logits, z);
  for (int32_t j = 0; j < kLanes; ++j) {
    label[j] = static_cast<int32_t>(labels[tile.row_of(j)]);
    own[j] = z[tile.value_of(label[j], j)];
    top[j] = -kInfinity<A>;
  }
  for (int32_t j = 0; j < Tile::kRows; ++j) z[tile.value_of(label[j], j)] = -kInfinity<A>;
  const auto larger = [](A a, A b) FASTDYNAT_INLINE_BODY { return b > a ? b : a; };
  for (int64_t i = 0; i < tile.end(); i += kLanes) {
    const A* x = z + i;
    for (int32_t j = 0; j < kLanes; ++j) top[j] = larger(top[j], x[j]);
  }
  tile.across(top, larger);
  tile.exponentials(z, top, soft.temperature, label, sum);
  for (int32_t j = 0; j < kLanes; ++j) {
    sum[j] = soft.valid(sum[j], own[j]);
    own[j] = soft.margin(own[j], top[j], sum[j]);
  }
  for (int32_t j = 0; j < tile.rows; ++j) margin[tile.first + j] = own[j];
  if (grad == nullptr) return;
  for (int32_t j = 0; j < kLanes; ++j) top[j] = soft.factor(sum[j]);
  for (int64_t i = 0; i < tile.end(); i += kLanes) {
    A* e = z + i;
    for (int32_t j = 0; j < kLanes; ++j) e[j] *= top[j];
  }
  for (int32_t j = 0; j < Tile::kRows; ++j) z[tile.value_of(label[j], j)] = soft.label_grad(sum[j]);
  tile.store(z, grad);
}

std::tuple<Tensor, Tensor> soft_margin_cpu(
    const Tensor& logits, const Tensor& labels, double temperature, bool with_grad) {
  return run_soft_margin(logits, labels, temperature, with_grad, [&](SoftMarginRows& rows) {
    check_classes("soft_margin", "labels", data<int64_t>(rows.labels), rows.n, rows.classes);
    with_wide_type(rows.logits, [&](auto wide) {
      using A = decltype(wide);
      const FloatRows from(rows.logits);
      const auto* classes = data<int64_t>(rows.labels);
      const SoftMargin<A> soft{static_cast<A>(temperature)};
      A* margin = mutable_data<A>(rows.margin);
      A* grad = with_grad ? mutable_data<A>(rows.grad) : nullptr;
      for_tiles<A>(rows.n, rows.classes, 1, [=](const auto& tile, A* z, int64_t) FASTDYNAT_INLINE_BODY {
        soft_margin_tile(tile, from, classes, soft, margin, grad, z);
      });
    });
  });
}

}  // namespace
}  // namespace fastdynat

STABLE_TORCH_LIBRARY_IMPL(fastdynat, CPU, m) {
  m.impl("soft_margin", TORCH_BOX(&fastdynat::soft_margin_cpu));
}
