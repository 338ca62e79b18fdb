"""--label-smoothing and mixed labels with every method: the number from the formula, or a refusal by name."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.method_variants import TINY, VARIANTS, make_method
from support.stepping import STEPS, K, N, make_batch, moved_network, train_step
from torch import Tensor, nn

from fastdynat.attack_engine.engine import Attacker
from fastdynat.attack_engine.goal import AttackGoal
from fastdynat.attacks import AttackResult
from fastdynat.commands.main import main
from fastdynat.data import Batch
from fastdynat.errors import UserError
from fastdynat.methods import METHODS, Inner, Method, Networks, Outer
from fastdynat.methods.base import unattacked
from fastdynat.methods.burn_in import BurnIn
from fastdynat.methods.madry import Madry
from fastdynat.training.resolve_labels import check_label_use

SMOOTHING = 0.3


@dataclass(frozen=True)
class Seen:
    """What the cross-entropies of a step are taken of.

    Attributes:
        model, guide: copies of the networks before the step, in train mode.
        x, x_adv: images, float64.
        target: (N, K) probabilities, not smoothed.
        smoothing: s of the losses.
        weights: (N,) of the method, 1 where it has none.
    """

    model: nn.Module
    guide: nn.Module
    x: Tensor
    x_adv: Tensor
    target: Tensor
    smoothing: float
    weights: Tensor

    def ce(self, logits: Tensor, target: Tensor | None = None) -> Tensor:
        target = self.target if target is None else target
        each = F.cross_entropy(logits, target, label_smoothing=self.smoothing, reduction="none")
        return (self.weights * each).mean()

    def adv(self) -> Tensor:
        return self.ce(self.model(self.x_adv))

    def clean(self) -> Tensor:
        return self.ce(self.model(self.x))

    def guided(self) -> Tensor:
        return self.ce(self.guide(self.x))


def dynat_terms(s: Seen) -> dict[str, Tensor]:
    dynamic = F.one_hot(s.guide(s.x).detach().argmax(1), K).double()
    return {"guide": s.guided(), "model": s.ce(s.model(s.x_adv), dynamic)}


def soft_dynat_terms(s: Seen) -> dict[str, Tensor]:
    guided = s.guided()  # moves the running statistics that the labels are made with
    soft = (copy.deepcopy(s.guide).eval()(s.x) / 2).softmax(1).detach()
    return {"guide": guided, "model": s.ce(s.model(s.x_adv), soft)}


def hat_terms(s: Seen) -> dict[str, Tensor]:
    fooled = F.one_hot(copy.deepcopy(s.guide).eval()(s.x_adv).argmax(1), K).double()
    helper = s.ce(s.model(s.x + 2 * (s.x_adv - s.x)), fooled)
    return {"model": s.clean() + 0.5 * helper}


# What stands in the losses of a variant for cross-entropies with labels; all other terms do not know them.
Terms = Callable[[Seen], dict[str, Tensor]]
TERMS: dict[str, Terms] = {
    "madry": lambda s: {"model": s.adv()},
    "fgsm_rs": lambda s: {"model": s.adv()},
    "n_fgsm": lambda s: {"model": s.adv()},
    "free-once": lambda s: {"model": s.clean()},  # its first perturbation is 0
    "gairat": lambda s: {"model": s.adv()},
    "mail": lambda s: {"model": s.adv()},
    "mail-trades": lambda s: {"model": replace(s, weights=torch.ones(N)).clean()},
    "mart": lambda s: {"model": s.adv()},
    "mart-released": lambda s: {"model": s.adv()},
    "arda": lambda s: {"model": s.adv()},
    "natural": lambda s: {"model": s.clean()},
    "natural-hot": lambda s: {"model": s.ce(s.model(s.x) / 5)},
    "trades": lambda s: {"model": s.clean()},
    "ikl": lambda s: {"model": s.clean()},
    "vat": lambda s: {"model": s.clean()},
    "vat-pgd": lambda s: {"model": s.clean()},
    "dyart": lambda s: {"model": s.clean()},
    "nu_at": lambda s: {"model": s.clean()},
    "alp": lambda s: {"model": 0.5 * s.clean() + 0.5 * s.adv()},
    "dynat": dynat_terms,
    "dynat-no-inner": lambda s: {k: (0.2 if k == "model" else 1) * v for k, v in dynat_terms(s).items()},
    "dynat-soft-eval": soft_dynat_terms,
    "dynat-true": lambda s: {"guide": s.guided(), "model": s.adv()},
    "dynat-gairat": dynat_terms,
    "lbgat": lambda s: {"guide": s.guided()},
    "lbgat-0": lambda s: {"guide": s.guided()},
    "adagat": lambda s: {"guide": s.guided()},
    "hat": hat_terms,
    "ard-half": lambda s: {"model": 0.5 * s.clean()},
    "iad-half": lambda s: {"model": 0.5 * s.clean()},
    "iad-2": lambda s: {"model": 0.5 * s.adv()},
    "burn-in": lambda s: {"model": s.clean()},
    "burn-in-guide": lambda s: {"model": s.clean(), "guide": s.guided()},
}
# No cross-entropy with labels: --label-smoothing is refused.
UNSMOOTHED = {"ard", "iad", "rslad", "distillation", "lbgat-frozen"}
# Losses or goals of a class: mixed labels are refused.
ONE_CLASS = {"mart", "mart-released", "gairat", "mail", "mail-trades", "iad", "iad-2", "iad-half", "dyart"}
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "natural-hot": ("natural", {"temperature": 5.0}),
    "free-once": ("free", {"replays": 1}),
    "dynat-true": ("dynat", {"outer_label": "true", "inner_loss": "ce_true"}),
    "dynat-awp": ("dynat", {"awp_objective": "trades"}),
    "ard-half": ("ard", {"alpha": 0.5}),
    "iad-half": ("iad", {"alpha": 0.5}),
}
NO_LABELS = {"rslad", "distillation", "ard", "lbgat-frozen"}  # in the losses of the variants that mix


def method_of(variant: str) -> Method[Any]:
    if variant == "burn-in":
        return BurnIn(Madry(Madry.options_type()))
    if variant == "burn-in-guide":
        return BurnIn(make_method("dynat"))
    if variant in MORE:
        name, options = MORE[variant]
        return METHODS[name](METHODS[name].options_type(**options))
    return make_method(variant)


def test_every_method_and_variant_has_decided() -> None:
    covered = {
        "fgsm_pgi",
        "fgsm_rs-prior",
        "madry-prior",
        "free",
        "free-2",
        "arda-quarter",
        "dynat-mail",
        "dynat-awp",
        "grad_align",  # its two losses: test_grad_align
        "liet",  # smooths at random: test_liet
    }  # other variants have their formulas
    assert {*VARIANTS, *MORE} <= {*TERMS, *UNSMOOTHED, *covered}
    for variant in {*TERMS, *UNSMOOTHED}:
        method = method_of(variant)
        assert method.smooths_labels == (variant not in UNSMOOTHED), variant
        assert method.takes_mixed_labels == (variant not in ONE_CLASS), variant


def mixed_labels(labels: Tensor) -> Tensor:
    """Of two classes each, in float64, with one image that is not mixed."""
    share = torch.linspace(0.55, 1, N, dtype=torch.float64)[:, None]
    return share * F.one_hot(labels, K) + (1 - share) * F.one_hot((labels + 1) % K, K)


@dataclass
class Stepped:
    """A step's networks, its losses, its goal."""

    model: nn.Module
    guide: nn.Module
    losses: dict[str, Tensor]
    goal: AttackGoal | None


