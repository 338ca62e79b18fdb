"""The engine computes the reference attack, folded, compiled and captured, or reports its fallback."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import needs
from support.fallbacks import CollectedIn, NoFallbacks
from support.graph_sim import SimulatedRecorder
from support.networks import tiny_cnn
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastdynat.attack_engine.attack_switches import AttackSwitches
from fastdynat.attack_engine.batch_norm_folding import NotFoldable, fold_batch_norm
from fastdynat.attack_engine.engine import AttackEngine, Attacker
from fastdynat.attack_engine.goal import AttackGoal
from fastdynat.attack_engine.pgd import pgd
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.attack_engine.replica import AttackReplica
from fastdynat.errors import UserError
from fastdynat.execution.compiling import MODES
from fastdynat.execution.graphed_call import WARM_UP_CALLS
from fastdynat.models import build_model
from fastdynat.ops.image_draws import ImageDraws

SPEC = PGDSpec(0.1, 0.03, 3, start="none")
# Name, batch norms that directly follow a convolution, image size.
FAMILIES = {
    "small": (4, 16),
    "resnet18": (20, 16),
    "preact_resnet18": (8, 16),
    "preact_resnet18-raw": (8, 16),
    "wrn-10-1": (3, 16),
    "torchvision:mobilenet_v3_small": (34, 32),
    "torchvision:densenet121": (59, 32),
}


def images(n: int = 6, size: int = 8, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.rand(n, 3, size, size, dtype=dtype), torch.randint(10, (n,))


@torch.no_grad()
def shake(model: nn.Module) -> None:
    """Random weights and running statistics, as in the middle of a training."""
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                parameter.add_(0.1 * torch.randn_like(parameter) * parameter.std(correction=0))
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            assert module.running_var is not None
            module.running_mean.copy_(0.3 * torch.randn_like(module.running_mean))
            module.running_var.copy_(torch.rand_like(module.running_var) + 0.5)


def logits_and_gradient(network: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    logits = network(leaf)
    return logits.detach(), torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), leaf)[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_folding_changes_nothing(name: str) -> None:
    """In float64, before and after the weights and statistics have moved on."""
    num_folded, size = FAMILIES[name]
    model = build_model(name, num_classes=10, image_shape=(3, size, size)).double().eval()
    x, y = images(2, size, torch.float64)
    shake(model)
    replica = AttackReplica(model, x)
    assert (replica.num_folded, replica.note) == (num_folded, "")
    for moved in (False, True):
        if moved:
            shake(model)
            replica.refresh()
        got, want = logits_and_gradient(replica.network, x, y), logits_and_gradient(model, x, y)
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-10 * max(1.0, float(other.abs().max())))


def test_weights_are_shared_where_they_can_be_and_followed_where_not() -> None:
    model, (x, _) = tiny_cnn(), images()
    memory = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    plain = AttackReplica(model, x, fold=False)
    assert {t.data_ptr() for t in plain.network.parameters()} <= memory
    low = AttackReplica(model, x, dtype=torch.bfloat16)
    weights = [m.weight for m in low.network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert all(w.dtype == torch.bfloat16 for w in weights)  # type: ignore[union-attr]
    assert all(w.data_ptr() not in memory for w in weights)  # type: ignore[operator, union-attr]
    for replica in (plain, low):
        assert not any(p.requires_grad for p in replica.network.parameters())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for weight in weights:
        weight.data.zero_()  # type: ignore[union-attr]
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    shake(model)
    low.refresh()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(low.network(x).float(), model.eval()(x).float(), rtol=0.05, atol=0.05)


def conv(*args: Any, **kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(3, 3, 3, *args, padding=1, **kwargs)


class Net(nn.Module):
    """`forward` of some modules."""

    def __init__(self, forward: Callable[..., Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self._forward = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda module, args, output: output * 2)
    return module


class FrozenNorm(nn.Module):
    """Normalises with buffers alone, as torchvision's FrozenBatchNorm2d does."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.rand(3, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.scale + 1e-5).rsqrt()


