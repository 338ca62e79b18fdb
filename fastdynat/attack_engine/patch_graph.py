"""The part of a traced network that can be computed on a patch of its maps, and the rest of it."""

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fastdynat.attack_engine.epilogue_fusion import ConvReLU2d
from fastdynat.attack_engine.fx_tracing import is_plain
from fastdynat.attack_engine.input_gradient import ImageConv2d, Rectified
from fastdynat.attack_engine.patch_geometry import Extent, Patch
from fastdynat.attack_engine.winograd_layers import WinogradConv2d, WinogradConvReLU2d

CONVOLUTIONS = (nn.Conv2d, ImageConv2d, WinogradConv2d, WinogradConvReLU2d, ConvReLU2d)
POOLINGS = (nn.MaxPool2d, nn.AvgPool2d)
BY_ELEMENT = (
    *(nn.BatchNorm2d, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Tanh),
    Rectified,
)
FUNCTIONS = (F.relu, torch.relu, F.relu6, F.leaky_relu, F.elu, F.silu, F.gelu, torch.sigmoid, torch.tanh)
BINARY = (
    operator.add,
    operator.sub,
    operator.mul,
    operator.truediv,
    operator.iadd,
    torch.add,
    torch.sub,
    torch.mul,
    torch.div,
)
# A patch of a larger share of its map costs as much as the whole map.
LARGEST = 0.6


@dataclass(frozen=True)
class Split:
    """A network cut in two, for a square of one size.

    Attributes:
        patches: of each node that is computed on patches, in order; the first is the image.
        frontier: those that the rest of the network reads.
        rest: maps of the frontier -> logits.
    """

    patches: dict[fx.Node, Patch]
    frontier: list[fx.Node]
    rest: fx.GraphModule


def split(traced: fx.GraphModule, shapes: dict[fx.Node, Any], side: int) -> Split | None:
    """`traced` cut where a square of `side` pixels has spread over most of the map; None if at once.

    shapes: of each node's result.
    """
    modules = dict(traced.named_modules(remove_duplicate=False))
    patches: dict[fx.Node, Patch] = {}
    for node in traced.graph.nodes:
        shape = shapes.get(node)
        if shape is None or len(shape) != 4:
            continue
        found: Patch | None
        if node.op == "placeholder":
            found = Patch(Extent.of_square(side, shape[2]), Extent.of_square(side, shape[3]), shape[1])
        else:
            found = _patch(node, patches, modules, shapes)
        if found is not None and found.share <= LARGEST:
            patches[node] = found
    if not any(node.op == "call_module" and _is_convolution(node, modules) for node in patches):
        return None
    frontier = [node for node in patches if any(user not in patches for user in node.users)]
    return Split(patches, frontier, _rest(traced, patches, frontier))


def sources(node: fx.Node, patches: dict[fx.Node, Patch]) -> list[fx.Node]:
    """The nodes on patches that `node` reads."""
    return [other for other in node.all_input_nodes if other in patches]


def window_of(module: nn.Module) -> tuple[tuple[int, int], ...]:
    """Kernel with its gaps, stride and padding of a convolution or pooling, (rows, columns) each."""
    kernel, stride, padding = (_pair(getattr(module, name)) for name in ("kernel_size", "stride", "padding"))
    gaps = _pair(getattr(module, "dilation", 1))
    return ((kernel[0] - 1) * gaps[0] + 1, (kernel[1] - 1) * gaps[1] + 1), stride, padding


def _pair(value: Any) -> tuple[int, int]:
    return tuple(value) if isinstance(value, tuple) else (value, value)


