"""AutoAttack (Croce & Hein 2020, arXiv 2003.01690) on the attack engine, with its package's signatures."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdynat.attack_engine.network_modes import attack_mode
from fastdynat.attacks import NamedAttack, stages
from fastdynat.errors import UserError
from fastdynat.evaluation import staged
from fastdynat.evaluation.autoattack_inputs import check_and_clamp, check_labels, check_place
from fastdynat.evaluation.batch_attacks import BatchAttacks
from fastdynat.evaluation.defences import check_answers, check_classified, check_square, warn_resumed
from fastdynat.evaluation.measure import exact_float32, predict_in_batches
from fastdynat.models.logits import Output, with_output
from fastdynat.ops import image_draws
from fastdynat.runs import check_output
from fastdynat.tuning.devices import pick_device

NORMS = ("linf", "l2", "l1")
BATCH_SIZE = 250
CHANGEABLE = ("stages", "seconds", "seed", "verbose", "device", "log_path")


class AutoAttack:
    """Worst case over the attacks of a version, each on the images that are still robust.

    The attacks run on a fast replica of the network. An image counts as broken only if the network itself
    misclassifies the adversarial image, which must lie in the ball and in [0, 1]; the network predicts in its
    own precision and, for an ``nn.Module``, in eval mode. Its modes and gradients are restored, and the
    caller may be under ``no_grad``. Any other callable is called as it is: pass a defence that needs train
    mode as a function.

    Attributes:
        stages: the attacks with their parameters, in order; the list may be changed.
        seconds: time of each stage in the last evaluation.
        model, norm, eps, version: as given; they cannot be changed, since the stages are made for them.
    """

    _made = False

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        norm: str = "Linf",
        eps: float = 0.3,
        seed: int | None = None,
        verbose: bool = True,
        attacks_to_run: Sequence[str] = (),
        version: str = "standard",
        is_tf_model: bool = False,
        device: str | torch.device | None = None,
        log_path: str | Path | None = None,
        *,
        attacks: Sequence[str] | None = None,
        output: Output | None = None,
    ) -> None:
        """
        Args:
            model: images in [0, 1] -> logits (N, K), K >= 2; on `device`, in the images' dtype or in half
                precision.
            norm: Linf, L2 or L1.
            eps: radius in [0, 1] pixel units.
            seed: of every stage; None draws one for each evaluation. Random numbers are functions of it and
                of the image's index.
            verbose: print a line for each stage.
            attacks_to_run, attacks: for version "custom", the stages: apgd-ce, apgd-dlr, apgd-t, fab, fab-t,
                square.
            version: standard, plus, rand or custom.
            is_tf_model: must be False.
            device: of the attack; None is the model's device, or for a function the images'.
            log_path: file to append the lines to.
            output: selects the logits if the model returns more than them: a key, an index or a function.

        Raises:
            UserError: invalid arguments.
        """
        if is_tf_model:
            raise UserError(
                "is_tf_model=True: TensorFlow models are not supported here; the package pyautoattack "
                "supports them"
            )
        if norm.lower() not in NORMS:
            raise UserError(f"norm must be Linf, L2 or L1, got {norm!r}")
        if not 0 < eps < float("inf"):
            raise UserError(f"eps must be above 0, in [0, 1] pixel units, got {eps!r}; write 8/255")
        self.model, self.norm, self.eps, self.seed = model, norm.lower(), float(eps), seed
        self.verbose, self.version, self.log_path = (
            verbose,
            version,
            None if log_path is None else Path(log_path),
        )
        if self.log_path is not None:
            check_output(self.log_path)
        self._network = with_output(model, output)
        weight = next(model.parameters(), None) if isinstance(model, nn.Module) else None
        self.device = (
            pick_device(str(device)) if device is not None else None if weight is None else weight.device
        )
        self.stages = stages(self.norm, self.eps, version, attacks_to_run if attacks is None else attacks)
        self.seconds: dict[str, float] = {}
        self._made = True

    def __setattr__(self, name: str, value: Any) -> None:
        """Set one of `CHANGEABLE`. AttributeError for any other, which the evaluation would not follow."""
        if self._made and name not in CHANGEABLE:
            raise AttributeError(
                f"{name} of an AutoAttack cannot be set, only {', '.join(CHANGEABLE)}: make a new one, as "
                "AutoAttack(model, norm='Linf', eps=8 / 255, version='custom', attacks_to_run=['apgd-ce'])"
            )
        super().__setattr__(name, value)

    @property
    def attacks_to_run(self) -> list[str]:
        """The names of the stages."""
        return [stage.name for stage in self.stages]

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Attack every image, as torchattacks' AutoAttack does; returns the adversarial images.

        The same as ``run_standard_evaluation(images, labels)``, in batches of 250 images.

        Args:
            images: (N, C, H, W), in [0, 1] up to rounding, float32 or float64 like the model.
            labels: (N,) integer classes.

        Returns:
            (N, C, H, W), detached, on the device of `images`, the image itself where it is robust.

        Raises:
            UserError: see `run_standard_evaluation`.
        """
        x_adv: Tensor = self.run_standard_evaluation(images, labels)
        return x_adv

    def run_standard_evaluation(
        self,
        x: Tensor,
        y: Tensor,
        bs: int = BATCH_SIZE,
        return_labels: bool = False,
        state_path: str | Path | None = None,
        *,
        batch_size: int | None = None,
    ) -> Any:
        """Attack every image.

        Args:
            x: (N, C, H, W), in [0, 1] up to rounding, float32 or float64 like the model.
            y: (N,) integer classes.
            bs, batch_size: images per batch; halved, with a warning, when memory runs out.
            return_labels: also return the network's predictions on the result.
            state_path: a JSON file, written after every batch; an existing one resumes the evaluation, with
                the same result. The state holds no images: those broken before the resume are returned
                unperturbed, and a warning gives their number and the robust accuracy.

        Returns:
            (N, C, H, W), detached, on the device of `x`, the image itself where it is robust; with
            `return_labels` also (N,) int64.

        Raises:
            UserError: invalid images or labels, too few classes, NaN logits, or the state of another
                evaluation or of another version of fastdynat.
        """
        return self._evaluate(
            self.stages,
            x,
            y,
            batch_size or bs,
            return_labels,
            None if state_path is None else Path(state_path),
        )

    def run_standard_evaluation_individual(
        self,
        x: Tensor,
        y: Tensor,
        bs: int = BATCH_SIZE,
        return_labels: bool = False,
        *,
        batch_size: int | None = None,
    ) -> dict[str, Any]:
        """The result of `run_standard_evaluation` for each stage alone, by its name."""
        return {
            stage.name: self._evaluate([stage], x, y, batch_size or bs, return_labels, None)
            for stage in self.stages
        }

    def clean_accuracy(
        self, x: Tensor, y: Tensor, bs: int = BATCH_SIZE, *, batch_size: int | None = None
    ) -> float:
        """The accuracy without an attack, in [0, 1]."""
        with self._evaluation_context():
            x, y = check_and_clamp(x, y, batch_size or bs)
            accuracy = float((self._clean(x, batch_size or bs) == y).double().mean())
        self._report(f"clean accuracy: {accuracy:.2%}")
        return accuracy

    def _evaluate(
        self,
        chosen: Sequence[NamedAttack],
        x: Tensor,
        y: Tensor,
        bs: int,
        return_labels: bool,
        path: Path | None,
    ) -> Any:
        with self._evaluation_context():
            x, y = check_and_clamp(x, y, bs)
            first = x[:bs].to(self._place(x))
            clean = self._clean(x, bs)
            classes = check_answers(
                self._network, first, y[:bs].to(first.device), randomised=self.version == "rand"
            )
            check_labels(y, classes)
            fitted = [self._fitted(stage, classes) for stage in chosen]
            attacks = [[stage.name, asdict(stage.search)] for stage in fitted]  # type: ignore[call-overload]
            own = staged.evaluation_identity(
                self.model,
                clean,
                x,
                y,
                lambda images: self._classes(images, bs),
                attacks=attacks,
                seed=self.seed,
                draws=image_draws.VERSION,
                **{"batch size": bs},
            )
            progress = staged.restore(path, own)
            if progress is None:
                seed = random.SystemRandom().getrandbits(31) if self.seed is None else self.seed
                progress = staged.begin(own, clean == y, seed)
            earlier = int((clean == y).sum()) - int(staged.standing(progress, len(x)).sum())
            correct = float((clean == y).double().mean())
            names = [stage.name for stage in fitted]
            self._report(f"AutoAttack {self.version}: {', '.join(names)}; clean accuracy: {correct:.2%}")
            run = BatchAttacks(self._network, fitted, first, self.norm, self.eps, progress.seed, bs)
            x_adv = x.clone()  # of an image that is robust, or was broken before a resume, the image itself
            staged.run_stages(
                run.attack, run.fooled, x, y, progress, names, bs, path, self._stage_done, x_adv=x_adv
            )
            run.warn()
            if earlier:
                warn_resumed(earlier, float(staged.standing(progress, len(x)).double().mean()))
            check_square({"clean": correct, **progress.accuracies})
            self.seconds = dict(progress.seconds)
            return (x_adv, self._classes(x_adv, bs)) if return_labels else x_adv

    def _fitted(self, stage: NamedAttack, classes: int) -> NamedAttack:
        """`stage` with no more target classes than a network of `classes` classes has."""
        stage.check_classes(classes)
        search: Any = stage.search
        if getattr(search, "targets", 0) < classes:
            return stage
        self._report(
            f"{stage.name}: {classes - 1} target classes instead of {search.targets}, all of the network's"
        )
        return replace(stage, search=replace(search, targets=classes - 1))

    def _classes(self, x: Tensor, bs: int) -> Tensor:
        """The class of each image, (N,), on the device of `x`."""
        return predict_in_batches(self._network, x, bs, self._place(x))

    def _clean(self, x: Tensor, bs: int) -> Tensor:
        """The class of each clean image; UserError where logits are NaN."""
        classes = self._classes(x, bs)
        check_classified(classes, "images")
        return classes

    def _place(self, x: Tensor) -> torch.device:
        """The device on which images `x` are attacked."""
        return self.device or x.device

    @contextmanager
    def _evaluation_context(self) -> Iterator[None]:
        """Full float32, eval mode and gradients, whatever the caller's context."""
        if self.device is not None:
            check_place(self.model, self.device)
        mode = attack_mode(self.model, "eval") if isinstance(self.model, nn.Module) else nullcontext()
        with exact_float32(), torch.inference_mode(False), torch.enable_grad(), mode:
            yield

    def _stage_done(self, name: str, accuracy: float, seconds: float) -> None:
        self._report(staged.stage_summary(name, accuracy, seconds))

    def _report(self, text: str) -> None:
        """Print `text` if `verbose`, and append it to the log file, as AutoAttack does."""
        if self.verbose:
            print(text)
        if self.log_path is not None:
            with self.log_path.open("a") as file:
                file.write(text + "\n")
