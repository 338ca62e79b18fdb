"""Logits of images that differ from known ones in one square, at the cost of the maps' changed parts.

A random search changes a few pixels of an image and asks for its logits. A convolution spreads the change by
its kernel, so that in the first layers most positions of a map stay as they were; only the others are
computed, from crops of the known maps, until the change has spread over most of a map (`patch_graph`). All
that follows is computed whole. The numbers are those of the whole network up to rounding, and do not drift:
the maps of a changed image that becomes a known one are those just computed.
"""

import logging
import operator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fastdynat.attack_engine.epilogue_fusion import ConvReLU2d
from fastdynat.attack_engine.fx_tracing import result_shapes, trace
from fastdynat.attack_engine.input_gradient import Rectified
from fastdynat.attack_engine.patch_geometry import Patch, Reading
from fastdynat.attack_engine.patch_graph import CONVOLUTIONS, POOLINGS, Split, split, window_of
from fastdynat.attack_engine.patch_maps import KnownMap, MapCrop, Squares, with_room

logger = logging.getLogger(__name__)
MOST_BYTES = 1 << 30  # of the maps of all known images


class PatchForward:
    """Logits by a network of images that differ from known images in one square each.

    Attributes:
        side: of the squares; None where the network is computed whole.
    """

    def __init__(self, traced: fx.GraphModule, example: Tensor) -> None:
        self._traced, self._shapes = traced, result_shapes(traced, example)
        self._modules = dict(traced.named_modules(remove_duplicate=False))
        self._splits: dict[int, Split | None] = {}
        self._disabled = False
        self._maps: dict[fx.Node, KnownMap] = {}
        self.side: int | None = None

    @classmethod
    def of(cls, network: Any, example: Tensor) -> "PatchForward | None":
        """For a module in eval mode on the CPU; None for other networks, and for those that fx cannot trace.

        example: (n, C, H, W) images.
        """
        if not isinstance(network, nn.Module) or network.training or example.device.type != "cpu":
            return None
        try:
            own = [module for module in network.modules() if type(module) in (*CONVOLUTIONS, Rectified)]
            return cls(trace(network, own), example[:1])
        except Exception as error:  # of foreign code on proxies, which may raise anything
            logger.debug("no patches: %s", error)
            return None

    def begin(self, x: Tensor, side: int, most: int) -> None:
        """Take `x` (N, C, H, W) as the known images, for squares of `side` pixels and passes of `most`.

        A graph that fails on patches is computed whole from now on.
        """
        self.side, self._maps = None, {}
        if self._disabled or len(x) == 0:
            return
        try:
            self._begin(x, side, most)
        except Exception as error:  # of layers of all kinds
            logger.debug("no patches: %s", error)
            self.disable()

    def _begin(self, x: Tensor, side: int, most: int) -> None:
        found = self._split(side)
        if found is None:
            return
        self._prepare(found)
        if self._bytes(x, most) > MOST_BYTES:
            return
        self._maps = {
            node: self._empty(found.patches[node], border, x, most) for node, border in self._borders.items()
        }
        _Recorder(self._traced, self._maps).run(x)
        self.side, self._known, self._most = side, x, most

    def keep(self, rows: Tensor) -> None:
        """Go on with the known images `rows` (n,) int64 alone."""
        if self.side is not None:
            self._maps = {node: kept.keep(rows, self._most) for node, kept in self._maps.items()}

    def logits(self, fresh: Tensor, squares: Squares) -> Tensor:
        """The logits (m, K) of the known images with the squares' pixels replaced.

        fresh: (m, C, side, side), the new pixels.
        """
        values: dict[fx.Node, Tensor] = {}
        self._last = squares
        for node in self._found.patches:
            value = fresh if node.op == "placeholder" else self._value(node, values, squares)
            values[node] = value
            if node in self._maps:
                self._maps[node].write(value)
        result: Tensor = self._found.rest(*(self._whole_map(node, squares) for node in self._found.frontier))
        return result

    def _whole_map(self, node: fx.Node, squares: Squares) -> Tensor:
        found = self._maps[node].crop(self._whole[node], squares)
        return found.contiguous() if self._maps[node].contiguous else found

    def accept(self, chosen: Tensor) -> None:
        """Make the changed images `chosen` (a,) of the last pass, at most one of each image, known ones."""
        for known in self._maps.values():
            known.accept(chosen, self._last)

    def disable(self) -> None:
        """Compute the network whole from now on."""
        self._disabled, self.side, self._maps = True, None, {}

    def _split(self, side: int) -> Split | None:
        if side not in self._splits:
            self._splits[side] = split(self._traced, self._shapes, side)
        return self._splits[side]

    def _prepare(self, found: Split) -> None:
        """Decide on the maps that are kept, their borders, and the parts that are read."""
        self._found, self._crops, self._whole = found, {}, {}
        borders: dict[fx.Node, tuple[int, int]] = dict.fromkeys(found.frontier, (0, 0))
        for node in found.patches:
            for source in self._cropped(node):
                known = borders.get(source, (0, 0))
                pads = self._padding(node) if source is node.args[0] else (0, 0)
                borders[source] = (max(known[0], pads[0]), max(known[1], pads[1]))
        self._borders = borders
        for node in found.patches:
            for source in self._cropped(node):
                self._crops[node, source] = self._crop_of(node, source)
        for node in found.frontier:
            patch = found.patches[node]
            zero = torch.zeros_like(patch.rows.first), torch.zeros_like(patch.columns.first)
            self._whole[node] = self._crop_at(node, *zero, patch.rows.total, patch.columns.total)

    def _spatial(self, node: fx.Node) -> nn.Module | None:
        """The convolution or pooling that `node` calls."""
        module = self._modules[str(node.target)] if node.op == "call_module" else None
        return module if isinstance(module, (nn.Conv2d, *POOLINGS)) else None

    def _padding(self, node: fx.Node) -> tuple[int, int]:
        module = self._spatial(node)
        return (0, 0) if module is None else window_of(module)[2]

    def _cropped(self, node: fx.Node) -> list[fx.Node]:
        """The maps of which `node` reads a part other than their fresh patch."""
        if node.op == "placeholder":
            return []
        patches, known = self._found.patches, [arg for arg in node.args if arg in self._found.patches]
        whole = [] if self._spatial(node) is None else known[:1]
        return [one for one in known if one in whole or patches[one] is not patches[node]]  # type: ignore

    def _crop_of(self, node: fx.Node, source: fx.Node) -> MapCrop:
        patch, module = self._found.patches[node], self._spatial(node)
        if module is None or source is not node.args[0]:
            return self._crop_at(
                source, patch.rows.first, patch.columns.first, patch.rows.count, patch.columns.count
            )
        kernel, stride, padding = window_of(module)
        counts = [
            (extent.count - 1) * s + k
            for extent, s, k in zip((patch.rows, patch.columns), stride, kernel, strict=True)
        ]
        first = (
            patch.rows.first * stride[0] - padding[0],
            patch.columns.first * stride[1] - padding[1],
        )
        return self._crop_at(source, *first, *counts)

    def _crop_at(self, source: fx.Node, top: Tensor, left: Tensor, rows: int, columns: int) -> MapCrop:
        patch, (down, across) = self._found.patches[source], self._borders[source]
        width = patch.columns.total + 2 * across
        vertical = Reading.of(patch.rows, top, rows, down)
        vertical = replace(vertical, kept=vertical.kept * width, fresh=vertical.fresh * patch.columns.count)
        return MapCrop(vertical, Reading.of(patch.columns, left, columns, across))

    def _bytes(self, x: Tensor, most: int) -> int:
        patches = [self._found.patches[node] for node in self._borders]
        known = [len(x) * (patch.rows.total + 2) * (patch.columns.total + 2) for patch in patches]
        rows = zip(patches, known, strict=True)
        return sum(x.element_size() * patch.channels * (count + most * patch.size) for patch, count in rows)

    @staticmethod
    def _empty(patch: Patch, border: tuple[int, int], x: Tensor, most: int) -> KnownMap:
        height, width = (
            extent.total + 2 * b for extent, b in zip((patch.rows, patch.columns), border, strict=True)
        )
        known = x.new_zeros(len(x) * height * width, patch.channels)
        return KnownMap(patch, border, with_room(known, patch, most), len(x))

    def _value(self, node: fx.Node, values: dict[fx.Node, Tensor], squares: Squares) -> Tensor:
        """The fresh patch of `node`, (m, channels, rows, columns)."""
        patches = self._found.patches

        def read(arg: Any) -> Any:
            if not isinstance(arg, fx.Node):
                return arg
            if arg not in patches:
                return operator.attrgetter(str(arg.target))(self._traced)
            crop = self._crops.get((node, arg))
            return values[arg] if crop is None else self._maps[arg].crop(crop, squares)

        args = [read(arg) for arg in node.args]
        if node.op == "call_function":
            return node.target(*args, **node.kwargs)  # type: ignore[operator]
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **node.kwargs)
        return _apply(self._modules[str(node.target)], *args)


def _apply(module: nn.Module, x: Tensor, *rest: Tensor) -> Tensor:
    """`module` on a crop that holds its padding."""
    if isinstance(module, nn.Conv2d):
        out = F.conv2d(x, module.weight, module.bias, module.stride, 0, module.dilation, module.groups)
        out = out.add_(rest[0]) if rest else out
        rectified = isinstance(module, ConvReLU2d) or getattr(module, "rectified", False)
        return out.relu_() if rectified else out
    if isinstance(module, nn.MaxPool2d):
        return F.max_pool2d(x, module.kernel_size, module.stride, 0, module.dilation)
    if isinstance(module, nn.AvgPool2d):
        return F.avg_pool2d(x, module.kernel_size, module.stride)
    result: Tensor = module(x)
    return result


class _Recorder(fx.Interpreter):
    """Runs a network and keeps the maps of some nodes, before later nodes may overwrite them."""

    def __init__(self, traced: fx.GraphModule, maps: dict[fx.Node, KnownMap]) -> None:
        super().__init__(traced)
        self._wanted = maps

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self._wanted:
            self._wanted[n].inner.copy_(result.permute(0, 2, 3, 1))
            self._wanted[n].contiguous = result.is_contiguous()
        return result
