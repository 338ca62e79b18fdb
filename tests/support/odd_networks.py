"""Networks as people build them, all (N, 3, 16, 16) in [0, 1] to 10 classes, and parameter-free changes."""

import dataclasses
import functools
import os
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.quantization import DeQuantStub, QuantStub
from torch.nn.modules.module import register_module_full_backward_hook
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint


def head(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 10))


def conv(c: int = 3, k: int = 8, **kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(c, k, 3, padding=1, **kwargs)


def body() -> nn.Sequential:
    return nn.Sequential(conv(), nn.BatchNorm2d(8), nn.ReLU(), head(8))


class Net(nn.Module):
    """`body` and what a test makes of it: ``forward`` is a function of the module and the images."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.net = body()
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def odd(forward: Callable[[Any, Tensor], Tensor], **attributes: Any) -> nn.Module:
    """A `Net` of a new class."""
    return type("Odd", (Net,), {"forward": forward, "__module__": __name__})(**attributes)


@dataclasses.dataclass
class Config:
    factor: float = 1.0
    steps: list[float] = dataclasses.field(default_factory=lambda: [1.0, 2.0])


class Sine(torch.autograd.Function):
    """A custom function whose gradient is not its derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.sin(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * torch.sigmoid(ctx.saved_tensors[0])


class Residual(nn.Module):
    """64 channels, so that convolutions are Winograd's, and everything in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = conv(3, 64), nn.BatchNorm2d(64)
        self.first, self.second = conv(64, 64), conv(64, 64, bias=False)
        self.head = head(64)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(self.norm(self.stem(x)))
        y = F.hardswish(self.first(x), inplace=True)
        y = self.second(F.dropout(y, 0.5, self.training, inplace=True))
        y += x
        return self.head(y.relu_())


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = conv(), nn.BatchNorm2d(8)
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 2, 1), nn.SiLU(inplace=True), nn.Conv2d(2, 8, 1)
        )
        self.head = head(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.stem(x))
        return self.head(y.mul_(self.gate(y.clone()).sigmoid()))


class Frozen(Net):
    """Batch norm always in train mode, without running statistics; noise follows the mode."""

    noise = 0.0

    def train(self, mode: bool = True) -> "Frozen":
        super().train(mode)
        self.noise = 0.5 if mode else 0.0
        self.net[1].eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + self.noise)


class Scaled(Net):
    factor = 1.0  # of the class

    def forward(self, x: Tensor) -> Tensor:
        return self.net((self.factor * x).sin())


FACTOR = 1.0  # read by a forward
SETTINGS = types.SimpleNamespace(factor=1.0)


def global_number(self: Any, x: Tensor) -> Tensor:
    return self.net((x * FACTOR).sin())


def global_object(self: Any, x: Tensor) -> Tensor:
    return self.net((x * SETTINGS.factor).sin())


def closed_over() -> nn.Module:
    factor = [1.0]

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.net((x * factor[0]).sin())

    net = odd(forward)
    net.factor = factor  # the test changes it through this one
    return net


def from_environment(self: Any, x: Tensor) -> Tensor:
    return self.net((x * float(os.environ.get("FASTDYNAT_TEST_FACTOR", "1"))).sin())


def wrapped_forward() -> nn.Module:
    net = body()
    forward = net.forward
    net.forward = lambda x: forward(x.sin()) * 2  # type: ignore[method-assign]
    return net


def wrapped_leaf() -> nn.Module:
    net = body()
    forward = net[0].forward
    net[0].forward = lambda x: forward(x).sin()
    return net


def sibling_hook() -> nn.Module:
    net = Net()
    net.other = nn.Sequential(conv(), nn.BatchNorm2d(8))
    other = net.other
    kept: list[Tensor] = []
    net.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    net.net[0].register_forward_hook(lambda module, args, out: out + other(kept.pop()))
    return net


def method_of_another() -> nn.Module:
    net = Net()
    net.forward = types.MethodType(lambda self, x: self.net(x.sin()), net)  # type: ignore[method-assign]
    return net


def shared_norm() -> nn.Module:
    norm = nn.BatchNorm2d(8)
    return nn.Sequential(conv(), norm, nn.ReLU(), conv(8, 8), norm, nn.ReLU(), head(8))


def shared_conv() -> nn.Module:
    layer = conv(8, 8)
    return nn.Sequential(conv(), layer, nn.BatchNorm2d(8), nn.ReLU(), layer, nn.BatchNorm2d(8), head(8))


def used_elsewhere(self: Any, x: Tensor) -> Tensor:
    y = self.first(x)
    return self.head(F.relu(self.norm(y)) + y)


def weight_read(self: Any, x: Tensor) -> Tensor:
    y = self.norm(self.first(x)).relu()
    return self.head(y) * self.first.weight.square().mean() * 50


def functional_norm(self: Any, x: Tensor) -> Tensor:
    y = self.first(x)
    return self.head(
        F.batch_norm(y, self.norm.running_mean, self.norm.running_var, self.norm.weight, self.norm.bias)
    )


def parts(**kwargs: Any) -> dict[str, Any]:
    return {"first": conv(), "norm": nn.BatchNorm2d(8), "head": head(8)} | kwargs


class Doubled(nn.BatchNorm2d):
    """A batch norm that does more."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).abs()


def without_gradient(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        weight = self.net[1](self.net[0](x)).sigmoid().mean((1, 2, 3), keepdim=True)
    return self.net(x * weight)


def in_half(self: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y = self.net[0](x)
    return self.net[1:](y.float())


def by_tensor_type(self: Any, x: Tensor) -> Tensor:
    return self.net(x.sin() if isinstance(x, Tensor) else x)


def by_gradient_mode(self: Any, x: Tensor) -> Tensor:
    return self.net(x.sin() if torch.is_grad_enabled() else x.sin() * 1.0)


def by_batch_size(self: Any, x: Tensor) -> Tensor:
    return self.net(x.sin() if x.shape[0] > 2 else x.cos())


def by_length(self: Any, x: Tensor) -> Tensor:
    return torch.cat([self.net(image[None]) for image in x])


def by_warm_up(self: Any, x: Tensor) -> Tensor:
    return self.net(x.sin() if self.steps > 3 else x.cos())


def counting(self: Any, x: Tensor) -> Tensor:
    self.calls += 1
    return self.net(x)


def remembered(self: Any, x: Tensor) -> Tensor:
    self.seen = x.detach().mean()  # a buffer that is assigned anew
    return self.net(x)


def noisy(self: Any, x: Tensor) -> Tensor:
    return self.net(x + 1e-3 * torch.randn_like(x))


def fixed_batch(self: Any, x: Tensor) -> Tensor:
    return self.net(x.view(4, 3, 16, 16))


def not_contiguous() -> nn.Module:
    net = odd(lambda self, x: self.net(x.transpose(2, 3)[..., ::2]).t().flip(0).t())
    return net


def hidden_modules() -> nn.Module:
    extra = [conv(3, 3), nn.BatchNorm2d(3).eval()]
    return odd(lambda self, x: self.net(self.extra[1](self.extra[0](x))), extra=extra)


def numbers_in_numpy(self: Any, x: Tensor) -> Tensor:
    return self.net((x * float(self.array[0])).sin())


def tensor_as_number(self: Any, x: Tensor) -> Tensor:
    return self.net((x * float(self.plain)).sin())


def pruned() -> nn.Module:
    net = body()
    prune.random_unstructured(net[0], "weight", 0.3)
    return net


def old_weight_norm() -> nn.Module:
    net = body()
    net[0] = torch.nn.utils.weight_norm(net[0])
    return net


def old_spectral_norm() -> nn.Module:
    net = body()
    net[0] = torch.nn.utils.spectral_norm(net[0])
    return net


def new_norms() -> nn.Module:
    net = body()
    parametrizations.weight_norm(net[0])
    parametrizations.spectral_norm(net[3][2])
    return net


def lazy() -> nn.Module:
    return nn.Sequential(
        nn.LazyConv2d(8, 3, padding=1), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10)
    )


def scaled_gradient() -> nn.Module:
    net = body()
    net[1].register_full_backward_hook(
        lambda module, grads, outs: tuple(g * torch.linspace(-1, 1, 8).view(8, 1, 1) for g in grads)
    )
    return net


def in_a_dict() -> nn.Module:
    return odd(
        lambda self, x: self.ends["out"](sum(branch(x) for branch in self.branches.values()).relu()),
        branches=nn.ModuleDict({k: nn.Sequential(conv(), nn.BatchNorm2d(8)) for k in "ab"}),
        ends=nn.ModuleDict({"out": head(8)}),
    )


def einsum_head() -> nn.Module:
    weight = nn.Parameter(torch.randn(10, 8) / 3)
    return odd(lambda self, x: torch.einsum("nchw,kc->nk", self.net[:3](x), self.weight) / 50, weight=weight)


def viewed(self: Any, x: Tensor) -> Tensor:
    """LeNet's and TRADES' idiom, which takes contiguous activations."""
    y = self.second(F.relu(self.norm(self.first(x))))
    return self.head(F.max_pool2d(y.relu_(), 2).view(x.size(0), -1))


def viewed_parts() -> dict[str, Any]:
    return {
        "first": conv(3, 64),
        "norm": nn.BatchNorm2d(64),
        "second": conv(64, 64),
        "head": nn.Linear(64 * 8 * 8, 10),
    }


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "a view of a map": lambda: odd(viewed, **viewed_parts()),
    "a view of the images": lambda: odd(
        lambda self, x: self.flat(x.view(len(x), -1)), flat=nn.Linear(768, 10)
    ),
    "in place": Residual,
    "squeeze and excite": SqueezeExcite,
    "conv, norm, norm": lambda: nn.Sequential(
        conv(), nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.ReLU(), head(8)
    ),
    "a norm after two convolutions": shared_norm,
    "a convolution in two places": shared_conv,
    "a convolution's result used twice": lambda: odd(used_elsewhere, **parts()),
    "a convolution's weight read": lambda: odd(weight_read, **parts()),
    "functional norm": lambda: odd(functional_norm, **parts()),
    "a norm that does more": lambda: odd(used_elsewhere, **parts(norm=Doubled(8))),
    "reflected padding": lambda: nn.Sequential(
        conv(padding_mode="reflect"), nn.BatchNorm2d(8), nn.ReLU(), head(8)
    ),
    "batch statistics": lambda: nn.Sequential(
        conv(), nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU(), head(8)
    ),
    "no affine, another eps": lambda: nn.Sequential(
        conv(), nn.BatchNorm2d(8, affine=False, eps=0.1, momentum=None), nn.ReLU(), head(8)
    ),
    "transposed": lambda: nn.Sequential(nn.ConvTranspose2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), head(8)),
    "linear and norm": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(768, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10)
    ),
    "norm of positions": lambda: nn.Sequential(
        nn.Flatten(2), nn.Linear(256, 3), nn.BatchNorm1d(3), nn.Flatten(), nn.ReLU(), nn.Linear(9, 10)
    ),
    "frozen norm": Frozen,
    "forward over the original": wrapped_forward,
    "a layer's forward over the original": wrapped_leaf,
    "a hook that calls a sibling": sibling_hook,
    "a bound forward": method_of_another,
    "a gradient hook on a norm": scaled_gradient,
    "einsum": einsum_head,
    "module dict": in_a_dict,
    "nested": lambda: nn.Sequential(
        nn.Sequential(nn.Sequential(conv(), nn.BatchNorm2d(8))), nn.ReLU(), nn.Sequential(head(8))
    ),
    "hidden modules": hidden_modules,
    "not contiguous": not_contiguous,
    "quantisation stubs": lambda: nn.Sequential(QuantStub(), *body(), DeQuantStub()),
    "scripted": lambda: torch.jit.script(body()),
    "a scripted part": lambda: nn.Sequential(
        torch.jit.script(nn.Sequential(conv(), nn.BatchNorm2d(8))), nn.ReLU(), head(8)
    ),
    "weight norm": new_norms,
    "old weight norm": old_weight_norm,
    "old spectral norm": old_spectral_norm,
    "pruned": pruned,
    "lazy": lazy,
    "no_grad inside": lambda: odd(without_gradient),
    "autocast inside": lambda: odd(in_half),
    "custom function": lambda: odd(lambda self, x: self.net(Sine.apply(x))),
    "checkpointed": lambda: odd(lambda self, x: checkpoint(self.net, x, use_reentrant=False)),
    "by type": lambda: odd(by_tensor_type),
    "by gradient mode": lambda: odd(by_gradient_mode),
    "by batch size": lambda: odd(by_batch_size),
    "image by image": lambda: odd(by_length),
    "one batch size": lambda: odd(fixed_batch),
    "noise from the global stream": lambda: odd(noisy),
    "counts its calls": lambda: odd(counting, calls=0),
    "keeps what it saw": lambda: odd(remembered, seen=torch.zeros(())),
    "data parallel": lambda: nn.DataParallel(body()),
}


