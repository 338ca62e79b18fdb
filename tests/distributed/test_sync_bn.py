"""--sync-bn in a run: what is synchronised, what never communicates, and how the choice is made."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.collectives import counted_collectives
from support.networks import tiny_cnn
from support.tiny_run import TINY
from torch import Tensor, nn

from fastdynat.attack_engine.goal import AttackGoal
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.attack_engine.replica import AttackReplica
from fastdynat.commands.main import main
from fastdynat.data import dataset_info
from fastdynat.distributed import ALONE, World, world
from fastdynat.distributed.synchronized_batch_norm import SynchronizedStatistics
from fastdynat.errors import UserError
from fastdynat.methods.configs import default_config
from fastdynat.training import build_networks, resolve
from fastdynat.training.networks import NetworkSet
from fastdynat.training.weight_files import snapshot

CPU = torch.device("cpu")
X = torch.rand(9, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(9)
EXACT = {"rtol": 0, "atol": 1e-10}


def _networks(**options: Any) -> NetworkSet:
    model, guide = tiny_cnn(0, dtype=torch.float64), tiny_cnn(1, dtype=torch.float64)
    options = {"sync_bn": not world().alone, "ema": 0.9, **options}
    return NetworkSet(model, guide, image_shape=(3, 8, 8), device=CPU, **options)


def _shard(batch: Tensor) -> Tensor:
    return batch[world().rank :: world().size]


def _attacked(bn: str) -> tuple[Tensor, int, dict[str, Tensor], int]:
    """Images of an attack, its collectives, the statistics after it, and the batch norms folded."""
    networks = _networks(attack_bn=bn)
    spec = PGDSpec(8 / 255, 2 / 255, 4, start="none")
    with counted_collectives() as calls:
        networks.attack.refresh()
        goal = AttackGoal("ce", _shard(LABELS))
        result = networks.attack.run(_shard(X), goal, spec)
        networks.views.attacked(_shard(X))
    folded = networks.attack.replica.num_folded
    return result.x_adv, len(calls), snapshot(networks.raw["model"].state_dict()), folded


@pytest.mark.parametrize("bn", ["eval", "train", "frozen"])
def test_the_attack_communicates_only_where_it_uses_the_statistics_of_the_batch(ranks, bn) -> None:
    x_adv, _, state, folded = _attacked(bn)
    for rank, (found, calls, moved, also_folded) in enumerate(ranks(2)(_attacked, bn)):
        assert also_folded == folded == (bn == "eval")
        assert calls == 0 if bn == "eval" else calls > 8
        torch.testing.assert_close(found, x_adv[rank::2], **EXACT)
        for name, value in state.items():
            torch.testing.assert_close(moved[name], value, **EXACT)


def _trained() -> dict[str, Tensor]:
    """Gradients and statistics after passes of every view that is trained."""
    networks = _networks()
    views, x = networks.views, _shard(X)
    for view in (views.model, views.unmoved, views.guide):
        view(x).square().sum().backward()
    found = dict(networks.raw["model"].named_buffers()) | {
        f"guide {name}": buffer for name, buffer in networks.raw["guide"].named_buffers()
    }
    for network in networks.raw.values():
        for parameter in network.parameters():
            world().sum_(parameter.grad)
    grads = dict(networks.raw["model"].named_parameters())
    return found | {f"gradient {name}": parameter.grad for name, parameter in grads.items()}


def test_every_trained_view_has_the_statistics_of_the_whole_batch(ranks) -> None:
    want = _trained()
    for found in ranks(2)(_trained):
        for name, value in want.items():
            torch.testing.assert_close(found[name], value, **EXACT)


def _kept() -> tuple[list[str], list[bool], int, int]:
    networks = _networks()
    model, keys = networks.raw["model"], list(networks.raw["model"].state_dict())
    synchronised = [
        any(isinstance(m, SynchronizedStatistics) for m in network.modules())
        for network in (model, networks.raw["guide"], networks.deployed(), networks.attack.replica.network)
    ]
    with counted_collectives() as calls:
        networks.views.guide_eval(_shard(X))
        folded = AttackReplica(model, X[:2]).num_folded  # as validation makes it, without a weight average
        model.eval()(X[:3])
        networks.average_step()
    return keys, synchronised, folded, len(calls)


def test_what_is_validated_attacked_and_saved_has_plain_batch_norm(ranks) -> None:
    keys = list(tiny_cnn(0).state_dict())
    assert ranks(2)(_kept) == [(keys, [True, True, False, False], 1, 0)] * 2


def _resolved(monkeypatch: pytest.MonkeyPatch, size: int, batch_size: int, **model: Any) -> str:
    info = dataset_info("digits")
    assert info is not None
    monkeypatch.setattr(resolve, "world", lambda: World(0, size) if size > 1 else ALONE)
    config = default_config("madry")
    config = replace(
        config,
        data=replace(config.data, batch_size=batch_size),
        model=replace(config.model, **model),
        engine=replace(config.engine, device="cpu", winograd="off"),
    )
    return resolve.resolve(config, info).model.sync_bn


@pytest.mark.parametrize(
    ("processes", "batch_size", "chosen", "said"),
    [
        (1, 8, "on", ""),
        (2, 64, "off", "over the 32 images of each process"),
        (2, 63, "on", "each has only 31 images of a batch (fewer than 32)"),
    ],
)
def test_auto_goes_by_the_images_of_a_process(
    monkeypatch, caplog, processes, batch_size, chosen, said
) -> None:
    with caplog.at_level(logging.INFO):
        assert _resolved(monkeypatch, processes, batch_size) == chosen
    assert ("--sync-bn" in caplog.text) == bool(said)
    assert said in caplog.text


def test_a_choice_of_the_user_stands(monkeypatch, caplog) -> None:
    with caplog.at_level(logging.INFO):
        assert _resolved(monkeypatch, 8, 16, sync_bn="off") == "off"
        assert _resolved(monkeypatch, 2, 512, sync_bn="on") == "on"
    assert "--sync-bn" not in caplog.text


def test_off_refuses_layers_that_synchronise_by_themselves() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.SyncBatchNorm(4))
    with pytest.raises(UserError, match=r"--sync-bn off: the layer 1 is a torch\.nn\.SyncBatchNorm"):
        build_networks._refuse_synchronising([network])
    build_networks._refuse_synchronising([tiny_cnn(0)])


def _resumed(run: Path, *flags: str) -> int:
    return main(["train", "--resume", str(run), "--quiet", "--stop-after", "1", *flags])


def test_a_run_keeps_its_choice(tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    assert main(["train", "--run-dir", str(run), "--method", "natural", *TINY, "--stop-after", "1"]) == 0
    config = run / "config.yaml"
    assert "sync_bn: 'on'" in config.read_text()
    assert _resumed(run, "--sync-bn", "auto") == 0
    assert _resumed(run, "--sync-bn", "off") == 2
    assert "sync_bn is on in this run, not off" in capsys.readouterr().err
    lines = [line for line in config.read_text().splitlines(True) if "sync_bn" not in line]
    config.write_text("".join(lines))  # a run of an earlier version, which knew one process only
    assert _resumed(run) == 0
    assert "sync_bn: 'on'" in config.read_text()


@pytest.mark.parametrize(("network", "warns"), [("small", True), ("small-gn", False)])
def test_a_run_that_goes_on_in_micro_batches_warns_with_batch_norm(
    network: str, warns: bool, tmp_path: Path, capsys
) -> None:
    run = tmp_path / "run"
    flags = ["--method", "natural", "--model", network, *TINY, "--stop-after", "1"]
    assert main(["train", "--run-dir", str(run), *flags]) == 0
    assert _resumed(run) == 0
    assert "of a batch" not in capsys.readouterr().err
    assert _resumed(run, "--grad-accum-steps", "2") == 0
    said = "over 1/2 of a batch, where the run so far used 1/1, so training goes on differently; "
    assert (f"{said}--grad-accum-steps 1 would avoid this" in capsys.readouterr().err) == warns


def test_off_warns_where_a_run_goes_on_with_other_processes(tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    flags = ["--method", "natural", *TINY, "--stop-after", "1", "--sync-bn", "off"]
    assert main(["train", "--run-dir", str(run), *flags]) == 0
    assert _resumed(run) == 0
    assert "--sync-bn" not in capsys.readouterr().err
    starts = json.loads((run / "environment.json").read_text())
    starts[-1]["processes"] = 2
    (run / "environment.json").write_text(json.dumps(starts))
    assert _resumed(run) == 0
    assert "over 1/1 of a batch, where the run so far used 1/2" in capsys.readouterr().err
