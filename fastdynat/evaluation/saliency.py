"""Interpretability: saliency maps, SmoothGrad, and their agreement with the image's edges.

Saliency is the absolute gradient of the label's logit at the image, its maximum over channels (Simonyan et
al. 2014, arXiv 1312.6034). The logit is used because a saturated loss has no gradient. Robust networks have
saliency maps that people can read (Tsipras et al. 2019, arXiv 1805.12152)."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdynat.attack_engine.ascent import Ascent
from fastdynat.attack_engine.goal import AttackGoal
from fastdynat.attack_engine.network_modes import attack_mode
from fastdynat.attack_engine.pgd import check_batch
from fastdynat.errors import UserError
from fastdynat.evaluation.measure import attacked, exact_float32
from fastdynat.ops.image_draws import ImageDraws, Randomness, normal_like

CHUNK = 256  # images per forward and backward pass, and maps ranked at a time; bounds the memory
# Quantile of a map that is shown as 1: single bright pixels would darken all others (Smilkov et al. 2017).
BRIGHTEST = 0.99


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Result of `explain` for n images; tensors are float32 on the CPU.

    Attributes:
        saliency: (n, H, W) in [0, 1] for display, each map divided by its 99 % quantile. All numbers below
            are of the unscaled maps.
        smooth_grad: (n, H, W), the same of the gradient averaged over noisy copies of the image (SmoothGrad).
        edge_alignment: Spearman's rank correlation over pixels of the saliency and the image's edges (Sobel),
            mean over images, in [-1, 1]. Adebayo et al. 2018 (arXiv 1810.03292) compare saliency maps by it.
            0 for a map that is constant.
        smooth_edge_alignment: the same of SmoothGrad.
        image_alignment: ``|<x, g>| / ||g||``, mean over images (Etmann et al. 2019, arXiv 1905.04172).
        concentration: Gini index of the saliency, mean over images: 0 for a uniform map, close to 1 for a
            single pixel (Chalasani et al. 2020, arXiv 1810.06583).
        reference_alignment: Spearman's correlation with the saliency of the reference network; None without
            one.
    """

    saliency: Tensor
    smooth_grad: Tensor
    edge_alignment: float
    smooth_edge_alignment: float
    image_alignment: float
    concentration: float
    reference_alignment: float | None


@exact_float32()
def explain(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    *,
    reference: nn.Module | None = None,
    samples: int = 25,
    noise: float = 0.1,
    generator: Randomness = None,
) -> Explanation:
    """Saliency and SmoothGrad (Smilkov et al. 2017, arXiv 1706.03825) of `model` at `x`, with statistics.

    Args:
        model: images in [0, 1] -> logits, on the images' device; in eval mode during the call.
        x: (n, C, H, W), float32 or float64, in [0, 1].
        labels: (n,) int64, whose logits are explained.
        reference: another network, whose saliency is compared.
        samples: noisy copies per image.
        noise: their standard deviation, relative to the image's range; the paper finds 0.1 to 0.2 best.
        generator: source of the noise, a ``torch.Generator`` or `ImageDraws` of the images; None is torch's
            global generator.

    Raises:
        UserError: no images, images outside [0, 1], another number of labels, no samples, or negative noise.
    """
    check_batch(x, AttackGoal("ce", labels))
    if len(x) == 0 or samples < 1 or noise < 0:
        raise UserError(
            f"explain needs images, samples >= 1 and noise >= 0, got {len(x)}, {samples} and {noise:g}"
        )
    gradient = _mean_gradient(model, x, labels)
    smooth = _mean_gradient(model, x, labels, samples, noise, generator)
    saliency, smooth_saliency, edges = flat(gradient), flat(smooth), sobel(x)
    other = None if reference is None else flat(_mean_gradient(reference, x, labels))
    return Explanation(
        saliency=_for_display(saliency),
        smooth_grad=_for_display(smooth_saliency),
        edge_alignment=float(spearman(saliency, edges).mean()),
        smooth_edge_alignment=float(spearman(smooth_saliency, edges).mean()),
        image_alignment=float(image_alignment(x, gradient).mean()),
        concentration=float(gini(saliency).mean()),
        reference_alignment=None if other is None else float(spearman(saliency, other).mean()),
    )


def flat(gradient: Tensor) -> Tensor:
    """(n, C, H, W) gradients -> (n, H, W) saliency: the largest absolute value over the channels."""
    return gradient.abs().amax(1)