def stepped(variant: str, batch: Batch, smoothing: float, x_adv: Tensor) -> Stepped:
    """One step of a variant whose attack returns `x_adv`, in the last of four epochs."""
    method, seen = method_of(variant), Stepped(moved_network(1), moved_network(2), {}, None)
    method.label_smoothing = smoothing
    if variant.startswith("burn-in"):
        method.label_smoothing = 0.0
        method = BurnIn(_smoothed(variant, smoothing))
    method.epochs = 4
    own_outer, own_inner = method.outer, method.inner

    def perturb(nets: Networks, batch: Batch, inner: Inner, attack: Attacker) -> AttackResult:
        if variant == "dyart" or (inner.goal is None and variant != "vat"):
            return type(method).perturb(method, nets, batch, inner, attack)
        kept = torch.arange(N) % STEPS
        return replace(unattacked(x_adv), kept=kept, gradients=N * STEPS, steps=STEPS)

    def inner(nets: Networks, batch: Batch) -> Inner:
        found = own_inner(nets, batch)
        seen.goal = found.goal
        seen.losses.update(found.losses)
        return found

    def outer(*args: Any) -> Outer:
        found = own_outer(*args)
        seen.losses.update(found.losses)
        return found

    method.perturb, method.inner, method.outer = perturb, inner, outer  # type: ignore[method-assign]
    guide = seen.guide if method.uses_guide or "guide" in method.trains else None
    if isinstance(method, BurnIn) and "guide" in method.trains:
        method.uses_guide = True  # type: ignore[misc]
    step = train_step(method, seen.model, guide, start=method.attack_defaults.start)
    step.start_epoch(3)
    step(batch)
    return seen


