"""The drop-in attacks: torchattacks' own images in every mode, and what torchattacks does not do."""

import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import needs
from hypothesis import given, settings
from hypothesis import strategies as st
from support.networks import tiny_cnn
from torch import Tensor, nn

import fastdynat
from fastdynat import PGD, PGDL2, TPGD
from fastdynat.compat.torchattacks_base import TorchAttack
from fastdynat.errors import UserError
from fastdynat.tuning.devices import pick_half

NAMES = ("PGD", "PGDL2", "FGSM", "FFGSM", "BIM", "TPGD")
MEAN, STD = (0.4, 0.5, 0.45), (0.2, 0.25, 0.3)
MODES = {
    "default": lambda a: None,
    "label": lambda a: a.set_mode_targeted_by_label(quiet=True),
    "function": lambda a: a.set_mode_targeted_by_function(lambda x, y: (y + 1) % 10, quiet=True),
    "least-likely": lambda a: a.set_mode_targeted_least_likely(2, quiet=True),
    "random": lambda a: a.set_mode_targeted_random(quiet=True),
}


def batch(dtype: torch.dtype = torch.float32, n: int = 6) -> tuple[Tensor, Tensor]:
    """Six is no power of two, so that torchattacks' mean and our sum round differently."""
    return torch.rand(n, 3, 8, 8, dtype=dtype), torch.randint(10, (n,))


def noise(like: Tensor, normal: bool = False) -> Tensor:
    """The same numbers for both libraries, in [0, 1) or normal."""
    draw, generator = torch.randn if normal else torch.rand, torch.Generator().manual_seed(5)
    return draw(like.shape, generator=generator, dtype=torch.float64).to(like.dtype)


@contextmanager
def same_starts() -> Iterator[None]:
    """Hands both libraries the same random starts."""

    def start_point(x: Tensor, start: str, *, norm: str, eps: float, generator: Any = None) -> Tensor:
        if start == "none":
            return x.clone()
        if start == "gaussian":
            return x + 0.001 * noise(x, normal=True)
        if norm == "linf":
            return (x + eps * (2 * noise(x) - 1)).clamp(0, 1)
        direction = noise(x, normal=True)
        return (x + eps * noise(x[:, :1, :1, :1]) * F.normalize(direction.flatten(1)).view_as(x)).clamp(0, 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["fastdynat.attack_engine.pgd"], "start_point", start_point)
        patch.setattr("fastdynat.compat.torchattacks.start_point", start_point)
        patch.setattr(torch, "randn_like", lambda x: noise(x, normal=True))
        patch.setattr(Tensor, "uniform_", lambda self, a, b: self.copy_(noise(self) * (b - a) + a))
        patch.setattr(Tensor, "normal_", lambda self: self.copy_(noise(self, normal=True)))
        yield


def both(name: str, model: nn.Module, **kwargs: Any) -> tuple[Any, Any]:
    import torchattacks

    return getattr(fastdynat, name)(model, **kwargs), getattr(torchattacks, name)(model, **kwargs)


