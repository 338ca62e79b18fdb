"""Any network: the drop-in attack is the plain one on the model itself, and leaves the model as it was."""

import copy
import gc
import os
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import odd_networks
from support.plain_attack import (
    ALPHA,
    EPS,
    STEPS,
    assert_untouched,
    batch,
    plain_pgd,
    same,
    snapshot,
    with_statistics,
)
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.batchnorm import _BatchNorm

from fastdynat import PGD, trades_loss
from fastdynat.attack_engine.batch_norm_folding import fold_batch_norm
from fastdynat.attack_engine.network_modes import NotCopyable
from fastdynat.compat import refresh
from fastdynat.training.networks import NetworkSet


@pytest.fixture(autouse=True)
def _outside() -> Iterator[None]:
    hardtanh = F.hardtanh
    yield
    F.hardtanh = hardtanh
    torch_module._global_backward_hooks.clear()
    odd_networks.FACTOR, odd_networks.SETTINGS.factor = 1.0, 1.0
    os.environ.pop("FASTDYNAT_TEST_FACTOR", None)


def make(name: str, source: dict[str, Callable[[], nn.Module]]) -> nn.Module:
    torch.manual_seed(0)
    model = source[name]()
    if name == "lazy":
        model(torch.rand(2, 3, 16, 16))
    return with_statistics(model)


