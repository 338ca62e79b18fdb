"""Tracing of a network by torch.fx, with the shapes of all results and without no-op layers."""

import operator
import threading
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as torch_module

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
MAX_UNTRACED = 32  # modules; each costs another trace
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

    def __init__(self, untraced: set[nn.Module]) -> None:
        super().__init__()
        self._thread, self._untraced = threading.get_ident(), untraced
        self._autocast_depth = _autocast_depth()

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Refuse operations inside an autocast region of the network, which the graph would be without."""
        if _autocast_depth() != self._autocast_depth:
            raise RuntimeError("its forward pass sets autocast itself")
        return super().create_node(*args, **kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m in self._untraced or super().is_leaf_module(m, module_qualified_name)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        if any(getattr(m, name) for name in HOOKS) and not self.is_leaf_module(m, self.path_of_module(m)):
            raise NotFoldable(f"a hook is on {type(m).__name__}, which tracing would bypass")
        try:
            return super().call_module(m, forward, args, kwargs)
        except (NotFoldable, _Untraceable):
            raise
        except Exception as error:  # of foreign code, which may raise anything
            raise _Untraceable(m) from error


def _autocast_depth() -> int:
    """The number of autocast regions around the call, whether they turn it on or off."""
    depth = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    return depth


class _Untraceable(Exception):
    """The innermost module whose forward pass fails on proxies; its exception is the cause."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def trace(network: nn.Module, leaves: Collection[nn.Module] = ()) -> fx.GraphModule:
    """`network` as a graph over the same modules, of which `leaves` are one call each.

    A module that cannot be traced, as one whose control flow depends on the size of its input, is one call
    in the graph. Exceptions of the network's own code on proxies are passed on.
    """
    untraced = set(leaves)
    while True:
        try:
            return _trace(network, untraced)
        except _Untraceable as error:
            # One that is a leaf already fails for another reason: no path leads to it from the network.
            if error.module in untraced or len(untraced) == len(leaves) + MAX_UNTRACED:
                raise error.__cause__ or error from None
            untraced.add(error.module)


def _trace(network: nn.Module, untraced: set[nn.Module]) -> fx.GraphModule:
    tracer = _Tracer(untraced)
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


def drop_rank_checks(traced: fx.GraphModule) -> None:
    """Remove assertions of a tensor's number of dimensions, which would count as readers of the tensor."""
    for node in list(traced.graph.nodes):
        if node.target is torch._assert and _is_rank_check(node.args[0]):
            traced.graph.erase_node(node)
    for node in reversed(list(traced.graph.nodes)):
        if not node.users and (_is_rank_check(node) or _is_rank(node)):
            traced.graph.erase_node(node)


def _is_rank(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is getattr and node.args[1] == "ndim"


def _is_rank_check(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is operator.eq and _is_rank(node.args[0])


def settle(traced: fx.GraphModule) -> None:
    """Make `traced` run its graph as it is now, without the modules that it no longer calls."""
    traced.graph.lint()
    traced.recompile()
    # fx's own __call__ prints every error, even handled ones.
    type(traced).__call__ = nn.Module.__call__  # type: ignore[method-assign]
    traced.delete_all_unused_submodules()
    # The cycle of graph and module would keep all tensors alive until garbage collection.
    traced.graph.owning_module = None


def relus_after(traced: fx.GraphModule) -> Iterator[tuple[nn.Module, bool, str]]:
    """Each plain ``nn.ReLU`` that is called once and is the only reader of a plain layer.

    Yields:
        The layer, whether it is called this once only, and the name of the ReLU.
    """
    modules = dict(traced.named_modules())
    uses = call_counts(traced)
    for node in traced.graph.nodes:
        source = node.args[0] if node.args else None
        if node.op != "call_module" or not isinstance(source, fx.Node) or source.op != "call_module":
            continue
        layer, relu = modules[str(source.target)], modules[str(node.target)]
        alone = uses[node.target] == 1 and len(source.users) == 1
        if alone and type(relu) is nn.ReLU and is_plain(layer) and is_plain(relu):
            yield layer, uses[source.target] == 1, str(node.target)


def call_counts(traced: fx.GraphModule) -> Counter[Any]:
    """Number of calls of each module in the graph.

    Reading a tensor of it, or a call of a module that contains it and is not traced, counts as a call.
    """
    nodes = [node for node in traced.graph.nodes if node.op in ("call_module", "get_attr")]
    counts = Counter(n.target if n.op == "call_module" else n.target.rpartition(".")[0] for n in nodes)
    modules = dict(traced.named_modules(remove_duplicate=False))
    called = [modules[node.target] for node in nodes if node.op == "call_module"]
    inner = {id(part) for module in called for part in module.modules() if part is not module}
    counts.update(name for name, module in modules.items() if id(module) in inner)
    return counts
