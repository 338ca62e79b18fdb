"""Folding of eval-mode batch norm into the convolution or linear layer before it, in the traced graph.

A batch norm is a layer of torch, or a call of ``F.batch_norm`` in the forward pass of a layer derived from
one (timm's BatchNormAct2d, whose activation stays in the graph).

In eval mode ``bn(conv(x)) = s * conv(x) + (beta - s * mean)`` with ``s = gamma / sqrt(var + eps)`` per
channel, which is a convolution with weight ``s * W`` and a bias. The attack needs no gradient of gamma and
beta, so folding only saves two passes over the activations; sums are rounded in another order.
"""

import copy
import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastdynat.attack_engine.epilogue_fusion import fuse_epilogues
from fastdynat.attack_engine.fx_tracing import (
    NotFoldable,
    call_counts,
    drop_no_ops,
    drop_rank_checks,
    is_plain,
    relus_after,
    result_shapes,
    settle,
    trace,
)

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
FUNCTIONAL = inspect.signature(F.batch_norm)


@dataclass(frozen=True)
class Fold:
    """One folded pair: `layer` and `bn` share the network's tensors, `folded` has its own weight and bias."""

    layer: nn.Module
    bn: _BatchNorm
    folded: nn.Module


@torch.no_grad()
def fold_batch_norm(
    network: nn.Module, example: Tensor, *, fuse: bool = False
) -> tuple[fx.GraphModule, list[Fold]]:
    """A traced copy of `network`, in eval mode, with each batch norm directly after a layer folded into it.

    The copy shares all tensors with `network` except those of the folded layers, which hold current values
    until `refresh_folds`.

    Args:
        example: images, for one forward pass of the traced network.
        fuse: also fuse convolutions with their ReLU (`fuse_epilogues`).

    Raises:
        NotFoldable: the network cannot be traced (its control flow depends on the data), or has no such pair.
    """
    traced, shapes = _traced(network, example)
    # A traced network has no module of which it only reads tensors.
    modules = {**dict(network.named_modules(remove_duplicate=False)), **_called_modules(traced)}
    uses = call_counts(traced)
    folds: dict[fx.Node, Fold] = {}
    for node in list(traced.graph.nodes):
        pair = _pair(node, modules, uses, shapes)
        # A second batch norm after the same layer would replace the first fold.
        if pair is None or node.args[0] in folds:
            continue
        layer, bn = pair
        fold = Fold(layer, bn, _empty_copy(layer))
        traced.set_submodule(str(node.args[0].target), fold.folded)
        folds[node.args[0]] = fold
        tensors = node.all_input_nodes[1:]
        node.replace_all_uses_with(node.args[0])
        for unused in (node, *tensors):
            traced.graph.erase_node(unused)
    if not folds:
        raise NotFoldable("it has no batch norm in eval mode directly after a convolution or linear layer")
    refresh_folds(list(folds.values()))
    if fuse:
        fuse_epilogues(traced, {id(fold.folded) for fold in folds.values()}, shapes)
    settle(traced)
    return traced, list(folds.values())


def _traced(network: nn.Module, example: Tensor) -> tuple[fx.GraphModule, dict[fx.Node, torch.Size | None]]:
    """The traced `network` without no-op layers, and the shape of each node's result on `example`."""
    try:
        traced = trace(network)
        drop_no_ops(traced)
        drop_rank_checks(traced)
        shapes = result_shapes(traced, example)
    except NotFoldable:
        raise
    except Exception as error:  # tracing runs foreign code, which may raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise NotFoldable(f"the network cannot be traced ({reason})") from None
    if any(
        node.op == "get_attr" and node.target.startswith("_tensor_constant") for node in traced.graph.nodes
    ):
        raise NotFoldable("its forward makes tensors that tracing would freeze")
    return traced, shapes


def _called_modules(traced: fx.GraphModule) -> dict[str, nn.Module]:
    modules = dict(traced.named_modules(remove_duplicate=False))
    called = {str(node.target) for node in traced.graph.nodes if node.op == "call_module"}
    return {name: module for name, module in modules.items() if name in called}


