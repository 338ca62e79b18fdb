// fastdynat::attack_logit_grad on the CPU.
#include "attack_logit_grad.h"

#include "tiles.h"

namespace fastdynat {
namespace {

template <typename A>
struct Pointers {
  FloatRows logits, target;  // target.data is null for class labels
  const int64_t* labels;
  void* grad;
  ScalarType dtype;  // of grad
  A* value;
};

template <typename A, typename Tile>
FASTDYNAT_INLINE void store_grad(const Tile& tile, const A* values, const Pointers<A>& to) {
  switch (to.dtype) {
    case ScalarType::Double: return tile.store(values, static_cast<double*>(to.grad));
    case ScalarType::Half: return tile.store(values, static_cast<Half*>(to.grad));
    case ScalarType::BFloat16: return tile.store(values, static_cast<BFloat16*>(to.grad));
    default: return tile.store(values, static_cast<float*>(to.grad));
  }
}

// The scale of each lane's row: `sign`, times a power of two if `rescale`.
template <typename A>
FASTDYNAT_INLINE void scales(const A* largest, bool rescale, A sign, A* scale) {
  for (int32_t j = 0; j < kLanes; ++j) scale[j] = rescale ? sign * inverse_power_of_two(largest[j]) : sign;
}

// Cross-entropy with class labels. z are the logits and become the gradient; `again` is a second tile.
template <typename A, typename Tile>
FASTDYNAT_INLINE void hard_tile(
    const Tile& tile, const Pointers<A>& at, bool rescale, A sign, A* z, A* again) {
  const int64_t end = tile.end();
  Lanes<A> top, others, rest, ours, inverse, scale;
  Lanes<int32_t> prediction, label;
  tile.load(at.logits, z);
  tile.best(z, top, prediction);
  for (int32_t j = 0; j < kLanes; ++j) {
    label[j] = static_cast<int32_t>(at.labels[tile.row_of(j)]);
    others[j] = rest[j] = ours[j] = A(0);
  }
  for (int64_t i = 0; i < end; i += kLanes) {
    A* to = z + i;
    for (int32_t j = 0; j < kLanes; ++j) {
      const int32_t k = tile.class_of(i, j);
      const A shifted = to[j] - top[j];
      const A e = exp_nonpositive(shifted);
      to[j] = e;
      others[j] += k == prediction[j] ? A(0) : e;
      rest[j] += k == label[j] ? A(0) : e;
      ours[j] += k == label[j] ? shifted : A(0);
    }
  }
  tile.total(others);
  tile.total(rest);
  tile.total(ours);
  int32_t faint = 0;
  for (int32_t j = 0; j < kLanes; ++j) {
    others[j] += top[j] - top[j];  // NaN where the maximum is infinite or NaN: all of that row becomes NaN
    inverse[j] = A(1) / (A(1) + others[j]);
    rest[j] *= inverse[j];
    faint |= rest[j] < kFaint<A>;
  }
  for (int32_t j = 0; j < tile.rows; ++j)
    at.value[tile.first + j] = sign * (log1p_nonnegative(others[j]) - ours[j]);
  scales(rest, rescale, sign, scale);
  for (int64_t i = 0; i < end; i += kLanes) {
    A* to = z + i;
    for (int32_t j = 0; j < kLanes; ++j) {
      to[j] = scale[j] * (tile.class_of(i, j) == label[j] ? -rest[j] : to[j] * inverse[j]);
    }
  }
  if (rescale && faint != 0) {
    Lanes<A> best, sum;
    Lanes<int32_t> which;
    tile.load(at.logits, again);
    for (int64_t i = 0; i < end; i += kLanes) {
      for (int32_t j = 0; j < kLanes; ++j)
        again[i + j] = tile.class_of(i, j) == label[j] ? -kInfinity<A> : again[i + j];
    }
    tile.best(again, best, which);
    for (int32_t j = 0; j < kLanes; ++j) sum[j] = A(0);
    for (int64_t i = 0; i < end; i += kLanes) {
      for (int32_t j = 0; j < kLanes; ++j) {
        again[i + j] = exp_nonpositive(again[i + j] - best[j]);
        sum[j] += again[i + j];
      }
    }
    tile.total(sum);
    scales(sum, true, sign, scale);
    for (int64_t i = 0; i < end; i += kLanes) {
      for (int32_t j = 0; j < kLanes; ++j) {
        const bool anew = rest[j] < kFaint<A> && best[j] > -kInfinity<A>;
        const A g = scale[j] * (tile.class_of(i, j) == label[j] ? -sum[j] : again[i + j]);
        z[i + j] = anew ? g : z[i + j];
      }
    }
  }
  store_grad(tile, z, at);
}

// Cross-entropy with probabilities, or the divergence from exp(target) if kKl. z become the gradient, q the
// probabilities.
template <typename A, bool kKl, typename Tile>
FASTDYNAT_INLINE void soft_tile(const Tile& tile, const Pointers<A>& at, bool rescale, A sign, A* z, A* q) {
  const int64_t end = tile.end();
  Lanes<A> top, others, mass, value, largest, log_total, scale;
  Lanes<int32_t> prediction;
  tile.load(at.logits, z);
  tile.best(z, top, prediction);
  tile.load(at.target, q);
  if (kKl) {
    for (int64_t i = 0; i < end; ++i)
      q[i] = q[i] > A(0) ? A(0) : q[i];  // a log-probability, but for rounding
  }
  for (int32_t j = 0; j < kLanes; ++j) others[j] = mass[j] = value[j] = largest[j] = A(0);
  for (int64_t i = 0; i < end; i += kLanes) {
    for (int32_t j = 0; j < kLanes; ++j) {
      const int32_t k = tile.class_of(i, j);
      const A p = kKl ? exp_nonpositive(q[i + j]) : k < tile.classes ? q[i + j] : A(0);
      others[j] += k == prediction[j] ? A(0) : exp_nonpositive(z[i + j] - top[j]);
      mass[j] += p;
    }
  }
  tile.total(others);
  tile.total(mass);
  for (int32_t j = 0; j < kLanes; ++j) {
    others[j] += top[j] - top[j];
    log_total[j] = log1p_nonnegative(others[j]);
    others[j] = mass[j] / (A(1) + others[j]);
  }
  for (int64_t i = 0; i < end; i += kLanes) {
    for (int32_t j = 0; j < kLanes; ++j) {
      const A shifted = z[i + j] - top[j];
      const A log_p = shifted - log_total[j];
      const A p = kKl ? exp_nonpositive(q[i + j]) : tile.class_of(i, j) < tile.classes ? q[i + j] : A(0);
      const A term = p * ((kKl ? q[i + j] : A(0)) - log_p);
      value[j] += p == A(0) ? A(0) : term;
      const A g = exp_nonpositive(shifted) * others[j] - p;
      z[i + j] = g;
      const A size = g < A(0) ? -g : g;
      largest[j] = size > largest[j] ? size : largest[j];
    }
  }
  tile.total(value);
  tile.across(largest, [](A a, A b) FASTDYNAT_INLINE_BODY { return b > a ? b : a; });
  scales(largest, rescale, sign, scale);
  for (int64_t i = 0; i < end; i += kLanes) {
    for (int32_t j = 0; j < kLanes; ++j) z[i + j] *= scale[j];
  }
  for (int32_t j = 0; j < tile.rows; ++j) {
    at.value[tile.first + j] =
        sign * (value[j] + (others[j] - others[j]));  // p = 0 everywhere hides a NaN row
  }
  store_grad(tile, z, at);
}

// The first largest class other than a and b.
template <typename A, typename T>
FASTDYNAT_INLINE int32_t best_but(const T* row, int32_t classes, int32_t a, int32_t b) {
  int32_t best = -1;
  for (int32_t k = 0; k < classes; ++k) {
    if (k == a || k == b) continue;
    if (best < 0 || beats(static_cast<A>(row[k]), static_cast<A>(row[best]))) best = k;
  }
  return best;
}

template <typename A, typename T>
FASTDYNAT_INLINE void sparse_row(
    const T* row, T* to, A* value, int32_t classes, int32_t label, AttackLoss loss, bool rescale, A sign) {
  const int32_t first = best_but<A>(row, classes, -1, -1);
  const int32_t other = first == label ? best_but<A>(row, classes, first, -1) : first;
  const auto z = [&](int32_t k) FASTDYNAT_INLINE_BODY { return static_cast<A>(row[k]); };
  SparseGrad<A> grad = margin_grad(label, other, z(label), z(other));
  if (loss == AttackLoss::kDlr) {
    const int32_t second = first == label ? other : best_but<A>(row, classes, first, -1);
    const int32_t third = best_but<A>(row, classes, first, second);
    grad = dlr_grad(label, other, first, third, z(label), z(other), z(first), z(third));
  }
  const A bad = z(first) - z(first);
  const A scale = rescale ? sign * inverse_power_of_two(grad.largest()) : sign;
  for (int32_t k = 0; k < classes; ++k) to[k] = static_cast<T>(bad);
  for (int i = 0; i < 4; ++i) {
    if (grad.at[i] >= 0) to[grad.at[i]] = static_cast<T>(scale * grad.entry(grad.at[i]) + bad);
  }
  *value = sign * grad.value + bad;
}

template <typename A>
void logit_grad_rows(LogitGrad& g) {
  Pointers<A> at{};
  at.logits = FloatRows(g.logits);
  at.grad = g.grad.mutable_data_ptr();
  at.dtype = g.grad.scalar_type();
  at.value = mutable_data<A>(g.value);
  const bool rescale = g.rescale;
  const A sign = g.targeted ? A(-1) : A(1);
  if (is_soft(g.loss)) {
    at.target = FloatRows(g.labels);
  } else {
    at.labels = data<int64_t>(g.labels);
    check_classes("attack_logit_grad", "labels", at.labels, g.n, g.classes);
  }
  if (g.loss == AttackLoss::kCe) {
    for_tiles<A>(g.n, g.classes, 2, [=](const auto& tile, A* scratch, int64_t size) FASTDYNAT_INLINE_BODY {
      hard_tile(tile, at, rescale, sign, scratch, scratch + size);
    });
  } else if (g.loss == AttackLoss::kKl) {
    for_tiles<A>(g.n, g.classes, 2, [=](const auto& tile, A* scratch, int64_t size) FASTDYNAT_INLINE_BODY {
      soft_tile<A, true>(tile, at, rescale, sign, scratch, scratch + size);
    });
  } else if (g.loss == AttackLoss::kSoftCe) {
    for_tiles<A>(g.n, g.classes, 2, [=](const auto& tile, A* scratch, int64_t size) FASTDYNAT_INLINE_BODY {
      soft_tile<A, false>(tile, at, rescale, sign, scratch, scratch + size);
    });
  } else {
    const int64_t classes = g.classes;
    const AttackLoss loss = g.loss;
    with_pointer(at.logits, [&](const auto* rows) {
      using T = std::remove_cv_t<std::remove_pointer_t<decltype(rows)>>;
      T* to = static_cast<T*>(at.grad);
      parallel<A>(g.n, 4 * classes, [=](int64_t begin, int64_t end) FASTDYNAT_INLINE_BODY {
        for (int64_t i = begin; i < end; ++i) {
          sparse_row<A>(
              rows + i * classes, to + i * classes, at.value + i, static_cast<int32_t>(classes),
              static_cast<int32_t>(at.labels[i]), loss, rescale, sign);
        }
      });
    });
  }
}

std::tuple<Tensor, Tensor> attack_logit_grad_cpu(
    const Tensor& logits, const Tensor& labels, int64_t loss, bool rescale, bool targeted) {
  return run_logit_grad(logits, labels, loss, rescale, targeted, [](LogitGrad& g) {
    with_wide_type(g.logits, [&](auto wide) { logit_grad_rows<decltype(wide)>(g); });
  });
}

}  // namespace
}  // namespace fastdynat

STABLE_TORCH_LIBRARY_IMPL(fastdynat, CPU, m) {
  m.impl("attack_logit_grad", TORCH_BOX(&fastdynat::attack_logit_grad_cpu));
}