def patch_function(net: Any) -> None:
    """Another function with fewer arguments in a name that the network's trace calls; a test puts it back."""
    F.hardtanh = lambda y, low, high: y.abs()  # type: ignore[assignment]


def swap_function(net: Any) -> None:
    net.act = torch.sin


def forget_statistics(net: Any) -> None:
    net[1].running_mean = net[1].running_var = None


def set_global(net: Any) -> None:
    globals()["FACTOR"] = 3.0


def set_class(net: Any) -> None:
    type(net).factor = 3.0


def new_forward(net: Any) -> None:
    type(net).forward = lambda self, x: self.net((3 * x).sin())


def turn_norm(module: nn.Module, grads: Any, outs: Any) -> Any:
    """A hook that turns gradients at batch norms."""
    turned = (g * torch.linspace(-1, 1, 8).view(8, 1, 1) for g in grads)
    return tuple(turned) if isinstance(module, nn.BatchNorm2d) else None


def attribute(name: str, value: Any) -> Callable[[Any], None]:
    return lambda net: setattr(net, name, value)


def scale_by(name: str) -> Callable[[Any, Tensor], Tensor]:
    return lambda self, x: self.net((x * getattr(self, name)).sin())


# A network, and a change of it after its first call.
CHANGES: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], Any]]] = {
    "a number": (
        lambda: odd(lambda self, x: self.net((x * self.factor).sin()), factor=1.0),
        attribute("factor", 3.0),
    ),
    "a temperature": (
        lambda: odd(lambda self, x: self.net(x) / self.t + x.mean((1, 2, 3))[:, None], t=1.0),
        attribute("t", -1.0),
    ),
    "a plain tensor replaced": (
        lambda: odd(lambda self, x: self.net((x * self.plain).sin()), plain=torch.ones(())),
        attribute("plain", torch.tensor(3.0)),
    ),
    "a plain tensor in place": (
        lambda: odd(lambda self, x: self.net((x * self.plain).sin()), plain=torch.ones(())),
        lambda net: net.plain.fill_(3.0),
    ),
    "a plain tensor's data": (
        lambda: odd(tensor_as_number, plain=torch.ones(())),
        lambda net: net.plain.data.fill_(3.0),
    ),
    "a plain tensor read as a number": (
        lambda: odd(tensor_as_number, plain=torch.ones(())),
        lambda net: net.plain.fill_(3.0),
    ),
    "an array in place": (lambda: odd(numbers_in_numpy, array=np.ones(1)), lambda net: net.array.fill(3.0)),
    "in a list": (
        lambda: odd(lambda self, x: self.net((x * self.some[0]).sin()), some=[1.0]),
        lambda net: net.some.insert(0, 3.0),
    ),
    "in a dict of lists": (
        lambda: odd(lambda self, x: self.net((x * self.some["a"][0]).sin()), some={"a": [1.0]}),
        lambda net: net.some["a"].insert(0, 3.0),
    ),
    "in an object": (
        lambda: odd(lambda self, x: self.net((x * self.config.factor).sin()), config=Config()),
        lambda net: setattr(net.config, "factor", 3.0),
    ),
    "a function": (lambda: odd(lambda self, x: self.net(self.act(3 * x)), act=torch.cos), swap_function),
    "a partial": (
        lambda: odd(lambda self, x: self.net(self.act(x)), act=functools.partial(torch.clamp, max=0.9)),
        attribute("act", functools.partial(torch.clamp, max=0.2)),
    ),
    "a forward replaced": (
        Net,
        lambda net: setattr(net, "forward", types.MethodType(lambda self, x: self.net(x.cos()), net)),
    ),
    "a class's forward": (lambda: odd(lambda self, x: self.net(x)), new_forward),
    "a class's attribute": (lambda: type("Own", (Scaled,), {"__module__": __name__})(), set_class),
    "eps of a norm": (body, lambda net: setattr(net[1], "eps", 10.0)),
    "a hook later": (body, lambda net: net[0].register_forward_hook(lambda module, args, out: -out)),
    "a hook removed": (
        lambda: odd(lambda self, x: self.net(x), handle=None),
        lambda net: net.net[0].register_forward_pre_hook(lambda module, args: (3 * args[0]).sin()),
    ),
    "a gradient hook later": (
        body,
        lambda net: net[0].register_full_backward_pre_hook(
            lambda module, outs: (outs[0] * torch.linspace(-1, 1, 8).view(8, 1, 1),)
        ),
    ),
    "batch statistics from now on": (body, forget_statistics),
    "a buffer assigned": (
        lambda: odd(lambda self, x: self.net((x * self.net[1].running_mean.norm()).sin())),
        lambda net: setattr(net.net[1], "running_mean", 3 * torch.ones(8)),
    ),
    "an activation replaced": (body, lambda net: net.__setitem__(2, nn.Tanh())),
    "a parametrisation later": (body, lambda net: parametrizations.spectral_norm(net[0])),
    "pruned later": (body, lambda net: prune.random_unstructured(net[0], "weight", 0.5)),
    "pruned weights in place": (pruned, lambda net: net[0].weight_orig.data.neg_()),
    "old weight norm in place": (old_weight_norm, lambda net: net[0].weight_v.data.neg_()),
    "a parametrisation in place": (
        new_norms,
        lambda net: net[0].parametrizations.weight.original1.data.neg_(),
    ),
    "a hidden module's weights": (hidden_modules, lambda net: net.extra[0].weight.data.neg_()),
    "scripted weights": (lambda: torch.jit.script(body()), lambda net: next(net.parameters()).data.neg_()),
    "a warm-up": (lambda: odd(by_warm_up, steps=0), attribute("steps", 10)),
    "a global number": (lambda: odd(global_number), set_global),
    "a global object": (lambda: odd(global_object), lambda net: setattr(SETTINGS, "factor", 3.0)),
    "closed over": (closed_over, lambda net: net.factor.insert(0, 3.0)),
    "the environment, which cannot be seen": (
        lambda: odd(from_environment),
        lambda net: os.environ.__setitem__("FASTDYNAT_TEST_FACTOR", "3"),
    ),
    "a function of torch patched": (
        lambda: odd(lambda self, x: self.net[3](F.hardtanh(self.net[1](self.net[0](x)), 0.0, 6.0))),
        patch_function,
    ),
    "a global gradient hook": (
        lambda: nn.Sequential(conv(), nn.BatchNorm2d(8), nn.Sigmoid(), head(8)),
        lambda net: register_module_full_backward_hook(turn_norm),
    ),
    "padding": (
        lambda: nn.Sequential(conv(), head(8)),
        lambda net: setattr(net[0], "padding_mode", "circular"),
    ),
    "stride": (lambda: nn.Sequential(conv(), head(8)), lambda net: setattr(net[0], "stride", (2, 2))),
}
