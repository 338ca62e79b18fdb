"""Logits from a network's output: one rule and one error message for all attacks, losses and commands."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastdynat.errors import UserError

# The logits within a network's output: a key or attribute, an index, or a function of the answer.
Output = str | int | Callable[[Any], Tensor]
HALF = (torch.float16, torch.bfloat16)
NO_CLASS = -1  # of NaN or infinite logits; equals no label


class Answering(nn.Module):
    """`network`, whose logits are `output` of what it returns (`picked`)."""

    def __init__(self, network: nn.Module, output: Output) -> None:
        super().__init__()
        self.network, self.output = network, output

    def forward(self, x: Tensor) -> Tensor:
        """Images -> logits."""
        return picked(self.network(x), self.output)


def with_output(network: Any, output: Output | None) -> Any:
    """`network` itself without `output`; else a module or function of the same weights returning logits."""
    if output is None:
        return network
    check_output_choice(output)
    return (
        Answering(network, output) if isinstance(network, nn.Module) else lambda x: picked(network(x), output)
    )


def check_output_choice(output: object) -> None:
    """Raise UserError unless `output` is one."""
    if isinstance(output, bool) or not (isinstance(output, str | int) or callable(output)):
        raise UserError(
            f"output must be a key, an index or a function of the network's output, got {output!r}"
        )


def picked(out: Any, output: Output) -> Tensor:
    """`output` of the answer `out`.

    A key or an index leaves a tensor as it is: some networks, torchvision's GoogLeNet among them, return one
        in eval mode only.

    Raises:
        UserError: there is no such part.
    """
    if not isinstance(output, str | int):
        return output(out)
    if isinstance(out, Tensor | fx.Proxy):
        return out  # type: ignore[return-value]
    parts = _parts(out)
    if isinstance(output, str) and output in parts:
        return parts[output]
    if isinstance(output, int) and -len(parts) <= output < len(parts):
        return list(parts.values())[output]
    if isinstance(output, str) and output in getattr(
        out, "__dict__", {}
    ):  # what is traced is no tensor, and no part
        return out.__dict__[output]
    raise UserError(f"output={output!r} is not in the network's output, {describe_output(out)}")


def logits_of(out: Any, images: int) -> Tensor:
    """`out`, if it is logits of so many images: floats (images, K), K >= 2.

    Raises:
        UserError: it is something else; says what, and what to do.
    """
    if (
        isinstance(out, Tensor)
        and out.dim() == 2
        and len(out) == images
        and out.shape[1] > 1
        and out.is_floating_point()
    ):
        return out
    raise not_logits(out, images)


def not_logits(out: Any, images: int, network: str = "the network") -> UserError:
    """The error for an answer that is no logits."""
    remedy = _remedy(out, images)
    return UserError(
        f"{network} maps {images} images to {describe_output(out)}, not to logits ({images}, classes); "
        f"{remedy}"
    )


def describe_output(out: Any) -> str:
    """An answer in a few words.

    >>> describe_output({"logits": torch.zeros(2, 10), "features": None}), describe_output((torch.zeros(2),))
    ("a dict of 'logits', 'features'", 'a tuple of 1')
    """
    if isinstance(out, Tensor):
        kind = "" if out.is_floating_point() else f"{str(out.dtype).removeprefix('torch.')} "
        return f"{kind}{tuple(out.shape)}"
    parts = _parts(out)
    article = "an" if type(out).__name__[:1] in "AEIOUaeiou" else "a"
    if isinstance(out, list | tuple) and not hasattr(out, "_fields"):
        return f"{article} {type(out).__name__} of {len(parts)}"
    return f"{article} {type(out).__name__}" + (f" of {', '.join(map(repr, parts))}" if parts else "")


def _parts(out: Any) -> dict[Any, Any]:
    """The parts of a container by name, or by number where they have none; {} for anything else."""
    if isinstance(out, Mapping):
        return dict(out)
    if is_dataclass(out) and not isinstance(out, type):
        return {f.name: getattr(out, f.name) for f in fields(out)}
    if isinstance(out, Sequence) and not isinstance(out, str | bytes):
        return dict(zip(getattr(out, "_fields", range(len(out))), out, strict=True))
    return {name: value for name, value in getattr(out, "__dict__", {}).items() if isinstance(value, Tensor)}


def _remedy(out: Any, images: int) -> str:
    if not isinstance(out, Tensor):
        parts = _parts(out)
        fit = [
            name
            for name, part in parts.items()
            if isinstance(part, Tensor) and part.dim() == 2 and len(part) == images
        ]
        names = [name for name in ("logits", "out", 0) if name in fit] + fit
        example = f"output={names[0]!r}" if names else "output= a key, an index or a function of the answer"
        return f"return the logits alone, or pass {example} in Python"
    if not out.is_floating_point():
        return "return the scores as they are before argmax or rounding"
    if out.dim() == 1 and len(out) == images:
        return _binary("torch.stack([torch.zeros_like(s), s], 1)")
    if tuple(out.shape) == (images, 1):
        return _binary("torch.cat([torch.zeros_like(s), s], 1)")
    if out.dim() > 2 and len(out) == images and out[0].numel() == out.shape[1] > 1:
        return "return out.flatten(1), or pass output=lambda out: out.flatten(1) in Python"
    return "return one row of logits per image, or pass output= a function that does in Python"


def _binary(logits: str) -> str:
    return (
        f"one class is nothing to attack; a binary network's score s becomes logits by output=lambda s: "
        f"{logits} in Python"
    )


def own_dtype(network: object) -> torch.dtype | None:
    """Of the first floating-point parameter; None without any."""
    parameters = network.parameters() if isinstance(network, nn.Module) else ()
    return next((p.dtype for p in parameters if p.is_floating_point()), None)


def half_of(network: object, images: torch.dtype) -> torch.dtype | None:
    """The half precision of `network` itself, for images of dtype `images`; None if it shares their dtype.

    Such a network is called on images rounded to its dtype; the images themselves stay as precise as they
    are.

    Raises:
        UserError: a float32 network at float64 images, or the other way round.
    """
    own = own_dtype(network)
    if own not in (None, images, *HALF):
        raise UserError(f"images are {images} and the model {own}; convert one to the other's dtype")
    return own if own in HALF else None


class NoGradient(UserError):
    """A network whose logits do not depend on the images by differentiable operations."""

    def __init__(self) -> None:
        super().__init__(
            "no gradient of the network's logits reaches the images (detach, no_grad, integers or argmax in "
            "between): an attack by gradients would return them as they are; replace that step by a smooth "
            "one, or attack by square"
        )


def predicted_classes(logits: Tensor) -> Tensor:
    """Classes (N,) of `logits` (N, K), int64; `NO_CLASS` where a logit is NaN or +inf."""
    return logits.argmax(1).masked_fill(~(logits < torch.inf).all(1), NO_CLASS)
