"""The authors' own AutoAttack, from the package `pyautoattack` or `autoattack`: resumable, and with times."""

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdynat.attack_engine.network_modes import attack_mode
from fastdynat.attacks import VERSIONS
from fastdynat.distributed import first_decides, world
from fastdynat.errors import UserError, unknown_name
from fastdynat.evaluation import staged
from fastdynat.evaluation.halving import with_halving
from fastdynat.evaluation.measure import exact_float32, predict_in_batches
from fastdynat.evaluation.measure_on_ranks import on_all_ranks
from fastdynat.evaluation.unit_images import UnitImages

logger = logging.getLogger(__name__)

PACKAGES = ("pyautoattack", "autoattack")
NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}


def run_reference(
    model: nn.Module,
    x: Tensor | UnitImages,
    y: Tensor,
    *,
    norm: str,
    eps: float,
    seed: int,
    batch_size: int,
    device: torch.device,
    version: str = "standard",
    state_path: Path | str | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Attack `model` (images in [0, 1] -> logits, on `device`) in eval mode, float32 and deterministically.

    Each batch of each stage is one call of the package, which is what its own loop does: equal seeds give the
    verdicts of one call for everything. Several processes, all of which must call this alike, take turns at
    the batches of each stage. The model is warmed up before, since the package takes a compilation for a
    dynamic defence. The global random streams stay as they were.

    Args:
        x: (N, C, H, W), float32 in [0, 1], in memory or read batch by batch.
        y: (N,) int64.
        norm: linf, l2 or l1.
        eps: radius in [0, 1] pixel units.
        seed: of every batch.
        batch_size: images per batch; halved, with a note, where memory runs out.
        version: standard, plus or rand.
        state_path: a JSON file, written after every batch; where it exists the evaluation goes on from there.
            None on all ranks but the first.

    Returns:
        (N,) bool on the CPU: which images stand; and seconds by stage.

    Raises:
        UserError: the package is missing, the version unknown, or the state is of another evaluation.
    """
    if version not in VERSIONS:
        raise unknown_name("version of AutoAttack", version, VERSIONS)
    package = _package()
    state_path = None if state_path is None else Path(state_path)

    def classes(x: Tensor) -> Tensor:
        return predict_in_batches(model, x, batch_size, device).to(y.device)

    with _deterministic(device), attack_mode(model, "eval"), _package_warnings_logged():

        def clean_classes() -> Tensor:
            parts = x.split(batch_size) if isinstance(x, Tensor) else x.parts(batch_size)
            return torch.cat([classes(part) for part in parts])

        clean = on_all_ranks(clean_classes)[0]
        numbers = {
            "norm": norm,
            "eps": eps,
            "seed": seed,
            "batch size": batch_size,
            "attacks": list(VERSIONS[version]),
        }
        own = staged.evaluation_identity(model, clean, x, y, classes, **numbers, package=package.__name__)
        begun = staged.begin(own, clean == y, seed)
        progress = first_decides(lambda: staged.restore(state_path, own) or begun)
        adversary = _adversary(package, model, norm, eps, seed, device, version)
        on_all_ranks(lambda: _fit(adversary, model, x[torch.arange(1)].to(device)))

        def attack(name: str, x: Tensor, y: Tensor, numbers: Tensor) -> Tensor:
            adversary.attacks_to_run = [name]
            run = partial(_attack, adversary, x.to(device), y.to(device))
            return with_halving(run, batch_size).to(x.device)

        def fooled(x_adv: Tensor, x: Tensor, y: Tensor) -> Tensor:
            return classes(x_adv) != y

        staged.run_stages(
            attack,
            fooled,
            x,
            y,
            progress,
            VERSIONS[version],
            batch_size,
            state_path,
            _stage_done,
            on_ranks=True,
        )
    return staged.standing(progress, len(x)), world().from_first(dict(progress.seconds))


def require_reference(norm: str) -> None:
    """Raise UserError unless the package is installed and attacks in `norm`."""
    if norm not in NORMS:
        raise UserError(
            f"autoattack knows {', '.join(NORMS)}, not {norm}: leave it out, or give another --norm"
        )
    _package()


def _package() -> Any:
    for name in PACKAGES:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
    raise UserError("the authors' AutoAttack is not installed: pip install 'fastdynat[autoattack]'")


def _adversary(
    package: Any, model: nn.Module, norm: str, eps: float, seed: int, device: torch.device, version: str
) -> Any:
    adversary = package.AutoAttack(
        model, norm=NORMS[norm], eps=eps, seed=seed, version=version, device=str(device)
    )
    adversary.verbose = False
    return adversary


def _fit(adversary: Any, model: nn.Module, x: Tensor) -> None:
    """No more target classes than the network has; the package only warns of them, and then fails."""
    with torch.no_grad():
        others = model(x).shape[1] - 1
    for targeted in (adversary.apgd_targeted, adversary.fab):
        targeted.n_target_classes = min(targeted.n_target_classes, others)


def _attack(adversary: Any, x: Tensor, y: Tensor, size: int) -> Tensor:
    """The adversarial images of one batch; older packages return images alone and say `bs` for batch size."""
    with torch.enable_grad():
        try:
            found = adversary.run_standard_evaluation(x, y, batch_size=size)
        except TypeError as error:
            if "batch_size" not in str(error):
                raise
            found = adversary.run_standard_evaluation(x, y, bs=size)
    return found[0] if isinstance(found, tuple) else found


@contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """Algorithms whose result does not depend on chance, and random streams that are put back."""
    cudnn: Any = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    devices = [device] if device.type == "cuda" else []
    with exact_float32(), torch.random.fork_rng(devices), torch.inference_mode(False):
        try:
            cudnn.deterministic, cudnn.benchmark = True, False
            yield
        finally:
            cudnn.deterministic, cudnn.benchmark = before


def _stage_done(name: str, accuracy: float, seconds: float) -> None:
    logger.info(staged.stage_summary(name, accuracy, seconds))


class _PackageWarnings(logging.Handler):
    """Logs each warning of the package once."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.known: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text not in self.known:
            self.known.add(text)
            logger.warning("AutoAttack warns: %s", text)


@contextmanager
def _package_warnings_logged() -> Iterator[None]:
    theirs, handler = logging.getLogger("auto-attack"), _PackageWarnings()
    before = theirs.propagate
    theirs.addHandler(handler)
    theirs.propagate = False
    try:
        yield
    finally:
        theirs.removeHandler(handler)
        theirs.propagate = before
