"""Dynamic-label cross-entropy: a float64 oracle, extreme rows, agreement of the implementations."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import needs
from hypothesis import given, settings
from hypothesis import strategies as st
from support.rows import DTYPES, INF, LARGE, NAN, ON_CPU, ON_GPU, QUIET, SHAPES, classes, close, scores
from torch import Tensor

from fastdynat import ops
from fastdynat.errors import UserError

pytestmark = QUIET


def loss_of(z: Tensor, guide: Tensor, **kwargs: Any) -> tuple[ops.DynamicLabelLoss, Tensor]:
    """The operator's result, and the gradient of the sum of its loss."""
    z = z.clone().requires_grad_()
    result = ops.dynamic_label_cross_entropy(z, guide, **kwargs)
    (grad,) = torch.autograd.grad(result.loss.sum(), z)
    return result, grad


def label_distribution(guide: Tensor, k: int, soft: bool, temperature: float, smoothing: float) -> Tensor:
    """t in float64."""
    if soft:
        p = (guide.double() / temperature).softmax(1)
    else:
        p = F.one_hot(guide if guide.dim() == 1 else guide.double().argmax(1), k).double()
    return p * (1 - smoothing) + smoothing / k


def oracle(z: Tensor, t: Tensor, weights: Tensor | None, reduction: str) -> tuple[Tensor, Tensor]:
    """Loss and gradient of its sum, from the definition, in float64."""
    z = z.double()
    log_q = z - z.logsumexp(1, keepdim=True)
    scale = torch.ones(len(z), dtype=torch.float64) if weights is None else weights.double()
    loss = -torch.where(t > 0, t * log_q, 0).sum(1) * scale
    grad = log_q.exp() - t
    if reduction == "mean":
        return loss.mean(), grad * scale[:, None] / len(z)
    return (loss.sum() if reduction == "sum" else loss), grad * scale[:, None]


