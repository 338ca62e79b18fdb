"""Closed-form gradient of attack losses: float64 autograd, rescaling, extreme logits."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import SIMULATED_CUDA, needs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdynat import ops

# The interpreter computes with numpy, which remarks on the NaN and infinities that kernels pass through.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(invalid value|divide by zero|overflow|All-NaN):RuntimeWarning"
)

NAN, INF = float("nan"), float("inf")
LOSSES = ("ce", "soft-ce", "kl", "margin", "dlr")
HARD = ("ce", "margin", "dlr")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 8e-3, torch.float16: 1e-3}
ON_CPU = [
    "eager",
    pytest.param("cpp", marks=needs("ext")),
    SIMULATED_CUDA,
    pytest.param(
        "triton", marks=[needs("triton"), pytest.mark.skipif(torch.cuda.is_available(), reason="see ON_GPU")]
    ),
]
ON_GPU = [pytest.param(name, marks=[needs("gpu"), pytest.mark.gpu]) for name in ("eager", "cuda", "triton")]
SHAPES = [(0, 10), (1, 3), (33, 10), (5, 64), (3, 65), (4, 100), (2, 1000)]


def inputs(shape: tuple[int, int], loss: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    logits = (3 * torch.randn(shape)).to(dtype)
    if loss in HARD:
        return logits, torch.randint(shape[1], shape[:1])
    log_q = (2 * torch.randn(shape, dtype=torch.float64)).log_softmax(1)
    return logits, (log_q if loss == "kl" else log_q.exp()).to(
        dtype if dtype == torch.float64 else torch.float32
    )


def run(logits: Tensor, labels: Tensor, loss: str, **kwargs: Any) -> ops.AttackGrad:
    return ops.attack_logit_grad(logits, labels, loss=loss.removeprefix("soft-"), **kwargs)


def formula(z: Tensor, label: Tensor, loss: str) -> Tensor:
    """The loss of one row in float64, straight from its definition."""
    if loss == "soft-ce":
        return -(label * (z - z.logsumexp(0))).sum()
    if loss == "kl":
        return (label.exp() * (label - (z - z.logsumexp(0)))).sum()
    y = int(label)
    others = torch.cat([z[:y], z[y + 1 :]])
    if loss == "ce":
        return torch.log1p(torch.exp(others - z[y]).sum())
    lead = others[others.argmax()] - z[y]
    order = z.sort(descending=True, stable=True).values
    return lead if loss == "margin" else lead / (order[0] - order[2])


def oracle(logits: Tensor, labels: Tensor, loss: str) -> tuple[Tensor, Tensor]:
    z = logits.double().requires_grad_()
    wide = labels if labels.dtype == torch.int64 else labels.double()
    values = torch.stack([formula(z[i], wide[i], loss) for i in range(len(z))]) if len(z) else z.sum(1)
    (grad,) = torch.autograd.grad(values.sum(), z)
    return grad, values.detach()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("backend", ON_CPU)
def test_agrees_with_autograd_of_the_formula(backend: str, loss: str) -> None:
    for shape in SHAPES:
        for dtype in DTYPES:
            logits, labels = inputs(shape, loss, dtype)
            if loss == "dlr":
                logits = (
                    logits + torch.arange(shape[1]).to(dtype) / 8
                )  # no ties: autograd has a say in them, we have another
            grad, value = run(logits, labels, loss, backend=backend)
            expected, expected_value = oracle(logits, labels, loss)
            scale = float(expected.abs().max()) if expected.numel() else 1.0
            torch.testing.assert_close(
                grad.double(), expected, rtol=0, atol=TOLERANCE[dtype] * max(scale, 1.0)
            )
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            assert (grad.dtype, value.dtype) == (dtype, wide)
            torch.testing.assert_close(
                value.double(), expected_value, rtol=3e-6 if wide == torch.float32 else 1e-12, atol=3e-6
            )


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("backend", ON_CPU)
def test_targeted_is_the_negative(backend: str, loss: str) -> None:
    logits, labels = inputs((7, 10), loss)
    away, towards = (
        run(logits, labels, loss, targeted=t, rescale=True, backend=backend) for t in (False, True)
    )
    assert torch.equal(towards.grad, -away.grad)
    assert torch.equal(towards.loss, -away.loss)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ON_CPU)
def test_the_scale_is_a_power_of_two(backend: str, dtype: torch.dtype, loss: str) -> None:
    logits, labels = inputs((40, 10), loss, dtype)
    plain = run(logits, labels, loss, backend=backend).grad
    scaled = run(logits, labels, loss, rescale=True, backend=backend).grad
    largest = scaled.abs().amax(1)
    moving = plain.abs().amax(1) > 0  # not where the label is the third of a "dlr", which is then constant
    assert int(moving.sum()) >= 20
    assert bool(((largest >= 0.5) & (largest < 1))[moving].all())
    plain, scaled = plain[moving], scaled[moving]
    ratio = scaled.abs().amax(1) / plain.abs().amax(1)
    assert bool((torch.frexp(ratio)[0] == 0.5).all())
    assert torch.equal(scaled, plain * ratio[:, None])


@pytest.mark.parametrize("gap", [30.0, 88.0, 150.0, 1e4])
@pytest.mark.parametrize("backend", ON_CPU)
def test_a_confident_row_keeps_its_direction(backend: str, gap: float) -> None:
    """Hard labels, classified right by far: float32 itself loses the gradient from a gap of about 100 on."""
    logits = torch.randn(20, 10)
    labels = torch.randint(10, (20,))
    logits = logits.scatter_add(1, labels[:, None], torch.full((20, 1), gap))
    scaled = run(logits, labels, "ce", rescale=True, backend=backend).grad
    others = logits.double().scatter(1, labels[:, None], -INF).softmax(1)
    expected = others.scatter(1, labels[:, None], -1.0)
    torch.testing.assert_close(
        scaled.double() / -scaled.double().gather(1, labels[:, None]), expected, rtol=1e-4, atol=1e-6
    )
    assert bool((scaled.abs().amax(1) >= 0.5).all())
    assert bool((scaled.abs().amax(1) < 1).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ON_CPU)
def test_half_precision_underflow_before_and_after(backend: str, dtype: torch.dtype) -> None:
    labels = torch.randint(10, (200,))
    logits = (
        torch.randn(200, 10).scatter_add(1, labels[:, None], torch.linspace(10, 120, 200)[:, None]).to(dtype)
    )
    zero = {
        rescale: float(
            (run(logits, labels, "ce", rescale=rescale, backend=backend).grad == 0).all(1).float().mean()
        )
        for rescale in (False, True)
    }
    assert zero[False] > (0.8 if dtype == torch.float16 else 0.1)
    assert zero[True] == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ON_CPU)
def test_the_labels_entry_is_minus_the_sum_of_the_others(backend: str, dtype: torch.dtype) -> None:
    logits = torch.tensor([[9.0, 0.0, -1.0], [7.0, -2.0, 0.5]], dtype=dtype)
    grad = run(logits, torch.tensor([0, 0]), "ce", backend=backend).grad.double()
    assert bool((grad[:, 0] < 0).all())
    torch.testing.assert_close(
        grad[:, 0], -grad[:, 1:].sum(1), rtol=1e-2 if dtype == torch.bfloat16 else 2e-3, atol=0
    )


@pytest.mark.parametrize("backend", ON_CPU)
def test_ties_go_to_the_first_class(backend: str) -> None:
    z = torch.tensor([[1.0, 2.0, 2.0, 2.0]])
    assert run(z, torch.tensor([0]), "margin", backend=backend).grad.tolist() == [[-1.0, 1.0, 0.0, 0.0]]
    assert run(z, torch.tensor([1]), "margin", backend=backend).grad.tolist() == [[0.0, -1.0, 1.0, 0.0]]
    flat = run(z, torch.tensor([0]), "dlr", backend=backend)
    assert flat.grad.tolist() == [[0.0] * 4]
    assert flat.loss.tolist() == [0.0]
    # first 3.0 at 1, second 3.0 at 2, third 1.0 at 0
    dlr = run(torch.tensor([[1.0, 3.0, 3.0, 0.0]]), torch.tensor([3]), "dlr", backend=backend)
    assert dlr.loss.tolist() == [1.5]
    torch.testing.assert_close(dlr.grad, torch.tensor([[0.75, 0.5 - 0.75, 0.0, -0.5]]))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("backend", ON_CPU)
def test_broken_rows_stay_alone(backend: str, loss: str) -> None:
    for classes in (10, 70):
        logits, labels = inputs((6, classes), loss)
        clean = run(logits, labels, loss, rescale=True, backend=backend)
        logits[1, 4], logits[3, 2], logits[4] = NAN, INF, -INF
        grad, value = run(logits, labels, loss, rescale=True, backend=backend)
        for row in (1, 3, 4):
            assert bool(grad[row].isnan().all()), row
            assert math.isnan(value[row]), row
        for row in (0, 2, 5):
            assert torch.equal(grad[row], clean.grad[row])
            assert torch.equal(value[row], clean.loss[row])


@pytest.mark.parametrize("backend", ON_CPU)
def test_a_class_of_logit_minus_infinity_has_no_part(backend: str) -> None:
    logits, labels = torch.tensor([[1.0, -INF, 0.0, 2.0]]), torch.tensor([0])
    for rescale in (False, True):
        grad, value = run(logits, labels, "ce", rescale=rescale, backend=backend)
        assert float(grad[0, 1]) == 0
        assert bool(grad.isfinite().all())
        assert bool(value.isfinite().all())
    q = torch.tensor([[0.5, 0.0, 0.25, 0.25]])
    for loss, labels in (("soft-ce", q), ("kl", q.log())):
        grad, value = run(logits, labels, loss, backend=backend)
        expected, expected_value = oracle(logits[:, [0, 2, 3]], labels[:, [0, 2, 3]], loss)
        torch.testing.assert_close(grad[:, [0, 2, 3]].double(), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(value.double(), expected_value, rtol=0, atol=1e-6)
    lost = run(torch.tensor([[-INF, 1.0, 0.0]]), torch.tensor([0]), "ce", backend=backend)
    assert float(lost.loss) == INF
    torch.testing.assert_close(lost.grad, torch.tensor([[-1.0, 1 / (1 + math.exp(-1)), 1 / (1 + math.e)]]))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("backend", ON_CPU)
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_rows_do_not_know_each_other(backend: str, loss: str, data: st.DataObject) -> None:
    n, classes = data.draw(st.integers(1, 40)), data.draw(st.integers(3, 80))
    # torch, and numpy under the interpreter, sum rows of another place or number in another order
    same = {"rtol": 1e-5, "atol": 1e-6} if backend in ("eager", "triton") else {"rtol": 0, "atol": 0}
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    logits, labels = inputs((n, classes), loss)
    logits = logits * data.draw(st.sampled_from([1e-3, 1.0, 30.0]))
    rescale = data.draw(st.booleans())
    grad, value = run(logits, labels, loss, rescale=rescale, backend=backend)
    order = torch.randperm(n)
    shuffled = run(logits[order], labels[order], loss, rescale=rescale, backend=backend)
    torch.testing.assert_close(shuffled.grad, grad[order], **same)
    torch.testing.assert_close(shuffled.loss, value[order], **same)
    cut = data.draw(st.integers(0, n))
    parts = [
        run(logits[i], labels[i], loss, rescale=rescale, backend=backend)
        for i in (slice(0, cut), slice(cut, n))
    ]
    torch.testing.assert_close(torch.cat([p.grad for p in parts]), grad, **same)
    if loss != "dlr":
        assert float(grad.double().sum(1).abs().max()) <= 1e-5  # softmax minus a distribution


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("backend", ON_GPU)
def test_gpu_agrees_with_cpu(backend: str, loss: str) -> None:
    for shape in SHAPES:
        for dtype in DTYPES:
            for rescale in (False, True):
                logits, labels = inputs(shape, loss, dtype)
                grad, value = run(logits.cuda(), labels.cuda(), loss, rescale=rescale, backend=backend)
                expected = run(logits, labels, loss, rescale=rescale, backend="eager")
                # A largest entry next to a power of two may be scaled by the next one.
                want, got = (g.double().abs().amax(1) for g in (expected.grad, grad.cpu()))
                ratio = torch.where(
                    (want > 0) & (got > 0) & rescale, (want / got).round(decimals=1), 1.0
                ).view(-1, 1)
                atol = TOLERANCE[dtype] * max(
                    1.0, float(expected.grad.abs().max()) if expected.grad.numel() else 1.0
                )
                torch.testing.assert_close(
                    grad.cpu().double() * ratio, expected.grad.double(), rtol=1e-5, atol=atol
                )
                torch.testing.assert_close(value.cpu(), expected.loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["attack_logit_grad", pytest.param("attack_logit_grad_triton", marks=needs("triton"))]
)
def test_registration(name: str) -> None:
    operator = getattr(torch.ops.fastdynat, name).default
    for code, loss in enumerate(("ce", "kl", "margin", "dlr", "soft-ce")):
        for shape in ((5, 7), (0, 7)):
            torch.library.opcheck(operator, (*inputs(shape, loss), code, True, False))


@pytest.mark.parametrize("backend", ON_CPU)
def test_compiles_as_one_graph(backend: str) -> None:
    def both(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        out = run(logits, labels, "ce", rescale=True, backend=backend)
        return out.grad, out.loss

    logits, labels = inputs((5, 10), "ce")
    compiled: Callable[..., Any] = torch.compile(both, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(compiled(logits, labels), both(logits, labels), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("backend", ON_CPU)
def test_any_layout_and_no_graph(backend: str) -> None:
    logits, labels = inputs((6, 10), "ce")
    wide = torch.stack([logits, logits], -1)[..., 0].requires_grad_()
    out = run(wide, labels, "ce", backend=backend)
    assert not out.grad.requires_grad
    assert torch.equal(out.grad, run(logits, labels, "ce", backend=backend).grad)
    torch.testing.assert_close(run(logits.t().contiguous().t(), labels, "ce", backend=backend).grad, out.grad)


@pytest.mark.parametrize("backend", ON_CPU)
def test_a_class_that_does_not_exist(backend: str) -> None:
    """An error in both forms for the CPU; NaN where raising would wait for a device, or in a trace."""
    logits, labels = torch.randn(3, 4), torch.tensor([0, 4, -1])
    if backend in ("cpp", "eager"):
        for loss in ("ce", "margin", "dlr"):
            with pytest.raises(RuntimeError, match=r"labels\[1\] is 4, expected a class in \[0, 4\)"):
                run(logits, labels, loss, backend=backend)
    if backend == "cpp":
        return
    traced = torch.compile(run, backend="eager") if backend == "eager" else run
    grad, value = traced(logits, labels, "ce", backend=backend)
    assert grad.isnan().any(1).tolist() == [False, True, True]
    assert value.isnan().tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        (
            (torch.rand(2, 3), torch.tensor([0, 1])),
            {"loss": "mse"},
            "loss must be one of ce, kl, margin, dlr, got 'mse'",
        ),
        ((torch.rand(2, 2), torch.tensor([0, 1])), {"loss": "dlr"}, r"K >= 3, got shape \(2, 2\)"),
        (
            (torch.rand(2, 3), torch.tensor([0.0, 1.0])),
            {"loss": "margin"},
            "labels must be int64 class indices, got torch.float32",
        ),
        ((torch.rand(2, 3), torch.tensor([0])), {"loss": "ce"}, r"labels must have shape \(2,\)"),
        (
            (torch.rand(2, 3), torch.tensor([0, 1])),
            {"loss": "kl"},
            r"labels must be log-probabilities of shape \(2, 3\)",
        ),
        (
            (torch.rand(2, 3), torch.rand(3, 2)),
            {"loss": "ce"},
            r"labels must be probabilities of shape \(2, 3\)",
        ),
        ((torch.rand(2, 3).int(), torch.tensor([0, 1])), {"loss": "ce"}, "logits must be float32"),
        (
            (torch.rand(2, 3), torch.zeros(2, dtype=torch.int64, device="meta")),
            {"loss": "ce"},
            "labels is on meta",
        ),
    ],
)
def test_errors_name_the_values(args: tuple[Tensor, Tensor], kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.attack_logit_grad(*args, **kwargs)


@pytest.mark.parametrize("backend", ON_CPU)
def test_faint_soft_rows_are_finite(backend: str) -> None:
    """The largest entry is subnormal or flushed: no power of two makes it one half, and none may overflow."""
    logits = torch.stack([torch.tensor([gap, 0.0]) for gap in (86.0, 88.6, 95.0, 103.0, 120.0)])
    target = torch.tensor([1.0, -INF]).expand(5, 2).log_softmax(1)
    for loss, labels in (("kl", target), ("soft-ce", target.exp())):
        grad, value = run(logits, labels, loss, rescale=True, backend=backend)
        assert bool(grad.isfinite().all())
        assert bool(value.isfinite().all())
        assert float(grad.abs().max()) <= 1


@pytest.mark.parametrize("backend", ON_CPU)
def test_nothing_but_the_label_is_possible(backend: str) -> None:
    for loss in ("margin", "dlr"):
        logits = torch.tensor([[5.0, -INF, -INF]])
        grad, value = run(logits, torch.tensor([0]), loss, backend=backend)
        if loss == "margin":
            assert grad.tolist() == [[-1.0, 1.0, 0.0]]
            assert float(value) == -INF
    ratio = run(torch.tensor([[-INF, 1.0, 2.0, 3.0, 0.5]]), torch.tensor([0]), "dlr", backend=backend)
    assert float(ratio.loss) == INF
    assert not bool(ratio.grad[:, [0, 2, 4]].isnan().any())


@pytest.mark.parametrize("backend", ON_CPU)
def test_a_log_probability_above_zero_counts_as_zero(backend: str) -> None:
    logits = torch.tensor([[1.0, 2.0, 0.0]])
    above, at = (run(logits, torch.tensor([[v, -50.0, -60.0]]), "kl", backend=backend) for v in (200.0, 0.0))
    assert torch.equal(above.grad, at.grad)
    assert torch.equal(above.loss, at.loss)
