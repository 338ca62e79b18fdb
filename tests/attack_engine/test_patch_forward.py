"""Logits from changed patches of the maps: those of the whole network, wherever the squares lie."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import needs
from hypothesis import given, settings
from hypothesis import strategies as st
from support.odd_networks import NETWORKS
from torch import Tensor, nn

from fastdynat.attack_engine.ascent import Ascent
from fastdynat.attack_engine.input_gradient import Rectified
from fastdynat.attack_engine.patch_forward import PatchForward
from fastdynat.attack_engine.patch_geometry import Extent
from fastdynat.attack_engine.patch_maps import Squares
from fastdynat.attack_engine.winograd_layers import WinogradConvReLU2d
from fastdynat.attacks import square_judge
from fastdynat.attacks.square import Square
from fastdynat.attacks.square_proposals import Draws
from fastdynat.evaluation.measure import attacked
from fastdynat.models import build_model
from fastdynat.tuning import Convolution

IMAGES, PASS = 5, 12


class Mixed(nn.Module):
    """Strides, gaps, pooling with borders, a residual of another size, products and layers in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor([0.5, 2.0, 1.5]).view(1, 3, 1, 1))
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 5, stride=1, padding=2), nn.ReLU(inplace=True))
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.wide = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2)
        self.norm = nn.BatchNorm2d(8)
        self.down = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.short = nn.Conv2d(8, 12, 1, stride=2)
        self.mean = nn.AvgPool2d(2)
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.stem((x - 0.5) * self.scale))
        x = x + torch.relu(self.norm(self.wide(x)))
        out = self.down(x)
        out += self.short(x)
        return self.head(self.mean(torch.relu(out)).mean((2, 3)))


def shaken(network: nn.Module, seed: int = 0) -> nn.Module:
    """With statistics of batch norm as after training, in float64 and eval mode."""
    torch.manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network.double().eval().requires_grad_(False)


def pasted(x: Tensor, squares: Squares, fresh: Tensor) -> Tensor:
    whole, side = x[squares.images].clone(), fresh.shape[-1]
    corners = zip(squares.top.tolist(), squares.left.tolist(), strict=True)
    for image, (top, left), pixels in zip(whole, corners, fresh, strict=True):
        image[:, top : top + side, left : left + side] = pixels
    return whole


def somewhere(images: int, room: int, generator: torch.Generator) -> Squares:
    """Squares anywhere, the first four in the corners."""
    rows, top, left = (torch.randint(0, n, (PASS,), generator=generator) for n in (images, room, room))
    top[:4], left[:4] = torch.tensor([0, 0, room - 1, room - 1]), torch.tensor([0, room - 1, 0, room - 1])
    return Squares(rows, top, left)


def networks() -> dict[str, Any]:
    built = {
        name: lambda name=name: build_model(name, num_classes=10, image_shape=(3, 32, 32))
        for name in ("small", "small-silu", "wrn-10-1", "torchvision:resnet18")
    }
    return {"mixed": Mixed, **built}


@pytest.mark.parametrize("name", networks())
@torch.no_grad()
def test_patches_give_the_logits_of_the_whole_network(name: str) -> None:
    """In float64, after images were replaced and others left out."""
    network = shaken(networks()[name]())
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(IMAGES, 3, 32, 32, generator=generator, dtype=torch.float64)
    patches = PatchForward.of(network, images)
    assert patches is not None
    for side in (6, 3):
        known = images
        patches.begin(known, side, PASS)
        assert patches.side == side, "nothing was computed on patches"
        for kept in (torch.arange(IMAGES), torch.tensor([0, 2, 3])):
            known = known[kept]
            patches.keep(kept)
            squares = somewhere(len(known), 32 - side + 1, generator)
            fresh = torch.rand(PASS, 3, side, side, generator=generator, dtype=torch.float64)
            changed = pasted(known, squares, fresh)
            found, want = patches.logits(fresh, squares), network(changed)
            torch.testing.assert_close(found, want, rtol=0, atol=1e-10)
            assert (want - network(known[squares.images])).abs().amax(1).min() > 1e-6
            one_each = torch.tensor(
                [int((squares.images == i).nonzero()[0]) for i in squares.images.unique()]
            )
            patches.accept(one_each)
            known[squares.images[one_each]] = changed[one_each]


