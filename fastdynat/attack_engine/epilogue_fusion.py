"""Epilogue fusion in the folded replica: a convolution with the residual sum and ReLU that follow it in the
traced graph.
"""

import copy
import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fastdynat.attack_engine.fx_tracing import is_plain, uses_of
from fastdynat.ops.conv_relu import conv_relu, result_shape

ADD_FUNCTIONS, ADD_METHODS = (operator.add, operator.iadd, torch.add), ("add", "add_")
IN_PLACE = (operator.iadd, "add_")
RELU_FUNCTIONS, RELU_METHODS = (F.relu, torch.relu, torch.relu_), ("relu", "relu_")


class ConvReLU2d(nn.Conv2d):
    """What `join_epilogues` makes of a convolution: it adds a residual, if there is one, and takes the ReLU.

    Attributes:
        fused: by one kernel of the device (`fastdynat.ops.conv_relu`); else one after the other.
    """

    fused: bool = False

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """relu(convolution + residual), under autocast as convolution, sum and ReLU would be."""
        weight = self.weight
        if self.fused and x.dtype != weight.dtype and torch.is_autocast_enabled(x.device.type):
            x = x.to(weight.dtype)
        if not self.fused or not self._fits(x, residual):
            out = super().forward(x)
            return (out if residual is None else out + residual).relu_()
        geometry: dict[str, Any] = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        return conv_relu(x, weight, self.bias, residual, groups=self.groups, **geometry)

    def _fits(self, x: Tensor, residual: Tensor | None) -> bool:
        """Not where the sum would be broadcast or in another dtype."""
        if x.dim() != 4 or x.dtype != self.weight.dtype:
            return False
        geometry: Any = (self.stride, self.padding, self.dilation, self.groups)
        shape = result_shape(x, self.weight, geometry)
        return residual is None or (residual.shape == shape and residual.dtype == self.weight.dtype)


def join_epilogues(
    traced: fx.GraphModule, ours: set[int], shapes: Mapping[fx.Node, torch.Size | None]
) -> list[ConvReLU2d]:
    """Join each convolution in the graph with the ReLU that alone reads it, or alone reads its sum with
    something of its shape.

    Args:
        ours: ids of the modules that nobody else has and that may be changed; of others a copy over the same
            tensors is made.
        shapes: of each node's result.
    """
    modules, uses, known = dict(traced.named_modules(remove_duplicate=False)), uses_of(traced), dict(shapes)

    def is_convolution(node: Any) -> bool:
        if not isinstance(node, fx.Node) or node.op != "call_module" or len(node.users) != 1:
            return False
        layer: Any = modules[str(node.target)]
        usual = (
            type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        )
        return (
            usual and is_plain(layer) and uses[node.target] == 1 and len(node.args) == 1 and not node.kwargs
        )

    joined: list[ConvReLU2d] = []
    for relu in list(traced.graph.nodes):
        if not _is_relu(relu, modules):
            continue
        source = relu.args[0]
        if len(source.users) != 1:
            continue
        for convolution, residual in _terms(source):
            alike = residual is None or (
                known.get(residual) is not None and known[residual] == known.get(convolution)
            )
            if is_convolution(convolution) and alike:
                made = _join(traced, relu, convolution, residual, ours)
                known[made] = known[relu]
                joined.append(traced.get_submodule(str(made.target)))  # type: ignore[arg-type]
                break
    return joined


def _is_relu(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    if not node.args or not isinstance(node.args[0], fx.Node) or set(node.kwargs) - {"inplace"}:
        return False
    if node.op == "call_module":
        module = modules[str(node.target)]
        return type(module) is nn.ReLU and is_plain(module)
    return (node.op == "call_function" and node.target in RELU_FUNCTIONS) or (
        node.op == "call_method" and node.target in RELU_METHODS
    )


def _terms(source: fx.Node) -> Iterator[tuple[Any, Any]]:
    """What `source` may be: a convolution alone, or a sum of one and a residual, by either order."""
    function = source.op == "call_function" and source.target in ADD_FUNCTIONS
    method = source.op == "call_method" and source.target in ADD_METHODS
    if not (function or method):
        yield source, None
        return
    if source.kwargs or len(source.args) != 2 or not all(isinstance(arg, fx.Node) for arg in source.args):
        return  # a number, or a factor
    first, second = source.args
    if first is second:
        return
    yield first, second
    # A sum that overwrites the residual would be missing where that is read again.
    if source.target not in IN_PLACE:
        yield second, first


def _join(
    traced: fx.GraphModule, relu: fx.Node, convolution: fx.Node, residual: fx.Node | None, ours: set[int]
) -> fx.Node:
    name = str(convolution.target)
    layer: Any = traced.get_submodule(name)
    if id(layer) not in ours:
        parameters, layer = layer._parameters, copy.copy(layer)
        layer._parameters = dict(parameters)
        traced.set_submodule(name, layer)
    layer.__class__ = ConvReLU2d
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