OPTIONS: list[dict[str, Any]] = [
    {},
    {"reduction": "sum"},
    {"reduction": "none", "label_smoothing": 0.1},
    {"soft": True, "temperature": 2.0},
    {"soft": True, "label_smoothing": 0.3, "reduction": "none"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("backend", ON_CPU)
def test_loss_and_gradient_agree_with_the_definition(backend: str, options: dict[str, Any]) -> None:
    full = {"soft": False, "temperature": 1.0, "label_smoothing": 0.0, "reduction": "mean"} | options
    for n, k in [*SHAPES, (2, 1), (2, 2)]:
        for dtype, weights in (
            (torch.float32, None),
            (torch.float32, torch.rand(n)),
            (torch.float64, torch.rand(n)),
        ):
            z, guide, labels = scores(n, k, dtype), scores(n, k, dtype), classes(n, k)
            result, grad = loss_of(z, guide, labels=labels, weights=weights, backend=backend, **options)
            t = label_distribution(guide, k, full["soft"], full["temperature"], full["label_smoothing"])
            loss, expected = oracle(z, t, weights, full["reduction"])
            assert result.loss.dtype == dtype
            assert grad.dtype == dtype
            close(result.loss, loss)
            close(grad, expected)
            assert torch.equal(result.predictions, z.argmax(1))
            assert torch.equal(result.dynamic_labels, guide.argmax(1))
            assert result.target_correct is not None
            assert result.guide_correct is not None
            assert result.target_correct == (z.argmax(1) == labels).sum()
            assert result.guide_correct == (guide.argmax(1) == labels).sum()


@pytest.mark.parametrize("guide_dtype", [*DTYPES, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ON_CPU)
def test_every_pair_of_dtypes(backend: str, dtype: torch.dtype, guide_dtype: torch.dtype) -> None:
    for n, k in ((5, 10), (2, 200)):
        z = scores(n, k, dtype)
        guide = classes(n, k) if guide_dtype == torch.int64 else scores(n, k, guide_dtype)
        result, grad = loss_of(z, guide, backend=backend)
        loss, expected = oracle(z, label_distribution(guide, k, False, 1, 0), None, "mean")
        close(result.loss, loss)
        close(grad, expected)
        assert result.target_correct is None
        assert result.guide_correct is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ON_GPU)
def test_gpu_agrees_with_cpu(backend: str, dtype: torch.dtype) -> None:
    for n, k in [*SHAPES, (70000, 10)]:
        for options in OPTIONS:
            z, guide, labels = scores(n, k, dtype), scores(n, k, dtype), classes(n, k)
            here, grad_here = loss_of(z, guide, labels=labels, backend="eager", **options)
            there, grad_there = loss_of(
                z.cuda(), guide.cuda(), labels=labels.cuda(), backend=backend, **options
            )
            close(there.loss.cpu(), here.loss)
            close(grad_there.cpu(), grad_here)
            for a, b in zip(there[1:], here[1:], strict=True):
                assert torch.equal(a.cpu(), b)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("backend", ON_CPU)
def test_gradcheck(backend: str, soft: bool) -> None:
    guide, weights = scores(2, 5, torch.float64), torch.rand(2)
    z = scores(2, 5, torch.float64, 1.0).requires_grad_()

    def loss(z: Tensor) -> Tensor:
        kwargs = {
            "soft": soft,
            "label_smoothing": 0.1,
            "weights": weights,
            "reduction": "none",
            "backend": backend,
        }
        return ops.dynamic_label_cross_entropy(z, guide, **kwargs).loss

    assert torch.autograd.gradcheck(loss, (z,))


@pytest.mark.parametrize("k", [10, 300])
@pytest.mark.parametrize("backend", ON_CPU)
def test_large_gaps_are_exact(backend: str, k: int) -> None:
    # The label is far below, then far above, the other classes.
    z = torch.zeros(2, k)
    z[0, 3], z[1, 5] = LARGE, LARGE
    labels = torch.tensor([0, 5])
    result, grad = loss_of(z, labels, reduction="none", backend=backend)
    assert result.loss.tolist() == [LARGE, 0.0]
    expected = torch.zeros(2, k)
    expected[0, 3], expected[0, 0] = 1, -1
    assert torch.equal(grad, expected)


@pytest.mark.parametrize("k", [10, 300])
@pytest.mark.parametrize("backend", ON_CPU)
def test_the_label_keeps_its_gradient_where_p_is_nearly_one(backend: str, k: int) -> None:
    for dtype, gap in ((torch.float32, 30.0), (torch.bfloat16, 30.0), (torch.float16, 12.0)):
        z = torch.zeros(1, k, dtype=dtype)
        z[0, 2] = gap
        result, grad = loss_of(z, torch.tensor([2]), backend=backend)
        rest = (k - 1) * torch.exp(torch.tensor(-gap, dtype=torch.float64))
        assert torch.isclose(result.loss.double(), torch.log1p(rest), rtol=1e-5)
        assert grad[0, 2] < 0
        rtol = 4 * torch.finfo(dtype).eps + (
            0.02 if dtype == torch.float16 else 0
        )  # float16 is subnormal there
        assert torch.isclose(-grad[0, 2].double(), rest, rtol=rtol)


@pytest.mark.parametrize("backend", ON_CPU)
def test_half_precision_gradients_survive_the_mean_and_the_loss_scale(backend: str) -> None:
    n, scale = 512, 65536.0
    z = scores(n, 10, torch.float16).requires_grad_()
    labels = classes(n, 10)
    loss = ops.dynamic_label_cross_entropy(z, labels, backend=backend).loss
    (grad,) = torch.autograd.grad(loss * scale, z)
    _, expected = oracle(z.detach(), label_distribution(labels, 10, False, 1, 0), None, "mean")
    # One rounding, that of the result: nothing was rounded to float16 before the two factors met.
    torch.testing.assert_close(grad.double(), expected * scale, rtol=1.1 * 2**-11, atol=2**-25)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("k", [7, 200])
@pytest.mark.parametrize("backend", ON_CPU)
def test_bad_rows_stay_to_themselves(backend: str, k: int, soft: bool) -> None:
    z, guide = scores(6, k), scores(6, k)
    z[1, 4], z[2, 3], z[3] = NAN, INF, -INF
    if soft:
        guide[4, 2] = NAN
    result, grad = loss_of(z, guide, soft=soft, reduction="none", backend=backend)
    bad = torch.tensor([False, True, True, True, soft, False])
    assert torch.equal(result.loss.isnan(), bad)
    assert torch.equal(grad.isnan(), bad[:, None].expand(-1, k))
    assert torch.equal(
        result.predictions, z.argmax(1)
    )  # NaN counts as the largest, and the first of equals wins
    assert result.predictions[1:4].tolist() == [4, 3, 0]
    good, good_grad = loss_of(z[~bad], guide[~bad], soft=soft, reduction="none", backend=backend)
    assert torch.equal(result.loss[~bad], good.loss)
    assert torch.equal(grad[~bad], good_grad)


@pytest.mark.parametrize("k", [7, 200])
@pytest.mark.parametrize("backend", ON_CPU)
def test_masked_classes_have_no_probability(backend: str, k: int) -> None:
    z, guide = scores(4, k), scores(4, k)
    z[:, 2] = guide[:, 2] = -INF
    keep = [i for i in range(k) if i != 2]
    for soft in (False, True):
        result, grad = loss_of(z, guide, soft=soft, reduction="none", backend=backend)
        expected, expected_grad = loss_of(
            z[:, keep], guide[:, keep], soft=soft, reduction="none", backend=backend
        )
        close(result.loss, expected.loss)
        close(grad[:, keep], expected_grad)
        assert (grad[:, 2] == 0).all()
    result, grad = loss_of(z, torch.full((4,), 2), reduction="none", backend=backend)
    assert (result.loss == INF).all()
    close(grad[:, 2], torch.full((4,), -1.0))
    # Only the label has any probability.
    alone = torch.full((1, k), -INF)
    alone[0, 5] = 3.0
    result, grad = loss_of(alone, torch.tensor([5]), reduction="none", backend=backend)
    assert result.loss.item() == 0
    assert (grad == 0).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("k", [7, 40, 200])
@pytest.mark.parametrize("backend", ON_CPU)
def test_logarithms_of_probabilities_are_a_guide_that_says_them(
    backend: str, k: int, smoothing: float
) -> None:
    """As of mixed images: log 0 = -inf is a class without probability, beside classes of any loss."""
    for dtype in (torch.float32, torch.float64):
        z, labels = scores(5, k, dtype), classes(5, k)
        other = (labels + 1) % k
        z[0, labels[0]], z[1, other[1]], z[2] = -300, 300, 40 * z[2]
        share = torch.tensor([0.3, 0.5, 0.875, 1.0, 0.0], dtype=torch.float64)[:, None]
        mixed = share * F.one_hot(labels, k) + (1 - share) * F.one_hot(other, k)
        options = {"soft": True, "label_smoothing": smoothing, "reduction": "none", "backend": backend}
        result, grad = loss_of(z, mixed.to(dtype).log(), **options)
        torch_z = z.double().requires_grad_()
        expected = F.cross_entropy(torch_z, mixed, reduction="none", label_smoothing=smoothing)
        (expected_grad,) = torch.autograd.grad(expected.sum(), torch_z)
        close(result.loss, expected.detach())
        close(grad, expected_grad)
        assert torch.equal(result.dynamic_labels, mixed.argmax(1))


@pytest.mark.parametrize("k", [7, 200])
@pytest.mark.parametrize("backend", ON_CPU)
def test_the_first_of_equal_maxima_is_the_class(backend: str, k: int) -> None:
    for first, second in ((0, 1), (1, 6), (5, 6)):
        z = torch.zeros(3, k)
        z[:, first] = z[:, second] = 2.0
        result = ops.dynamic_label_cross_entropy(z, z.clone(), backend=backend)
        assert result.predictions.tolist() == result.dynamic_labels.tolist() == [first] * 3
    nan = torch.zeros(1, k)
    nan[0, 3] = nan[0, 5] = NAN
    nan[0, 1] = INF
    result = ops.dynamic_label_cross_entropy(torch.zeros(1, k), nan, backend=backend)
    assert result.dynamic_labels.item() == 3
    assert result.loss.isfinite()


@pytest.mark.parametrize("backend", ON_CPU)
def test_a_class_that_does_not_exist(backend: str) -> None:
    """An error in both forms for the CPU; NaN in its row where raising would wait for a device."""
    for bad in (-1, 4, 2**40):
        if backend in ("cpp", "eager"):
            with pytest.raises(RuntimeError, match=rf"guide\[1\] is {bad}, expected a class in \[0, 4\)"):
                ops.dynamic_label_cross_entropy(scores(3, 4), torch.tensor([0, bad, 3]), backend=backend)
            continue
        result, grad = loss_of(scores(3, 4), torch.tensor([0, bad, 3]), reduction="none", backend=backend)
        assert result.loss.isnan().tolist() == [False, True, False]
        assert grad.isnan().all(1).tolist() == [False, True, False]
        assert not grad[::2].isnan().any()
        assert result.dynamic_labels.tolist() == [0, bad, 3]


@pytest.mark.parametrize("backend", ON_CPU)
def test_any_layout_and_nothing_in_place(backend: str) -> None:
    for k in (6, 140):
        z, guide = scores(k, 5).T, scores(5, 2 * k)[:, ::2]
        labels, weights = classes(10, k)[::2], torch.rand(10)[::2]
        before = z.clone(), guide.clone()
        result, grad = loss_of(z, guide, labels=labels, weights=weights, backend=backend)
        plain = {"labels": labels.contiguous(), "weights": weights.contiguous(), "backend": backend}
        expected, expected_grad = loss_of(z.contiguous(), guide.contiguous(), **plain)
        assert torch.equal(result.loss, expected.loss)
        assert torch.equal(grad, expected_grad)
        assert result.target_correct == expected.target_correct
        assert torch.equal(z, before[0])
        assert torch.equal(guide, before[1])


@pytest.mark.parametrize("backend", ON_CPU)
def test_no_gradient_reaches_guide_or_weights(backend: str) -> None:
    z, guide, weights = (
        scores(3, 4).requires_grad_(),
        scores(3, 4).requires_grad_(),
        torch.rand(3, requires_grad=True),
    )
    for soft in (False, True):
        result = ops.dynamic_label_cross_entropy(z, guide, weights=weights, soft=soft, backend=backend)
        result.loss.backward()
        assert guide.grad is None
        assert weights.grad is None
        assert z.grad is not None
    with torch.no_grad():
        assert not ops.dynamic_label_cross_entropy(z, guide, backend=backend).loss.requires_grad
    assert not ops.dynamic_label_cross_entropy(z.detach(), guide, backend=backend).loss.requires_grad


@pytest.mark.parametrize("backend", ON_CPU[1:])
def test_second_derivatives_are_refused_not_wrong(backend: str) -> None:
    z = scores(3, 4).requires_grad_()
    loss = ops.dynamic_label_cross_entropy(z, scores(3, 4), backend=backend).loss
    with pytest.raises(RuntimeError, match=r'no second derivative .* backend="eager" has one'):
        torch.autograd.grad(loss, z, create_graph=True)


@needs("ext")
def test_the_sum_does_not_depend_on_the_number_of_threads() -> None:
    z, guide = scores(20011, 10), scores(20011, 10)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            result, grad = loss_of(z, guide, backend="cpp")
            found.append((result.loss, grad))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][0], found[2][0])
    assert torch.equal(found[0][1], found[2][1])
    close(found[0][0], oracle(z, label_distribution(guide, 10, False, 1, 0), None, "mean")[0])


