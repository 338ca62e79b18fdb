"""Unusual networks and inputs through every entry point: the right value, or the right message."""

import copy
from collections.abc import Callable
from functools import partial
from operator import itemgetter
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.callers import (
    BLIND,
    ENTRIES,
    EPS,
    LOSSES,
    NO_LOGITS,
    PARTS,
    Answers,
    Called,
    N,
    TrainsWithMore,
    batch,
    by_autoattack,
    net,
)
from torch import Tensor, nn

from fastdynat import PGD, dynat_loss, mart_loss, trades_loss
from fastdynat.attack_engine.engine import AttackEngine
from fastdynat.attack_engine.goal import AttackGoal
from fastdynat.attack_engine.pgd import pgd
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.attacks import parse_attack
from fastdynat.data import ImageSet
from fastdynat.errors import UserError
from fastdynat.evaluation import AutoAttack, accuracy_over_eps, check_masking, measure
from fastdynat.evaluation.fidelity import check_fidelity
from fastdynat.models.logits import logits_of

CPU = torch.device("cpu")


def through(entry: str, model: Any, x: Tensor, y: Any, **kwargs: Any) -> Tensor:
    torch.manual_seed(0)
    return ENTRIES[entry](model, x, y, **kwargs)


def images_of(x: Tensor, y: Tensor) -> ImageSet:
    return ImageSet((x * 255).round().byte(), y)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("part", PARTS)
def test_the_part_that_is_named_is_what_is_attacked(part: str, entry: str) -> None:
    """Bit for bit what comes of the network that returns its logits alone."""
    make, output, _ = PARTS[part]
    x, y = batch()
    found = through(entry, Answers(net(), make), x, y, output=output)
    assert torch.equal(found, through(entry, net(), x, y))


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_answer_that_is_a_tensor_in_eval_mode_only(entry: str) -> None:
    x, y = batch()
    model = TrainsWithMore(net(), lambda z: (z, z.sum()))
    assert torch.equal(through(entry, model.eval(), x, y, output=0), through(entry, net(), x, y))


@pytest.mark.parametrize("entry", [*ENTRIES, "engine", "measure"])
@pytest.mark.parametrize("answer", [*PARTS, *NO_LOGITS])
def test_what_is_no_logits_gets_one_sentence(answer: str, entry: str) -> None:
    make, *_, said = {**PARTS, **NO_LOGITS}[answer]
    (x, y), model = batch(), Answers(net(), make).eval()
    calls: dict[str, Callable[[], Any]] = {
        "engine": lambda: AttackEngine(model, x[:2]),
        "measure": lambda: measure(
            model,
            images_of(x, y),
            parse_attack("clean", eps=EPS, step_size=EPS),
            device=CPU,
            batch_size=4,
            seed=0,
        ),
    }
    with pytest.raises(UserError, match=rf"the network maps \d+ images to {said}") as told:
        calls.get(entry, lambda: through(entry, model, x, y))()
    assert "not to logits (" in str(told.value)


def test_a_wrong_part_is_named() -> None:
    x, y = batch()
    model = Answers(net(), lambda z: {"logits": z})
    for output, said in (
        ("scores", "output='scores' is not in the network's output, a dict of 'logits'"),
        (1, "output=1 is not"),
    ):
        with pytest.raises(UserError, match=said):
            PGD(model, output=output)(x, y)
    with pytest.raises(UserError, match=r"output must be a key, an index or a function .*, got 0\.5"):
        PGD(model, output=0.5)
    with pytest.raises(UserError, match="output must be"):
        AutoAttack(model, output=True)