def shared_conv(self: Any, x: Tensor) -> Tensor:
    return self.bn(self.conv(x)) + self.conv(2 * x)


def read_twice(self: Any, x: Tensor) -> Tensor:
    out = self.conv(x)
    return self.bn(out) + out


def noisy(self: Any, x: Tensor) -> Tensor:
    return self.bn(self.conv(x)) + 1e-4 * torch.randn(3, 1, 1)


def branching(self: Any, x: Tensor) -> Tensor:
    return self.bn(self.conv(x)) if x.mean() > 0 else x


def stopped(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        mask = self.bn(self.conv(x))
    return x * mask


def sequence(self: Any, x: Tensor) -> Tensor:
    return self.bn(self.linear(x.flatten(2)))


UNFOLDABLE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "conv called twice": (lambda: Net(shared_conv, conv=conv(), bn=nn.BatchNorm2d(3)), "no batch norm"),
    "conv read twice": (lambda: Net(read_twice, conv=conv(), bn=nn.BatchNorm2d(3)), "no batch norm"),
    "hook on the conv": (lambda: nn.Sequential(hooked(conv()), nn.BatchNorm2d(3)), "no batch norm"),
    "hook on the batch norm": (lambda: nn.Sequential(conv(), hooked(nn.BatchNorm2d(3))), "no batch norm"),
    "hook on a block": (
        lambda: nn.Sequential(hooked(nn.Sequential(conv(), nn.BatchNorm2d(3)))),
        "a hook is on Sequential",
    ),
    "no running statistics": (
        lambda: nn.Sequential(conv(), nn.BatchNorm2d(3, track_running_stats=False)),
        "no batch norm",
    ),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)),
        "no batch norm",
    ),
    "spectral norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(conv()), nn.BatchNorm2d(3)),
        "no batch norm",
    ),
    "weight norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(conv()), nn.BatchNorm2d(3)),
        "no batch norm",
    ),
    # Channels equal outputs and batch norm is fresh, so that a wrong fold would show in no number yet.
    "linear on sequences": (
        lambda: Net(sequence, linear=nn.Linear(64, 3), bn=nn.BatchNorm1d(3)),
        "no batch norm",
    ),
    "a stopped gradient": (lambda: Net(stopped, conv=conv(), bn=nn.BatchNorm2d(3)), "input gradients differ"),
    "no batch norm at all": (lambda: nn.Sequential(conv()), "no batch norm"),
    "control flow by value": (lambda: Net(branching, conv=conv(), bn=nn.BatchNorm2d(3)), "cannot be traced"),
    "noise of its own": (lambda: Net(noisy, conv=conv(), bn=nn.BatchNorm2d(3)), "tracing would freeze"),
}


@pytest.mark.parametrize("name", UNFOLDABLE)
def test_what_cannot_be_folded_is_left_as_it_is_and_said(name: str) -> None:
    make, said = UNFOLDABLE[name]
    torch.manual_seed(0)
    model, (x, _) = make().eval(), images()
    replica = AttackReplica(model, x)
    assert said in replica.note
    assert replica.num_folded == 0
    shake(model)
    replica.refresh()
    with torch.no_grad():
        torch.testing.assert_close(replica.network(x), model(x), rtol=0, atol=1e-2 if "noise" in name else 0)


def test_batch_norm_in_train_mode_is_not_folded() -> None:
    with pytest.raises(NotFoldable, match="no batch norm in eval mode"):
        fold_batch_norm(tiny_cnn().train(), images()[0])
    assert "mode train" in AttackReplica(tiny_cnn(), images()[0], bn="train").note


def test_a_folded_network_follows_its_buffers_too() -> None:
    model, (x, _) = nn.Sequential(conv(), nn.BatchNorm2d(3), FrozenNorm()).eval(), images()
    replica = AttackReplica(model, x)
    assert replica.num_folded == 1
    model[2].scale.mul_(4)
    replica.refresh()
    with torch.no_grad():
        torch.testing.assert_close(replica.network(x), model(x))


