"""The timed calls: our attack and step, those of peers, and a matrix product of the same precision."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import update_bn

from fastdynat.attack_engine.ascent import Ascent
from fastdynat.attack_engine.engine import AttackEngine
from fastdynat.attack_engine.goal import AttackGoal
from fastdynat.attack_engine.network_modes import attack_mode
from fastdynat.attack_engine.pgd import run_pgd
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.commands.bench.plain_dynat import PlainDynat
from fastdynat.data import Batch, TrainLoader, TrainSplit
from fastdynat.evaluation.fidelity import Fidelity, check_fidelity
from fastdynat.execution.compiling import compile_whole
from fastdynat.execution.fallbacks import Fallbacks
from fastdynat.execution.float32 import products_like_convolutions
from fastdynat.ops import use_backend
from fastdynat.training import TrainStep, attack_switches, build_parts
from fastdynat.training.resolved_config import ResolvedConfig
from fastdynat.tuning.devices import AMP_DTYPES

ATTACK_BATCHES = (
    4  # that an attack is timed on in turn: what stays in a cache between calls is faster to read
)

Attack = Callable[[Tensor, Tensor], Tensor]  # images in [0, 1], labels -> attacked images


@dataclass(frozen=True)
class Work:
    """Something that a row times.

    Attributes:
        call: one batch of it; returns the attacked images, where it is an attack.
        fidelity: checks that it is none the weaker for its speed, where it is an attack of ours.
        step: the training step, where it is one.
        stream: its batches without end.
        finite: whether what it computed last is a number.
    """

    call: Callable[[], Any]
    fidelity: Callable[[], Fidelity] | None = None
    step: TrainStep | None = None
    stream: Iterator[Batch] | None = None
    finite: Callable[[], bool] = field(default=lambda: True)


def endless(loader: TrainLoader, batch_size: int) -> Iterator[Batch]:
    """Full batches of one epoch after the other: a shorter one would be code of its own."""
    for epoch in itertools.count():
        yield from (batch for batch in loader.epoch(epoch) if len(batch.labels) == batch_size)


def _attacked(config: ResolvedConfig[Any], split: TrainSplit) -> tuple[Any, TrainStep, tuple[Batch, ...]]:
    """Networks whose running statistics are those of the images, the step, and a few batches."""
    networks, step, loader = build_parts(config, split)
    batches = tuple(itertools.islice(endless(loader, config.data.batch_size), ATTACK_BATCHES))
    update_bn([batch.x for batch in batches], networks.raw["model"])
    return networks, step, batches


def _taking_turns(
    attack: Attack, batches: tuple[Batch, ...], fidelity: Callable[[], Fidelity] | None = None
) -> Work:
    turns = itertools.cycle(batches)

    def call() -> Tensor:
        batch = next(turns)
        return attack(batch.x, batch.labels)

    return Work(call, fidelity)


def engine_attack(config: ResolvedConfig[Any], split: TrainSplit) -> Work:
    """Our attack as in a training step: take over the weights, then all steps. As one graph where the step
    would be one.
    """
    networks, step, batches = _attacked(config, split)
    engine = networks.attack
    switches = attack_switches(config.engine)
    if config.engine.graphs == "on" and not switches.graphs:
        switches = replace(switches, graphs=True)
        engine = AttackEngine(
            networks.raw["model"],
            batches[0].x,
            bn=config.attack.attack_bn,
            switches=switches,
            fallbacks=Fallbacks(),
        )

    def attack(x: Tensor, labels: Tensor) -> Tensor:
        with use_backend(config.engine.kernels):
            engine.refresh()
            return engine.run(x, AttackGoal("ce", labels), step.spec).x_adv

    def fidelity() -> Fidelity:
        model = networks.raw["model"]
        with use_backend(config.engine.kernels):
            # The model's own answers as labels: then every image has something to lose.
            with attack_mode(model, "eval"), torch.no_grad():
                probes = [(batch.x, model(batch.x).argmax(1)) for batch in batches]
            return check_fidelity(engine, model, probes, step.spec, bn=config.attack.attack_bn)

    return _taking_turns(attack, batches, fidelity)


@dataclass(frozen=True)
class WeightGradients(Ascent):
    """The ascent of a training loop that calls ``loss.backward()``: every step computes the weights'
    gradients too.
    """

    def logits_and_grad(self, read: Tensor, goal: AttackGoal) -> tuple[Tensor, Tensor]:
        leaf = read.detach().requires_grad_()
        logits = self.logits(leaf)
        torch.autograd.backward(logits, self.logit_grad(logits, goal))
        assert leaf.grad is not None
        return logits.detach(), leaf.grad


def weight_gradient_attack(config: ResolvedConfig[Any], split: TrainSplit) -> Work:
    """Our attack on a replica whose weights need gradients, which nobody reads; compiled as a network, not as
    a whole step.
    """
    networks, step, batches = _attacked(config, split)
    replica = networks.attack.replica
    network: Any = replica.network.requires_grad_(True)
    if config.engine.compile != "off":
        network = compile_whole(
            network, mode=config.engine.compile, what="the attacked network", fallbacks=Fallbacks()
        )
    ascent = WeightGradients(network, dtype=AMP_DTYPES[config.engine.amp])

    def attack(x: Tensor, labels: Tensor) -> Tensor:
        with use_backend(config.engine.kernels):
            replica.refresh()
            x_adv = run_pgd(ascent, x, AttackGoal("ce", labels), step.spec).x_adv
        replica.network.zero_grad(set_to_none=True)
        return x_adv

    return _taking_turns(attack, batches)


def engine_step(config: ResolvedConfig[Any], split: TrainSplit, fallbacks: Fallbacks | None = None) -> Work:
    """Our training step, from the loader's batch to the new weights; `fallbacks` as in `build_parts`."""
    _, step, loader = build_parts(config, split, fallbacks=fallbacks)
    stream = endless(loader, config.data.batch_size)
    logs: dict[str, Tensor] = {}

    def call() -> None:
        with use_backend(config.engine.kernels):
            logs.update(step(next(stream)))

    return Work(call, step=step, stream=stream, finite=lambda: all(bool(v.isfinite()) for v in logs.values()))