def test_a_binary_score_becomes_logits_by_the_remedy() -> None:
    """The softmax of the remedy is the sigmoid of the score, so the attack lowers the score of class 1."""
    x, _ = batch()
    score = Answers(net(), lambda z: z[:, 0])
    y = (score(x) > 0).long()
    x_adv = PGD(
        score, eps=EPS, random_start=False, output=lambda s: torch.stack([torch.zeros_like(s), s], 1)
    )(x, y)
    change = (score(x_adv) - score(x)).sign()
    assert torch.equal(change, torch.where(y == 1, -1.0, 1.0))
    leaf = x.clone().requires_grad_()
    grad = torch.autograd.grad(
        F.binary_cross_entropy_with_logits(score(leaf), y.float(), reduction="sum"), leaf
    )[0]
    one = PGD(
        score,
        eps=EPS,
        alpha=0.01,
        steps=1,
        random_start=False,
        output=lambda s: torch.stack([torch.zeros_like(s), s], 1),
    )
    torch.testing.assert_close(one(x, y), (x + 0.01 * grad.sign()).clamp(0, 1))


def _item(i: int, out: Any) -> Tensor:
    return out[i]


REWRITTEN: dict[str, Callable[[], Any]] = {
    "lambda": lambda: lambda out: out[0],
    "default": lambda: lambda out, i=0: out[i],
    "named default": lambda: lambda out, *, i=0: out[i],
    "partial": lambda: partial(_item, 0),
    "partial of a lambda": lambda: partial(lambda i, out: out[i], 0),
}


