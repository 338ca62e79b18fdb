"""FGSM-PGI: steps in a row against a transcription in float64, its state, and what it refuses."""

import copy
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.same_run import assert_same_run
from support.stepping import LR, K, N, moved_network, train_step
from support.tiny_run import TINY
from torch import Tensor, nn

from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.commands.main import main
from fastdynat.data import Batch
from fastdynat.errors import UserError
from fastdynat.machine import free_memory
from fastdynat.methods import FgsmPgi, FgsmPgiOptions
from fastdynat.methods.image_state import from_int8, levels, to_int8
from fastdynat.training import method_buffers
from fastdynat.training.step import TrainStep

RADIUS = 8 / 255
SPEC = PGDSpec(RADIUS, RADIUS, 1, start="none")
SMOOTHING = 0.4


def pixels(seed: int) -> Tensor:
    """(N, 3, 8, 8) 8-bit images, with pixels at both ends of the range."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(N, 3, 8, 8, dtype=torch.float64, generator=generator)
    return (128 + 90 * noise).round().clamp(0, 255) / 255


def batches() -> list[Batch]:
    """Three visits of images that look different each time, in other orders, the last one without three."""
    generator = torch.Generator().manual_seed(9)
    labels = torch.randint(K, (N,), generator=generator)
    found = []
    for visit, size in enumerate((N, N, N - 3, N)):
        order = torch.randperm(N, generator=generator)[:size]
        found.append(Batch(pixels(visit)[order], labels[order], order))
    return found


def drawn_signs(x: Tensor) -> Tensor:
    """The signs that the next step draws; the random state is restored."""
    state = torch.get_rng_state()
    drawn = torch.rand(x.shape, dtype=x.dtype)
    torch.set_rng_state(state)
    return torch.where(drawn < 0.5, -1.0, 1.0).double()


class Reference:
    """FastAT_Benchmark's loop in float64, with its L1 norm over the batch; momentum is stored in float16.

    The norm of a batch of n images is scaled to N of them: m <- g / (||g||_1 N / n) + decay m.
    """

    def __init__(self, model: nn.Module, *, rounds: bool = True) -> None:
        self.model, self.rounds = model, rounds
        self.delta = torch.zeros(N, 3, 8, 8, dtype=torch.float64)
        self.momentum = torch.zeros(N, 3, 8, 8, dtype=torch.float64)
        self.entries = N * 3 * 8 * 8

    def criterion(self, logits: Tensor, y: Tensor) -> Tensor:
        target = (1 - SMOOTHING) * F.one_hot(y, K) + SMOOTHING / K
        return -(target * (logits - logits.exp().sum(1, keepdim=True).log())).sum(1).mean()

    def step(self, batch: Batch) -> Tensor:
        """One update, gradients left in .grad; returns the loss."""
        model, x, idx = self.model.train(), batch.x, batch.indices
        delta, momentum = self.delta[idx], self.momentum[idx]
        x0 = torch.clamp(x + delta, 0, 1).requires_grad_()
        model.zero_grad()
        prior = model(x0)
        (grad,) = torch.autograd.grad(self.criterion(prior, batch.labels), x0, retain_graph=True)
        momentum = grad / (grad.abs().sum() * N / len(x)) + 0.3 * momentum
        after = torch.clamp(delta + RADIUS * momentum.sign(), -RADIUS, RADIUS)
        after = torch.minimum(torch.maximum(after, -x), 1 - x)
        delta = torch.clamp(delta + RADIUS * grad.sign(), -RADIUS, RADIUS)
        delta = torch.minimum(torch.maximum(delta, -x), 1 - x)
        logits = model(x + delta)
        loss = self.criterion(logits, batch.labels) + 10 * ((logits - prior) ** 2).mean()
        loss.backward()
        if self.rounds:
            momentum = (momentum * self.entries).half().double() / self.entries
        self.momentum[idx], self.delta[idx] = momentum, after
        return loss.detach()

    def update(self) -> None:
        with torch.no_grad():
            for p in self.model.parameters():
                p -= LR * p.grad


def pgi(model: nn.Module, **options: Any) -> tuple[FgsmPgi, TrainStep]:
    method = FgsmPgi(FgsmPgiOptions(**options))
    method.label_smoothing = SMOOTHING
    return method, train_step(method, model, None, spec=SPEC)


def test_steps_in_a_row_are_those_of_the_published_loop() -> None:
    model = moved_network(1)
    reference = Reference(copy.deepcopy(model))
    method, step = pgi(model)
    for visit, batch in enumerate(batches()):
        torch.manual_seed(visit)
        if visit == 0:
            reference.delta[batch.indices] = RADIUS * drawn_signs(batch.x)
        loss, logs = reference.step(batch), step(batch)
        torch.testing.assert_close(logs["loss"], loss)
        for (name, p), q in zip(model.named_parameters(), reference.model.parameters(), strict=True):
            assert float(q.grad.abs().sum()) > 0
            torch.testing.assert_close(p.grad, q.grad, msg=name)
        reference.update()
        for key, value in model.state_dict().items():
            torch.testing.assert_close(value, reference.model.state_dict()[key], msg=key)
        delta = from_int8(method.buffers["delta"], RADIUS, torch.float64)
        torch.testing.assert_close(delta, reference.delta, rtol=0, atol=1e-15)
        momentum = method.buffers["momentum"].double() / reference.entries
        torch.testing.assert_close(momentum, reference.momentum, rtol=2e-3, atol=1e-12)
    assert float((delta.abs() < RADIUS * 0.99).double().mean()) > 0.1  # clips and momentum change it


def test_momentum_in_float16_turns_no_sign_in_a_thousand() -> None:
    ends = []
    for rounds in (True, False):
        reference = Reference(moved_network(1), rounds=rounds)
        reference.delta = RADIUS * drawn_signs(reference.delta)
        for batch in batches():
            reference.step(batch)
            reference.update()
        ends.append(reference.delta)
    assert float((ends[0] != ends[1]).double().mean()) < 1e-3


def test_perturbations_begin_anew_with_each_period() -> None:
    method, step = pgi(moved_network(1), reset_epochs=2)
    batch = batches()[0]
    part = Batch(batch.x[:5], batch.labels[:5], batch.indices[:5])  # --epoch-steps leaves the others out
    for epoch, given in enumerate((batch, batch, part, batch)):
        step.start_epoch(epoch)
        before = {name: buffer.clone() for name, buffer in method.buffers.items()}
        torch.manual_seed(epoch)
        signs = drawn_signs(given.x)
        start = method.perturb(step.networks.views, given, None, step._attacker(given, 0, (SPEC,)))  # type: ignore[arg-type]
        fresh = before["period"][given.indices] != epoch // 2
        assert (
            fresh.tolist()
            == {0: [True] * N, 1: [False] * N, 2: [True] * 5, 3: [False] * 5 + [True] * 3}[epoch]
        )
        kept = from_int8(before["delta"][given.indices], RADIUS, torch.float64)
        wanted = torch.where(fresh[:, None, None, None], RADIUS * signs, kept)
        torch.testing.assert_close(start.start - given.x, wanted, rtol=0, atol=1e-12)
        assert not start.momentum[fresh].any()
        assert bool(start.momentum[~fresh].any()) == (epoch in (1, 3))
        step(given)


def test_the_first_step_without_regulariser_and_decay_is_fgsm_from_corners() -> None:
    model = moved_network(1)
    reference = copy.deepcopy(model)
    method, step = pgi(model, mse_weight=0.0, momentum_decay=0.0)
    batch = batches()[0]
    torch.manual_seed(1)
    x0 = (batch.x + RADIUS * drawn_signs(batch.x)).clamp(0, 1).requires_grad_()
    step(batch)
    criterion = nn.CrossEntropyLoss(label_smoothing=SMOOTHING)
    grad = torch.autograd.grad(criterion(reference(x0), batch.labels), x0)[0]
    x_adv = x0.detach() + RADIUS * grad.sign()
    x_adv = torch.minimum(torch.maximum(x_adv, batch.x - RADIUS), batch.x + RADIUS).clamp(0, 1)
    moved = from_int8(method.buffers["delta"][batch.indices], RADIUS, torch.float64)
    # Where x0 was clipped, the perturbation itself goes on from outside the range.
    inside = (batch.x > RADIUS) & (batch.x < 1 - RADIUS)
    torch.testing.assert_close((batch.x + moved)[inside], x_adv[inside])


# Storage


@pytest.mark.parametrize("k", [1, 2, 3, 4, 7, 8, 16, 31, 100, 127])
def test_perturbations_of_8_bit_images_are_stored_without_loss(k: int) -> None:
    for dtype in (torch.float32, torch.float64):
        delta = torch.arange(-k, k + 1, dtype=dtype) / 255
        stored = to_int8(delta, k / 255)
        assert stored.unique().numel() == 2 * k + 1
        back = from_int8(stored, k / 255, dtype)
        torch.testing.assert_close(back, delta, rtol=1e-6, atol=0)
        assert torch.equal(back[[0, -1]], torch.tensor([-k / 255, k / 255], dtype=dtype))


@pytest.mark.parametrize("eps", [0.03, 0.0005, 128 / 255, 0.9])
def test_others_are_rounded_to_a_254th_of_the_radius(eps: float) -> None:
    assert levels(eps) == 127
    delta = torch.linspace(-eps, eps, 9999, dtype=torch.float64)
    back = from_int8(to_int8(delta, eps), eps, torch.float64)
    assert 0 < float((back - delta).abs().max()) <= eps / 254 * (1 + 1e-9)
    assert torch.equal(back.sign() * (back != 0), delta.sign() * (back != 0))


def test_a_run_resumes_exactly_from_the_middle_of_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*TINY, "--method", "fgsm_pgi", "--steps", "1", "--epochs", "3", "--reset-epochs", "2"]
    assert main(["train", "--run-dir", str(tmp_path / "whole"), *flags]) == 0
    step, calls = TrainStep.__call__, []

    def interrupted(self: TrainStep, batch: Any) -> Any:
        calls.append(1)
        if len(calls) == 10:  # 7 updates in an epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch)

    monkeypatch.setattr(TrainStep, "__call__", interrupted)
    assert main(["train", "--run-dir", str(tmp_path / "parts"), *flags]) == 143
    monkeypatch.undo()
    assert main(["train", "--resume", str(tmp_path / "parts"), "--quiet"]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    whole, parts = (
        torch.load(tmp_path / run / "last" / "state.pt", weights_only=True)["method"]
        for run in ("whole", "parts")
    )
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert whole["delta"].dtype is torch.int8
    assert whole["period"].tolist() == [1] * 200
    assert whole["momentum"].flatten(1).any(1).all()


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mse_weight": -1.0}, "mse_weight must be >= 0, got -1"),
        ({"momentum_decay": 1.5}, r"momentum_decay must be in \[0, 1\], got 1.5"),
        ({"reset_epochs": 0}, "reset_epochs must be >= 1, got 0"),
    ],
)
def test_options_that_cannot_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        FgsmPgi(FgsmPgiOptions(**options))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--norm", "l2"], "fgsm_pgi is a method for linf, got norm l2"),
        (["--steps", "2"], "fgsm_pgi takes 1 step from where the image's last one ended, got steps 2"),
        (["--start", "uniform"], "got steps 1 and start uniform; leave --steps and --start out"),
        (["--awp", "0.01"], "awp 0.01: method fgsm_pgi has no attack separate from its update"),
        (["--mixup", "0.8"], "mixup 0.8: method fgsm_pgi needs one class per image"),
        (["--grad-accum-steps", "2"], "--grad-accum-steps 2: method fgsm_pgi .* needs them at once"),
        (
            ["--extra-data", "no.npz"],
            "--extra-data no.npz: method fgsm_pgi keeps a perturbation of each image",
        ),
        (["--labelled", "50"], "labelled 50: method fgsm_pgi needs every label"),
        (["--attack", "apgd"], "attack apgd: method fgsm_pgi has an attack of its own"),
    ],
)
def test_flags_that_cannot_work(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--method", "fgsm_pgi", "--data", "cifar10", "--run-dir", str(tmp_path / "run")]
    assert main([*command, *flags]) == 2
    said = capsys.readouterr().err
    assert re.search(message, " ".join(said.split())), said
    assert not (tmp_path / "run").exists()


def test_more_images_than_there_is_memory_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free_memory, "available_memory", lambda: 10**9)
    method = FgsmPgi(FgsmPgiOptions())
    method.num_images = 1_281_167
    with pytest.raises(
        UserError, match=r"--method n_fgsm.*1,281,167 training images take 538.8 GiB of memory"
    ):
        method_buffers.give_buffers(method, torch.zeros(2, 3, 224, 224))
    assert not method.buffers
    method.num_images = 100
    method_buffers.give_buffers(method, torch.zeros(2, 3, 32, 32))
    assert method.buffers["delta"].shape == (100, 3, 32, 32)
    assert method_buffers.checkpoint_note(method) == (
        "fgsm_pgi keeps 1 MB for the perturbations of 100 training images; each checkpoint holds them"
    )
