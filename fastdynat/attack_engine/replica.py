"""The replica: a frozen copy of the network, folded, in half precision and in the fastest memory format."""

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastdynat.attack_engine.batch_norm_folding import Fold, fold_batch_norm, refresh_folds, relu_in_place
from fastdynat.attack_engine.cast_weights import castable_weights
from fastdynat.attack_engine.copy_check import check_twin
from fastdynat.attack_engine.epilogue_fusion import ConvReLU2d
from fastdynat.attack_engine.folding_check import check_folding
from fastdynat.attack_engine.fusion_choice import fuse_where_faster, fuse_where_verified
from fastdynat.attack_engine.fx_tracing import NotFoldable
from fastdynat.attack_engine.input_gradient import fast_image_gradients, take_relus_along
from fastdynat.attack_engine.network_comparison import (
    FLOAT32_TOLERANCE,
    disagreement,
    reference_logits,
    reference_logits_and_grad,
)
from fastdynat.attack_engine.network_modes import attack_mode, frozen_twin
from fastdynat.attack_engine.winograd_layers import WinogradLayers
from fastdynat.execution.float32 import full_float32

# Layers whose weights autocast would cast at every call. All others stay as they are in the network.
CAST = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, ConvReLU2d)


class AttackReplica:
    """`network`, a copy of `model` made for attacks, whose weights follow the model's.

    No parameter of it needs a gradient, so an attack computes input gradients only, eager and compiled, and
    never reaches the model's ``.grad``. It shares the model's memory where it can; folded weights, weights in
    half precision or another memory format and Winograd's transformed ones are copies, updated by `refresh`.
    With batch norm in eval mode so are all running statistics, folded or not: the passes of an update move
    the model's while attacks on its other micro-batches are still to come.
    With a `dtype`, `network` runs under autocast to it: batch norm and everything else that autocast keeps in
    float32 stays so.

    Attributes:
        network: images in [0, 1] -> logits.
        num_norms: batch norms of the model.
        num_folded: batch norms folded into the layer before them.
        num_fused: convolutions that add the residual and take the ReLU in one operator of cuDNN.
        num_winograd: convolutions that use Winograd's algorithm where it pays.
        channels_last: whether the network runs in that memory format; not if it takes views that need
            contiguous tensors.
        fusion_chosen: whether `choose_fusion` has run.
        note: why nothing was folded although `fold` asked for it; else "".
    """

    @full_float32()
    def __init__(
        self,
        model: nn.Module,
        example: Tensor,
        *,
        bn: str = "eval",
        dtype: torch.dtype | None = None,
        channels_last: bool = False,
        fold: bool = True,
        fused_conv: bool = False,
        winograd: bool = True,
        static: bool = False,
        compares: bool = False,
    ) -> None:
        """
        Args:
            model: images in [0, 1] -> logits; float32 or float64, any train/eval state.
            example: (n, C, H, W) images on the model's device, for checks of the copy; two are enough.
            bn: batch norm during the attack: "eval", "train" or "frozen" (`set_attack_mode`); only "eval" is
                folded.
            dtype: half-precision type of convolution and linear weights; None keeps the model's.
            channels_last: run in channels-last memory format where the network can.
            fold: fold batch norm where the network allows it.
            fused_conv: in a folded network, compute convolution, bias, residual and ReLU as one operator
                (`fuse_epilogues`).
            winograd: compute 3x3 convolutions by Winograd's algorithm where that pays: in float32, on the
                CPU, with the extension (`WinogradLayers`). Takes eight times the memory of their weights.
                Also the gradient at the images by a matrix product (`ImageConv2d`).
            static: calls of the network may be compiled or captured.
            compares: `refresh` compares weights before it transforms Winograd's again, because they are often
                unchanged; otherwise all weights count as changed.

        Raises:
            NotCopyable: a UserError; a copy of `model` does not compute the same (`check_twin`).
        """
        self.num_norms = sum(isinstance(module, _BatchNorm) for module in model.modules())
        self.network = frozen_twin(model, bn)
        check_twin(model, self.network, example)
        self._folds: list[Fold] = []
        self.note = ""
        if fold:
            self._fold(model, example, bn, fused_conv)
        self._castable = set() if dtype is None else castable_weights(self.network, example, dtype, CAST)
        self._sources: list[Tensor] = []
        self._copies: list[Tensor] = []
        self.channels_last = channels_last and self._runs_channels_last(example, dtype)
        if not self.channels_last:
            self._own_weights(dtype, torch.preserve_format)
        self._statistics: list[Tensor] = []  # and the model's own, in `_moved`
        self._moved: list[Tensor] = []
        if bn == "eval":
            self._own_statistics()
        self._fused = [module for module in self.network.modules() if type(module) is ConvReLU2d]
        fuse_where_verified(self._fused, example.device)
        self.fusion_chosen = False
        self._winograd = None
        if winograd and dtype is None:
            self._winograd = WinogradLayers(self.network, static=static, compares=compares)
            fusible = self._winograd.layers and self._folds and not static
            if fusible and isinstance(self.network, fx.GraphModule):
                self._winograd.take_epilogues(self.network, example)
        if isinstance(self.network, fx.GraphModule):
            relu_in_place(self.network)
        if winograd and dtype is None and not static:
            fast_image_gradients(self.network)
            if isinstance(self.network, fx.GraphModule):
                take_relus_along(self.network)

    @property
    def num_folded(self) -> int:
        return len(self._folds)

    @property
    def num_fused(self) -> int:
        return sum(layer.fused for layer in self._fused)

    @property
    def num_winograd(self) -> int:
        return 0 if self._winograd is None else len(self._winograd.layers)

    def _fold(self, model: nn.Module, example: Tensor, bn: str, fuse: bool) -> None:
        try:
            if bn != "eval":
                raise NotFoldable(f"batch norm is in mode {bn}, which depends on the batch")
            if not self.num_norms:
                raise NotFoldable("it has no batch norm")
            with torch.autocast(example.device.type, enabled=False):
                check_folding(model, example, fuse=fuse)
                network, folds = fold_batch_norm(self.network, example, fuse=fuse)
                expected = reference_logits_and_grad(self.network, example)
                actual = reference_logits_and_grad(network, example)
                difference = disagreement(expected, actual, (FLOAT32_TOLERANCE, 5 * FLOAT32_TOLERANCE))
                if difference:
                    raise NotFoldable(f"the traced network's {difference}")
        except NotFoldable as why:
            if fuse:
                self._fold(model, example, bn, fuse=False)
                return
            self.note = str(why)
            return
        self.network, self._folds = network, folds

    def _runs_channels_last(self, example: Tensor, dtype: torch.dtype | None) -> bool:
        """Convert the weights and run the network; if it fails, as ``x.view(len(x), -1)`` does, undo it."""
        before = [(module, dict(module._parameters)) for module in self.network.modules()]
        self._own_weights(dtype, torch.channels_last)
        half = torch.autocast(example.device.type, dtype, enabled=dtype is not None)
        try:
            with attack_mode(self.network, "eval"), half:  # moves no running statistics
                reference_logits(self.network, example.contiguous(memory_format=torch.channels_last))
        except RuntimeError:
            self._sources, self._copies = [], []
            for module, parameters in before:
                module._parameters.update(parameters)
            return False
        return True

    def _own_weights(self, dtype: torch.dtype | None, memory_format: torch.memory_format) -> None:
        """Convert the replica's own weights, and copy weights that autocast would convert at every call.

        A weight that is read as it is, too, keeps its dtype (`castable_weights`): autocast converts it.
        """
        own = {id(fold.folded) for fold in self._folds}
        for module in self.network.modules():
            if type(module) not in CAST:
                continue
            for name, old in list(module._parameters.items()):
                if old is None:
                    continue
                layout = memory_format if old.dim() == 4 else torch.preserve_format
                as_cast = dtype if dtype is not None and id(old) in self._castable else old.dtype
                new = old.detach().to(dtype=as_cast, memory_format=layout)
                if new.data_ptr() == old.data_ptr():
                    continue
                module._parameters[name] = nn.Parameter(new, requires_grad=False)
                if id(module) not in own:
                    self._sources.append(old.detach())
                    self._copies.append(new)

    def _own_statistics(self) -> None:
        """Copy the buffers that passes in train mode may move; one that several modules hold stays one."""
        own: dict[int, Tensor] = {}
        for module in self.network.modules():
            for name, old in module._buffers.items():
                if old is None or not old.is_floating_point():
                    continue
                if id(old) not in own:
                    own[id(old)] = old.detach().clone()
                    self._moved.append(old.detach())
                module._buffers[name] = own[id(old)]
        self._statistics += own.values()

    def own_tensors(self) -> dict[str, Tensor]:
        """All tensors that `refresh` writes on a GPU, by number; none of them is the model's."""
        found = [*self._statistics, *self.own_weights()]
        return {str(i): tensor for i, tensor in enumerate(found)}

    def own_weights(self) -> list[Tensor]:
        """`own_tensors` without statistics, of which other values may be no variances."""
        folded = (t for fold in self._folds for t in (fold.folded.weight, fold.folded.bias))
        return [t.detach() for t in (*self._copies, *folded) if isinstance(t, Tensor)]

    def choose_fusion(self, x: Tensor, *, compiled: bool) -> int:
        """On a GPU, at the first call: unfuse the layers that run faster without cuDNN's fused kernels.

        Timed at the size of `x`.

        Args:
            x: images as the network gets them, inside its autocast region.
            compiled: the network runs compiled (`fuse_where_faster`).

        Returns:
            The number of convolutions that are slower fused.
        """
        before, first = self.num_fused, not self.fusion_chosen
        self.fusion_chosen = True
        if not first or not before or x.device.type != "cuda":
            return 0
        fuse_where_faster(self.network, self._fused, x, compiled=compiled)
        return before - self.num_fused

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the model's weights and statistics, in place: compiled and captured code stays valid."""
        # Apart, because lists of one dtype are copied in one launch.
        for copies, sources in ((self._copies, self._sources), (self._statistics, self._moved)):
            if copies:
                torch._foreach_copy_(copies, sources)
        refresh_folds(self._folds)
        if self._winograd is not None:
            self._winograd.refresh()

    def prepare(self, x: Tensor, passes: float) -> None:
        """Prepare for `passes` pairs of forward and backward passes on images like `x` (`WinogradLayers`)."""
        if self._winograd is not None:
            self._winograd.prepare(x, passes)