def _is_convolution(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    return node.op == "call_module" and type(modules[str(node.target)]) in CONVOLUTIONS


def _patch(
    node: fx.Node, patches: dict[fx.Node, Patch], modules: dict[str, nn.Module], shapes: dict[fx.Node, Any]
) -> Patch | None:
    """The patch of the result of `node`; None where it must be computed whole."""
    known = sources(node, patches)
    if not known or _overwrites_what_others_read(node, modules):
        return None
    if any(isinstance(arg, fx.Node) for arg in node.kwargs.values()):  # a number that is computed
        return None
    module = modules[str(node.target)] if node.op == "call_module" else None
    if module is None:
        method = node.op == "call_method" and node.target in ("relu", "sigmoid")
        if method or node.target in FUNCTIONS:
            return patches[known[0]] if len(node.args) == 1 else None  # F.relu(x, True) writes to x
        return _sum(node, patches, shapes) if node.target in BINARY else None
    if not is_plain(module) or (module.training and isinstance(module, nn.BatchNorm2d)) or node.kwargs:
        return None
    if type(module) in BY_ELEMENT:
        return patches[known[0]] if _has_statistics(module) else None
    if type(module) not in CONVOLUTIONS + POOLINGS or not _is_regular(module, node.args[0]):
        return None
    (down, across), stride, padding = window_of(module)
    source, (_, channels, height, width) = patches.get(node.args[0]), shapes[node]  # type: ignore[arg-type]
    if source is None:
        return None
    found = Patch(
        source.rows.through(down, stride[0], padding[0], height),
        source.columns.through(across, stride[1], padding[1], width),
        channels,
    )
    rest = node.args[1:]
    if node.args[0] in rest:  # read twice, as two different parts
        return None
    return found if all(r in patches and found.covers(patches[r]) for r in rest) else None  # type: ignore


def _has_statistics(module: nn.Module) -> bool:
    return not isinstance(module, nn.BatchNorm2d) or module.running_mean is not None


def _is_regular(module: nn.Module, source: Any) -> bool:
    """Padding is zeros, and rows and columns are counted in the usual way."""
    if isinstance(module, nn.Conv2d):
        return module.padding_mode == "zeros" and not isinstance(module.padding, str)
    if getattr(module, "ceil_mode", False) or getattr(module, "return_indices", False):
        return False
    if isinstance(module, nn.AvgPool2d):
        return _pair(module.padding) == (0, 0) and module.divisor_override is None
    if _pair(module.padding) == (0, 0):
        return True
    # Maps have borders of zeros, which change no maximum of numbers that are not negative.
    owner = source.graph.owning_module
    return source.op == "call_module" and type(owner.get_submodule(source.target)) in (
        nn.ReLU,
        ConvReLU2d,
        WinogradConvReLU2d,
        Rectified,
    )


def _sum(node: fx.Node, patches: dict[fx.Node, Patch], shapes: dict[fx.Node, Any]) -> Patch | None:
    """Of a sum, product, difference or quotient of two maps, or of a map and numbers per channel."""
    if len(node.args) != 2 or node.kwargs:
        return None
    maps = [arg for arg in node.args if isinstance(arg, fx.Node) and arg in patches]
    for other in node.args:
        if isinstance(other, fx.Node) and other not in patches:
            shape = shapes.get(other)
            if shape is None or other.op != "get_attr" or any(size != 1 for size in shape[-2:]):
                return None
            if len(shape) not in (0, 3, 4) or (len(shape) == 4 and shape[0] != 1):
                return None
    if any(shapes[one] != shapes[node] for one in maps):
        return None
    found = [patches[one] for one in maps]
    return next((one for one in found if all(one.covers(other) for other in found)), None)


def _overwrites_what_others_read(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    module = modules[str(node.target)] if node.op == "call_module" else None
    in_place = bool(getattr(module, "inplace", False)) or node.kwargs.get("inplace", False)
    in_place = in_place or node.target is operator.iadd or str(node.target).endswith("_")
    if not in_place:
        return False
    written = node.args[0] if node.args else None
    return not isinstance(written, fx.Node) or len(written.users) > 1 or written.op == "placeholder"


def _rest(traced: fx.GraphModule, patches: dict[fx.Node, Patch], frontier: list[fx.Node]) -> fx.GraphModule:
    graph, copies = fx.Graph(), {}
    for i, node in enumerate(frontier):
        copies[node] = graph.placeholder(f"map_{i}")
    for node in traced.graph.nodes:
        if node not in patches and node.op != "placeholder":
            copies[node] = graph.node_copy(node, lambda n: copies[n])
    return fx.GraphModule(traced, graph)