def _smoothed(variant: str, smoothing: float) -> Method[Any]:
    method = make_method("dynat" if variant == "burn-in-guide" else "madry")
    method.label_smoothing = smoothing
    return method


def weights_of(variant: str, model: nn.Module, x_adv: Tensor, labels: Tensor) -> Tensor:
    """The images' weights in the losses with a true class, from the published formulas."""
    if variant in ("gairat", "dynat-gairat"):
        kept = (torch.arange(N) % STEPS).double()
        raw = 1 + torch.tanh(-1 + 5 * (1 - 2 * kept / STEPS))
        return raw / raw.mean()
    if variant == "mail":
        p = model(x_adv).softmax(1).detach()
        own = p.gather(1, labels[:, None])[:, 0]
        rival = p.scatter(1, labels[:, None], 0.0).amax(1)
        return 3 * torch.sigmoid(10 * (rival - own - 0.5))
    return torch.ones(N, dtype=torch.float64)


def gradients(module: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in module.parameters()]


def expected_terms(
    variant: str, batch: Batch, x_adv: Tensor, smoothing: float
) -> tuple[dict[str, Tensor], nn.Module, nn.Module]:
    """The cross-entropies alone, with their gradients in the networks' copies."""
    model, guide = moved_network(1), moved_network(2)
    target = F.one_hot(batch.labels, K).double() if batch.mixed is None else batch.mixed
    weights = weights_of(variant, copy.deepcopy(model), x_adv, batch.labels)
    if variant == "dynat-gairat":  # the guide's own loss is not weighted
        plain = Seen(model, guide, batch.x, x_adv, target, smoothing, torch.ones(N))
        terms = {"guide": plain.guided(), "model": dynat_terms(replace(plain, weights=weights))["model"]}
    else:
        terms = TERMS[variant](Seen(model, guide, batch.x, x_adv, target, smoothing, weights))
    torch.stack([*terms.values()]).sum().backward()
    return terms, model, guide


def assert_only_the_labels_changed(variant: str, batch: Batch, smoothing: float) -> Stepped:
    """Between plain labels and those of `batch`, losses and gradients differ as cross-entropies do."""
    plain = Batch(batch.x, batch.labels, batch.indices)
    generator = torch.Generator().manual_seed(6)
    x_adv = (batch.x + 0.05 * torch.rand(batch.x.shape, generator=generator, dtype=torch.float64)).clamp(0, 1)
    got, before = stepped(variant, batch, smoothing, x_adv), stepped(variant, plain, 0.0, x_adv)
    want, model, guide = expected_terms(variant, batch, x_adv, smoothing)
    want_before, model_before, guide_before = expected_terms(variant, plain, x_adv, 0.0)
    for name, loss in got.losses.items():
        change = (loss - before.losses[name]).detach()
        none = torch.zeros((), dtype=torch.float64)
        wanted = (want.get(name, none) - want_before.get(name, none)).detach()
        torch.testing.assert_close(change, wanted, rtol=1e-9, atol=1e-12, msg=name)
    assert max(abs(float(want[name].detach() - want_before[name].detach())) for name in want) > 1e-6
    for a, b, c, d in (
        (got.model, before.model, model, model_before),
        (got.guide, before.guide, guide, guide_before),
    ):
        for p, q, r, s in zip(*map(gradients, (a, b, c, d)), strict=True):
            torch.testing.assert_close(p - q, r - s, rtol=1e-8, atol=1e-12)
    return got


@pytest.mark.parametrize("variant", TERMS)
def test_smoothing_changes_the_cross_entropies_with_labels_alone(variant: str) -> None:
    assert_only_the_labels_changed(variant, make_batch(), SMOOTHING)