def attacked(attack: PGD, x: Tensor, y: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return attack(x, y)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", odd_networks.NETWORKS)
def test_odd_networks(name: str) -> None:
    model, (x, y) = make(name, odd_networks.NETWORKS).train(), batch()
    before = snapshot(model)
    attack = PGD(model, EPS, ALPHA, STEPS, random_start=False)
    torch.manual_seed(1)
    got = attacked(attack, x, y)
    again = attacked(attack, x, y)
    assert_untouched(model, before)
    torch.manual_seed(1)
    want = plain_pgd(model, x, y)
    assert same(want, x) < 0.6
    least = 0.97 if name in ("autocast inside", "noise from the global stream") else 0.995
    assert same(got, want) > least, attack.path
    assert same(again, got) > least


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", odd_networks.CHANGES)
def test_changes_are_followed(name: str) -> None:
    (x, y), (network, change) = batch(), odd_networks.CHANGES[name]
    model = make(name, {name: network}).train()
    attack = PGD(model, EPS, ALPHA, STEPS, random_start=False)
    old = plain_pgd(model, x, y)
    assert same(attacked(attack, x, y), old) > 0.995
    assert same(attacked(attack, x, y), old) > 0.995
    change(model)
    want = plain_pgd(model, x, y)
    assert same(want, old) < 0.98
    assert same(attacked(attack, x, y), want) > 0.995, attack.path


def test_which_networks_are_attacked_themselves() -> None:
    """A copy that computes with the original, or that does not follow it, is no replica."""
    reasons = {
        "forward over the original": "holds on to the original",
        "a layer's forward over the original": "holds on to the original",
        "a hook that calls a sibling": "holds on to the original",
        "scripted": "TorchScript",
        "a scripted part": "TorchScript",
    }
    for name, reason in reasons.items():
        attack = PGD(make(name, odd_networks.NETWORKS).train(), EPS, ALPHA, STEPS)
        with pytest.warns(UserWarning, match=reason):
            attack(*batch())
        assert "on the model itself" in attack.path


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("speed", [{}, {"channels_last": False}, {"amp": torch.bfloat16}])
def test_views_that_take_contiguous_maps(speed: dict[str, Any]) -> None:
    """Sixteen images, so that convolutions use Winograd; no note, since no requested mode was given up."""
    warnings.filterwarnings("ignore", "amp=torch.*as long as in float32")  # true of some processors
    model, (x, y) = make("a view of a map", odd_networks.NETWORKS), batch(16)
    y = y % 10
    attack = PGD(model, EPS, ALPHA, STEPS, random_start=False, **speed)
    assert same(attack(x, y), plain_pgd(model, x, y)) > (0.9 if "amp" in speed else 0.995)
    assert "channels-last" not in attack.path
    with pytest.warns(UserWarning, match="channels_last=True: the model fails in that memory format"):
        PGD(model, EPS, ALPHA, STEPS, channels_last=True)(x, y)


def test_a_view_that_only_another_size_breaks(capfd: pytest.CaptureFixture[str]) -> None:
    """A map of 1x1 has a view in every memory format."""
    layers = {
        "net": nn.Identity(),
        "first": odd_networks.conv(3, 16),
        "pool": nn.MaxPool2d(16),
        "last": nn.Linear(16, 10),
    }

    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.pool(self.first(x)).view(x.size(0), -1)
        return self.last(F.adaptive_avg_pool1d(y, 16))

    model = odd_networks.odd(forward, **layers)
    attack = PGD(model, EPS, ALPHA, STEPS, random_start=False)
    for size in (16, 32, 48, 16):
        x, y = batch(size=size)
        assert same(attack(x, y), plain_pgd(model, x, y)) > 0.995
    assert "replica" in attack.path
    assert "Traceback" not in capfd.readouterr().err


def test_training_refuses_networks_of_which_no_replica_can_be_made() -> None:
    right = make("in place", odd_networks.NETWORKS)
    for name in ("forward over the original", "a hook that calls a sibling", "scripted"):
        wrong = make(name, odd_networks.NETWORKS)
        for model, guide in ((wrong, None), (right, wrong)):
            with pytest.raises(NotCopyable, match="no replica of"):
                NetworkSet(model, guide, image_shape=(3, 16, 16), device=torch.device("cpu"))


def test_the_first_of_two_norms_is_not_lost_on_a_fresh_network() -> None:
    _, folds = fold_batch_norm(odd_networks.NETWORKS["conv, norm, norm"]().eval(), batch()[0])
    assert len(folds) == 1
    model = odd_networks.NETWORKS["conv, norm, norm"]()
    attack, (x, y) = PGD(model, EPS, ALPHA, STEPS, random_start=False), batch()
    attack(x, y)
    assert "1 of 2 batch norms folded" in attack.path
    with_statistics(model)  # in place, as training does
    assert same(attack(x, y), plain_pgd(model, x, y)) > 0.995


@pytest.mark.parametrize("name", ["by type", "a bound forward", "by batch size", "custom function"])
def test_a_fold_is_tried_out_on_numbers_that_tell(name: str) -> None:
    attack = PGD(make(name, odd_networks.NETWORKS), EPS, ALPHA, STEPS)
    with pytest.warns(UserWarning, match="batch norm is not folded in the attack"):
        attack(*batch())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    ["a temperature", "a plain tensor in place", "eps of a norm", "scripted weights", "a global number"],
)
def test_the_losses_follow_changes_too(name: str) -> None:
    (x, y), (network, change) = batch(), odd_networks.CHANGES[name]

    def loss(model: nn.Module) -> Tensor:
        torch.manual_seed(5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return trades_loss(
            model, x, y, optimizer, step_size=ALPHA, epsilon=EPS, perturb_steps=3, beta=6.0
        ).detach()

    followed, fresh = make(name, {name: network}), make(name, {name: network})
    for model in (followed, fresh):
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.momentum = 0.0
    before = loss(followed)
    change(followed)
    change(fresh)
    want = loss(fresh)
    assert float((want - before).abs()) > 1e-4
    torch.testing.assert_close(loss(followed), want, rtol=1e-4, atol=1e-5)
    refresh(followed)
    torch.testing.assert_close(loss(followed), want, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_what_changes_at_every_call_is_attacked_itself() -> None:
    model, (x, y) = make("a number", {"a number": odd_networks.CHANGES["a number"][0]}), batch()
    attack = PGD(model, EPS, ALPHA, STEPS, random_start=False)
    for step in range(7):
        model.factor = 1.0 + step
        assert same(attack(x, y), plain_pgd(model, x, y)) > 0.995
    assert "on the model itself" in attack.path


def living_bytes() -> int:
    """Bytes of all dense tensors on the CPU, each memory once."""
    tensors = [t for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter)]
    tensors = [t for t in tensors if t.device.type == "cpu" and t.layout == torch.strided]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", ["in place", "by batch size", "forward over the original", "noise from the global stream"]
)
def test_an_attack_per_call_leaves_nothing_behind(name: str) -> None:
    """Without the garbage collector, which comes when it likes."""
    model, (x, y) = make(name, odd_networks.NETWORKS), batch()
    PGD(model, EPS, ALPHA, 1)(x, y)
    gc.collect()
    gc.disable()
    try:
        before = living_bytes()
        for _ in range(10):
            PGD(model, EPS, ALPHA, 1)(x, y)
        assert living_bytes() - before < 20_000
    finally:
        gc.enable()


