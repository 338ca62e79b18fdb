"""Drop-in losses: the releases' loops in float64, from their formulas, and features beyond the releases."""

import copy
import gc
import inspect
import math
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import needs
from support.networks import tiny_cnn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastdynat import dynat_loss, lbgat_loss, mart_loss, trades_loss
from fastdynat.attack_engine.steps import start_point
from fastdynat.compat import losses
from fastdynat.compat.inner_attack import _replicas
from fastdynat.errors import UserError

N, K, EPS, STEP, STEPS, BETA = 6, 10, 0.031, 0.007, 4, 3.0
LOSSES: dict[str, Callable[..., Tensor]] = {
    "trades": trades_loss,
    "mart": mart_loss,
    "dynat": dynat_loss,
    "lbgat": lbgat_loss,
}
GUIDED = ("dynat", "lbgat")
pytestmark = pytest.mark.filterwarnings("ignore:dynat_loss multiplies")  # BETA is not 1


class Watched(nn.Module):
    """A network that records its inputs in train mode."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.seen = net, []

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen.append(x.detach())
        return self.net(x)


class CountsZeroGrad(torch.optim.SGD):
    zeroed = 0

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.zeroed += 1
        super().zero_grad(set_to_none)


def batch(dtype: torch.dtype = torch.float64, n: int = N) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.rand(n, 3, 8, 8, dtype=dtype, generator=generator), torch.randint(
        K, (n,), generator=generator
    )


def called(
    name: str, model: nn.Module, guide: Any, x: Tensor, y: Tensor, optimizer: Any = None, **kwargs: Any
) -> Tensor:
    networks = (model, guide) if name in GUIDED else (model,)
    optimizer = optimizer or torch.optim.SGD([p for net in networks for p in net.parameters()], lr=0.1)
    budget = {"step_size": STEP, "epsilon": EPS, "perturb_steps": STEPS, "beta": BETA}
    return LOSSES[name](*networks, x, y, optimizer, **{**budget, **kwargs})


def log_p(logits: Tensor) -> Tensor:
    return torch.log(torch.exp(logits) / torch.exp(logits).sum(1, keepdim=True))


def kl(p: Tensor, q: Tensor) -> Tensor:
    """Per image, of the logits' distributions."""
    return (torch.exp(log_p(p)) * (log_p(p) - log_p(q))).sum(1)


def picked(log_probs: Tensor, y: Tensor) -> Tensor:
    return torch.stack([log_probs[i, int(y[i])] for i in range(len(y))])


def released_attack(
    model: nn.Module, x: Tensor, start: Tensor, objective: Callable[[Tensor], Tensor], norm: str
) -> Tensor:
    """The inner loops of the releases, in eval mode: signed steps for l_inf, SGD on delta for l_2."""
    model.eval()
    x_adv = start
    for _ in range(STEPS):
        leaf = x_adv.detach().requires_grad_()
        gradient = torch.autograd.grad(objective(model(leaf)), leaf)[0]
        if norm == "l_inf":
            x_adv = leaf.detach() + STEP * torch.sign(gradient)
            x_adv = torch.clamp(torch.min(torch.max(x_adv, x - EPS), x + EPS), 0, 1)
            continue
        moved = []
        for i in range(len(x)):
            delta = leaf.detach()[i] - x[i] + 2 * EPS / STEPS * gradient[i] / gradient[i].pow(2).sum().sqrt()
            delta = (x[i] + delta).clamp(0, 1) - x[i]
            moved.append(x[i] + delta * min(1.0, EPS / (float(delta.pow(2).sum().sqrt()) + 1e-7)))
        x_adv = torch.stack(moved)
    model.train()
    return x_adv.clamp(0, 1)