def _losses(output: Callable[[], Any], calls: int) -> int:
    """The number of replicas after so many calls with `output`, made anew for each."""
    from fastdynat.compat.inner_attack import _replicas

    (x, y), model = batch(), Answers(net(), lambda z: (z,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(calls):
        trades_loss(model, x, y, optimizer, perturb_steps=1, output=output())
    return len(_replicas[model])


@pytest.mark.parametrize("kind", REWRITTEN)
def test_a_function_written_in_the_call_makes_one_replica(kind: str) -> None:
    assert _losses(REWRITTEN[kind], 3) == 1


def test_no_output_keeps_a_replica_of_every_call() -> None:
    from fastdynat.compat.inner_attack import MOST

    assert _losses(lambda: itemgetter(0), MOST + 2) == MOST


def test_functions_that_pick_something_else_have_replicas_of_their_own() -> None:
    from fastdynat.compat.speed_options import hashable

    def picking(i: int) -> Callable[[Any], Tensor]:
        return lambda out, *, j=i: out[j]

    outputs = [picking(0), picking(1), partial(_item, 0), partial(_item, 1), partial(_item, i=0), 0, "logits"]
    assert len({hashable({"output": output}) for output in outputs}) == len(outputs)


HALVES = [(torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16), (torch.bfloat16, False)]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(("region", "amp"), HALVES)
def test_an_attack_is_the_same_in_the_callers_autocast_region(
    region: torch.dtype, amp: torch.dtype | bool, train: bool
) -> None:
    (x, y), model = batch(), net()
    attack = PGD(model, EPS, EPS / 2, 2, random_start=False, amp=amp)
    if train:  # on the model itself
        attack.set_model_training_mode(True, True, True)
    want = attack(x, y)
    with torch.autocast("cpu", region):
        answers = [model(x)]
        got = attack(x, y)
        answers.append(model(x))
        torch.testing.assert_close(attack(x, y), got)
    torch.testing.assert_close(got, want)
    with torch.autocast("cpu", region):  # the attack first
        got = attack(x, y)
        answers.append(model(x))
    torch.testing.assert_close(got, want)
    assert all(answer.dtype == region for answer in answers)


# No gradient at all.


@pytest.mark.parametrize("entry", [name for name in ENTRIES if name != "AutoAttack"])
@pytest.mark.parametrize("kind", BLIND)
def test_a_network_without_gradients_is_refused_by_attacks_that_need_them(kind: str, entry: str) -> None:
    x, y = batch()
    with pytest.raises(
        UserError, match=r"no gradient of the network's logits reaches the images .* attack by square"
    ):
        through(entry, Called(net(), BLIND[kind]), x, y)


@pytest.mark.parametrize("kind", BLIND)
def test_the_same_holds_where_it_would_be_compiled(kind: str) -> None:
    x, y = batch()
    with pytest.raises(UserError, match="no gradient of the network's logits reaches the images"):
        PGD(Called(net(), BLIND[kind]), compile=True)(x, y)


@pytest.mark.parametrize("kind", BLIND)
def test_autoattack_says_so_and_its_square_breaks_what_it_can(kind: str) -> None:
    x, _ = batch()
    model = Called(net(), BLIND[kind])
    y = model(x).argmax(1)
    with pytest.warns(UserWarning, match="gradients were zero") as told:
        x_adv = by_autoattack(model, x, y, ("apgd-ce3", "fab-t", "square300"), output=None)
    texts = [str(w.message) for w in told]
    assert any(f"apgd-ce3: {N} of {N} gradients were zero" in text for text in texts), texts
    fell = model(x_adv).argmax(1) != y
    assert bool(fell.any())
    assert float((x_adv - x).abs().max()) <= EPS * (1 + 1e-5)
    assert torch.equal(x_adv[~fell], x[~fell])


@pytest.mark.parametrize("kind", BLIND)
def test_the_masking_checks_find_it(kind: str) -> None:
    x = torch.rand(60, 3, 8, 8)
    model = Called(net(), BLIND[kind])
    report = check_masking(
        model,
        images_of(x, model((x * 255).round() / 255).argmax(1)),
        norm="linf",
        eps=EPS,
        device=CPU,
        batch_size=60,
        seed=0,
    )
    (gradients,) = [check for check in report.warnings if check.name == "gradients"]
    assert "ce 100.0 %, margin 100.0 %, dlr 100.0 %" in gradients.evidence


@pytest.mark.parametrize("entry", [name for name in ENTRIES if name != "FGSM"])
def test_a_network_that_rounds_its_images_is_told_of(entry: str) -> None:
    """Its gradients exist, and are 0."""
    x, _ = batch()
    model = Called(net(), lambda inner: lambda x: inner((x * 15).round() / 15))
    with pytest.warns(UserWarning, match=r"\d+ of \d+ gradients were zero or not finite in every pixel"):
        found = through(entry, model, x, model(x).argmax(1))
    if entry in ("PGD", "pgd"):  # the start is all there is
        assert float((found - x).abs().max()) <= EPS * (1 + 1e-5)


def test_nan_logits_are_told_of_and_refused() -> None:
    (x, y), broken = batch(), net()
    with torch.no_grad():
        broken[-1].bias.fill_(float("nan"))
    with pytest.raises(
        UserError, match=f"logits are NaN or infinite for {N} of {N} images, which cannot be judged"
    ):
        by_autoattack(broken, x, y)
    with pytest.warns(UserWarning, match="gradients were zero or not finite"):
        PGD(broken, fold=False)(x, y)
    some = Called(
        net(), lambda inner: lambda x: inner(x) + torch.where(x[:, :1, 0, 0] > 0.5, float("inf"), 0.0)
    )
    with pytest.raises(UserError, match=rf"for {int((x[:, 0, 0, 0] > 0.5).sum())} of {N} images"):
        AutoAttack(some, eps=EPS, verbose=False).clean_accuracy(x, y)


def test_nan_at_what_an_attack_returns_is_told_of() -> None:
    x = torch.full((N, 3, 8, 8), 0.5)
    model = Called(
        net(),
        lambda inner: (
            lambda x: inner(x) + torch.log((0.52 - x.flatten(1).amax(1, keepdim=True)).clamp_min(-1))
        ),
    )
    y = model(x).argmax(1)
    with pytest.warns(
        UserWarning, match=r"\d+ images count as misclassified because the network's logits are NaN"
    ):
        by_autoattack(model, x, y, ("square5",))


# Dtypes and devices.


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(("images", "model"), [("float64", "float32"), ("float32", "float64")])
def test_one_sentence_where_dtypes_do_not_meet(images: str, model: str, entry: str) -> None:
    x, y = batch(getattr(torch, images))
    with pytest.raises(
        UserError, match=rf"images are torch\.{images} and the model torch\.{model}; convert one"
    ):
        through(entry, net(dtype=getattr(torch, model)), x, y)


@pytest.mark.parametrize("entry", ENTRIES)
def test_float64_stays_float64(entry: str) -> None:
    x, y = batch(torch.float64)
    found = through(entry, net(dtype=torch.float64), x, y)
    assert found.dtype == torch.float64
    if entry not in LOSSES:
        assert bool((found != found.float().double()).any())  # not by way of float32
        assert float((found - x).flatten(1).abs().amax()) <= EPS * (1 + 1e-5) or entry == "PGDL2"


@pytest.mark.filterwarnings("ignore:apgd-dlr5.* gradients were zero")  # rightly, once the label is third
@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_all_of_autoattack_in_float64(norm: str) -> None:
    """Every stage by itself: in the ball to float64's rounding, and its verdict is the network's own."""
    eps = {"Linf": 0.05, "L2": 0.3, "L1": 3.0}[norm]
    model, x = net(dtype=torch.float64), batch(torch.float64)[0]
    y = model(x).argmax(1)
    names = ("apgd-ce5", "apgd-dlr5", "apgd-t5", "fab", "fab-t", "square50")
    attack = AutoAttack(model, norm=norm, eps=eps, seed=1, version="custom", attacks=names, verbose=False)
    order = {"Linf": float("inf"), "L2": 2, "L1": 1}[norm]
    for x_adv in attack.run_standard_evaluation_individual(x, y).values():
        assert x_adv.dtype == torch.float64
        assert float(torch.linalg.vector_norm((x_adv - x).flatten(1), order, dim=1).max()) <= eps * (1 + 1e-5)
    assert attack.device == CPU


@pytest.mark.parametrize("entry", ["PGD", "pgd", "AutoAttack"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_network_in_half_precision_reads_the_images_rounded(dtype: torch.dtype, entry: str) -> None:
    (x, _), model = batch(), net().to(dtype)
    y = model(x.to(dtype)).argmax(1)
    x_adv = through(entry, model, x, y)
    assert x_adv.dtype == torch.float32
    assert 0 < float((x_adv - x).abs().max()) <= EPS * (1 + 1e-5)
    with torch.no_grad():
        before, after = (F.cross_entropy(model(images.to(dtype)).float(), y) for images in (x, x_adv))
    assert float(after) > float(before)


@pytest.mark.parametrize("entry", LOSSES)
def test_training_a_network_in_half_precision_is_refused(entry: str) -> None:
    x, y = batch()
    with pytest.raises(
        UserError, match=r"images are torch.float32 and the model torch.float16; .* torch.autocast"
    ):
        through(entry, net().half(), x, y)


def test_autoattack_is_where_the_model_is_and_for_a_function_where_the_images_are() -> None:
    x, y = batch()
    assert AutoAttack(net()).device == CPU
    assert AutoAttack(net().to("meta")).device == torch.device("meta")
    model = net()
    attack = AutoAttack(
        lambda x: model(x), eps=EPS, seed=1, version="custom", attacks=["apgd-ce2"], verbose=False
    )
    assert attack.run_standard_evaluation(x, y).device == CPU


def test_results_carry_no_graph() -> None:
    (x, y), model = batch(), net()
    scale = torch.ones((), requires_grad=True)
    for entry in ("PGD", "PGDL2", "FGSM", "TPGD", "pgd", "AutoAttack"):
        found = through(entry, model, x * scale, y)
        assert not found.requires_grad, entry
        assert torch.equal(found, through(entry, model, x, y)), entry


# The range of images.

RANGES: list[tuple[Callable[[Tensor], Tensor], str]] = [
    (lambda x: x * 255, "divide by 255$"),
    (lambda x: x * 255 - 128, "divide by 255 what is in 0"),
    (lambda x: x * 2 - 1, r"\(images \+ 1\) / 2"),
    (lambda x: (x - 0.45) / 0.22, "they look normalised"),
    (lambda x: x * 2.5, "they look normalised"),
    (lambda x: x.index_fill(0, torch.tensor(2), float("nan")), "hold NaN"),
    (lambda x: x.index_fill(0, torch.tensor(2), float("inf")), "hold infinity"),
    (lambda x: x.clamp_min(0.0) - 0.01, "must be in"),
]


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("number", range(len(RANGES)))
def test_images_out_of_range_are_refused_with_the_advice_that_fits(number: int, entry: str) -> None:
    (x, y), (spoil, said) = batch(), RANGES[number]
    x[0, 0, 0, :2] = torch.tensor([0.0, 1.0])
    with pytest.raises(UserError, match=said) as told:
        through(entry, net(), spoil(x), y)
    assert str(told.value).startswith("images ")


@pytest.mark.parametrize("entry", ENTRIES)
def test_what_rounding_left_beyond_is_clamped(entry: str) -> None:
    x, y = batch()
    x = (x * 1.5 - 0.25).clamp(0, 1)
    loose = torch.where(x == 0, -2.98e-8, torch.where(x == 1, 1 + 5e-4, x))
    found, right = through(entry, net(), loose, y), through(entry, net(), x, y)
    if entry in LOSSES:  # which train on the images as they are
        torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-3)
    else:
        assert torch.equal(found, right)


# Labels.

BAD_LABELS: list[tuple[Callable[[Tensor], Any], str]] = [
    (lambda y: y[:, None], r"use labels\[:, 0\]"),
    (lambda y: y[:3], r"6 images but labels of shape \(3,\)"),
    (lambda y: y.float(), r"use labels.long\(\)"),
    (lambda y: y + 10, "10"),
    (lambda y: y - 10, "got -|in -"),
    (lambda y: "cats", "labels must be a tensor of classes, got str"),
]
BAD_ROWS: list[tuple[Callable[[Tensor], Tensor], str]] = [
    (lambda p: 2 * p, "a sum that is 1 away from 1"),
    (lambda p: p * 0, "a sum that is 1 away from 1"),
    (lambda p: 2 * p - 0.1, "got one of -0.1"),
    (lambda p: p / 0, "sum that is nan|sum that is inf"),
    (
        lambda p: p[:, :5] / p[:, :5].sum(1, keepdim=True).clamp_min(1),
        "rows of 5 probabilities, the model has 10 classes|sum",
    ),
    (lambda p: p.long(), r"use labels.float\(\)"),
]


@pytest.mark.parametrize("entry", [name for name in ENTRIES if name != "TPGD"])
@pytest.mark.parametrize("number", range(len(BAD_LABELS)))
def test_labels_that_are_no_classes_are_refused(number: int, entry: str) -> None:
    (x, y), (spoil, said) = batch(), BAD_LABELS[number]
    with pytest.raises(UserError, match=said):
        through(entry, net(), x, spoil(y))


@pytest.mark.parametrize("entry", ["PGD", "PGDL2", "FGSM", "pgd", "trades_loss"])
@pytest.mark.parametrize("number", range(len(BAD_ROWS)))
def test_rows_that_are_no_probabilities_are_refused(number: int, entry: str) -> None:
    (x, y), (spoil, said) = batch(), BAD_ROWS[number]
    with pytest.raises(UserError, match=said):
        through(entry, net(), x, spoil(F.one_hot(y, 10).float()))


@pytest.mark.parametrize("entry", ["mart_loss", "dynat_loss", "lbgat_loss", "AutoAttack"])
def test_rows_are_refused_where_classes_are_needed(entry: str) -> None:
    x, y = batch()
    with pytest.raises(UserError, match=r"one class per image|6 integer classes"):
        through(entry, net(), x, F.one_hot(y, 10).float())


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("kind", ["numpy", "list", "int32", "uint8"])
def test_labels_of_other_kinds_are_the_same_labels(kind: str, entry: str) -> None:
    x, y = batch()
    given = {"numpy": y.numpy(), "list": y.tolist(), "int32": y.int(), "uint8": y.numpy().astype(np.uint8)}[
        kind
    ]
    assert torch.equal(through(entry, net(), x, given), through(entry, net(), x, y))


@pytest.mark.parametrize("entry", ENTRIES)
def test_images_that_are_no_tensor_are_refused(entry: str) -> None:
    x, y = batch()
    with pytest.raises(UserError, match="got ndarray"):
        through(entry, net(), x.numpy(), y)  # type: ignore[arg-type]


# Few classes.


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_every_stage_with_few_classes(classes: int) -> None:
    x, y = batch(classes=classes)
    model = net(classes=classes)
    for name, least in (
        ("apgd-ce3", 2),
        ("apgd-dlr3", 3),
        ("apgd-t3", 4),
        ("fab", 2),
        ("fab-t", 2),
        ("square20", 2),
    ):
        if classes < least:
            with pytest.raises(
                UserError,
                match=rf"needs {least} classes, the network has {classes}; attack by apgd-ce instead",
            ):
                by_autoattack(model, x, y, (name,))
            continue
        x_adv = by_autoattack(model, x, y, (name,))
        assert float((x_adv - x).abs().max()) <= EPS * (1 + 1e-5)


@pytest.mark.parametrize("name", ["apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square"])
def test_one_class_is_nothing_to_attack(name: str) -> None:
    x, y = batch(classes=1)
    with pytest.raises(UserError, match="one class is nothing to attack; a binary network's score"):
        by_autoattack(net(classes=1), x, y, (name,))


def test_a_goal_that_the_classes_do_not_allow() -> None:
    x, y = batch(classes=2)
    with pytest.raises(UserError, match="the loss dlr needs 3 classes, the model has 2; use the loss margin"):
        pgd(net(classes=2), x, AttackGoal("dlr", y), PGDSpec(EPS, EPS, 1))


# The loss functions' own.


def test_gradients_of_micro_batches_add_up() -> None:
    """Without batch norm, whose statistics would differ between halves; the noise is drawn per call."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    (x, y), alone = batch(), copy.deepcopy(model)
    torch.manual_seed(2)
    for rows in (slice(0, 3), slice(3, 6)):
        numbers: Any = {"epsilon": EPS, "perturb_steps": 2, "zero_grad": False}
        loss = trades_loss(model, x[rows], y[rows], None, **numbers)  # type: ignore[arg-type]
        (loss / 2).backward()
    torch.manual_seed(2)
    expected = 0.0
    for rows in (slice(0, 3), slice(3, 6)):
        optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
        (trades_loss(alone, x[rows], y[rows], optimizer, epsilon=EPS, perturb_steps=2) / 2).backward()
        expected = expected + alone[1].weight.grad
    torch.testing.assert_close(model[1].weight.grad, expected)


@pytest.mark.parametrize("entry", LOSSES)
def test_no_optimizer_needs_zero_grad_off(entry: str) -> None:
    from fastdynat import dynat_loss, lbgat_loss

    x, y = batch()
    loss: Any = {
        "trades_loss": trades_loss,
        "mart_loss": mart_loss,
        "dynat_loss": dynat_loss,
        "lbgat_loss": lbgat_loss,
    }[entry]
    networks = (net(), net(4)) if entry in ("dynat_loss", "lbgat_loss") else (net(),)
    with pytest.raises(UserError, match=r"optimizer=None: .*zero_grad=False"):
        loss(*networks, x, y, None, perturb_steps=1)


def test_marts_floor_is_the_releases() -> None:
    """``log(1.0001 - p)`` in float64, at epsilon 0, where the attack and the KL are nothing."""
    x, _ = batch(torch.float64)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10)).double()
    with torch.no_grad():
        model[1].weight.mul_(60)
    y = (model(x).argmax(1) + 1) % 10
    p = model(x).softmax(1)
    rival = p.scatter(1, y[:, None], 0).amax(1)
    expected = (F.cross_entropy(model(x), y, reduction="none") - torch.log(1.0001 - rival)).mean()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.testing.assert_close(mart_loss(model, x, y, optimizer, epsilon=0, floor=0.0001), expected)
    with pytest.raises(UserError, match=r"floor must be in \[0, 1\), got -1"):
        mart_loss(model, x, y, optimizer, floor=-1)


# Radii of curves.


@pytest.mark.parametrize(
    ("norm", "radii"),
    [("linf", [0, 0.01, 0.05]), ("l2", [0, 0.1, 0.5]), ("l1", [0, 1, 5]), ("l0", [0, 1, 3, 6])],
)
def test_curves_in_every_norm(norm: str, radii: list[float]) -> None:
    """Each point is the accuracy under the attack, with the radius's step, of images robust so far."""
    x = torch.rand(40, 3, 8, 8)
    model = net()
    images = images_of(x, model((x * 255).round() / 255).argmax(1))
    found = accuracy_over_eps(model, images, "bim5", radii, norm=norm, device=CPU, batch_size=40, seed=0)
    assert found.accuracy[0] == 1.0
    assert all(a >= b for a, b in zip(found.accuracy, found.accuracy[1:], strict=False))
    assert found.accuracy[-1] < 1
    step = 10 * radii[1] if norm == "l0" else radii[1] / 4
    first = parse_attack("bim5", eps=radii[1], step_size=step, norm=norm)
    assert found.accuracy[1] == measure(model, images, first, device=CPU, batch_size=40, seed=0).accuracy
    with pytest.raises(UserError, match="does not depend on the radius"):
        accuracy_over_eps(model, images, "deepfool", [0.1], norm="linf", device=CPU, batch_size=40, seed=0)


def test_a_radius_under_l0_is_a_whole_number() -> None:
    x, y = batch()
    with pytest.raises(
        UserError, match=r"eps under l0 is a whole number of pixels that may change, got 1\.5"
    ):
        accuracy_over_eps(net(), images_of(x, y), "bim5", [1.5], norm="l0", device=CPU, batch_size=4, seed=0)


def test_logits_are_what_the_doc_says() -> None:
    z = torch.zeros(2, 3)
    assert logits_of(z, 2) is z
    engine = AttackEngine(net(), batch()[0][:2])
    assert check_fidelity(engine, net(), [batch()], PGDSpec(EPS, EPS / 4, 2)).images == N


@pytest.mark.parametrize(
    "model", [lambda x: x.mean((2, 3)), None, "resnet18"], ids=["function", "None", "name"]
)
def test_what_is_no_module_is_no_model(model: Any) -> None:
    """AutoAttack alone, which needs neither modes nor weights, takes any function."""
    calls: list[Callable[[], Any]] = [
        lambda: PGD(model),
        lambda: pgd(model, batch()[0], AttackGoal("ce", batch()[1]), PGDSpec(EPS, EPS, 1)),
        lambda: trades_loss(model, *batch(), None, zero_grad=False),
        lambda: dynat_loss(model, net(), *batch(), None, zero_grad=False),
    ]
    for call in calls:
        with pytest.raises(
            UserError, match=r"model must be a torch\.nn\.Module, got (function|NoneType|str)"
        ):
            call()


@pytest.mark.parametrize(
    "eps", [float("nan"), "8/255", torch.full((N, 1, 1, 1), EPS)], ids=["NaN", "text", "per image"]
)
def test_a_radius_is_one_number(eps: Any) -> None:
    x, y = batch()
    with pytest.raises(UserError, match="eps must be one number in pixel units"):
        PGD(net(), eps=eps)(x, y)
    with pytest.raises(UserError, match="epsilon must be one number in pixel units"):
        trades_loss(net(), x, y, None, epsilon=eps, zero_grad=False)
    assert torch.equal(
        PGD(net(), torch.tensor(EPS), EPS, 1, False)(x, y), PGD(net(), EPS, EPS, 1, False)(x, y)
    )