def test_copies_of_the_model_know_nothing_of_the_attack() -> None:
    model, (x, y) = make("in place", odd_networks.NETWORKS), batch()
    keys, held = list(model.state_dict()), [set(vars(module)) for module in model.modules()]
    PGD(model, EPS, ALPHA, 1)(x, y)
    assert list(model.state_dict()) == keys
    assert [set(vars(module)) for module in model.modules()] == held
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other.eval()(x), model.eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda attack: pickle.loads(pickle.dumps(attack))])
def test_copies_of_an_attack_attack_their_own_model(again: Callable[[PGD], PGD]) -> None:
    model, (x, y) = make("in place", odd_networks.NETWORKS), batch()
    attack = PGD(model, EPS, ALPHA, STEPS, random_start=False, fold=False)
    for made in (again(attack), (attack(x, y), again(attack))[1]):
        made.model.stem.weight.data.neg_()
        assert same(made(x, y), plain_pgd(made.model, x, y)) > 0.995
        assert "batch norm eval" in made.path
    assert same(attack(x, y), plain_pgd(model, x, y)) > 0.995


def _normalised(model: nn.Module) -> PGD:
    attack = PGD(model, EPS, ALPHA, STEPS, random_start=False)
    attack.set_normalization_used([0.0] * 3, [1.0] * 3)
    return attack


ATTACKS: dict[str, Callable[[nn.Module], PGD]] = {
    "plain": lambda model: PGD(model, EPS, ALPHA, STEPS, random_start=False),
    "normalised": _normalised,
    "output": lambda model: PGD(model, EPS, ALPHA, STEPS, random_start=False, output="logits"),
    "wrapped": lambda model: PGD(nn.Sequential(model), EPS, ALPHA, STEPS, random_start=False),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ATTACKS)
@pytest.mark.parametrize("name", ["in place", "frozen norm", "forward over the original"])
def test_two_threads_may_attack_one_model(name: str, kind: str) -> None:
    model, (x, y) = make(name, odd_networks.NETWORKS).train(), batch()
    before, want, found = snapshot(model), plain_pgd(model, x, y), []
    shared = ATTACKS[kind](model)

    def work(attack: PGD) -> None:
        for _ in range(3):
            found.append(same(attack(x, y), want))

    own = [ATTACKS[kind](model) for _ in range(2)]
    threads = [threading.Thread(target=work, args=(attack,)) for attack in (shared, shared, *own)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 12  # no thread ended early
    assert min(found) > 0.995
    assert_untouched(model, before)


def test_lazy_layers_take_their_shapes_from_the_images() -> None:
    model, (x, y) = odd_networks.NETWORKS["lazy"](), batch()
    attack = PGD(model, EPS, ALPHA, STEPS, random_start=False)
    got = attack(x, y)
    assert same(got, plain_pgd(model, x, y)) > 0.995
    assert model.training
    assert type(model[0]) is nn.Conv2d