def released(
    name: str, model: nn.Module, guide: nn.Module, x: Tensor, y: Tensor, noise: Tensor, norm: str
) -> Any:
    """Loss and attacked images; passes in the release's order, so that buffers move alike (guide's once)."""
    label, guide_logits = y, guide.train()(x) if name in GUIDED else x
    if name in ("trades", "lbgat"):
        with torch.no_grad():
            before = model.eval()(x)
        x_adv = released_attack(model, x, x + noise, lambda logits: kl(before, logits).sum(), norm)
    else:
        label = guide_logits.argmax(1) if name == "dynat" else y
        x_adv = released_attack(
            model, x, x + noise, lambda logits: -picked(log_p(logits), label).mean(), norm
        )
    if name == "trades":
        natural = -picked(log_p(model(x)), y).mean()
        attacked = model(x_adv)
        return natural + BETA * kl(model(x), attacked).mean(), x_adv
    if name == "mart":
        clean, attacked = model(x), model(x_adv)
        p_adv, loss = torch.exp(log_p(attacked)), -picked(log_p(attacked), y)
        for i in range(len(x)):
            other = max((p_adv[i, k] for k in range(K) if k != y[i]), key=lambda p: float(p.detach()))
            loss = loss - F.one_hot(torch.tensor(i), len(x)) * torch.log(1 - other)
        return (loss + BETA * kl(clean, attacked) * (1 - torch.exp(picked(log_p(clean), y)))).mean(), x_adv
    attacked, clean = model(x_adv), model(x)
    guide_loss = -picked(log_p(guide_logits), y).mean()
    if name == "dynat":
        return guide_loss - BETA * picked(log_p(attacked), label).mean(), x_adv
    return guide_loss + (attacked - guide_logits).pow(2).mean() + BETA * kl(clean, attacked).mean(), x_adv


CASES = [(name, "l_inf") for name in LOSSES] + [("trades", "l_2")]


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_equals_the_release_in_float64(name: str, norm: str) -> None:
    """Loss, attacked images, gradients, running statistics, modes and zero_grad."""
    (x, y), nets = batch(), (Watched(tiny_cnn(1, dtype=torch.float64)), tiny_cnn(2, dtype=torch.float64))
    theirs = copy.deepcopy(nets)
    optimizer = CountsZeroGrad([p for net in nets for p in net.parameters()], lr=0.1)
    for net in nets:
        for p in net.parameters():
            p.grad = torch.full_like(p, 1e3)  # what is left of an earlier step
    nets[0].eval()
    torch.manual_seed(7)
    loss = called(name, *nets, x, y, optimizer, distance=norm)
    loss.backward()
    torch.manual_seed(7)
    noise = start_point(x, "gaussian", norm="linf", eps=EPS) - x  # its distribution: test_ops_random_start
    expected, x_adv = released(name, *theirs, x, y, noise, norm)
    expected.backward()

    torch.testing.assert_close(loss, expected)
    seen = {"trades": [x, x_adv, x], "mart": [x, x_adv], "dynat": [x_adv, x], "lbgat": [x_adv, x]}[name]
    assert len(nets[0].seen) == len(seen)
    for ours, reference in zip(nets[0].seen, seen, strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-9)
    assert float((x_adv - x).abs().max()) > 5e-3
    assert optimizer.zeroed == 1
    assert all(module.training for module in nets[0].modules())
    for ours, reference in zip(nets, theirs, strict=True):
        for (key, p), q in zip(ours.named_parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, msg=key)
        for (key, b), c in zip(ours.named_buffers(), reference.buffers(), strict=True):
            torch.testing.assert_close(b, c, msg=key)


def test_mart_is_the_releases_up_to_the_numbers_in_its_logarithms() -> None:
    (x, y), net = batch(), Watched(tiny_cnn(1, dtype=torch.float64))
    loss = called("mart", net, None, x, y)
    copied = tiny_cnn(1, dtype=torch.float64).train()
    clean, attacked = copied(x), copied(net.seen[1])
    p, q = clean.softmax(1), attacked.softmax(1)
    two = q.argsort(1)[:, -2:]
    other = torch.where(two[:, 1] == y, two[:, 0], two[:, 1])
    boosted = F.cross_entropy(attacked, y) + F.nll_loss(torch.log(1.0001 - q + 1e-12), other)
    divergence = F.kl_div(torch.log(q + 1e-12), p, reduction="none").sum(1)
    expected = boosted + BETA * (divergence * (1.0000001 - p.gather(1, y[:, None])[:, 0])).mean()
    torch.testing.assert_close(loss, expected, rtol=3e-4, atol=0)


def test_trades_at_beta_zero_is_natural_training() -> None:
    (x, y), net = batch(), tiny_cnn(1, dtype=torch.float64)
    natural = copy.deepcopy(net)
    called("trades", net, None, x, y, beta=0.0).backward()
    F.cross_entropy(natural(x), y).backward()
    for p, q in zip(net.parameters(), natural.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_without_the_third_pass_only_the_statistics_change() -> None:
    (x, y), nets = batch(), [Watched(tiny_cnn(1, dtype=torch.float64)) for _ in range(2)]
    grads = []
    for net, third in zip(nets, (True, False), strict=True):
        torch.manual_seed(7)
        called("trades", net, None, x, y, bn_third_pass=third).backward()
        grads.append([p.grad for p in net.parameters()])
    torch.testing.assert_close(grads[0], grads[1])
    assert [len(net.seen) for net in nets] == [3, 2]
    assert not torch.allclose(nets[0].net[1].running_mean, nets[1].net[1].running_mean)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(192, K)).double()
    watched = Watched(plain)
    called("trades", watched, None, x, y, fold=False)
    assert len(watched.seen) == 2  # nothing to move