@pytest.mark.parametrize("smoothing", [0.0, SMOOTHING])
@pytest.mark.parametrize("variant", [name for name in TERMS if name not in ONE_CLASS])
def test_mixed_labels_take_the_place_of_classes(variant: str, smoothing: float) -> None:
    """In losses and goal; IKL's prior is uniform here, see `test_ikl`."""
    plain = make_batch()
    mixed = mixed_labels(plain.labels)
    batch = Batch(plain.x, plain.labels, plain.indices, mixed=mixed)
    found = assert_only_the_labels_changed(variant, batch, smoothing)
    attacked_from_labels = {"madry", "fgsm_rs", "n_fgsm", "nu_at", "alp", "arda", "trades", "ard-half"}
    attacked_from_labels |= {"dynat-true"}
    if variant in attacked_from_labels:
        assert found.goal is not None
        assert found.goal.loss == "ce"
        expected = (1 - smoothing) * mixed + smoothing / K
        torch.testing.assert_close(found.goal.target, expected[: len(found.goal.target)])
    elif found.goal is not None:
        assert found.goal.target.dtype != mixed.dtype or not torch.equal(found.goal.target, mixed)


@pytest.mark.parametrize("variant", sorted(NO_LABELS))
def test_mixed_labels_do_not_matter_where_no_loss_has_labels(variant: str) -> None:
    plain = make_batch()
    batch = Batch(plain.x, plain.labels, plain.indices, mixed=mixed_labels(plain.labels))
    got, want = (stepped(variant, b, 0.0, plain.x + 0.01) for b in (batch, plain))
    assert all(torch.equal(loss, want.losses[name]) for name, loss in got.losses.items())


def test_the_goal_keeps_classes_unsmoothed() -> None:
    batch, method = make_batch(), make_method("madry")
    method.label_smoothing = 0.4
    assert torch.equal(method.true_goal(batch).target, batch.labels)


@pytest.mark.parametrize("loss", ["margin", "dlr"])
def test_losses_of_one_class_take_no_mixed_labels(loss: Any) -> None:
    with pytest.raises(UserError, match=rf"loss {loss} needs one class per image, got labels .*use ce"):
        AttackGoal(loss, mixed_labels(make_batch().labels))


@pytest.mark.parametrize("gap", [0.0, 5.0, 40.0, 1000.0])
def test_an_unmixed_row_of_mixed_labels_attacks_as_its_class(gap: float) -> None:
    """Also where the network is certain: probabilities of 0 and 1 lose no gradient."""
    labels = make_batch().labels
    logits = torch.randn(N, K) + gap * F.one_hot(labels, K)
    rows = AttackGoal("ce", F.one_hot(labels, K).float()).logit_grad(logits, rescale=True)
    classes = AttackGoal("ce", labels).logit_grad(logits, rescale=True)
    unit = [grad / grad.abs().amax(1, keepdim=True) for grad in (rows, classes)]
    torch.testing.assert_close(*unit, rtol=1e-3, atol=1e-5)


def test_unlabelled_images_have_no_smoothed_loss() -> None:
    """VAT's mean is over the images with a label."""
    batch = make_batch()
    batch.labels[::2] = -1
    x_adv = batch.x + 0.01
    got, before = (stepped("vat", batch, s, x_adv) for s in (SMOOTHING, 0.0))
    z, labels = moved_network(1)(batch.x)[1::2], batch.labels[1::2]
    wanted = F.cross_entropy(z, labels, label_smoothing=SMOOTHING) - F.cross_entropy(z, labels)
    torch.testing.assert_close(got.losses["model"] - before.losses["model"], wanted)


@pytest.mark.parametrize("mixing", [False, True])
@pytest.mark.parametrize("variant", ["trades", "ikl", "dynat-awp"])
def test_weight_perturbation_ascends_the_loss_with_these_labels(variant: str, mixing: bool) -> None:
    """Of the methods that have a loss of their own for it; all others take `outer`'s."""
    plain, model, guide = make_batch(), moved_network(1), moved_network(2)
    mixed = mixed_labels(plain.labels)
    batch = Batch(plain.x, plain.labels, plain.indices, mixed=mixed if mixing else None)
    method = method_of(variant)
    method.num_classes = K
    method.buffers = method.make_buffers(batch.x)
    nets, attacked = Networks(model, model, model, guide, guide), unattacked(batch.x + 0.02)
    losses = []
    for given, smoothing in ((batch, SMOOTHING), (plain, 0.0)):
        method.label_smoothing = smoothing
        losses.append(method.awp_loss(nets, given, method.inner(nets, given), attacked))
    target = mixed if mixing else F.one_hot(plain.labels, K).double()
    z = model(plain.x)
    wanted = F.cross_entropy(z, target, label_smoothing=SMOOTHING) - F.cross_entropy(z, plain.labels)
    torch.testing.assert_close(losses[0] - losses[1], wanted, rtol=1e-9, atol=1e-12)


