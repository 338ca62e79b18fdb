"""Tracing of a network by torch.fx, with the shapes of all results and without no-op layers."""

import threading
from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as torch_module

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


class NotFoldable(Exception):
    """The network cannot be folded; the message says why."""


def is_plain(module: nn.Module) -> bool:
    """True if calling `module` runs the ``forward`` of its class only, without hooks."""
    hooks = [getattr(module, name) for name in HOOKS] + [
        getattr(torch_module, f"_global{name}") for name in HOOKS
    ]
    return not any(hooks) and "forward" not in vars(module)


# Tracing patches the call of every module in every thread: one trace runs at a time, and calls of other
# threads pass through it.
_tracing = threading.Lock()


class _Tracer(fx.Tracer):
    # Otherwise an expression of buffers alone, such as 1 / std, is computed once and never again.
    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        if any(getattr(m, name) for name in HOOKS) and not self.is_leaf_module(m, self.path_of_module(m)):
            raise NotFoldable(f"a hook is on {type(m).__name__}, which tracing would bypass")
        return super().call_module(m, forward, args, kwargs)


def trace(network: nn.Module) -> fx.GraphModule:
    """`network` as a graph over the same modules. Exceptions of its code on proxies are passed on."""
    tracer = _Tracer()
    try:
        with _tracing:
            graph = tracer.trace(network)
        return fx.GraphModule(network, graph)
    finally:
        # A tracer is in reference cycles with the functions it patches, which would keep the network alive.
        tracer.root = tracer.tensor_attrs = tracer.submodule_paths = None  # type: ignore[assignment]


class _Shapes(fx.Interpreter):
    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__(traced)
        self.of: dict[fx.Node, torch.Size | None] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.of[n] = result.shape if isinstance(result, Tensor) else None
        return result


def result_shapes(traced: fx.GraphModule, example: Tensor) -> dict[fx.Node, torch.Size | None]:
    """The shape of each node's result on `example`; None where it is no tensor."""
    shapes = _Shapes(traced)
    shapes.run(example)
    return shapes.of


def drop_no_ops(traced: fx.GraphModule) -> None:
    """Remove layers that return their input, identities and dropout in eval mode, from between others."""
    modules = dict(traced.named_modules(remove_duplicate=False))
    for node in list(traced.graph.nodes):
        if (
            node.op != "call_module"
            or len(node.args) != 1
            or node.kwargs
            or not isinstance(node.args[0], fx.Node)
        ):
            continue
        module = modules[str(node.target)]
        idle = type(module) is nn.Identity or (type(module) in DROPOUTS and not module.training)
        if idle and is_plain(module):
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)


def call_counts(traced: fx.GraphModule) -> Counter[Any]:
    """Number of calls of each module in the graph; reading a tensor of it counts as a call."""
    nodes = [node for node in traced.graph.nodes if node.op in ("call_module", "get_attr")]
    return Counter(n.target if n.op == "call_module" else n.target.rpartition(".")[0] for n in nodes)
