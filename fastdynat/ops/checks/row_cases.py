"""Cases of the operators on logits: numbers of classes, dtypes, gaps of 1e4, ties, non-finite rows."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastdynat.ops.attack_logit_grad import attack_logit_grad
from fastdynat.ops.checks.case_helpers import (
    FLOATS,
    Layout,
    contiguous,
    generator,
    named,
    normal,
    register_cases,
    shaped,
    turned,
    with_gaps,
)
from fastdynat.ops.dynamic_label_cross_entropy import dynamic_label_cross_entropy
from fastdynat.ops.soft_margin import soft_margin, soft_margin_grad
from fastdynat.verification import Case, Timing

# One shape per code path: lanes over rows and over classes on the CPU; part of a warp, a warp and a block
# per row on GPUs; chunks in Triton.
SHAPES = ((33, 10), (5, 17), (3, 100), (2, 129), (2, 1001), (2, 4099), (1, 3), (0, 10))
RARE = ((5, 17), (2, 129), (2, 4099), (1, 3))  # left to the deep check of candidates that compile
PLAIN, LARGE = (33, 10), (2048, 1000)
INF = math.inf
QUOTIENTS = {torch.bfloat16: 2.0**-7 / 4e-6, torch.float16: 2.0**-10 / 4e-6}
LAYOUTS: dict[str, Layout] = {"contiguous": contiguous, "with gaps": with_gaps, "turned": turned}


def scores(shape: Sequence[int], seed: int, *, odd: bool = False, spread: float = 3.0) -> Tensor:
    """Logits, float64; `odd` ones have gaps of 1e4, ties, -inf, and rows with NaN, +inf or only -inf."""
    z = spread * normal(shape, seed)
    if not odd:
        return z
    z[0, 0], z[1, 0] = 1e4, -1e4
    z[2] = z[2].round()
    z[3], z[4, 1:] = 0.5, 2.0
    z[5, 2] = -INF
    z[6, 1], z[7, 2], z[8] = math.nan, INF, -INF
    return z


def labels_of(shape: Sequence[int], device: torch.device) -> Tensor:
    """(N,) int64 labels for (N, K) logits; those of the first two rows are 0."""
    drawn = torch.randint(shape[1], (shape[0],), generator=generator(9), dtype=torch.int64, device="cpu")
    drawn[:2] = 0
    return drawn.to(device)


def hard(
    device: torch.device,
    *,
    shape: Sequence[int],
    dtype: torch.dtype,
    odd: bool,
    layout: str,
    options: dict[str, Any],
) -> tuple[Any, ...]:
    """(logits, labels, options)."""
    return LAYOUTS[layout](scores(shape, 1, odd=odd).to(device, dtype)), labels_of(shape, device), options


def soft(
    device: torch.device,
    *,
    shape: Sequence[int],
    dtype: torch.dtype,
    odd: bool,
    layout: str,
    options: dict[str, Any],
) -> tuple[Any, ...]:
    """(logits, probabilities or their logarithms, options)."""
    log_q = (2 * normal(shape, 2)).log_softmax(1)
    target = log_q if options["loss"] == "kl" else log_q.exp()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return LAYOUTS[layout](scores(shape, 1, odd=odd).to(device, dtype)), target.to(device, wide), options


def run_logit_grad(
    logits: Tensor, labels: Tensor, options: dict[str, Any], backend: str
) -> tuple[Tensor, ...]:
    """Gradient and loss; rescaled rows divided by their largest entry.

    Where that is next to a power of two, rounding decides which scale a row gets.
    """
    grad, loss = attack_logit_grad(logits, labels, backend=backend, **options)
    if not options["rescale"]:
        return grad, loss
    largest = grad.abs().amax(1, keepdim=True)
    one_scale = ((largest >= 0.5) & (largest <= 1)) | (largest == 0) | largest.isnan()
    return torch.where(largest == 0, 0, grad / largest), loss, one_scale


def logit_grad_cases() -> list[Case]:
    """The cases of `attack_logit_grad`."""
    calls: list[tuple[str, Sequence[int], torch.dtype, bool, str, bool]] = []
    for loss in ("ce", "margin", "dlr", "kl", "soft ce"):
        calls += [
            (loss, PLAIN, dtype, rescale, "contiguous", False)
            for dtype in FLOATS
            for rescale in (False, True)
        ]
        calls += [(loss, shape, torch.float32, False, "contiguous", False) for shape in SHAPES[1:]]
        calls += [(loss, PLAIN, torch.float32, True, "contiguous", True)]
    calls += [("ce", PLAIN, torch.float32, False, layout, False) for layout in ("with gaps", "turned")]
    cases = []
    for loss, shape, dtype, rescale, layout, odd in calls:
        name = f"{loss}, {named(dtype)}, {shaped(shape)}" + ", rescaled" * rescale + ", odd rows" * odd
        name += f", {layout}" * (layout != "contiguous")
        options = {"loss": loss.removeprefix("soft "), "rescale": rescale, "targeted": rescale and not odd}
        make = soft if loss in ("kl", "soft ce") else hard
        # The divisor is rounded, too, so that quotients may differ by one more step.
        scale = QUOTIENTS.get(dtype, 1.0) if rescale else 1.0
        # At first use: each loss as float32 and bfloat16 attacks call it, and rescaled; for ce also other
        # dtypes and sizes.
        first = dtype == torch.float32 and shape in (PLAIN, (0, 10))
        first |= rescale and dtype == torch.bfloat16
        first |= loss == "ce" and (dtype == torch.float32 or rescale) and shape not in RARE
        make = partial(make, shape=shape, dtype=dtype, odd=odd, layout=layout, options=options)
        cases.append(Case(name, make, scale, deep=not first))
    return cases


def mixed_labels(labels: Tensor, classes: int) -> Tensor:
    """Log-probabilities (N, K), float64, of two classes per image or of one; all others have none: -inf."""
    share = torch.linspace(0.5, 1, len(labels), dtype=torch.float64, device=labels.device)[:, None]
    both = [torch.nn.functional.one_hot(label, classes) for label in (labels, labels.roll(1))]
    return (share * both[0] + (1 - share) * both[1]).log()


def guided(
    device: torch.device,
    *,
    shape: Sequence[int],
    dtype: torch.dtype,
    guide_dtype: torch.dtype,
    odd: bool,
    layout: str,
    weighted: bool,
    options: dict[str, Any],
    mixed: bool = False,
) -> tuple[Any, ...]:
    """(target logits, guide, labels, weights or None, options)."""
    labels = labels_of(shape, device)
    classes = guide_dtype == torch.int64
    scored = mixed_labels(labels, shape[1]) if mixed else scores(shape, 4)
    guide = labels.roll(1) if classes else LAYOUTS[layout](scored.to(device, guide_dtype))
    if odd and not classes:
        guide[3] = guide[2].round()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weights = normal(shape[:1], 5).abs().to(device, wide) if weighted else None
    return LAYOUTS[layout](scores(shape, 1, odd=odd).to(device, dtype)), guide, labels, weights, options


def run_dynamic_label(
    z: Tensor, guide: Tensor, labels: Tensor, weights: Tensor | None, options: dict[str, Any], backend: str
) -> tuple[Any, ...]:
    """Loss, gradient of its sum, predictions, labels and counts."""
    z = z.detach().requires_grad_()
    found = dynamic_label_cross_entropy(z, guide, labels=labels, weights=weights, backend=backend, **options)
    (grad,) = torch.autograd.grad(found.loss.sum(), z)
    return (found.loss.detach(), grad, *found[1:])


def dynamic_label_cases() -> list[Case]:
    """The cases of `dynamic_label_cross_entropy`."""
    each: dict[str, Any] = {"reduction": "none"}
    variants: dict[str, tuple[bool, dict[str, Any]]] = {
        "mean": (False, {}),
        "weighted sum": (True, {"reduction": "sum"}),
        "smoothed": (True, {"label_smoothing": 0.1, **each}),
        "soft": (False, {"soft": True, "temperature": 2.0, **each}),
        "mixed": (False, {"soft": True, **each}),
        "mixed, smoothed": (False, {"soft": True, "label_smoothing": 0.1, **each}),
    }
    plain = (PLAIN, torch.float32, torch.float32, "mean", "contiguous", False)
    calls: list[tuple[Sequence[int], torch.dtype, torch.dtype, str, str, bool]] = [plain]
    calls += [
        (PLAIN, dtype, guide, "smoothed", "contiguous", False)
        for dtype in FLOATS
        for guide in (dtype, torch.int64)
    ]
    calls += [
        (shape, torch.float32, torch.float32, "weighted sum", "contiguous", False) for shape in SHAPES[:-1]
    ]
    calls += [(shape, torch.float32, torch.float32, "soft", "contiguous", False) for shape in SHAPES]
    calls += [(PLAIN, torch.float32, torch.bfloat16, "soft", "contiguous", False)]
    calls += [(shape, torch.float32, torch.float32, "mixed", "contiguous", False) for shape in SHAPES]
    calls += [
        (PLAIN, dtype, torch.float32, variant, "contiguous", odd)
        for variant, dtype, odd in (
            ("mixed, smoothed", torch.float32, False),
            ("mixed, smoothed", torch.bfloat16, False),
            ("mixed", torch.float64, False),
            ("mixed", torch.float32, True),
        )
    ]
    calls += [
        (PLAIN, torch.float32, torch.float32, "mean", layout, False) for layout in ("with gaps", "turned")
    ]
    calls += [(PLAIN, dtype, dtype, "soft", "contiguous", True) for dtype in (torch.float32, torch.float64)]
    calls += [(PLAIN, torch.float32, torch.int64, "smoothed", "contiguous", True)]
    cases = []
    for shape, dtype, guide, variant, layout, odd in calls:
        weighted, options = variants[variant]
        name = f"{variant}, {named(dtype)}, guide {named(guide)}, {shaped(shape)}" + ", odd rows" * odd
        name += f", {layout}" * (layout != "contiguous")
        make = partial(guided, shape=shape, dtype=dtype, guide_dtype=guide, odd=odd, layout=layout)
        # At first use: hard and soft labels, guides of logits and of classes, every dtype, the usual numbers
        # of classes.
        deep = (
            shape in RARE
            or (variant in ("soft", "mixed") and shape not in (PLAIN, (0, 10)))
            or (odd and dtype == torch.float64)
            or (variant.startswith("mixed") and dtype != torch.float32)
        )
        deep |= guide == torch.int64 and dtype in (torch.float16, torch.float64)
        mixed = variant.startswith("mixed")
        make = partial(make, weighted=weighted, options=options, mixed=mixed)
        cases.append(Case(name, make, deep=deep))
    return cases


def run_margin(logits: Tensor, labels: Tensor, options: dict[str, Any], backend: str) -> tuple[Tensor, ...]:
    """The margin and its gradient, by autograd and from `soft_margin_grad`, and the margin alone."""
    z = logits.detach().requires_grad_()
    found = soft_margin(z, labels, backend=backend, **options)
    (grad,) = torch.autograd.grad(found.sum(), z)
    both = soft_margin_grad(logits, labels, backend=backend, **options)
    return found.detach(), grad, *both, soft_margin(logits, labels, backend=backend, **options)


def margin_cases() -> list[Case]:
    """The cases of `soft_margin`."""
    calls: list[tuple[Sequence[int], torch.dtype, float, str, bool]] = []
    calls += [(PLAIN, dtype, 5.0, "contiguous", odd) for dtype in FLOATS for odd in (False, True)]
    calls += [(shape, torch.float32, 5.0, "contiguous", False) for shape in (*SHAPES[1:], (67, 2))]
    calls += [(PLAIN, torch.float32, 0.3, layout, False) for layout in LAYOUTS]
    cases = []
    for shape, dtype, temperature, layout, odd in calls:
        name = f"{named(dtype)}, {shaped(shape)}, T={temperature:g}" + ", odd rows" * odd
        name += f", {layout}" * (layout != "contiguous")
        options = {"temperature": temperature}
        deep = shape not in (PLAIN, (0, 10), (2, 1001), (2, 4099))  # the last one is another kernel's
        make = partial(hard, shape=shape, dtype=dtype, odd=odd, layout=layout, options=options)
        cases.append(Case(name, make, deep=deep))
    return cases


def row_timing(make: Any, passes: int, **more: Any) -> Timing:
    """The timed call of an operator on logits; `passes` over its (N, K) tensors."""
    make = partial(make, shape=LARGE, dtype=torch.float32, odd=False, layout="contiguous", **more)
    return Timing(f"float32 {shaped(LARGE)}", make, passes * 4 * math.prod(LARGE))


# Sums of exponentials, in float32 at least, differ in order; half-precision gradients are rounded once and
# differ by one step at most.
HALVES = {torch.bfloat16: (2.0**-7, 4e-6), torch.float16: (2.0**-10, 4e-6)}
register_cases(
    "attack_logit_grad",
    run_logit_grad,
    logit_grad_cases,
    {torch.float32: (6e-6, 4e-6), torch.float64: (2e-12, 2e-13), **HALVES},
    timed=partial(row_timing, hard, 2, options={"loss": "ce", "rescale": True, "targeted": False}),
)
register_cases(
    "dynamic_label_cross_entropy",
    run_dynamic_label,
    dynamic_label_cases,
    {torch.float32: (4e-6, 1e-6), torch.float64: (8e-15, 4e-15), **HALVES},
    timed=partial(row_timing, guided, 3, guide_dtype=torch.float32, weighted=False, options={}),
)
# Differences of logits reach 12, or 1e4, so that the relative tolerance is that of the margin.
register_cases(
    "soft_margin",
    run_margin,
    margin_cases,
    {torch.float32: (2e-6, 4e-6), torch.float64: (4e-15, 8e-15), **HALVES},
    timed=partial(row_timing, hard, 2, options={"temperature": 5.0}),
)