def sobel(x: Tensor) -> Tensor:
    """Sobel magnitude (n, H, W) of the channel means of `x` (n, C, H, W); borders are replicated."""
    across = x.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
    kernels = torch.stack([across, across.T])[:, None]
    return (
        F.conv2d(F.pad(x.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate"), kernels)
        .square()
        .sum(1)
        .sqrt()
    )


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's rank correlation of the maps of `a` and `b` (n, H, W), (n,); ties share their mean rank.

    0 where a map is constant.
    """
    return torch.cat(
        [_pearson(_ranks(i), _ranks(j)) for i, j in zip(a.split(CHUNK), b.split(CHUNK), strict=True)]
    )


def _ranks(maps: Tensor) -> Tensor:
    values = maps.flatten(1).contiguous()
    order = values.sort(1).values
    below, up_to = (torch.searchsorted(order, values, right=right) for right in (False, True))
    return (below + up_to).double() / 2


def _pearson(a: Tensor, b: Tensor) -> Tensor:
    a, b = (v - v.mean(1, keepdim=True) for v in (a, b))
    spread = a.norm(dim=1) * b.norm(dim=1)
    return torch.where(spread > 0, (a * b).sum(1) / spread.clamp_min(torch.finfo(a.dtype).tiny), 0.0)


def gini(maps: Tensor) -> Tensor:
    """The Gini index of each map of `maps` (n, H, W), not negative, (n,); 0 for a map of zeros."""
    values = maps.flatten(1).double().sort(1).values
    pixels = values.shape[1]
    weights = (2 * torch.arange(1, pixels + 1, device=maps.device) - pixels - 1).double() / pixels
    total = values.sum(1)
    return torch.where(total > 0, values @ weights / total.clamp_min(torch.finfo(torch.double).tiny), 0.0)


def image_alignment(x: Tensor, gradient: Tensor) -> Tensor:
    """``|<x, g>| / ||g||`` per image, (n,); 0 where the gradient is."""
    x, gradient = x.flatten(1).double(), gradient.flatten(1).double()
    length = gradient.norm(dim=1)
    return torch.where(
        length > 0, (x * gradient).sum(1).abs() / length.clamp_min(torch.finfo(torch.double).tiny), 0.0
    )


def _mean_gradient(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    samples: int = 1,
    noise: float = 0.0,
    generator: Randomness = None,
) -> Tensor:
    """The mean gradient of each label's logit at `samples` copies of its image, noisy and not clipped, (n, C,
    H, W).
    """
    with torch.inference_mode(False), torch.enable_grad(), attack_mode(model, "eval"):
        total = torch.zeros_like(x)
        sigma = noise * (x.amax((1, 2, 3), keepdim=True) - x.amin((1, 2, 3), keepdim=True))
        ascent = attacked(model, x)
        states = [generator.next_state() for _ in range(samples)] if isinstance(generator, ImageDraws) else []
        for copies in _chunks(len(x), samples, x.device):
            rows = copies % len(x)
            read = x[rows]
            if noise and isinstance(generator, ImageDraws):
                read = read + sigma[rows] * _noise(read, copies, generator.images, states)
            elif noise:
                read = read + sigma[rows] * normal_like(read, generator, *x.shape[1:])
            total.index_add_(0, rows, _label_gradient(ascent, read, labels[rows]))
    return total / samples


def _label_gradient(ascent: Ascent, x: Tensor, labels: Tensor) -> Tensor:
    return ascent.value_and_grad(
        x, lambda logits: (F.one_hot(labels, logits.shape[1]).to(logits.dtype), None)
    )[1]


def _chunks(images: int, samples: int, device: torch.device) -> Iterator[Tensor]:
    """The numbers of all copies, `CHUNK` at a time: copy k is sample k // images of image k % images."""
    for start in range(0, images * samples, CHUNK):
        yield torch.arange(start, min(start + CHUNK, images * samples), device=device)


def _noise(x: Tensor, copies: Tensor, images: Tensor, states: list[Tensor]) -> Tensor:
    """Normal numbers for each of `copies`, which depend on its sample and its image's number only."""
    first, last = (int(copies[end]) // len(images) for end in (0, -1))
    parts = []
    for sample in range(first, last + 1):
        rows = copies[copies // len(images) == sample] % len(images)
        parts.append(ImageDraws(states[sample], images[rows], 1).normal(*x.shape[1:], dtype=x.dtype))
    return torch.cat(parts)


def _for_display(maps: Tensor) -> Tensor:
    top = maps.flatten(1).quantile(BRIGHTEST, dim=1)[:, None, None]
    # Where at most one pixel in a hundred has a gradient, the map is divided by its largest value.
    top = torch.where(top > 0, top, maps.amax((1, 2), keepdim=True))
    return (
        torch.where(top > 0, maps / top.clamp_min(torch.finfo(maps.dtype).tiny), 0.0)
        .clamp(0, 1)
        .float()
        .cpu()
    )
