"""Networks that answer, compute and are built in unusual ways, and everything that a user calls them with."""

from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from support.networks import tiny_cnn
from torch import Tensor, nn

from fastdynat import FGSM, PGD, PGDL2, TPGD, dynat_loss, lbgat_loss, mart_loss, trades_loss
from fastdynat.attack_engine.goal import AttackGoal
from fastdynat.attack_engine.pgd import pgd
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.evaluation import AutoAttack

N, EPS = 6, 0.05


def net(seed: int = 3, **kwargs: Any) -> nn.Module:
    """Returns logits, of ten classes unless told otherwise, in eval mode."""
    return tiny_cnn(seed, **kwargs).eval()


def batch(dtype: torch.dtype = torch.float32, classes: int = 10) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.rand(N, 3, 8, 8, dtype=dtype, generator=generator), torch.randint(
        classes, (N,), generator=generator
    )


class Answers(nn.Module):
    """`inner`, whose logits are made something else by `make`."""

    def __init__(self, inner: nn.Module, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.make = inner, make

    def forward(self, x: Tensor) -> Any:
        return self.make(self.inner(x))


class TrainsWithMore(Answers):
    """torchvision's GoogLeNet: a tensor in eval mode, a named tuple in train mode."""

    def forward(self, x: Tensor) -> Any:
        return self.make(self.inner(x)) if self.training else self.inner(x)


@dataclass
class Data:
    features: Tensor
    logits: Tensor


Named = namedtuple("Named", ["logits", "features"])


class ModelOutput(OrderedDict):  # type: ignore[type-arg]
    """transformers' output class: keys, also as attributes."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


class Box:
    """Nothing but attributes."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


def wide_map(z: Tensor) -> Tensor:
    return z[:, :, None, None]


# Answer, output that finds the logits in it, what the refusal says without.
PARTS: dict[str, tuple[Callable[[Tensor], Any], Any, str]] = {
    "dict": (
        lambda z: {"features": z.sum(), "logits": z},
        "logits",
        "a dict of 'features', 'logits', .*output='logits'",
    ),
    "dict, function": (lambda z: {"out": z}, lambda out: out["out"], "a dict of 'out', .*output='out'"),
    "tuple": (lambda z: (z, z.sum()), 0, "a tuple of 2, .*output=0"),
    "list from its end": (lambda z: [z.sum(), z], -1, "a list of 2, .*output=1"),
    "dataclass": (lambda z: Data(z.sum(), z), "logits", "a Data of 'features', 'logits', .*output='logits'"),
    "named tuple": (
        lambda z: Named(z, z.sum()),
        "logits",
        "a Named of 'logits', 'features', .*output='logits'",
    ),
    "named tuple by number": (lambda z: Named(z, z.sum()), 0, "a Named of 'logits', 'features'"),
    "model output": (
        lambda z: ModelOutput(logits=z),
        "logits",
        "a ModelOutput of 'logits', .*output='logits'",
    ),
    "attributes": (lambda z: Box(z), "logits", "a Box of 'logits', .*output='logits'"),
    "map of 1x1": (wide_map, lambda out: out.flatten(1), r"\(\d+, 10, 1, 1\), .*out.flatten\(1\)"),
}
NO_LOGITS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "one score": (lambda z: z[:, 0], r"\(\d+,\), .*torch.stack"),
    "a column of scores": (lambda z: z[:, :1], r"\(\d+, 1\), .*torch.cat"),
    "the batch's mean": (lambda z: z.mean(0, keepdim=True), r"\(1, 10\), .*one row of logits per image"),
    "argmax": (lambda z: z.argmax(1), r"int64 \(\d+,\), .*before argmax"),
    "nothing": (lambda z: None, "a NoneType, .*return the logits alone"),
    "a sequence of rows": (lambda z: z[:, None].expand(-1, 3, -1), r"\(\d+, 3, 10\), "),
}

# Networks that give the images no gradient at all.
BLIND: dict[str, Callable[[nn.Module], Callable[[Tensor], Tensor]]] = {
    "detached image": lambda inner: lambda x: inner(x.detach()),
    "detached logits": lambda inner: lambda x: inner(x).detach(),
    "no_grad": lambda inner: torch.no_grad()(inner.forward),
    "bytes": lambda inner: lambda x: inner((x * 255).byte().float() / 255),
    "integers": lambda inner: lambda x: inner((x * 255).long().to(x.dtype) / 255),
    "booleans": lambda inner: lambda x: inner((x > 0.5).to(x.dtype)),
}


class Called(nn.Module):
    """A function of `inner`, as a network."""

    def __init__(self, inner: nn.Module, make: Callable[[nn.Module], Callable[[Tensor], Tensor]]) -> None:
        super().__init__()
        self.inner, self.make = inner, make

    def forward(self, x: Tensor) -> Tensor:
        return self.make(self.inner)(x)


def _drop_in(kind: Any, **numbers: Any) -> Callable[..., Tensor]:
    def call(model: Any, x: Tensor, y: Tensor, **speed: Any) -> Tensor:
        attack = kind(model, eps=EPS, **numbers, **speed)
        found: Tensor = attack(x) if kind is TPGD else attack(x, y)
        return found

    return call


def _loss(loss: Any, *, guided: bool = False) -> Callable[..., Tensor]:
    def call(model: Any, x: Tensor, y: Tensor, **speed: Any) -> Tensor:
        guide: nn.Module = net(4, dtype=x.dtype if isinstance(x, Tensor) else torch.float32)
        if isinstance(model, Answers):
            guide = type(model)(guide, model.make)
        networks = (model, guide) if guided else (model,)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        found: Tensor = loss(
            *networks, x, y, optimizer, step_size=0.01, epsilon=EPS, perturb_steps=3, **speed
        )
        return found.detach()

    return call


def by_pgd(model: Any, x: Tensor, y: Tensor, **speed: Any) -> Tensor:
    return pgd(model, x, AttackGoal("ce", y), PGDSpec(EPS, EPS / 4, 4), **speed).x_adv


def by_autoattack(
    model: Any, x: Tensor, y: Tensor, names: Any = ("apgd-ce3", "square20"), **kwargs: Any
) -> Tensor:
    attack = AutoAttack(model, eps=EPS, seed=1, version="custom", attacks=names, verbose=False, **kwargs)
    found: Tensor = attack.run_standard_evaluation(x, y)
    return found


# (model, x, y, **output) -> what comes out, from equal seeds the same.
ENTRIES: dict[str, Callable[..., Tensor]] = {
    "PGD": _drop_in(PGD, steps=3),
    "PGDL2": _drop_in(PGDL2, steps=3),
    "FGSM": _drop_in(FGSM),
    "TPGD": _drop_in(TPGD, steps=3),
    "pgd": by_pgd,
    "trades_loss": _loss(trades_loss),
    "mart_loss": _loss(mart_loss),
    "dynat_loss": _loss(dynat_loss, guided=True),
    "lbgat_loss": _loss(lbgat_loss, guided=True),
    "AutoAttack": by_autoattack,
}
LOSSES = tuple(name for name in ENTRIES if name.endswith("_loss"))
