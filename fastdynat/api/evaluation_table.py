"""`fastdynat.evaluate`: accuracies of a network under named attacks, in Python."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdynat.api.evaluation_subject import open_subject, threat_model
from fastdynat.api.trained_run import TrainedRun
from fastdynat.attack_engine.steps import usual_step
from fastdynat.commands.evaluate.cells import Cells
from fastdynat.commands.evaluate.columns import check_target_classes, parse_columns
from fastdynat.commands.evaluate.measurement_store import as_measurement
from fastdynat.commands.evaluate.rank_checks import require_same_config, require_same_targets
from fastdynat.commands.evaluate.record import make_record
from fastdynat.commands.evaluate.settle import check_eval_device
from fastdynat.commands.evaluate.targets import Radius, Target
from fastdynat.config.eval_config import EvalConfig
from fastdynat.data.read_ahead import pixel_digest
from fastdynat.distributed import require_cpu_backend, world
from fastdynat.errors import UserError
from fastdynat.evaluation.measure import exact_float32
from fastdynat.evaluation.outcome import Measurement
from fastdynat.execution.process_state import process_state_kept
from fastdynat.models.logits import Output
from fastdynat.models.state_digest import state_digest
from fastdynat.ops import use_backend
from fastdynat.terminal.consoles import PlainTable, as_text, error_console
from fastdynat.terminal.progress import ProgressDisplay
from fastdynat.units import describe_size
from fastdynat.user_code import short_name


@dataclass(frozen=True)
class Evaluation(Mapping[str, float]):
    """Accuracies in [0, 1] by attack, in the order of the attacks; prints as a table.

    Attributes:
        measurements: by attack: `accuracy`, its 95 % interval `ci`, `correct`, `images`, `seconds`, ...
        norm, eps: the threat model; eps in [0, 1] pixel units.
        images: number of images.
        worst: share of images that stay correct under every attack of this norm; None for fewer than two
            attacks.
        worst_ci: its 95 % interval.
    """

    measurements: dict[str, Measurement]
    norm: str
    eps: float
    images: int
    worst: float | None
    worst_ci: tuple[float, float] | None

    def __getitem__(self, attack: str) -> float:
        # An attack of a user's file goes by its short name, and by the path that was asked for.
        return self.measurements[attack if attack in self.measurements else short_name(attack)].accuracy

    def __iter__(self) -> Iterator[str]:
        return iter(self.measurements)

    def __len__(self) -> int:
        return len(self.measurements)

    def __str__(self) -> str:
        title = f"accuracy on {self.images} images, {self.norm} eps {describe_size(self.eps, self.norm)}"
        table = PlainTable(title=title, title_justify="left")
        table.add_column("attack")
        for column in ("accuracy in %", "95 % interval", "seconds"):
            table.add_column(column, justify="right")
        for name, found in self.measurements.items():
            table.add_row(name, *_percent(found.accuracy, found.ci), f"{found.seconds:.1f}")
        if self.worst is not None and self.worst_ci is not None:
            table.add_row("worst case", *_percent(self.worst, self.worst_ci), "")
        return as_text(table)

    __repr__ = __str__


def _percent(share: float, interval: tuple[float, float]) -> tuple[str, str]:
    return f"{100 * share:.2f}", f"{100 * interval[0]:.2f} to {100 * interval[1]:.2f}"


@process_state_kept()
def evaluate(
    model: nn.Module | TrainedRun | str,
    data: Any = None,
    attacks: str | Sequence[str] = "clean,pgd20,fast-autoattack",
    *,
    eps: float | None = None,
    norm: str | None = None,
    step_size: float | None = None,
    num_images: int | None = None,
    batch_size: int = 500,
    seed: int = 1,
    data_dir: str | Path = "data",
    output: Output | None = None,
    **keys: Any,
) -> Evaluation:
    """Attack `model` on `data` and count what it still classifies correctly, with 95 % confidence intervals.

    The numbers are those of ``fastdynat eval``: attacks run on a fast replica of the network, and the network
    itself, in float32 and eval mode, judges each image. Nothing is written.

    Within torch's process group, every process must call this with the same network, data and arguments. They
    share the images, and each returns the result of all. The group must take CPU tensors, as that of
    ``init_process_group("cpu:gloo,cuda:nccl")``. Inside ``fastdynat.distributed.apart()`` a process evaluates
    alone.

    Example::

        print(fastdynat.evaluate(net, (images, labels), "clean,pgd50-10", eps=8 / 255))

    Args:
        model: a module that maps float images (N, C, H, W) in [0, 1] to logits (N, K); a `TrainedRun`; or a
            name as for ``fastdynat eval``: a run directory, robustbench:NAME, torchvision:NAME, timm:NAME,
            path/to/file.py:callable.
        data: (images, labels) or a torch Dataset; of a pair (train, test) and of a dict the test part; or the
            name of a data set, which a run sees at its own image size. See `fastdynat.train`. Images of
            another size than a run's, or classes of other names, are refused.
        attacks: names, separated by commas or in a list; ``fastdynat eval --list-attacks`` prints all.
        eps: radius, in [0, 1] pixel units for linf. None is the one that a run is to be evaluated at
            (`eval_eps`); for other models 8 / 255 under linf.
        norm: linf, l2, l1 or l0. None is the one that a run was trained for; linf for other models.
        step_size: step size of attacks with a fixed step; None is eps / 4 (10 eps under l0).
        num_images: use only the first `num_images` images.
        batch_size: images per batch; halved if memory runs out. Changes no result, except of attacks of your
            own files and of autoattack.
        seed: seed of the random numbers of each image.
        data_dir: folder of a data set given by name.
        output: selects the logits if a module returns more than them: a key, an index or a function.
        keys: device, amp, compile and kernels, as for ``fastdynat eval``.

    Raises:
        UserError: an argument that cannot work.
    """
    allowed = ("device", "amp", "compile", "kernels")
    if unknown := next((key for key in keys if key not in allowed), None):
        raise UserError(f"fastdynat.evaluate: unknown key {unknown!r}; the keys are {', '.join(allowed)}")
    attacks = _joined(attacks)
    config = EvalConfig(
        attacks=attacks,
        eps="auto" if eps is None else eps,
        norm="auto" if norm is None else norm,  # type: ignore[arg-type]
        step_size="auto" if step_size is None else step_size,
        num_images=num_images,
        batch_size=batch_size,
        seed=seed,
        cache="off",
        **keys,
    )
    require_cpu_backend()
    require_same_config([], config)
    device = check_eval_device(config)
    subject = open_subject(model, data, str(data_dir), output)
    network, name, info, images = subject.network, subject.name, subject.info, subject.images
    if num_images is not None:
        images = images.part(slice(num_images))
    norm, eps = threat_model(subject, norm, eps)
    step = usual_step(norm, eps) if step_size is None else step_size
    columns = parse_columns(attacks, eps=eps, step_size=step, norm=norm, amp=config.amp)
    if (transfer := next((column.name for column in columns if column.transfer), None)) is not None:
        raise UserError(f"{transfer} needs two networks: use fastdynat.evaluation.transfer_matrix")
    check_target_classes(columns, info.num_classes)
    weights, pixels = (
        ("", "") if world().alone else (state_digest(network.state_dict()), pixel_digest(images))
    )
    target = Target(
        name=name,
        checkpoint=None,
        weights=weights,
        network=network,
        trained={"method": None, "architecture": name, "dataset": info.name, "epoch": None},
        columns=columns,
        radius=Radius(norm, eps, step),
        info=info,
        everything=images,
        shard=None,
        digest=pixels,
        folder=None,
        source=None,
    )
    require_same_targets([target])
    display = ProgressDisplay(error_console(), quiet=True)
    with exact_float32(), use_backend(config.kernels), _prepared(network, device):
        cells = Cells(target, network, config, device, known={}, display=display, should_stop=lambda: False)
        results = [cells.cell(column) for column in columns]
    record = make_record(target, results, [], None)
    worst = record["worst"]
    return Evaluation(
        {column.name: _measurement(result) for column, result in zip(columns, results, strict=True)},
        norm,
        eps,
        len(images),
        None if worst is None else worst["accuracy"],
        None if worst is None else worst["ci"],
    )


def _joined(attacks: object) -> str:
    """The names of attacks, separated by commas."""
    if isinstance(attacks, str):
        return attacks
    if isinstance(attacks, Sequence) and all(isinstance(name, str) for name in attacks):
        return ",".join(attacks)
    raise UserError(f"attacks must be names, such as 'clean,pgd20', got {type(attacks).__name__}")


def _measurement(result: dict[str, Any]) -> Measurement:
    return as_measurement({key: value for key, value in result.items() if key != "stages"})


@contextmanager
def _prepared(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Within it the network is on `device`; afterwards where it was."""
    place = next(
        (tensor.device for part in (network.parameters(), network.buffers()) for tensor in part), device
    )
    try:
        network.to(device)
        yield
    finally:
        network.to(place)