def _pair(
    node: fx.Node,
    modules: dict[str, nn.Module],
    uses: Counter[Any],
    shapes: Mapping[fx.Node, torch.Size | None],
) -> tuple[nn.Module, _BatchNorm] | None:
    """The layer and batch norm of `node` if they can be folded: each called once, with no other reader."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or source.op != "call_module":
        return None
    layer: nn.Module = modules[str(source.target)]
    bn = _batch_norm(node, modules, uses)
    if bn is None or bn.training or bn.running_mean is None:
        return None
    if type(layer) not in LAYERS or len(source.users) > 1 or uses[source.target] > 1 or not is_plain(layer):
        return None
    # BatchNorm1d after a linear layer on (N, L, C) normalises L, not the layer's outputs; in a fresh network
    # it is the identity, so a comparison of logits would not notice.
    if isinstance(layer, nn.Linear) and len(shapes[source] or ()) != 2:
        return None
    return layer, bn


def _batch_norm(node: fx.Node, modules: dict[str, nn.Module], uses: Counter[Any]) -> _BatchNorm | None:
    """The batch norm that `node` computes, of which it is the only call; None where it is something else."""
    if node.op == "call_module":
        layer: Any = modules[str(node.target)]
        return layer if type(layer) in BATCH_NORMS and uses[node.target] == 1 and is_plain(layer) else None
    if node.op != "call_function" or node.target is not F.batch_norm:
        return None
    given = FUNCTIONAL.bind(*node.args, **node.kwargs)
    given.apply_defaults()
    tensors = {name: given.arguments[name] for name in ("running_mean", "running_var", "weight", "bias")}
    read = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if not all(isinstance(n, fx.Node) and n.op == "get_attr" and len(n.users) == 1 for n in read.values()):
        return None
    owner = str(node.all_input_nodes[1].target).rpartition(".")[0] if read else ""
    found = modules.get(owner)
    if not isinstance(found, _BatchNorm) or uses[owner] != len(read):
        return None
    here = {name: f"{owner}.{name}" for name in tensors if getattr(found, name) is not None}
    same = here == {name: n.target for name, n in read.items()} and given.arguments["eps"] == found.eps
    return found if same and given.arguments["training"] is False else None


def relu_in_place(traced: fx.GraphModule) -> None:
    """Run each ReLU in place that is the only reader of a layer: it saves a pass over the memory."""
    for layer, _, relu in relus_after(traced):
        if type(layer) in LAYERS:
            traced.set_submodule(relu, nn.ReLU(inplace=True))


def _empty_copy(layer: nn.Module) -> nn.Module:
    """A copy of `layer` that owns its weight and bias, uninitialised."""
    new = copy.copy(layer)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    new._parameters = {
        "weight": nn.Parameter(torch.empty_like(weight), requires_grad=False),
        "bias": nn.Parameter(weight.new_empty(weight.shape[0]), requires_grad=False),
    }
    return new


@torch.no_grad()
def refresh_folds(folds: Sequence[Fold]) -> None:
    """Write the current folded weights and biases, in the dtype and memory format of the folded layers.

    On a GPU this takes one kernel launch per weight and seven for all layers together; layer by layer it
    would take eight each, at every training step.
    """
    if not folds:
        return
    layers: list[Any] = [fold.layer for fold in folds]
    folded: list[Any] = [fold.folded for fold in folds]
    bns: list[Any] = [fold.bn for fold in folds]
    scales = torch._foreach_rsqrt(torch._foreach_add([bn.running_var for bn in bns], [bn.eps for bn in bns]))
    scales = _where_given(torch._foreach_mul, scales, [bn.weight for bn in bns])
    shifts = torch._foreach_neg([bn.running_mean for bn in bns])
    shifts = _where_given(torch._foreach_add, shifts, [layer.bias for layer in layers])
    biases = _where_given(torch._foreach_add, torch._foreach_mul(shifts, scales), [bn.bias for bn in bns])
    torch._foreach_copy_([new.bias for new in folded], biases)
    for layer, scale, new in zip(layers, scales, folded, strict=True):
        torch.mul(layer.weight, scale.view(-1, *(1,) * (layer.weight.dim() - 1)), out=new.weight)


def _where_given(
    op: Callable[..., Any], tensors: Sequence[Tensor], others: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """A foreach `op` on pairs of `tensors` and `others`; a tensor whose other is None stays as it is."""
    places = [i for i, other in enumerate(others) if other is not None]
    found = list(tensors)
    if places:
        made = op([tensors[i] for i in places], [others[i] for i in places])
        for place, tensor in zip(places, made, strict=True):
            found[place] = tensor
    return tuple(found)