@pytest.mark.peer
@needs("torchattacks")
@pytest.mark.parametrize("normalised", [False, True], ids=["plain", "normalised"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_the_images_are_torchattacks(name: str, mode: str, normalised: bool) -> None:
    model, (x, y) = tiny_cnn(dtype=torch.float64).eval(), batch(torch.float64)
    results = []
    for attack in both(name, model):
        if name == "TPGD" and mode != "default":
            with pytest.raises(ValueError, match=r"[Tt]argeted"):
                MODES[mode](attack)
            continue
        MODES[mode](attack)
        images = x
        if normalised:
            attack.set_normalization_used(list(MEAN), list(STD))
            images = (x - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
        torch.manual_seed(7)
        with same_starts():
            x_adv = attack(images, y)
        results.append((x_adv, images, attack.attack_mode, attack.targeted, repr(attack)))
    if results:
        (ours, images, *said), (theirs, _, *expected) = results
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-8)
        assert said == expected
        assert float((ours - images).abs().max()) > 5e-3


@pytest.mark.peer
@needs("torchattacks")
@pytest.mark.parametrize("name", NAMES)
def test_float32_agrees_with_torchattacks(name: str) -> None:
    """To rounding: a gradient that is rounding noise may change its sign, so a few pixels may differ."""
    model, (x, y) = tiny_cnn().eval(), batch(n=60)
    with same_starts():
        ours, theirs = (attack(x, y) for attack in both(name, model))
    assert ours.dtype == torch.float32
    assert float(((ours - theirs).abs() > 1e-4).double().mean()) < 0.01


@pytest.mark.peer
@needs("torchattacks")
@pytest.mark.parametrize("name", NAMES)
def test_constructors_are_torchattacks(name: str) -> None:
    import inspect

    import torchattacks

    ours, theirs = (inspect.signature(getattr(lib, name)).parameters for lib in (fastdynat, torchattacks))
    positional = [(p.name, p.default) for p in ours.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == [(p.name, p.default) for p in theirs.values()]
    assert all(p.kind is p.VAR_KEYWORD for p in list(ours.values())[len(positional) :])
    mine, peers = both(name, tiny_cnn())
    assert list(mine.supported_mode) == peers.supported_mode
    assert both("BIM", tiny_cnn(), steps=0)[0].steps == both("BIM", tiny_cnn(), steps=0)[1].steps


def test_an_unknown_keyword_is_refused_by_the_name_of_the_attack_or_loss() -> None:
    with pytest.raises(
        TypeError, match=r"^PGD\(\) got an unexpected keyword argument 'epsilon'.*amp, compile"
    ):
        PGD(tiny_cnn(), epsilon=0.1)  # type: ignore[call-arg]
    x, y = batch()
    with pytest.raises(TypeError, match=r"^trades_loss\(\) got an unexpected keyword argument 'eps'"):
        fastdynat.trades_loss(tiny_cnn(), x, y, None, zero_grad=False, eps=0.1)  # type: ignore[call-arg]


TRAINING = [
    (True, False, False),
    (True, True, False),
    (True, False, True),
    (True, True, True),
    (False, True, True),
]


@pytest.mark.peer
@needs("torchattacks")
@pytest.mark.filterwarnings("ignore:batchnorm_training and dropout_training have no effect")
@pytest.mark.parametrize("flags", TRAINING, ids=str)
def test_training_modes_are_torchattacks(flags: tuple[bool, bool, bool]) -> None:
    """The same images from the same dropout masks, and running statistics that move alike."""
    (x, y), statistics, images = batch(torch.float64), [], []
    for index in (0, 1):
        model = tiny_cnn(dropout=0.4, dtype=torch.float64).eval()
        attack = both("PGD", model, random_start=False)[index]
        attack.set_model_training_mode(*flags)
        torch.manual_seed(3)
        images.append(attack(x, y))
        assert index == 1 or not any(m.training for m in model.modules())
        statistics.append((model[1].running_mean, model[1].running_var, model[1].num_batches_tracked))
    torch.testing.assert_close(*images, rtol=0, atol=1e-8)
    torch.testing.assert_close(*statistics)
    assert bool(statistics[0][2] > 1) == (flags[0] and flags[1])


def test_batch_norm_alone_in_train_mode_is_said_to_do_nothing() -> None:
    with pytest.warns(UserWarning, match="have no effect without model_training=True"):
        PGD(tiny_cnn()).set_model_training_mode(batchnorm_training=True)


@pytest.mark.filterwarnings(
    "ignore:.* gradients were zero"
)  # of TPGD, whose start half precision may round away
@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    eps=st.floats(0, 1),
    n=st.integers(0, 3),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    amp=st.booleans(),
    seed=st.integers(0, 99),
)
def test_in_the_ball_and_in_range(
    name: str, eps: float, n: int, dtype: torch.dtype, amp: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    double = dtype == torch.float64
    model = tiny_cnn(seed, dtype=torch.float64 if double else torch.float32)
    x, y = torch.rand(n, 3, 8, 8, dtype=dtype), torch.randint(10, (n,))
    attack = getattr(fastdynat, name)(model, eps=eps, amp=amp and not double)
    x_adv = attack(x, y)
    assert (x_adv.shape, x_adv.dtype, x_adv.requires_grad) == (x.shape, dtype, False)
    if n:
        delta = (x_adv.double() - x.double()).flatten(1)
        length = delta.norm(dim=1) if name == "PGDL2" else delta.abs().amax(1)
        slack = {torch.float16: 1e-2, torch.bfloat16: 6e-2}.get(
            dtype, 1e-5
        )  # the result is rounded to the images' dtype
        assert float(length.max()) <= eps + slack
        assert float(x_adv.min()) >= 0
        assert float(x_adv.max()) <= 1


def test_random_starts_are_uniform_and_seeded() -> None:
    """Five thousand draws in mid-range: mean and spread of the uniform law, new ones at each call."""
    x, y = torch.full((32, 3, 8, 8), 0.5), torch.zeros(32, dtype=torch.int64)
    attack = PGD(tiny_cnn(), eps=0.1, steps=0)
    torch.manual_seed(1)
    first, second = attack(x, y) - x, attack(x, y) - x
    torch.manual_seed(1)
    assert torch.equal(attack(x, y) - x, first)
    assert not torch.equal(first, second)
    assert abs(float(first.mean())) < 5 * 0.1 / (3 * first.numel()) ** 0.5
    assert float(first.std()) == pytest.approx(0.1 / 3**0.5, rel=0.03)


def test_the_model_is_left_alone() -> None:
    model, (x, y) = tiny_cnn(dropout=0.5).train(), batch()
    model[1].eval()  # frozen by the user: torchattacks thaws it
    F.cross_entropy(model(x), y).backward()
    model[0].weight.requires_grad_(False)
    before = [(p.grad, p.grad.clone(), p.requires_grad) for p in model.parameters() if p.grad is not None]
    modes, state = (
        [m.training for m in model.modules()],
        {k: v.clone() for k, v in model.state_dict().items()},
    )
    for name in NAMES:
        getattr(fastdynat, name)(model)(x, y)
    after = [(p.grad, p.requires_grad) for p in model.parameters() if p.grad is not None]
    for (grad, value, needs_grad), (now, needs_now) in zip(before, after, strict=True):
        assert grad is now
        assert torch.equal(value, grad)
        assert needs_grad == needs_now
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_works_where_gradients_are_off(context: type) -> None:
    model, (x, y) = tiny_cnn(), batch()
    expected = PGD(model, random_start=False)(x, y)
    with context():
        x_adv = PGD(model, random_start=False)(x.clone(), y.clone())
    assert torch.equal(x_adv, expected)
    x_adv.requires_grad_()
    model(x_adv).sum().backward()  # not an inference tensor


def attacked_anew(attack: TorchAttack, x: Tensor, y: Tensor) -> Tensor:
    """The result of a fresh attack on the model as it is now."""
    return PGD(attack.model, random_start=False)(x, y)


CHANGES = {
    "optimizer": lambda m: (
        [p.grad for p in m.parameters()] and torch.optim.SGD(m.parameters(), lr=0.5).step()
    ),
    ".data in place": lambda m: m[0].weight.data.mul_(-1),
    "data replaced": lambda m: setattr(m[0].weight, "data", -m[0].weight.data),
    "parameter replaced": lambda m: setattr(m[0], "weight", nn.Parameter(-m[0].weight.detach())),
    "load_state_dict": lambda m: m.load_state_dict(tiny_cnn(5).state_dict()),
    "running statistics": lambda m: m.train()(5 * torch.rand(32, 3, 8, 8)),
    "a layer more": lambda m: m.append(nn.Linear(10, 10)),
    "a layer replaced": lambda m: m.__setitem__(2, nn.Softplus()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_replica_follows_the_model(change: str) -> None:
    model, (x, y) = tiny_cnn(), batch()
    attack = PGD(model, random_start=False)
    F.cross_entropy(model(x), y).backward()
    before = attack(x, y)
    CHANGES[change](model)
    assert torch.equal(attack(x, y), attacked_anew(attack, x, y))
    assert not torch.equal(attack(x, y), before)


def test_another_model_and_what_only_refresh_sees() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.scale = tiny_cnn(), 1.0

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x * self.scale)

    model, (x, y) = Scaled(), batch()
    attack = PGD(model, random_start=False)
    before = attack(x, y)
    model.scale = -1.0
    attack.refresh()
    assert not torch.equal(attack(x, y), before)
    attack.set_model(tiny_cnn(3))
    assert torch.equal(attack(x, y), attacked_anew(attack, x, y))
    assert attack.model_name == "Sequential"


@pytest.mark.parametrize("channels_last", [None, True], ids=["default", "channels-last inside"])
def test_layout_and_dtype_of_the_images_are_kept(channels_last: bool | None) -> None:
    model, (x, y) = tiny_cnn(), batch()
    attack = PGD(model, random_start=False, channels_last=channels_last)
    for images in (x, x.to(memory_format=torch.channels_last)):
        x_adv = attack(images, y)
        assert x_adv.stride() == images.stride()
    assert attack(x.expand(6, 3, 8, 8)[:, :, ::2, ::2], y).shape == (6, 3, 4, 4)


@pytest.mark.parametrize("amp", [True, torch.float16, torch.bfloat16], ids=str)
def test_half_precision_attacks_as_hard(amp: Any) -> None:
    model, (x, y) = tiny_cnn().eval(), batch(n=64)
    exact, fast = PGD(model, random_start=False), PGD(model, random_start=False, amp=amp)
    with torch.no_grad():
        clean, reached, half = (F.cross_entropy(model(images), y) for images in (x, exact(x, y), fast(x, y)))
    assert float(half - clean) == pytest.approx(float(reached - clean), rel=0.01)
    assert str(pick_half(amp, x.device).dtype or torch.float32).removeprefix("torch.") in fast.path
    assert "amp" in repr(fast)


def test_a_model_in_half_precision_is_attacked_in_it() -> None:
    model, (x, y) = tiny_cnn().eval(), batch(n=64)
    expected = PGD(model, random_start=False)(x, y)
    for dtype in (torch.float16, torch.bfloat16):
        half = tiny_cnn().eval().to(dtype)
        attack = PGD(half, random_start=False)
        x_adv = attack(x.to(dtype), y)
        assert x_adv.dtype == dtype
        assert float(((x_adv.float() - expected).abs() < 0.02).double().mean()) > 0.95
        attack.set_normalization_used([0.5] * 3, [0.2] * 3)
        assert attack((x.to(dtype) - 0.5) / 0.2, y).dtype == dtype


class Branching(nn.Module):
    """Chooses by value: no tracer can follow it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny_cnn()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x if x.mean() > 0.4 else 1 - x)


class Uncopyable(nn.Module):
    """Holds what copy.deepcopy refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.lock = tiny_cnn(), threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize(
    ("model", "kwargs", "said", "path"),
    [
        (Branching, {}, "not folded in the attack: the network cannot be traced", "batch norm eval"),
        (
            lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(192, 10)),
            {},
            "no batch norm in eval mode directly after",
            "batch norm eval",
        ),
        (Uncopyable, {}, "no replica of Uncopyable can be made", "on the model itself in eval mode"),
        (tiny_cnn, {"graphs": True}, "graphs=True needs a CUDA device", "1 batch norms folded"),
    ],
    ids=["control flow", "batch norm before all", "uncopyable", "graphs on the CPU"],
)
def test_what_cannot_be_done_is_said_once(model: Any, kwargs: dict[str, Any], said: str, path: str) -> None:
    net, (x, y) = model().eval(), batch()
    attack = PGD(net, random_start=False, **kwargs)
    assert attack.path == "not called yet"
    with pytest.warns(UserWarning, match=said) as warned:
        x_adv = attack(x, y)
    assert len(warned) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attack.refresh()
        assert torch.equal(attack(x, y), x_adv)
    assert path in attack.path
    with torch.no_grad():
        assert float(F.cross_entropy(net(x_adv), y)) > float(F.cross_entropy(net(x), y))


@pytest.mark.slow
@needs("cxx")
def test_compiled() -> None:
    model, (x, y) = tiny_cnn(dtype=torch.float64), batch(torch.float64)
    attack = PGDL2(model, random_start=False, compile=True)
    torch.testing.assert_close(attack(x, y), PGDL2(model, random_start=False)(x, y), rtol=0, atol=1e-8)
    assert attack.path.endswith("one compiled graph")


def bad_inputs() -> list[Any]:
    x, y = batch()
    return [
        pytest.param(
            lambda a: a((x * 255).to(torch.uint8), y), r"got torch.uint8 .*images.float\(\) / 255", id="bytes"
        ),
        pytest.param(
            lambda a: a(x * 255, y), r"images must be in \[0, 1\], got .* divide by 255", id="0 to 255"
        ),
        pytest.param(lambda a: a(x * 2 - 1, y), "set_normalization_used", id="-1 to 1"),
        pytest.param(lambda a: a(x * float("nan"), y), "images hold NaN", id="nan"),
        pytest.param(lambda a: a(x[0], y), r"\(N, C, H, W\).*got torch.float32 \(3, 8, 8\)", id="one image"),
        pytest.param(lambda a: a(x), r"needs labels: attack\(images, labels\)", id="no labels"),
        pytest.param(lambda a: a(x, y[:3]), "6 images but labels of shape", id="too few labels"),
        pytest.param(lambda a: a(x, y.float()), r"labels.long\(\)", id="float labels"),
        pytest.param(lambda a: a(x, y + 10), r"labels must be in \[0, 10\)", id="label 10"),
        pytest.param(
            lambda a: a(x.double(), y), "images are torch.float64 and the model torch.float32", id="dtypes"
        ),
        pytest.param(lambda a: a.set_normalization_used([0.5], [0.0]), "std above 0", id="std 0"),
        pytest.param(lambda a: a.set_mode_targeted_least_likely(0), "kth_min must be >= 1", id="kth_min 0"),
        pytest.param(
            lambda a: (a.set_mode_targeted_least_likely(10), a(x, y)),
            "kth_min must be below",
            id="kth_min 10",
        ),
        pytest.param(lambda a: (setattr(a, "eps", 8), a(x, y)), "write 8/255", id="eps 8"),
        pytest.param(lambda a: PGD(a.model, amp=torch.int8), "amp must be True, False", id="amp int8"),
        pytest.param(lambda a: PGD(a.model, compile="defualt"), "did you mean 'default'", id="compile mode"),
        pytest.param(lambda a: a.set_mode_targeted_by_function(None), "must be callable", id="no function"),
    ]


@pytest.mark.parametrize(("call", "said"), bad_inputs())
def test_bad_input_is_refused_with_the_remedy(call: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        call(PGD(tiny_cnn()))


def test_labels_may_be_of_any_integer_type_and_probabilities() -> None:
    model, (x, y) = tiny_cnn(), batch()
    attack = PGD(model, random_start=False)
    expected = attack(x, y)
    assert torch.equal(attack(x, y.int()), expected)
    assert torch.equal(attack(x, F.one_hot(y, 10).float()), expected)
    assert TPGD(model)(x).shape == x.shape


def test_importing_fastdynat_is_cheap_and_the_names_are_there() -> None:
    code = (
        "import sys, fastdynat; assert 'torch' not in sys.modules; "
        "from fastdynat import FGSM; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    losses = {"trades_loss", "mart_loss", "dynat_loss", "lbgat_loss"}
    api = {
        "AutoAttack",
        "Evaluation",
        "TrainedRun",
        "UserError",
        "evaluate",
        "keep_freed_memory",
        "load_network",
        "train",
        "units",
    }
    packages = {"attacks", "compat", "config", "data", "errors", "evaluation", "methods", "models", "ops"}
    packages |= {"recipes", "runs", "training", "units"}
    assert {*NAMES, *losses, *api, *packages, "__version__"} == set(fastdynat.__all__)
    with pytest.raises(AttributeError, match="no attribute 'PDG'"):
        fastdynat.PDG  # noqa: B018


@pytest.mark.gpu
@needs("gpu")
def test_on_a_gpu_bad_images_are_refused_without_waiting() -> None:
    attack, (x, y) = PGD(tiny_cnn().cuda(), eps=0.1), batch()
    for _ in range(6):
        assert attack(x, y).device.type == "cuda"
    attack(x * 255, y)
    torch.cuda.synchronize()
    with pytest.raises(UserError, match="of an earlier call"):
        attack(x, y)