@given(
    total=st.integers(4, 40),
    side=st.integers(1, 8),
    kernel=st.integers(1, 5),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
)
@settings(max_examples=60, deadline=None)
def test_an_extent_holds_every_output_that_reads_a_changed_input(
    total: int, side: int, kernel: int, stride: int, padding: int
) -> None:
    side, padding = min(side, total), min(padding, kernel // 2)
    outputs = (total + 2 * padding - kernel) // stride + 1
    if outputs < 1:
        return
    before = Extent.of_square(side, total)
    after = before.through(kernel, stride, padding, outputs)
    for a in range(total - side + 1):
        touched = [
            o for o in range(outputs) if o * stride - padding < a + side and o * stride - padding + kernel > a
        ]
        first = int(after.first[a])
        assert set(touched) <= set(range(first, first + after.count))
        assert 0 <= first <= outputs - after.count


# Whose traces are unusual: in place, shared or foreign layers, control flow, no trace at all.
ODD = (
    "a view of a map",
    "in place",
    "squeeze and excite",
    "a convolution in two places",
    "a convolution's result used twice",
    "reflected padding",
    "batch statistics",
    "a hook that calls a sibling",
    "scripted",
    "weight norm",
    "by batch size",
    "counts its calls",
)


@pytest.mark.parametrize("name", ODD)
def test_square_is_the_same_search_with_patches_and_without(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a trace does something else than the network: the comparison with it finds out."""
    torch.manual_seed(0)
    x = torch.rand(4, 3, 16, 16)
    model = NETWORKS[name]().eval()
    ascent = attacked(model, x)
    with torch.no_grad():
        labels = ascent.logits(x).argmax(1)
    spec = Square(eps=0.05, queries=100)
    draws = Draws.draw(x, "linf", 100, 0.8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(2)
    found = spec.run(ascent, x, labels, draws).x_adv
    monkeypatch.setattr(square_judge.PatchForward, "of", lambda *_: None)
    torch.manual_seed(2)
    plain = spec.run(ascent, x, labels, draws).x_adv
    same = (found == plain).flatten(1).all(1)
    assert int(same.sum()) >= 3, "at most one image may part at a tie"


def test_a_pooling_after_a_first_layer_that_takes_its_relu_is_computed_on_patches() -> None:
    """Of a replica: its padding of zeros changes no maximum of what has passed a ReLU."""
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1)),
        *(nn.Conv2d(24, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)),
    ).eval()
    replica = attacked(network, torch.rand(2, 3, 32, 32)).network
    assert isinstance(replica, nn.Module)
    assert any(type(module) is Rectified for module in replica.modules())
    x = torch.rand(3, 3, 32, 32)
    patches = PatchForward.of(replica, x)
    assert patches is not None
    patches.begin(x, 3, 8)
    names = [str(node.target) for node in patches._found.patches]
    assert len(names) >= 4, names  # the image, the first layer, its ReLU, the pooling
    squares = Squares(torch.tensor([0, 1, 2]), torch.tensor([4, 9, 17]), torch.tensor([0, 25, 12]))
    fresh = torch.rand(3, 3, 3, 3)
    with torch.no_grad():
        torch.testing.assert_close(
            patches.logits(fresh, squares), network(pasted(x, squares, fresh)), rtol=1e-4, atol=1e-5
        )


class Block(nn.Module):
    """A residual block that Winograd's algorithm suits, and a pooling with borders."""

    def __init__(self) -> None:
        super().__init__()
        for name, channels in (("stem", 3), ("one", 64), ("two", 64)):
            layer = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
            self.add_module(name, nn.Sequential(layer, nn.BatchNorm2d(64)))
        self.relus = nn.ModuleList(nn.ReLU() for _ in range(3))
        self.pool, self.head = nn.MaxPool2d(3, 2, padding=1), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relus[0](self.stem(x))
        x = self.relus[2](self.two(self.relus[1](self.one(x))) + x)
        return self.head(self.pool(x).mean((2, 3)))


@needs("ext")
def test_residual_and_relu_of_winograd_convolutions_are_computed_on_patches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in (("repays", True), ("gain", 1.0)):
        monkeypatch.setattr(Convolution, name, lambda *_, value=value: value)
    network = shaken(Block()).float()
    replica = attacked(network, torch.rand(2, 3, 32, 32)).network
    assert isinstance(replica, nn.Module)
    kinds = [type(module) for module in replica.modules()]
    assert kinds.count(WinogradConvReLU2d) == 2
    assert nn.ReLU not in kinds
    x = torch.rand(3, 3, 32, 32)
    patches = PatchForward.of(replica, x)
    assert patches is not None
    patches.begin(x, 3, 8)
    names = [str(node.target) for node in patches._found.patches]
    assert len(names) >= 6, names  # the image, three convolutions, the first one's ReLU, the pooling
    squares = Squares(torch.tensor([0, 1, 2]), torch.tensor([4, 9, 17]), torch.tensor([0, 25, 12]))
    fresh = torch.rand(3, 3, 3, 3)
    with torch.no_grad():
        whole = network(pasted(x, squares, fresh))
        torch.testing.assert_close(patches.logits(fresh, squares), whole, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(replica(x), network(x), rtol=1e-4, atol=1e-4)


def test_a_network_that_is_not_its_trace_is_computed_whole() -> None:
    class Lies(nn.Module):
        """Its trace leaves out what it does to real tensors."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x * 3 if type(x) is Tensor else x)
            return self.head(y.mean((2, 3)))

    torch.manual_seed(0)
    network, x = Lies().eval().requires_grad_(False), torch.rand(3, 3, 16, 16)
    labels = network(x).argmax(1)
    draws = Draws.draw(x, "linf", 120, 0.8, generator=torch.Generator().manual_seed(0))
    spec = Square(eps=0.05, queries=120)
    function = spec.run(Ascent(lambda images: network(images)), x, labels, draws)
    assert torch.equal(spec.run(Ascent(network), x, labels, draws).x_adv, function.x_adv)


class Scaled(nn.Module):
    """A forward with a number of its own, a layer called by keyword, and statistics of three channels."""

    def __init__(self, channels: int, form: str) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 3)
        self.relu, self.form = nn.ReLU(inplace=True), form
        self.register_buffer("mean", torch.full((1, 3 if form == "grey" else channels, 1, 1), 0.5))

    def forward(self, x: Tensor, slope: float = 0.1) -> Tensor:
        y = self.conv(x - self.mean)
        if self.form == "keyword":
            y = self.relu(input=y)
        elif self.form == "number":
            y = F.leaky_relu(y, slope)
        return self.head(y.mean((2, 3))) / (slope if self.form != "keyword" else 1.0)


@pytest.mark.parametrize(("channels", "form"), [(3, "number"), (3, "keyword"), (1, "grey"), (3, "default")])
def test_graphs_that_have_no_patches_are_searched_whole(channels: int, form: str) -> None:
    torch.manual_seed(0)
    network, x = Scaled(channels, form).eval().requires_grad_(False), torch.rand(3, channels, 16, 16)
    labels = network(x).argmax(1)
    draws = Draws.draw(x, "linf", 120, 0.8, generator=torch.Generator().manual_seed(0))
    spec = Square(eps=0.05, queries=120)
    function = spec.run(Ascent(lambda images: network(images)), x, labels, draws)
    assert torch.equal(spec.run(Ascent(network), x, labels, draws).x_adv, function.x_adv)
