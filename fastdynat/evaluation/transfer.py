"""The transfer matrix: accuracy of each network on the adversarial images of each other."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fastdynat.attack_engine.ascent import Ascent
from fastdynat.attack_engine.network_modes import attack_mode
from fastdynat.attacks import NamedAttack
from fastdynat.data import Images, eval_batches
from fastdynat.documents.numbers import Share
from fastdynat.errors import UserError
from fastdynat.evaluation.measure import BatchTick, attacked, counted, exact_float32, predict
from fastdynat.ops.image_draws import ImageDraws


@dataclass(frozen=True, kw_only=True)
class TransferMatrix:
    """Accuracies of all networks on the adversarial images of each; plain JSON values.

    Attributes:
        names: of the networks.
        attack: its name.
        clean: accuracy of each network without an attack, in [0, 1].
        accuracy: ``accuracy[source][target]``; on the diagonal the white-box accuracies that `measure` gives.
    """

    names: list[str]
    attack: str
    clean: list[Share]
    accuracy: list[list[Share]]


@exact_float32()
def transfer_matrix(
    networks: Mapping[str, nn.Module],
    images: Images,
    attack: NamedAttack,
    *,
    device: torch.device,
    batch_size: int,
    seed: int,
    should_stop: Callable[[], bool] = lambda: False,
    advance: Callable[[float], None] = lambda images: None,
) -> TransferMatrix:
    """Attack every network once and classify the adversarial images by all of them: one attack per network.

    Args:
        networks: images in [0, 1] -> logits, on `device`, by name.
        seed: of each image's random numbers, the same for every source.
        advance: called with the number of images done; its total is ``len(images)`` for each network.

    Raises:
        UserError: no network, or `attack` is "clean".
        Stopped: `should_stop` returned True.
    """
    if not networks or attack.search is None:
        raise UserError(
            f"a transfer matrix needs networks and an attack, got {len(networks)} networks and "
            f"{attack.name!r}"
        )
    targets = list(networks.values())
    correct = torch.zeros(len(targets), len(targets), dtype=torch.int64, device=device)
    clean = torch.zeros(len(targets), dtype=torch.int64, device=device)
    with torch.inference_mode(False), torch.enable_grad(), ExitStack() as modes:
        for network in targets:
            modes.enter_context(attack_mode(network, "eval"))
        for source, network in enumerate(targets):
            ascent: Ascent | None = None
            for batch in eval_batches(images, batch_size=batch_size, device=device):
                if ascent is None:
                    ascent = replace(attacked(network, batch.x), final=len(targets) == 1)
                tick = BatchTick(len(batch.x), should_stop, advance)
                tick(0)
                draws = ImageDraws.of(seed, batch.indices, device)
                result = attack.run(ascent, batch.x, batch.labels, draws=draws, tick=tick)
                x_adv = counted(result, batch.x)
                # As in `measure`, a misclassified clean image stays misclassified.
                right = _right(targets, batch.x, batch.labels)
                correct[source] += (right & _right(targets, x_adv, batch.labels)).sum(1)
                if source == 0:
                    clean += right.sum(1)
                tick(1)
    return TransferMatrix(
        names=list(networks),
        attack=attack.name,
        clean=[count / len(images) for count in clean.tolist()],
        accuracy=[[count / len(images) for count in row] for row in correct.tolist()],
    )


def _right(networks: list[nn.Module], x: Tensor, labels: Tensor) -> Tensor:
    """(len(networks), N) bool: the images that each network classifies correctly."""
    return torch.stack([predict(network, x) == labels for network in networks])
