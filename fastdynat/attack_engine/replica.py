"""The attack's own copy of the network: frozen, folded, in half precision, in the layout that is fast."""

import torch
from torch import Tensor, fx, nn

from fastdynat.attack_engine.batch_norm_folding import Fold, fold_batch_norm, put_tensors, relu_in_place
from fastdynat.attack_engine.copy_check import check_twin
from fastdynat.attack_engine.epilogue_fusion import ConvReLU2d
from fastdynat.attack_engine.fused_choice import keep_where_faster, use_where_right
from fastdynat.attack_engine.fx_tracing import NotFoldable
from fastdynat.attack_engine.network_comparison import ROUNDING, answer, answer_and_gradient, disagreement
from fastdynat.attack_engine.network_modes import frozen_twin
from fastdynat.attack_engine.rehearsal import rehearse
from fastdynat.attack_engine.winograd import WinogradLayers
from fastdynat.execution.float32 import full_float32

# The layers whose weights autocast would cast at every call; everything else stays as it is in the network.
CAST = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, ConvReLU2d)


class AttackReplica:
    """`network`, a module that follows `model` and is fit for being attacked.

    No parameter of it needs a gradient, so an attack computes input gradients only, in eager mode and
    compiled, and can never reach the model's ``.grad``. What can share the model's memory does; folded
    weights, weights in half precision, weights in another memory format and Winograd's transformed ones are
    copies, brought up to date by `refresh`. With `dtype`, `network` is to be called under autocast to it:
    batch norms and whatever else autocast keeps in float32 stay there.

    Attributes:
        network: images in [0, 1] -> logits.
        num_folded: batch norms folded into the layer before them.
        num_fused: convolutions that add the residual and take the ReLU after them as one operator.
        num_winograd: convolutions that Winograd's algorithm computes where that pays.
        channels_last: whether the network runs in that memory format; not where it takes views that only
            contiguous ones have.
        fusion_chosen: whether `choose_fusion` has been called.
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
            example: (n, C, H, W) images on the model's device, two are enough: they check that folding
                changed nothing.
            bn: batch norm during the attack: "eval", "train" or "frozen" (`set_attack_mode`); only "eval" can
                be folded.
            dtype: half-precision type of convolution and linear weights; None keeps the model's.
            channels_last: convolution weights in channels-last memory format, where the network can be run
                so.
            fold: fold batch norm where the network allows.
            fused_conv: where it is folded, compute convolution, bias, residual and ReLU as one operator
                (`join_epilogues`).
            winograd: compute 3x3 convolutions by Winograd's algorithm where that pays: in float32, on the
                CPU, with the extension (`WinogradLayers`). Takes eight times the memory of their weights.
            static: calls of the network may be compiled or captured.
            compares: weights may be the same from one `refresh` to the next, which is looked at before
                Winograd's are transformed anew. Else all that `refresh` takes over counts as changed.

        Raises:
            NotCopyable: a UserError; no copy of `model` computes what it computes (`check_twin`).
        """
        self.network = frozen_twin(model, bn)
        check_twin(model, self.network, example)
        self._folds: list[Fold] = []
        self.note = ""
        if fold:
            self._fold(model, example, bn, fused_conv)
        self._sources: list[Tensor] = []
        self._copies: list[Tensor] = []
        self.channels_last = channels_last and self._runs_channels_last(example, dtype)
        if not self.channels_last:
            self._own_weights(dtype, torch.preserve_format)
        self._fused = [module for module in self.network.modules() if type(module) is ConvReLU2d]
        use_where_right(self._fused, example.device)
        self.fusion_chosen = False
        self._winograd = None
        if winograd and dtype is None:
            self._winograd = WinogradLayers(self.network, static=static, compares=compares)
        if isinstance(self.network, fx.GraphModule):
            relu_in_place(self.network)

    @property
    def num_folded(self) -> int:
        return len(self._folds)

    @property
    def num_fused(self) -> int:
        return sum(layer.fused for layer in self._fused)

    @property
    def num_winograd(self) -> int:
        return 0 if self._winograd is None else len(self._winograd.layers)

    def _fold(self, model: nn.Module, example: Tensor, bn: str, join: bool) -> None:
        try:
            if bn != "eval":
                raise NotFoldable(f"batch norm is in mode {bn}, which depends on the batch")
            with torch.autocast(example.device.type, enabled=False):
                rehearse(model, example, join=join)
                network, folds = fold_batch_norm(self.network, example, join=join)
                one, other = (answer_and_gradient(each, example) for each in (self.network, network))
                why = disagreement(one, other, (ROUNDING, 5 * ROUNDING))
                if why:
                    raise NotFoldable(f"the traced network's {why}")
        except NotFoldable as why:
            if join:
                self._fold(model, example, bn, join=False)
                return
            self.note = str(why)
            return
        self.network, self._folds = network, folds

    def _runs_channels_last(self, example: Tensor, dtype: torch.dtype | None) -> bool:
        """Convert the weights and try the network out; if it fails, as ``x.view(len(x), -1)`` does, put them
        back.
        """
        before = [(module, dict(module._parameters)) for module in self.network.modules()]
        self._own_weights(dtype, torch.channels_last)
        try:
            with torch.autocast(example.device.type, dtype, enabled=dtype is not None):
                answer(self.network, example.contiguous(memory_format=torch.channels_last))
        except RuntimeError:
            self._sources, self._copies = [], []
            for module, parameters in before:
                module._parameters.update(parameters)
            return False
        return True

    def _own_weights(self, dtype: torch.dtype | None, memory_format: torch.memory_format) -> None:
        """Convert weights that are the replica's own, and replace those that would have to be converted at
        every call.
        """
        own = {id(fold.folded) for fold in self._folds}
        for module in self.network.modules():
            if type(module) not in CAST:
                continue
            for name, old in list(module._parameters.items()):
                if old is None:
                    continue
                layout = memory_format if old.dim() == 4 else torch.preserve_format
                new = old.detach().to(dtype=dtype or old.dtype, memory_format=layout)
                if new.data_ptr() == old.data_ptr():
                    continue
                module._parameters[name] = nn.Parameter(new, requires_grad=False)
                if id(module) not in own:
                    self._sources.append(old.detach())
                    self._copies.append(new)

    def derived(self) -> dict[str, Tensor]:
        """All tensors that `refresh` writes on a GPU, none of which is the model's, by some name."""
        found = [*self._copies]
        found += [
            t for fold in self._folds for t in (fold.folded.weight, fold.folded.bias) if isinstance(t, Tensor)
        ]
        return {str(i): tensor.detach() for i, tensor in enumerate(found)}

    def choose_fusion(self, x: Tensor) -> int:
        """On a GPU, at the first call: leave to cuDNN's fused convolutions what they are the faster for, at
        the size of `x`.

        Not in deterministic runs, whose numbers must not depend on timings.

        x: images as the network reads them, in the region in which it runs.

        Returns:
            How many convolutions were found to be slower fused.
        """
        before, first = self.num_fused, not self.fusion_chosen
        self.fusion_chosen = True
        if not first or not before or x.device.type != "cuda" or torch.are_deterministic_algorithms_enabled():
            return 0
        keep_where_faster(self.network, self._fused, x)
        return before - self.num_fused

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the model's weights and running statistics of now. In place: compiled and captured code
        stays valid.
        """
        if self._copies:
            torch._foreach_copy_(self._copies, self._sources)
        put_tensors(self._folds)
        if self._winograd is not None:
            self._winograd.refresh()

    def prepare(self, x: Tensor, passes: float) -> None:
        """Be told, before an attack, of its images as the network takes them, and of its pairs of passes."""
        if self._winograd is not None:
            self._winograd.prepare(x, passes)
