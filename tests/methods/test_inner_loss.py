"""--inner-loss of the Madry family: the attack on the margin, against a transcription in float64."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.stepping import LR, K, N, drawn_start, moved_network, train_step

from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.commands.main import main
from fastdynat.data import Batch
from fastdynat.methods import FgsmRs, FgsmRsOptions, Madry, MadryOptions, NFgsm, NFgsmOptions

RADIUS = 8 / 255
# The method, radius of the start, radius of the ball that the attack ends in, step size, steps.
ATTACKS = {
    "madry": (Madry(MadryOptions(inner_loss="margin")), RADIUS, RADIUS, 2 / 255, 3),
    "fgsm_rs": (FgsmRs(FgsmRsOptions(inner_loss="margin")), RADIUS, RADIUS, 10 / 255, 1),
    "n_fgsm": (NFgsm(NFgsmOptions(inner_loss="margin")), 2 * RADIUS, 3 * RADIUS, RADIUS, 1),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_the_attack_ascends_the_margin_and_the_update_descends_the_cross_entropy(name: str) -> None:
    method, start_radius, ball, size, steps = ATTACKS[name]
    generator = torch.Generator().manual_seed(4)
    batch = Batch(
        torch.rand(N, 3, 8, 8, generator=generator, dtype=torch.float64),
        torch.randint(K, (N,), generator=generator),
        torch.arange(N),
    )
    model = moved_network(1)
    reference = copy.deepcopy(model)
    step = train_step(method, model, None, spec=PGDSpec(RADIUS, size, steps))
    torch.manual_seed(7)
    x = drawn_start(batch.x, "uniform", start_radius)
    loss = step(batch)["loss"]
    reference.eval()
    for _ in range(steps):
        x.requires_grad_()
        logits = reference(x)
        others = logits.masked_fill(F.one_hot(batch.labels, K).bool(), -torch.inf).amax(1)
        margin = others - logits[torch.arange(N), batch.labels]
        (grad,) = torch.autograd.grad(margin.sum(), x)
        x = x.detach() + size * grad.sign()
        x = torch.minimum(torch.maximum(x, batch.x - ball), batch.x + ball).clamp(0, 1)
    expected = F.cross_entropy(reference.train()(x), batch.labels)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q - LR * q.grad)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mixup", "0.8"], "--mixup 0.8: with these options, method madry needs one class per image"),
        (["--targeted", "random"], "--targeted random: the attack of method madry is not the cross-entropy"),
        (["--inner-loss", "dlr"], "--inner-loss"),
    ],
)
def test_flags_that_do_not_go_with_it(
    flags: list[str], message: str, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--method", "madry", "--inner-loss", "margin", "--run-dir", str(tmp_path / "run")]
    assert main([*command, *flags]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()