@pytest.mark.parametrize("backend", ON_CPU)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_loss_properties(backend: str, data: st.DataObject) -> None:
    n, k = data.draw(st.integers(1, 6)), data.draw(st.sampled_from([2, 5, 16, 40, 131]))
    smoothing = data.draw(st.sampled_from([0.0, 0.2, 1.0]))
    soft = data.draw(st.booleans())
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    z, guide = scores(n, k, spread=data.draw(st.sampled_from([0.1, 3.0, 30.0]))), scores(n, k)
    options = {"soft": soft, "label_smoothing": smoothing, "reduction": "none", "backend": backend}
    result, grad = loss_of(z, guide, **options)
    assert (result.loss >= -1e-6).all()
    torch.testing.assert_close(grad.sum(1), torch.zeros(n), rtol=0, atol=1e-5)
    # Shifting all logits of a row changes nothing; permuting rows permutes everything.
    shifted, shifted_grad = loss_of(z + 8.0, guide, **options)
    torch.testing.assert_close(shifted.loss, result.loss, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(shifted_grad, grad, rtol=1e-4, atol=1e-4)
    order = torch.randperm(n)
    permuted, permuted_grad = loss_of(z[order], guide[order], **options)
    assert torch.equal(permuted.loss, result.loss[order])
    assert torch.equal(permuted_grad, grad[order])


@pytest.mark.parametrize(
    "name",
    [
        "dynamic_label_cross_entropy",
        pytest.param("dynamic_label_cross_entropy_triton", marks=needs("triton")),
    ],
)
def test_loss_registration(name: str) -> None:
    operator = getattr(torch.ops.fastdynat, name).default
    z = scores(3, 5).requires_grad_()
    for args in (
        (z, scores(3, 5), classes(3, 5), torch.rand(3), False, 1.0, 0.1, 1, True),
        (z, scores(3, 5), None, None, True, 2.0, 0.0, 0, True),
        (z.detach().half(), classes(3, 5), None, None, False, 1.0, 0.0, 2, False),
    ):
        torch.library.opcheck(operator, args)


@needs("ext")
def test_the_registered_loss_checks_its_arguments() -> None:
    run = torch.ops.fastdynat.dynamic_label_cross_entropy
    z, rest = scores(3, 4), (False, 1.0, 0.0, 1, False)
    for args, message in (
        ((z[0], z[0], None, None, *rest), r"target_logits must be \(N, K\) with K >= 1, got shape \(4\)"),
        ((z.int(), z, None, None, *rest), "target_logits must be float32"),
        ((z, z[:2], None, None, *rest), r"guide has shape \(2, 4\) but target_logits has shape \(3, 4\)"),
        ((z, classes(2, 4), None, None, *rest), "guide has shape"),
        ((z, z, classes(2, 4), None, *rest), "labels has shape"),
        ((z, z, None, torch.rand(3).double(), *rest), "weights must be float32"),
        ((z, classes(3, 4), None, None, True, *rest[1:]), "soft labels need the guide's logits"),
        ((z, z, None, None, False, 0.0, *rest[2:]), "temperature must be positive"),
        ((z, z, None, None, False, 1.0, 2.0, 1, False), "label_smoothing must be in"),
        ((z, z, None, None, False, 1.0, 0.0, 5, False), "reduction must be"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run(*args)
    loss = run(z.requires_grad_(), z, None, None, *rest)[0]
    with pytest.raises(RuntimeError, match="called without with_grad"):
        loss.backward()


@pytest.mark.parametrize("backend", ON_CPU)
def test_loss_compiles_as_one_graph(backend: str) -> None:
    z, guide, labels = scores(4, 6), scores(4, 6), classes(4, 6)

    def forward(z: Tensor) -> ops.DynamicLabelLoss:
        return ops.dynamic_label_cross_entropy(z, guide, labels=labels, label_smoothing=0.1, backend=backend)

    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    leaf = z.clone().requires_grad_()
    result = compiled(leaf)
    result.loss.backward()
    expected, expected_grad = loss_of(z, guide, labels=labels, label_smoothing=0.1, backend=backend)
    close(result.loss, expected.loss)
    assert leaf.grad is not None
    close(leaf.grad, expected_grad)
    assert result.target_correct == expected.target_correct


@pytest.mark.parametrize("backend", ON_CPU)
def test_loss_under_autocast(backend: str) -> None:
    linear, x = torch.nn.Linear(8, 5), torch.randn(4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = linear(x)
        result = ops.dynamic_label_cross_entropy(z, scores(4, 5), backend=backend)
        assert z.dtype == torch.bfloat16
        assert result.loss.dtype == torch.float32
        result.loss.backward()
    assert linear.weight.grad is not None
    assert linear.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_logits": torch.rand(4)}, r"target_logits must be \(N, K\) with K >= 1, got shape \(4,\)"),
        ({"target_logits": torch.rand(3, 0)}, r"K >= 1, got shape \(3, 0\)"),
        ({"target_logits": torch.zeros(3, 4).int()}, "target_logits must be float32.*got torch.int32"),
        ({"guide": torch.rand(3, 5)}, r"guide has shape \(3, 5\) but target_logits has shape \(3, 4\)"),
        ({"guide": torch.zeros(4, dtype=torch.int64)}, r"guide \(of int64 classes\) must have shape \(3,\)"),
        ({"guide": torch.zeros(3).int()}, "guide must be"),
        ({"guide": torch.zeros(3, dtype=torch.int64), "soft": True}, "soft=True needs the guide's logits"),
        ({"guide": torch.rand(3, 4, device="meta")}, "guide is on meta but the logits are on cpu"),
        ({"labels": torch.rand(3)}, "labels must be int64 class indices, got torch.float32"),
        ({"weights": torch.rand(4)}, r"weights must have shape \(3,\), one per row, got \(4,\)"),
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        ({"label_smoothing": 1.5}, r"label_smoothing must be in \[0, 1\], got 1.5"),
        ({"reduction": "avg"}, "reduction must be one of none, mean, sum, got 'avg'"),
    ],
)
def test_loss_errors_name_the_values(change: dict[str, Any], message: str) -> None:
    args: dict[str, Any] = {"target_logits": torch.rand(3, 4), "guide": torch.rand(3, 4)} | change
    with pytest.raises(ValueError, match=message):
        ops.dynamic_label_cross_entropy(**args)


def test_unknown_backend() -> None:
    with pytest.raises(UserError, match="unknown backend 'nothing'"):
        ops.dynamic_label_cross_entropy(torch.rand(2, 3), torch.rand(2, 3), backend="nothing")


@pytest.mark.parametrize("backend", ON_CPU)
def test_the_saved_gradient_survives_whoever_takes_it(backend: str) -> None:
    """Called with a factor of 1, the backward pass hands the saved gradient out as it is."""
    z, guide = scores(5, 7).requires_grad_(), scores(5, 7)
    _, want = oracle(z.detach(), label_distribution(guide, 7, False, 1, 0), None, "mean")
    loss = ops.dynamic_label_cross_entropy(z, guide, backend=backend).loss
    for factor in (1, 2, 3):
        loss.backward(retain_graph=True)
        assert z.grad is not None
        close(z.grad, factor * want)
    z.grad = None
    (2 * loss + loss).backward(retain_graph=True)
    close(z.grad, 3 * want)
    factors = torch.tensor([1.0, 1.0, -2.0])
    several = torch.autograd.grad(loss, z, factors, retain_graph=True, is_grads_batched=True)[0]
    close(several, factors[:, None, None] * want)
    shared = z * 1.0  # its gradient is the sum of two
    both = ops.dynamic_label_cross_entropy(shared, guide, backend=backend).loss + shared.sum()
    close(torch.autograd.grad(both, z)[0], want + 1)


@needs("ext")
def test_changing_a_gradient_in_place_is_refused_where_it_is_needed_again() -> None:
    z = scores(5, 7).requires_grad_()
    loss = ops.dynamic_label_cross_entropy(z, scores(5, 7), backend="cpp").loss
    (grad,) = torch.autograd.grad(loss, z, retain_graph=True)
    grad.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, z)