class Steep(nn.Module):
    """Logits that a change of 0.01 in an image moves by about 200: 0 or more than 150 apart."""

    def __init__(self, sign: int = 1) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(sign * 2e4))

    def forward(self, x: Tensor) -> Tensor:
        return F.pad((x.mean((1, 2, 3)) - 0.5)[:, None] * self.scale, (0, K - 1))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.filterwarnings("ignore:batch norm is not folded")
@pytest.mark.filterwarnings(
    "ignore:[0-9]+ of 16 gradients were zero"
)  # of MART, where the one logit that moves has p = e^-200
def test_finite_at_logit_gaps_beyond_150(name: str) -> None:
    """The releases' KL is NaN from a gap of 104 on."""
    x = torch.full((4, 3, 8, 8), 0.5) + torch.tensor([-0.02, -0.01, 0.01, 0.02])[:, None, None, None]
    model, guide = Watched(Steep()), Steep(-1)
    loss = called(name, model, guide, x, torch.tensor([0, 1, 0, 1]), rescale=True)
    gaps = torch.stack([model.net(images)[:, 0].detach().abs() for images in model.seen])
    assert float(gaps.max()) > 150
    loss.backward()
    assert bool(loss.isfinite())
    assert bool(model.net.scale.grad.isfinite())
    assert float(model.net.scale.grad.abs()) > 0


