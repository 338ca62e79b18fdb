"""Epilogue fusion in the folded graph: a convolution with the residual sum and ReLU that follow it."""

import copy
import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fastdynat.attack_engine.fx_tracing import call_counts, is_plain
from fastdynat.ops.conv_relu import conv_relu, result_shape

ADD_FUNCTIONS, ADD_METHODS = (operator.add, operator.iadd, torch.add), ("add", "add_")
IN_PLACE = (operator.iadd, "add_")
RELU_FUNCTIONS, RELU_METHODS = (F.relu, torch.relu, torch.relu_), ("relu", "relu_")


class ConvReLU2d(nn.Conv2d):
    """A convolution followed by an optional residual sum and a ReLU.

    Attributes:
        fused: computed by one kernel of the device (`fastdynat.ops.conv_relu`), instead of one after another.
    """

    fused: bool = False

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """relu(convolution + residual), with the dtypes that autocast gives the separate operations."""
        weight = self.weight
        if self.fused and x.dtype != weight.dtype and torch.is_autocast_enabled(x.device.type):
            x = x.to(weight.dtype)
        if not self.fused or not self._fits(x, residual):
            return self.apart(x, residual)
        geometry: dict[str, Any] = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        return conv_relu(x, weight, self.bias, residual, groups=self.groups, **geometry)

    def apart(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The same, one operation after the other."""
        out = super().forward(x)
        return (out if residual is None else out + residual).relu_()

    def _fits(self, x: Tensor, residual: Tensor | None) -> bool:
        """True if the sum is neither broadcast nor in another dtype."""
        if x.dim() != 4 or x.dtype != self.weight.dtype:
            return False
        geometry: Any = (self.stride, self.padding, self.dilation, self.groups)
        shape = result_shape(x, self.weight, geometry)
        return residual is None or (residual.shape == shape and residual.dtype == self.weight.dtype)


def fuse_epilogues(
    traced: fx.GraphModule,
    owned: set[int],
    shapes: Mapping[fx.Node, torch.Size | None],
    *,
    layers: type[nn.Conv2d] = nn.Conv2d,
    into: type[nn.Conv2d] = ConvReLU2d,
) -> list[nn.Conv2d]:
    """Fuse each convolution with the ReLU that is its only reader, or the only reader of its residual sum.

    Args:
        owned: ids of the modules that the graph owns and may change; other modules are copied, sharing their
            tensors.
        shapes: of each node's result.
        layers: class of the convolutions, subclasses left out.
        into: class that they become; its calls take the residual as a second argument.
    """
    modules = dict(traced.named_modules(remove_duplicate=False))
    uses = call_counts(traced)
    known = dict(shapes)

    def is_convolution(node: Any) -> bool:
        if not isinstance(node, fx.Node) or node.op != "call_module" or len(node.users) != 1:
            return False
        layer: Any = modules[str(node.target)]
        usual = type(layer) is layers and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        return (
            usual and is_plain(layer) and uses[node.target] == 1 and len(node.args) == 1 and not node.kwargs
        )

    fused_layers: list[nn.Conv2d] = []
    for relu in list(traced.graph.nodes):
        if not _is_relu(relu, modules):
            continue
        source = relu.args[0]
        if len(source.users) != 1:
            continue
        for convolution, residual in _summands(source):
            alike = residual is None or (
                known.get(residual) is not None and known[residual] == known.get(convolution)
            )
            if is_convolution(convolution) and alike and not _overwritten(convolution, source, relu, modules):
                made = _fuse(traced, relu, convolution, residual, owned, into)
                known[made] = known[relu]
                fused_layers.append(traced.get_submodule(str(made.target)))  # type: ignore[arg-type]
                break
    return fused_layers


def _overwritten(
    convolution: fx.Node, source: fx.Node, relu: fx.Node, modules: Mapping[str, nn.Module]
) -> bool:
    """True if something between `convolution` and `relu` may write to a tensor.

    Convolution and sum move to the place of `relu`: what they read must not change on the way.
    """
    node = convolution.next
    while node is not relu:
        if node is not source and _may_write(node, modules):
            return True
        node = node.next
    return False


def _may_write(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    if node.op not in ("call_module", "call_function", "call_method"):
        return False
    if node.kwargs.get("inplace") or "out" in node.kwargs:
        return True
    if node.op == "call_module":
        module = modules[str(node.target)]
        known = type(module).__module__.startswith(("torch.nn.", "fastdynat."))
        return bool(getattr(module, "inplace", False)) or not known
    if node.op == "call_method":
        return str(node.target).endswith("_") or node.target == "__setitem__"
    name = getattr(node.target, "__name__", "")
    in_place = name.endswith("_") or (name.startswith("i") and hasattr(operator, f"__{name}__"))
    return in_place or name == "setitem" or any(arg is True for arg in node.args)


def _is_relu(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    if not node.args or not isinstance(node.args[0], fx.Node) or set(node.kwargs) - {"inplace"}:
        return False
    if node.op == "call_module":
        module = modules[str(node.target)]
        return type(module) is nn.ReLU and is_plain(module)
    return (node.op == "call_function" and node.target in RELU_FUNCTIONS) or (
        node.op == "call_method" and node.target in RELU_METHODS
    )


def _summands(source: fx.Node) -> Iterator[tuple[Any, Any]]:
    """(convolution, residual) candidates of `source`: itself alone, or either order of a sum."""
    function = source.op == "call_function" and source.target in ADD_FUNCTIONS
    method = source.op == "call_method" and source.target in ADD_METHODS
    if not (function or method):
        yield source, None
        return
    if source.kwargs or len(source.args) != 2 or not all(isinstance(arg, fx.Node) for arg in source.args):
        return  # a scalar operand, or alpha
    first, second = source.args
    if first is second:
        return
    yield first, second
    # An in-place sum overwrites the residual, which other nodes may read again.
    if source.target not in IN_PLACE:
        yield second, first


def _fuse(
    traced: fx.GraphModule,
    relu: fx.Node,
    convolution: fx.Node,
    residual: fx.Node | None,
    owned: set[int],
    into: type[nn.Conv2d],
) -> fx.Node:
    name = str(convolution.target)
    layer: Any = traced.get_submodule(name)
    if id(layer) not in owned:
        parameters, layer = layer._parameters, copy.copy(layer)
        layer._parameters = dict(parameters)
        traced.set_submodule(name, layer)
    layer.__class__ = into
    with traced.graph.inserting_before(relu):
        made = traced.graph.call_module(
            name, (convolution.args[0],) + ((residual,) if residual is not None else ())
        )
    source: Any = relu.args[0]
    relu.replace_all_uses_with(made)
    traced.graph.erase_node(relu)
    if source is not convolution:
        traced.graph.erase_node(source)
    traced.graph.erase_node(convolution)
    return made