def test_hooks_of_other_layers_go_on_working() -> None:
    model, (x, _) = nn.Sequential(conv(), nn.BatchNorm2d(3), hooked(nn.ReLU())).eval(), images()
    replica = AttackReplica(model, x)
    assert replica.num_folded == 1
    with torch.no_grad():
        torch.testing.assert_close(replica.network(x), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "switches", [AttackSwitches(), AttackSwitches(dtype=torch.bfloat16)], ids=["fp32", "bf16"]
)
def test_an_attack_leaves_the_model_and_the_random_stream_alone(switches: AttackSwitches) -> None:
    model, (x, y) = tiny_cnn(dropout=0.5).train(), images()
    model[1].eval()
    F.cross_entropy(model(x), y).backward()
    model[0].weight.requires_grad_(False)
    grads = [p.grad for p in model.parameters()]
    values = [g.clone() for g in grads if g is not None]
    needs_grad, modes = [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]
    state, stream = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    engine = AttackEngine(model, x[:2], switches=switches)
    engine.refresh()
    engine.run(x, AttackGoal("ce", y), SPEC)
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    assert all(torch.equal(g, v) for g, v in zip(grads, values, strict=True) if g is not None)
    assert [p.requires_grad for p in model.parameters()] == needs_grad
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), stream)


