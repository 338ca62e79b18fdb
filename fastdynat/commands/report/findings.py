"""The findings of a report as plain values: one function for each kind."""

import base64
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from io import BytesIO
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image
from torch import Tensor, nn

from fastdynat.attack_engine.steps import diameter, usual_step
from fastdynat.attacks import NamedAttack, parse_attack
from fastdynat.data import Images, eval_batches
from fastdynat.evaluation import measure
from fastdynat.evaluation.curves import accuracy_over_eps
from fastdynat.evaluation.masking import check_masking
from fastdynat.evaluation.measure import attacked
from fastdynat.evaluation.saliency import explain
from fastdynat.evaluation.transfer import transfer_matrix
from fastdynat.ops.image_draws import ImageDraws

ATTACK = "pgd20"  # of the curve, the images and the transfer matrix
# A cheap attack for the smallest perturbation, by norm; a stronger one that was stored by `fastdynat eval` is
# taken instead.
NEAREST = {"linf": "deepfool-linf", "l2": "deepfool"}
RADII = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)  # in units of the run's eps
EXPLAINED, SHOWN = 64, 6  # images whose gradients are looked at, and of these the ones on the page
LARGEST = 128  # pixels on a side of the pictures on the page
PICTURES = ("image", "perturbation", "adversarial", "saliency", "smooth_grad")


@dataclass(frozen=True)
class Means:
    """The keyword arguments that all functions of `fastdynat.evaluation` share."""

    device: torch.device
    batch_size: int
    seed: int
    should_stop: Callable[[], bool]
    advance: Callable[[float], None]


@dataclass(frozen=True)
class AttackedNetwork:
    """A network under the threat model of its evaluation, with the images of its dataset."""

    network: nn.Module
    images: Images
    norm: str
    eps: float
    class_names: tuple[str, ...]


def curve(subject: AttackedNetwork, means: Means) -> dict[str, Any]:
    """`EpsCurve` of `ATTACK`, at radii up to the largest distance between two images."""
    largest = diameter(subject.norm, subject.images.shape)
    radii = [share * subject.eps for share in RADII if share * subject.eps < largest]
    if len(radii) < len(RADII):
        radii.append(largest)
    return asdict(
        accuracy_over_eps(subject.network, subject.images, ATTACK, radii, norm=subject.norm, **vars(means))
    )


def nearest_distances(subject: AttackedNetwork, means: Means) -> dict[str, Any]:
    """`Measurement` of the norm's attack in `NEAREST`."""
    attack = _parse(NEAREST[subject.norm], subject.norm, subject.eps)
    return asdict(measure(subject.network, subject.images, attack, **vars(means)))


def _parse(name: str, norm: str, eps: float) -> NamedAttack:
    return parse_attack(name, eps=eps, step_size=usual_step(norm, eps), norm=norm)


def masking(subject: AttackedNetwork, means: Means) -> dict[str, Any]:
    """`MaskingReport`."""
    return asdict(
        check_masking(subject.network, subject.images, norm=subject.norm, eps=subject.eps, **vars(means))
    )


def transfer_between(subjects: Mapping[str, AttackedNetwork], means: Means) -> dict[str, Any]:
    """`TransferMatrix` of networks with one dataset and one threat model."""
    first = next(iter(subjects.values()))
    attack = _parse(ATTACK, first.norm, first.eps)
    networks = {name: subject.network for name, subject in subjects.items()}
    return asdict(transfer_matrix(networks, first.images, attack, **vars(means)))


def examples(subject: AttackedNetwork, means: Means) -> dict[str, Any]:
    """Images of several classes under `ATTACK` with saliency; the numbers are over the first `EXPLAINED`."""
    network = subject.network
    first = next(eval_batches(subject.images, batch_size=EXPLAINED, device=means.device))
    x, labels = first.x, first.labels
    draws = ImageDraws.of(means.seed, range(len(x)), means.device)
    explanation = explain(network, x, labels, generator=draws)
    chosen = one_of_each(labels.cpu(), SHOWN).to(means.device)
    attack = _parse(ATTACK, subject.norm, subject.eps)
    x_adv = attack.run(attacked(network, x), x[chosen], labels[chosen], draws=draws.take(chosen)).x_adv
    with torch.no_grad():
        before, after = (network(images).softmax(1).cpu() for images in (x[chosen], x_adv))
    delta = (x_adv - x[chosen]).cpu()
    gain = amplification(delta)
    at = chosen.cpu()
    rows = zip(
        x[chosen].cpu(),
        (0.5 + gain * delta).clamp(0, 1),
        x_adv.cpu(),
        explanation.saliency[at],
        explanation.smooth_grad[at],
        strict=True,
    )
    return {
        "gain": gain,
        "explained": len(x),
        "edge_alignment": explanation.edge_alignment,
        "smooth_edge_alignment": explanation.smooth_edge_alignment,
        "concentration": explanation.concentration,
        "examples": [
            {
                "label": subject.class_names[int(labels[i])],
                "before": _prediction(before[n], subject.class_names),
                "after": _prediction(after[n], subject.class_names),
                "pictures": {name: picture(pixels) for name, pixels in zip(PICTURES, row, strict=True)},
            }
            for n, (i, row) in enumerate(zip(at, rows, strict=True))
        ],
    }


def one_of_each(labels: Tensor, count: int) -> Tensor:
    """The indices of the first image of each class, in the order of the images, `count` of them at most."""
    firsts = {int(label): index for index, label in reversed(list(enumerate(labels)))}
    return torch.tensor(sorted(firsts.values())[:count])


def amplification(delta: Tensor) -> float:
    """Factor that makes a perturbation visible: its largest pixel becomes at most 0.5 (two digits, down)."""
    largest = float(delta.abs().max())
    if largest == 0:
        return 1.0
    gain = 0.5 / largest
    unit = 10.0 ** (np.floor(np.log10(gain)) - 1)
    return float(f"{np.floor(gain / unit + 1e-6) * unit:.2g}")


def _prediction(probabilities: Tensor, names: tuple[str, ...]) -> tuple[str, float]:
    best = int(probabilities.argmax())
    return names[best], float(probabilities[best])


def picture(pixels: Tensor) -> str:
    """An image (C, H, W), or a map (H, W) in colours, in [0, 1], as a PNG in base64.

    Of an image with other than one or three channels, the mean over the channels.
    """
    if pixels.ndim == 2:
        array = colormaps["magma"](pixels.clamp(0, 1).numpy())[..., :3]
    else:
        if len(pixels) not in (1, 3):
            pixels = pixels.mean(0, keepdim=True)
        array = pixels.expand(3, -1, -1).permute(1, 2, 0).numpy()
    image = Image.fromarray((255 * array).round().astype(np.uint8))
    image.thumbnail((LARGEST, LARGEST))
    data = BytesIO()
    image.save(data, "PNG", optimize=True)
    return base64.b64encode(data.getvalue()).decode()
