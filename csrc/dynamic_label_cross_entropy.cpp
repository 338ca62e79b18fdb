// fastdynat::dynamic_label_cross_entropy on the CPU.
#include "dynamic_label_cross_entropy.h"

#include "tiles.h"

namespace fastdynat {
namespace {

template <typename A>
struct Pointers {
  FloatRows logits, guide;  // guide.data is null where the guide gives class indices
  const int64_t* given;     // those indices
  const A* weights;         // may be null
  A* loss;
  int64_t *predictions, *dynamic_labels;
  A* grad;  // may be null
};

// One tile: z becomes exp(z - max z) and then the gradient; t are the guide's logits and then the label's
// distribution.
template <typename A, bool kSoft, typename Tile>
FASTDYNAT_INLINE void cross_entropy_tile(
    const Tile& tile, const Pointers<A>& at, SmoothedLabel<A> smooth, A inverse_temperature, A grad_scale,
    A* z, A* t) {
  const int64_t end = tile.end();
  Lanes<A> top, guide_top, others, cost, weight, inverse;
  Lanes<int32_t> prediction, label;
  tile.load(at.logits, z);
  tile.best(z, top, prediction);
  if (at.guide.data != nullptr) {
    tile.load(at.guide, t);
    tile.best(t, guide_top, label);
  } else {
    for (int32_t j = 0; j < kLanes; ++j) label[j] = static_cast<int32_t>(at.given[tile.row_of(j)]);
  }
  for (int32_t j = 0; j < kLanes; ++j) {
    weight[j] = at.weights != nullptr ? at.weights[tile.row_of(j)] : A(1);
    cost[j] = A(0);
  }
  if (kSoft) {
    tile.exponentials(t, guide_top, inverse_temperature, label, others);
    for (int32_t j = 0; j < kLanes; ++j)
      inverse[j] = smooth.inverse(others[j] + (guide_top[j] - guide_top[j]));
  }
  if (kSoft || smooth.uniform != A(0)) {
    for (int64_t i = 0; i < end; i += kLanes) {
      const A* x = z + i;
      A* p = t + i;
      for (int32_t j = 0; j < kLanes; ++j) {
        const A target = kSoft ? smooth.target(p[j] * inverse[j]) : smooth.uniform;
        if (kSoft) p[j] = target;
        const A part = smooth.cost(target, x[j] - top[j]);
        cost[j] += tile.class_of(i, j) < tile.classes ? part : A(0);
      }
    }
    tile.total(cost);
  }
  if (!kSoft) {
    for (int32_t j = 0; j < Tile::kRows; ++j)
      cost[j] += smooth.cost(smooth.keep, z[tile.value_of(label[j], j)] - top[j]);
  }

  tile.exponentials(z, top, A(1), prediction, others);
  for (int32_t j = 0; j < kLanes; ++j) {
    others[j] += top[j] - top[j];  // NaN where the maximum is infinite or NaN: all of that row becomes NaN
    inverse[j] = smooth.inverse(others[j]);
  }
  for (int32_t j = 0; j < Tile::kRows; ++j) cost[j] = weight[j] * (log1p_nonnegative(others[j]) + cost[j]);
  for (int32_t j = 0; j < tile.rows; ++j) {
    at.loss[tile.first + j] = cost[j];
    at.predictions[tile.first + j] = prediction[j];
    at.dynamic_labels[tile.first + j] = label[j];
  }
  if (at.grad == nullptr) return;
  if (!kSoft) {
    for (int32_t j = 0; j < Tile::kRows; ++j) {
      const A e = z[tile.value_of(label[j], j)];
      cost[j] = smooth.label_grad(others[j], e, label[j] == prediction[j], tile.classes);
    }
  }
  for (int32_t j = 0; j < kLanes; ++j) weight[j] *= grad_scale;
  if constexpr (Tile::kRows == 1) {  // straight to where it belongs, with one row's factors in registers
    A* to = at.grad + tile.first * tile.classes;
    const A factor = weight[0], share = inverse[0], uniform = smooth.uniform;
    for (int32_t k = 0; k < tile.classes; ++k) to[k] = factor * (z[k] * share - (kSoft ? t[k] : uniform));
    if (!kSoft) to[label[0]] = factor * cost[0];
    return;
  }
  for (int64_t i = 0; i < end; i += kLanes) {
    A* x = z + i;
    const A* p = t + i;
    for (int32_t j = 0; j < kLanes; ++j)
      x[j] = weight[j] * (x[j] * inverse[j] - (kSoft ? p[j] : smooth.uniform));
  }
  if (!kSoft) {
    for (int32_t j = 0; j < Tile::kRows; ++j) z[tile.value_of(label[j], j)] = weight[j] * cost[j];
  }
  tile.store(z, at.grad);
}

template <typename A>
void cross_entropy_rows(CrossEntropy& c) {
  Pointers<A> at{};
  at.logits = FloatRows(c.logits);
  if (c.hard_guide) {
    at.given = data<int64_t>(c.guide);
    check_classes("dynamic_label_cross_entropy", "guide", at.given, c.n, c.classes);
  } else {
    at.guide = FloatRows(c.guide);
  }
  at.weights = c.weights ? data<A>(*c.weights) : nullptr;
  at.loss = mutable_data<A>(c.row_loss);
  at.predictions = mutable_data<int64_t>(c.predictions);
  at.dynamic_labels = mutable_data<int64_t>(c.dynamic_labels);
  at.grad = c.grad.dim() == 2 ? mutable_data<A>(c.grad) : nullptr;
  const SmoothedLabel<A> smooth = c.smoothed<A>();
  const A inverse_temperature = static_cast<A>(1.0 / c.temperature);
  const A grad_scale = c.grad_scale<A>();
  if (c.soft) {
    for_tiles<A>(c.n, c.classes, 2, [=](const auto& tile, A* scratch, int64_t size) FASTDYNAT_INLINE_BODY {
      cross_entropy_tile<A, true>(tile, at, smooth, inverse_temperature, grad_scale, scratch, scratch + size);
    });
  } else {
    for_tiles<A>(c.n, c.classes, 2, [=](const auto& tile, A* scratch, int64_t size) FASTDYNAT_INLINE_BODY {
      cross_entropy_tile<A, false>(
          tile, at, smooth, inverse_temperature, grad_scale, scratch, scratch + size);
    });
  }
}

// In one fixed order, whatever the number of threads.
template <typename A>
void reduce_rows(CrossEntropy& c) {
  if (c.reduction != Reduction::kNone) {
    const A* row_loss = data<A>(c.row_loss);
    double sums[kLanes] = {};
    for (int64_t i = 0; i < c.n; ++i) sums[i % kLanes] += static_cast<double>(row_loss[i]);
    double sum = 0;
    for (const double part : sums) sum += part;
    *mutable_data<A>(c.loss) =
        static_cast<A>(c.reduction == Reduction::kMean ? sum / static_cast<double>(c.n) : sum);
  }
  if (!c.labels) return;
  const auto* labels = data<int64_t>(*c.labels);
  const auto* predictions = data<int64_t>(c.predictions);
  const auto* dynamic_labels = data<int64_t>(c.dynamic_labels);
  int64_t target_correct = 0, guide_correct = 0;
  for (int64_t i = 0; i < c.n; ++i) {
    target_correct += predictions[i] == labels[i];
    guide_correct += dynamic_labels[i] == labels[i];
  }
  auto* counts = mutable_data<int64_t>(c.counts);
  counts[0] = target_correct;
  counts[1] = guide_correct;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> dynamic_label_cross_entropy_cpu(
    const Tensor& logits, const Tensor& guide, const std::optional<Tensor>& labels,
    const std::optional<Tensor>& weights, bool soft, double temperature, double smoothing, int64_t reduction,
    bool with_grad) {
  return run_cross_entropy(
      logits, guide, labels, weights, soft, temperature, smoothing, reduction, with_grad,
      [](CrossEntropy& c) {
        with_wide_type(c.logits, [&](auto wide) {
          cross_entropy_rows<decltype(wide)>(c);
          reduce_rows<decltype(wide)>(c);
        });
      });
}

}  // namespace
}  // namespace fastdynat

STABLE_TORCH_LIBRARY_IMPL(fastdynat, CPU, m) {
  m.impl("dynamic_label_cross_entropy", TORCH_BOX(&fastdynat::dynamic_label_cross_entropy_cpu));
}
