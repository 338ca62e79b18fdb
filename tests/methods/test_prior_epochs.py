"""--prior-epochs: attacks that go on from the image's last one, against a transcription in float64."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.stepping import LR, K, N, drawn_start, moved_network, train_step
from torch import Tensor, nn

from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.commands.main import main
from fastdynat.data import Batch
from fastdynat.errors import UserError
from fastdynat.methods import FgsmRs, FgsmRsOptions, Madry, MadryOptions, NFgsm, NFgsmOptions
from fastdynat.methods.image_state import from_int8

RADIUS = 8 / 255
ATTACKS = {
    "madry": (Madry, MadryOptions, PGDSpec(RADIUS, 2 / 255, 2)),
    "fgsm_rs": (FgsmRs, FgsmRsOptions, PGDSpec(RADIUS, 1.25 * RADIUS, 1)),
}


def image_batches() -> list[Batch]:
    """Visits of 8-bit images in other orders and looks, the second one by five of them only."""
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(K, (N,), generator=generator)
    found = []
    for size in (N, 5, N, N):
        x = torch.randint(256, (N, 3, 8, 8), generator=generator).double() / 255
        order = torch.randperm(N, generator=generator)[:size]
        found.append(Batch(x[order], labels[order], order))
    return found


def attacked(model: nn.Module, batch: Batch, start: Tensor, spec: PGDSpec) -> Tensor:
    x, model = start, model.eval()
    for _ in range(spec.steps):
        x = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(model(x), batch.labels), x)
        x = x.detach() + spec.step_size * grad.sign()
        x = torch.minimum(torch.maximum(x, batch.x - RADIUS), batch.x + RADIUS).clamp(0, 1)
    return x


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_starts_where_the_last_one_ended(name: str) -> None:
    kind, options, spec = ATTACKS[name]
    model = moved_network(1)
    reference = copy.deepcopy(model)
    method = kind(options(prior_epochs=3))
    step = train_step(method, model, None, spec=spec)
    last: list[Tensor | None] = [None] * N
    for epoch, batch in enumerate(image_batches()):
        if epoch == 3:  # anew
            last = [None] * N
        step.start_epoch(epoch)
        torch.manual_seed(epoch)
        start = drawn_start(batch.x, "uniform", RADIUS)
        for row, image in enumerate(batch.indices.tolist()):
            if (kept := last[image]) is not None:
                start[row] = (batch.x[row] + kept).clamp(0, 1)
        x_adv = attacked(reference, batch, start, spec)
        unit = RADIUS / 120  # what 8-bit images and whole steps are exact in
        for row, image in enumerate(batch.indices.tolist()):
            last[image] = ((x_adv[row] - batch.x[row]) / unit).round() * unit
        reference.train().zero_grad()
        loss = F.cross_entropy(reference(x_adv), batch.labels)
        loss.backward()
        with torch.no_grad():
            for p in reference.parameters():
                p -= LR * p.grad
        torch.testing.assert_close(step(batch)["loss"], loss.detach())
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(p, q)
        stored = from_int8(method.buffers["delta"], RADIUS, torch.float64)
        for image, kept in enumerate(last):
            assert kept is None or float((stored[image] - kept).abs().max()) < 1e-9


def test_without_it_nothing_is_kept() -> None:
    method = Madry(MadryOptions())
    assert not method.follows_images
    assert method.make_buffers(torch.zeros(2, 3, 8, 8)) == {}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--norm", "l2"], "--prior-epochs 5 works only under linf, got norm l2"),
        (["--norms", "linf,l2"], "--prior-epochs 5 works only under linf, got norm l2"),
        (["--mixup", "0.8"], "--mixup 0.8: with these options, method madry needs one class per image"),
        (["--extra-data", "no.npz"], "method madry keeps a perturbation of each image from one epoch"),
        (["--prior-epochs", "-1"], "--prior-epochs must be >= 0, got -1"),
    ],
)
def test_flags_that_do_not_go_with_it(
    flags: list[str], message: str, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--data", "cifar10", "--method", "madry", "--prior-epochs", "5"]
    assert main([*command, *flags, "--run-dir", str(tmp_path / "run")]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_n_fgsm_has_no_use_for_it() -> None:
    with pytest.raises(UserError, match="prior_epochs 5: n_fgsm starts every attack from noise"):
        NFgsm(NFgsmOptions(prior_epochs=5))