# Refusals


@pytest.mark.parametrize("name", METHODS)
def test_a_method_that_would_ignore_the_labels_is_refused_by_name(name: str) -> None:
    method = make_method(name)
    for asked, given, takes in (
        ("label_smoothing 0.1", {"smoothing": 0.1}, method.smooths_labels),
        ("mixup 0.8", {"mixing": "mixup 0.8"}, method.takes_mixed_labels),
    ):
        if takes:
            check_label_use(method, **given)  # type: ignore[arg-type]
        else:
            with pytest.raises(UserError, match=rf"^{asked}: .*method {name} .*; leave it out$"):
                check_label_use(method, **given)  # type: ignore[arg-type]


def test_options_that_leave_no_cross_entropy_are_named() -> None:
    with pytest.raises(UserError, match="with these options, method ard has no cross-entropy with labels"):
        check_label_use(make_method("ard"), smoothing=0.1)
    weighted = METHODS["dynat"].options_type(weighting="mail", weight_labels="true")
    with pytest.raises(UserError, match="with these options, method dynat needs one class per image"):
        check_label_use(METHODS["dynat"](weighted), mixing="cutmix 1")
    check_label_use(make_method("dynat-mail"), mixing="cutmix 1")


def test_mixing_needs_labels_of_all_images() -> None:
    with pytest.raises(UserError, match="mixup 1: with labelled 40, unlabelled images have no label to mix"):
        check_label_use(make_method("vat"), mixing="mixup 1", labelled=40)


class Inherits(Madry):
    """Another loss, of which nothing says what it does with labels."""

    name = "inherits"

    def outer(self, nets: Networks, batch: Batch, inner: Inner, attacked: AttackResult) -> Outer:
        return Outer({"model": F.cross_entropy(nets.model(attacked.x_adv), batch.labels)})


class Says(Inherits):
    name = "says"
    smooths_labels = takes_mixed_labels = True


class AddsAPass(Madry):
    name = "adds"

    def after_update(self, nets: Networks, batch: Batch) -> None:
        pass


def test_a_method_of_ones_own_says_that_it_takes_labels() -> None:
    options = Madry.options_type()
    for given in ({"smoothing": 0.1}, {"mixing": "mixup 0.8"}):
        with pytest.raises(UserError, match=r"method inherits does not declare .* Method\.fit .* = True\)"):
            check_label_use(Inherits(options), **given)  # type: ignore[arg-type]
        check_label_use(Says(options), **given)  # type: ignore[arg-type]
        check_label_use(AddsAPass(options), **given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "madry", "--smoothing", "1"], "--label-smoothing must be in [0, 1), got 1"),
        (["--method", "mart", "--mixup", "0.8"], "mixup 0.8: method mart needs one class per image"),
    ],
)
def test_refused_before_any_work(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--run-dir", "run", *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("method", ["ikl", "dynat"])
def test_mixed_and_smoothed_training_resumes_to_the_last_bit(method: str, tmp_path: Path) -> None:
    flags = ["--method", method, "--steps", "2", "--mixup", "0.8", "--label-smoothing", "0.1", *TINY]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(["train", "--run-dir", str(whole), *flags]) == 0
    assert main(["train", "--run-dir", str(parts), *flags, "--stop-after", "1"]) == 0
    assert main(["train", "--resume", str(parts), "--quiet"]) == 0
    for name in (p.name for p in (whole / "last").glob("*.safetensors")):
        assert (whole / "last" / name).read_bytes() == (parts / "last" / name).read_bytes()
    states = [torch.load(run / "last" / "state.pt", weights_only=True)["method"] for run in (whole, parts)]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    if method == "ikl":
        assert float(states[0]["sums"].sum()) == pytest.approx(96)  # the images of the last epoch