def torchattacks_attack(config: ResolvedConfig[Any], split: TrainSplit) -> Work:
    """torchattacks' PGD on the network of `config`, under autocast where that is in half precision."""
    import torchattacks  # extra `peer`; `why_no_torchattacks` has been asked

    networks, step, batches = _attacked(config, split)
    spec: PGDSpec = step.spec
    kind = torchattacks.PGD if spec.norm == "linf" else torchattacks.PGDL2
    peer = kind(
        networks.raw["model"], spec.eps, spec.step_size, spec.steps, random_start=spec.start != "none"
    )
    dtype, device_type = AMP_DTYPES[config.engine.amp], batches[0].x.device.type

    def attack(x: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(device_type, dtype) if dtype else nullcontext():
            return peer(x, labels)

    return _taking_turns(attack, batches)


def plain_step(config: ResolvedConfig[Any], split: TrainSplit) -> Work:
    """The released loop on the networks and batches of `config`, which is in float32, contiguous and not
    compiled.
    """
    networks, step, loader = build_parts(config, split)
    spec, optim = step.spec, config.optim
    plain = PlainDynat(
        networks.raw["model"],
        networks.raw["guide"],
        eps=spec.eps,
        step_size=spec.step_size,
        steps=spec.steps,
        lr=step.learning_rate(0),
        momentum=optim.momentum,
        weight_decay=optim.weight_decay,
    )
    stream = endless(loader, config.data.batch_size)

    def call() -> None:
        batch = next(stream)
        plain(batch.x, batch.labels)

    return Work(call)


def matrix_product(dtype: torch.dtype, device: torch.device) -> tuple[Work, int]:
    """A square product in the precision that convolutions have for `dtype` (TF32 for float32, where that is
    allowed), and its FLOPs.
    """
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.rand(size, size, device=device).to(dtype) for _ in range(2))

    def call() -> None:
        with products_like_convolutions():
            torch.mm(a, b)

    return Work(call), 2 * size**3