def test_mart_margin_term_is_exact_where_the_release_ends_at_nine() -> None:
    """Sure of the wrong class by 200, nine others alike; at epsilon 0 there is no KL."""
    x, model = torch.full((2, 3, 8, 8), 0.51), Steep()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = called("mart", model, None, x, torch.tensor([1, 1]), epsilon=0)
    torch.testing.assert_close(loss, torch.tensor(200.0 + 200.0 - math.log(9)), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.filterwarnings("ignore:[0-9]+ of [0-9]+ gradients were zero")  # at this rate units die
def test_in_a_scripts_loop_the_loss_falls(name: str) -> None:
    (x, y), model, guide = batch(torch.float32, 32), tiny_cnn(1), tiny_cnn(2)
    optimizer = torch.optim.SGD([*model.parameters(), *guide.parameters()], lr=0.1, momentum=0.9)
    losses = []
    for _ in range(40):
        loss = called(name, model, guide, x, y, optimizer, step_size=0.003, epsilon=0.01, beta=1.0)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


CHANGES = {
    "optimizer": lambda m: torch.optim.SGD(m.parameters(), lr=0.5).step(),
    ".data in place": lambda m: m[0].weight.data.mul_(-1),
    "data replaced": lambda m: setattr(m[0].weight, "data", -m[0].weight.data),
    "parameter replaced": lambda m: setattr(m[0], "weight", nn.Parameter(-m[0].weight.detach())),
    "a layer replaced": lambda m: m.__setitem__(2, nn.Softplus()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_the_model_are_followed(change: str) -> None:
    (x, y), model = batch(), tiny_cnn(1, dtype=torch.float64)
    called("trades", model, None, x, y).backward()
    CHANGES[change](model)
    fresh = copy.deepcopy(model)
    found = []
    for net in (model, fresh):
        torch.manual_seed(3)
        found.append(called("trades", net, None, x, y))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_the_model_may_be_forgotten() -> None:
    (x, y), model = batch(), tiny_cnn(1, dtype=torch.float64)
    called("trades", model, None, x, y).backward()
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


class Uncopyable(nn.Module):
    """Holds what copy.deepcopy refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.lock = tiny_cnn(1, dtype=torch.float64), threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize("norm", ["l_inf", "l_2"])
def test_what_cannot_be_copied_is_attacked_itself(norm: str) -> None:
    (x, y), model, plain = batch(), Uncopyable(), tiny_cnn(1, dtype=torch.float64)
    for net in (model.net, plain):
        net.train()
    torch.manual_seed(3)
    with pytest.warns(UserWarning, match="on the model itself, eagerly"):
        loss = called("trades", model, None, x, y, distance=norm)
    torch.manual_seed(3)
    torch.testing.assert_close(loss, called("trades", plain, None, x, y, distance=norm))
    for (key, b), c in zip(model.net.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(b, c, msg=key)
    called("trades", model, None, x, y)  # is said once
    gone = weakref.ref(model)
    del model, net
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, pytest.param(torch.compile, marks=[pytest.mark.slow, needs("cxx")])]
)
def test_wrapped_models_give_the_same(wrap: Callable[[nn.Module], nn.Module]) -> None:
    (x, y), model = batch(), tiny_cnn(1, dtype=torch.float64)
    plain = copy.deepcopy(model)
    found = []
    for net in (wrap(model), plain):
        torch.manual_seed(3)
        loss = called("trades", net, None, x, y)
        loss.backward()
        found.append((loss.detach(), [p.grad for p in net.parameters()], list(net.buffers())))
    torch.testing.assert_close(*found)


def test_distributed() -> None:
    """One process of a group: gradients are reduced; attack and third pass stay out of the reducer's way."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        (x, y), model = batch(), tiny_cnn(1, dtype=torch.float64)
        plain = copy.deepcopy(model)
        parameters = inspect.signature(DistributedDataParallel).parameters
        flag = (
            "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"
        )  # renamed in torch 2.14
        wrapped = DistributedDataParallel(model, **{flag: False})
        for _ in range(2):
            for net in (wrapped, plain):
                torch.manual_seed(3)
                called("trades", net, None, x, y).backward()
        torch.testing.assert_close(
            [p.grad for p in wrapped.parameters()], [p.grad for p in plain.parameters()]
        )
        torch.testing.assert_close(list(wrapped.buffers()), list(plain.buffers()))
    finally:
        torch.distributed.destroy_process_group()


class Shared(nn.Module):
    """Normalises its images, and uses one batch norm in two places: that one cannot be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6)
        self.last = nn.Linear(6, K)
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.45]).view(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first((x - self.mean) / 0.2)).tanh()
        return self.last(self.norm(self.second(x)).tanh().mean((2, 3)))


@pytest.mark.filterwarnings("ignore:batch norm is not folded")
def test_a_normalisation_inside_and_a_layer_in_two_places() -> None:
    (x, y), model = batch(), Shared().double()
    reference = copy.deepcopy(model)
    for _ in range(2):
        torch.manual_seed(7)
        noise = start_point(x, "gaussian", norm="linf", eps=EPS) - x
        expected, _ = released("trades", reference, reference, x, y, noise, "l_inf")
        torch.manual_seed(7)
        torch.testing.assert_close(called("trades", model, None, x, y), expected)
    torch.testing.assert_close(list(model.buffers()), list(reference.buffers()))


@pytest.mark.parametrize("name", LOSSES)
def test_under_autocast_the_attack_is_in_its_precision(name: str) -> None:
    (x, y), model, guide = batch(torch.float32, 32), tiny_cnn(1), tiny_cnn(2)
    exact = copy.deepcopy((model, guide))
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16):
        loss = called(name, model, guide, x, y)
    loss.backward()
    torch.manual_seed(3)
    expected = called(name, *exact, x, y)
    expected.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0)
    grads = [torch.cat([p.grad.flatten() for p in net.parameters()]) for net in (model, exact[0])]
    assert float(F.cosine_similarity(*grads, 0)) > 0.99
    with torch.autocast("cpu", torch.bfloat16):
        called(name, model, guide, x, y, amp=False)
    paths = [cache.path for cache, _ in _replicas[model].values()]
    assert [path.split(",")[0] for path in paths] == ["bfloat16 replica", "float32 replica"]


def bad_calls() -> list[Any]:
    x, y = batch(torch.float32)
    return [
        pytest.param(
            "trades", {"x": x.half()}, "got torch.float16 .*float32 and call under torch.autocast", id="half"
        ),
        pytest.param("mart", {"x": x.bfloat16()}, "got torch.bfloat16 .*autocast", id="bf16"),
        pytest.param(
            "dynat", {"x": (x * 255).byte()}, r"got torch.uint8 .*images.float\(\) / 255", id="bytes"
        ),
        pytest.param(
            "trades", {"x": x * 2 - 1}, r"in \[0, 1\].*normalisation the model's first layer", id="normalised"
        ),
        pytest.param("dynat", {"y": y + 5}, r"labels must be in \[0, 10\)", id="label 10"),
        pytest.param("mart", {"y": y[:2]}, "6 images but labels of shape", id="too few labels"),
        pytest.param(
            "mart",
            {"y": F.one_hot(y, K).float()},
            "mart_loss needs y to be one class per image",
            id="probabilities",
        ),
        pytest.param("mart", {"distance": "l_2"}, "mart_loss has no attack for distance 'l_2'", id="l_2"),
        pytest.param(
            "trades", {"distance": "linf"}, "unknown distance 'linf': did you mean 'l_inf'", id="linf"
        ),
        pytest.param("trades", {"epsilon": 8}, "write 8/255", id="epsilon 8"),
        pytest.param(
            "trades", {"x": x.double()}, "images are torch.float64 and the model torch.float32", id="dtypes"
        ),
        pytest.param("trades", {"amp": torch.int8}, "amp must be True, False", id="amp int8"),
    ]


@pytest.mark.parametrize(("name", "kwargs", "said"), bad_calls())
def test_bad_input_is_refused_before_anything_moves(name: str, kwargs: dict[str, Any], said: str) -> None:
    (x, y), model, guide = batch(torch.float32), tiny_cnn(1), tiny_cnn(2)
    state = copy.deepcopy([*model.buffers(), *guide.buffers()])
    optimizer = CountsZeroGrad(model.parameters(), lr=0.1)
    with pytest.raises(UserError, match=said):
        called(name, model, guide, **{"x": x, "y": y, **kwargs}, optimizer=optimizer)
    assert optimizer.zeroed == 0
    torch.testing.assert_close([*model.buffers(), *guide.buffers()], state, rtol=0, atol=0)


def test_labels_may_be_of_any_integer_type_and_trades_takes_probabilities() -> None:
    (x, y), found = batch(), []
    for labels in (y, y.int(), F.one_hot(y, K).double()):
        net = tiny_cnn(1, dtype=torch.float64)
        torch.manual_seed(3)
        found.append(called("trades", net, None, x, labels))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    torch.testing.assert_close(found[2], found[0])


@pytest.mark.parametrize("norm", ["l_inf", "l_2"])
def test_an_epsilon_of_zero_searches_nothing(norm: str) -> None:
    """Where a script warms epsilon up."""
    (x, y), net = batch(), Watched(tiny_cnn(1, dtype=torch.float64))
    called("trades", net, None, x, y, distance=norm, epsilon=0.0)
    assert torch.equal(net.seen[1], x)


def test_the_images_keep_their_layout() -> None:
    (x, y), net = batch(torch.float32), Watched(tiny_cnn(1))
    for images in (x, x.contiguous(memory_format=torch.channels_last)):
        called("trades", net, None, images, y, channels_last=True)
        assert net.seen[-2].stride() == images.stride()


SIGNATURES = {
    "trades": (0.003, 0.031, 10, 1.0, "l_inf"),
    "mart": (0.007, 0.031, 10, 6.0, "l_inf"),
    "dynat": (0.003, 0.031, 10, 1.0, "l_inf"),
    "lbgat": (0.003, 0.031, 10, 1.0, "l_inf"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_signatures_are_the_releases(name: str) -> None:
    parameters = inspect.signature(LOSSES[name]).parameters.values()
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    networks = {"dynat": ["model", "guide"], "lbgat": ["model", "model_teacher"]}.get(name, ["model"])
    rest = ["x_natural", "y", "optimizer", "step_size", "epsilon", "perturb_steps", "beta", "distance"]
    assert [p.name for p in positional] == networks + rest
    assert tuple(p.default for p in positional[-5:]) == SIGNATURES[name]


def test_dynat_loss_warns_once_where_beta_is_not_the_releases(recwarn: pytest.WarningsRecorder) -> None:
    """The release's script passes 6, which its loss ignores: a copied script gets another loss here."""
    losses._warn_of_beta.cache_clear()
    x, y = batch()
    called("dynat", tiny_cnn(dtype=torch.float64), tiny_cnn(1, dtype=torch.float64), x, y, beta=1.0)
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"beta 6; DYNAT's release ignores .* Leave beta out"):
        called("dynat", tiny_cnn(dtype=torch.float64), tiny_cnn(1, dtype=torch.float64), x, y, beta=6)
    called("dynat", tiny_cnn(dtype=torch.float64), tiny_cnn(1, dtype=torch.float64), x, y, beta=6)
    assert not [w for w in recwarn.list if "multiplies" in str(w.message)]