@pytest.mark.parametrize("bn", ["eval", "train", "frozen"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_it_is_the_reference_attack_in_every_batch_norm_mode(bn: str, norm: str) -> None:
    """In float64; batch norm's running statistics move alike too."""
    models, (x, y) = [tiny_cnn(dtype=torch.float64).train() for _ in range(2)], images(dtype=torch.float64)
    spec = PGDSpec(
        0.1 if norm == "linf" else 1.0, 0.03 if norm == "linf" else 0.3, 4, norm=norm, start="none"
    )
    engine = AttackEngine(models[0], x[:2], bn=bn)
    got, want = engine.run(x, AttackGoal("ce", y), spec), pgd(models[1], x, AttackGoal("ce", y), spec, bn=bn)
    torch.testing.assert_close(got.x_adv, want.x_adv, rtol=0, atol=1e-9)
    assert (int(got.zero_grads), got.gradients) == (int(want.zero_grads), want.gradients)
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict())


def test_a_given_start_is_begun_from() -> None:
    model, (x, y) = tiny_cnn(dtype=torch.float64), images(dtype=torch.float64)
    engine, goal, start = AttackEngine(model, x[:2]), AttackGoal("ce", y), (x + 0.05).clamp(0, 1)
    expected = pgd(model, x, goal, SPEC, x_start=start).x_adv
    torch.testing.assert_close(engine.run(x, goal, SPEC, x_start=start).x_adv, expected, rtol=0, atol=1e-9)
    assert not torch.equal(engine.run(x, goal, SPEC).x_adv, expected)
    with pytest.raises(UserError, match="restarts must be 1, got 2"):
        engine.run(x, goal, PGDSpec(0.1, 0.03, 3, restarts=2), x_start=start)


class Backwards(TorchDispatchMode):
    """The gradients that each convolution's and linear layer's backward pass computes."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: Counter[tuple[bool, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution_backward.default:
            self.masks[tuple(args[-1])] += 1
        return func(*args, **kwargs or {})


def two_convs() -> nn.Module:
    """The second convolution's input needs a gradient: a careless attack would compute its weight's too."""
    layers = [
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.Flatten(),
        nn.Linear(64, 10),
    ]
    return nn.Sequential(*layers)


@pytest.mark.parametrize(
    "switches", [AttackSwitches(), AttackSwitches(fold=False, dtype=torch.bfloat16)], ids=str
)
def test_no_weight_gradient_is_computed(switches: AttackSwitches) -> None:
    model, (x, y) = two_convs(), images()
    engine = AttackEngine(model, x[:2], switches=switches)
    with Backwards() as seen:
        engine.run(x, AttackGoal("ce", y), SPEC)
    assert seen.masks == {(True, False, False): 2 * SPEC.steps}


@pytest.mark.slow
@needs("cxx")
def test_a_compiled_step_computes_no_weight_gradient_and_is_the_eager_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Read from the graph that Inductor makes code from."""
    masks: Counter[tuple[bool, ...]] = Counter()

    def watch(graph: torch.fx.Graph) -> None:
        found = [node for node in graph.nodes if node.target is torch.ops.aten.convolution_backward.default]
        masks.update(tuple(node.args[-1]) for node in found)

    monkeypatch.setitem(MODES, "default", {"post_grad_custom_post_pass": watch})
    model, (x, y) = two_convs(), images()
    engine = AttackEngine(model, x[:2], switches=AttackSwitches(compile="default"), fallbacks=NoFallbacks())
    got = engine.run(x, AttackGoal("ce", y), SPEC)
    assert masks == {(True, False, False): 2}
    want = AttackEngine(model, x[:2]).run(x, AttackGoal("ce", y), SPEC)
    assert float(((got.x_adv - want.x_adv).abs() > 1e-4).double().mean()) < 0.01
    with torch.no_grad():
        model[0].weight.neg_()
    engine.refresh()
    moved = AttackEngine(model, x[:2]).run(x, AttackGoal("ce", y), SPEC).x_adv
    assert (
        float(((engine.run(x, AttackGoal("ce", y), SPEC).x_adv - moved).abs() > 1e-4).double().mean()) < 0.01
    )
    assert engine.path == "float32 replica, 1 batch norms folded, one compiled graph"


@needs("cxx")
class Rounded(torch.autograd.Function):
    """A quantised input with a straight-through gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x * 255).round() / 255

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class RoundedFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = tiny_cnn().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(Rounded.apply(x))


@pytest.mark.slow
@pytest.mark.parametrize("closed_form", [True, False])
def test_a_compiled_step_has_the_gradient_of_a_function_that_reads_the_image_itself(
    closed_form: bool,
) -> None:
    model, x, goal = RoundedFirst(), torch.rand(4, 3, 8, 8), AttackGoal("ce", torch.arange(4))
    switches = AttackSwitches(compile="default", closed_form=closed_form, fold=False)
    engine = AttackEngine(model, x, switches=switches)
    got = engine.run(x, goal, PGDSpec(8 / 255, 2 / 255, 2, start="none")).x_adv
    want = pgd(model, x, goal, PGDSpec(8 / 255, 2 / 255, 2, start="none")).x_adv
    assert float(((got - want).abs() < 1e-6).float().mean()) > 0.99


def test_control_flow_by_value_is_attacked_uncompiled_and_unfolded_and_said() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.net(x if x.mean() > 0.4 else 1 - x)

    said: list[str] = []
    model, (x, y) = Net(forward, net=tiny_cnn(dtype=torch.float64)).eval(), images(dtype=torch.float64)
    engine = AttackEngine(
        model, x[:2], switches=AttackSwitches(compile="default"), fallbacks=CollectedIn(said)
    )
    for _ in range(2):
        got = engine.run(x, AttackGoal("ce", y), SPEC).x_adv
        torch.testing.assert_close(got, pgd(model, x, AttackGoal("ce", y), SPEC).x_adv, rtol=0, atol=1e-9)
    assert ["not folded" in text for text in said] == [True, False]
    assert "the attack runs without torch.compile" in said[1]
    assert all(text in engine.path for text in said)


def test_a_compiler_that_fails_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        def call(*args: Any) -> Any:
            raise torch._dynamo.exc.BackendCompilerFailed(broken, RuntimeError("no compiler"), None)

        return call

    monkeypatch.setattr(torch, "compile", broken)
    said: list[str] = []
    model, (x, y) = tiny_cnn(), images()
    engine = AttackEngine(
        model, x[:2], switches=AttackSwitches(compile="default"), fallbacks=CollectedIn(said)
    )
    want = AttackEngine(model, x[:2]).run(x, AttackGoal("ce", y), SPEC).x_adv
    for _ in range(2):
        assert torch.equal(engine.run(x, AttackGoal("ce", y), SPEC).x_adv, want)
    assert len(said) == 1
    assert "the attack runs without torch.compile" in said[0]


def graphed(
    model: nn.Module, x: Tensor, **switches: Any
) -> tuple[AttackEngine, SimulatedRecorder, list[str]]:
    recorder, said = SimulatedRecorder(), []  # type: tuple[SimulatedRecorder, list[str]]
    engine = AttackEngine(
        model, x[:2], switches=AttackSwitches(**switches), recorder=recorder, fallbacks=CollectedIn(said)
    )
    return engine, recorder, said


@pytest.mark.parametrize("start", [False, True], ids=["own start", "given start"])
def test_a_captured_attack_is_the_attack(start: bool) -> None:
    """Three eager calls per shape, then replays on new images, labels and weights; results are kept."""
    model = tiny_cnn()
    plain, (engine, recorder, said) = (
        AttackEngine(model, torch.rand(2, 3, 8, 8)),
        graphed(model, torch.rand(2, 3, 8, 8)),
    )
    kept: list[tuple[Tensor, Tensor]] = []
    for _ in range(WARM_UP_CALLS + 3):
        shake(model)
        for size in (6, 4):  # the tail of an epoch has a graph of its own
            (x, y), goal_engines = images(size), (plain, engine)
            results = []
            for one in goal_engines:
                one.refresh()
                x_start = (x + 0.05).clamp(0, 1) if start else None
                results.append(one.run(x, AttackGoal("ce", y), SPEC, x_start=x_start).x_adv)
            assert torch.equal(*results)
            kept.append((results[1], results[1].clone()))
    assert (recorder.warmed, recorder.captured, recorder.replayed) == (2 * WARM_UP_CALLS, 2, 6)
    assert said == []
    assert all(torch.equal(result, copy) for result, copy in kept)  # no replay wrote to an earlier result


def test_every_replay_draws_its_own_noise() -> None:
    (x, y), spec = images(), PGDSpec(0.1, 0.03, 1)
    engine, recorder, _ = graphed(tiny_cnn(), x)
    torch.manual_seed(3)
    drawn = [engine.run(x, AttackGoal("ce", y), spec).x_adv for _ in range(WARM_UP_CALLS + 2)]
    assert recorder.replayed == 2
    assert len({tuple(d.flatten().tolist()) for d in drawn}) == len(drawn)
    plain = AttackEngine(tiny_cnn(), x[:2])
    torch.manual_seed(3)
    for captured in drawn:
        assert torch.equal(plain.run(x, AttackGoal("ce", y), spec).x_adv, captured)


@pytest.mark.parametrize("norm", ["linf", "l1"])
def test_draws_of_images_are_inputs_of_the_graph(norm: str) -> None:
    """A replay draws what the plain attack draws for its step and its images; later draws are not touched."""
    (x, y), spec = images(), PGDSpec(0.1, 0.03, 1, norm=norm, restarts=2)
    (engine, recorder, _), plain = graphed(tiny_cnn(), x), AttackEngine(tiny_cnn(), x[:2])
    state, drawn = torch.tensor([7, 0]), []
    for step in range(WARM_UP_CALLS + 2):
        state[1] = step << 32  # as training does: one memory, filled anew for each step
        numbers = torch.arange(len(x)) + 10 * step
        sources = [ImageDraws(state, numbers) for _ in range(2)]
        found = [
            one.run(x, AttackGoal("ce", y), spec, generator=source).x_adv
            for one, source in zip((engine, plain), sources, strict=True)
        ]
        assert torch.equal(*found)
        assert torch.equal(*(source.uniform(3) for source in sources))
        drawn.append(tuple(found[0].flatten().tolist()))
    assert recorder.replayed == 2
    assert len(set(drawn)) == len(drawn)


def test_an_attacker_attacks_some_of_a_batch_as_in_the_whole() -> None:
    (x, y), spec = images(), PGDSpec(0.1, 0.03, 2)
    x = x.double()
    engine = AttackEngine(tiny_cnn(dtype=torch.float64), x[:2])
    rows = torch.tensor([4, 1])

    def attacker() -> Attacker:
        return Attacker(engine, spec, ImageDraws.of(3, range(len(x)), "cpu"))

    whole = attacker()(x, AttackGoal("ce", y)).x_adv
    for chosen in (rows, torch.arange(len(x)) < 2, slice(3)):
        part = attacker().take(chosen)(x[chosen], AttackGoal("ce", y[chosen])).x_adv
        torch.testing.assert_close(part, whole[chosen], rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="take"):
        attacker()(x[rows], AttackGoal("ce", y[rows]))
    Attacker(engine, spec).take(rows)(x[rows], AttackGoal("ce", y[rows]))  # draws for any batch


def test_a_capture_that_fails_is_said_once_and_the_attack_goes_on() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.net(x if x.mean() > 0.4 else 1 - x)

    model, (x, y) = Net(forward, net=tiny_cnn()).eval(), images()
    engine, recorder, said = graphed(model, x, fold=False)
    want = pgd(model, x, AttackGoal("ce", y), SPEC).x_adv
    for _ in range(WARM_UP_CALLS + 3):
        assert torch.equal(engine.run(x, AttackGoal("ce", y), SPEC).x_adv, want)
    assert recorder.replayed == 0
    assert len(said) == 1
    assert "CUDA graphs are off" in said[0]
    assert said[0] in engine.path


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 1 / 512), (torch.float16, 1 / 4096)])
def test_the_first_layer_sees_the_iterate_rounded_and_the_iterate_itself_is_exact(
    dtype: torch.dtype, rounding: float
) -> None:
    """Steps of a quarter of bfloat16's spacing: an iterate kept in that type would not move at all."""
    seen: list[Tensor] = []

    class Brighter(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.detach().clone())
            return torch.stack([-x.mean((1, 2, 3)), x.mean((1, 2, 3))], 1)

    x, labels = torch.full((2, 3, 4, 4), 0.7), torch.zeros(2, dtype=torch.int64)
    engine = AttackEngine(Brighter(), x, switches=AttackSwitches(dtype=dtype, fold=False))
    seen.clear()
    step_size, steps = 1 / 1024, 8
    x_adv = engine.run(x, AttackGoal("ce", labels), PGDSpec(0.1, step_size, steps, start="none")).x_adv
    assert x_adv.dtype == torch.float32
    torch.testing.assert_close(x_adv, x + steps * step_size, rtol=0, atol=1e-6)
    assert [read.dtype for read in seen] == [dtype] * steps
    for k, read in enumerate(seen):
        assert (read.float() - (0.7 + k * step_size)).abs().max() <= rounding + 1e-6


def test_relus_after_a_layer_overwrite_its_result_and_others_do_not() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1, self.relu1 = nn.Conv2d(5, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()
            self.conv2, self.bn2, self.relu2 = nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()
            self.relu3, self.linear = nn.ReLU(), nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            a = self.bn1(self.conv1(x))
            b = self.bn2(self.conv2(self.relu1(a)))
            return self.linear(self.relu3(self.relu2(b) + b).mean((2, 3)))  # b is read twice

    model = Net().eval()
    engine = AttackEngine(model, torch.rand(2, 5, 8, 8))
    assert engine.replica.num_folded == 2
    inplace = {
        name: m.inplace for name, m in engine.replica.network.named_modules() if isinstance(m, nn.ReLU)
    }
    assert inplace == {"relu1": True, "relu2": False, "relu3": False}
    x, weights = torch.rand(16, 5, 8, 8), torch.randn(16, 10)
    leaf = x.clone().requires_grad_()
    expected = torch.autograd.grad(model(leaf), leaf, weights)[0]
    torch.testing.assert_close(
        engine.ascent.value_and_grad(x, lambda logits: (weights, logits))[1], expected, rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("bn", ["eval", "train", "frozen"])
def test_making_a_replica_moves_no_running_statistics(bn: str) -> None:
    model = tiny_cnn().train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert AttackReplica(model, torch.rand(2, 3, 8, 8), bn=bn, channels_last=True).channels_last
    assert before
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
