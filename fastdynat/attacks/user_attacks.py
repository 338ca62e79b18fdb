"""Attacks of users' files: ``path/to/file.py:NAME``, a class or a name that the file registers."""

import hashlib
import inspect
import json
import re
from dataclasses import asdict, dataclass, is_dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastdynat.attack_engine.ascent import Ascent
from fastdynat.attack_engine.attack_result import AttackResult, as_attack_result
from fastdynat.attack_engine.shrinking_batch import Tick, no_tick
from fastdynat.attacks.ball import distance, inside
from fastdynat.attacks.interface import Attack, Nearest
from fastdynat.attacks.registry import NORMS, AttackEntry, Radii, entries, from_fields
from fastdynat.errors import UserError
from fastdynat.ops.image_draws import Randomness
from fastdynat.user_code import error_with_place, import_user_module, short_name, source_of


@dataclass(frozen=True)
class UserAttack:
    """An attack of a user's file, whose every result is checked: its shape, its range, its ball.

    Attributes:
        name: as tables show it (`short_name`).
        attack: the user's own.
        source: sha256 of the file; part of the cache's key, so that an edited attack is measured again.
        eps: radius of the threat model in [0, 1] pixel units.
        threat: norm of the threat model.
    """

    name: str
    attack: Attack
    source: str
    eps: float
    threat: str

    @property
    def norm(self) -> str:
        """The norm of the user's attack."""
        return self.attack.norm

    def check_classes(self, classes: int) -> None:
        """Ask the user's attack, if it has this check."""
        check = getattr(self.attack, "check_classes", None)
        if check is not None:
            check(classes)

    def __call__(
        self,
        ascent: Ascent,
        x: Tensor,
        labels: Tensor,
        *,
        generator: Randomness = None,
        tick: Tick = no_tick,
    ) -> AttackResult:
        """Attack, and check what comes back; a tensor alone is taken as `AttackResult.x_adv`.

        A `Nearest` is judged in the ball of the threat model, if that has its norm.

        Raises:
            UserError: images of another shape or type, outside [0, 1], or outside the ball.
        """
        attack: Any = self.attack  # may be one of this package, with other numbers, and take `ImageDraws`
        found = attack(ascent, x.clone(), labels, generator=generator, tick=tick)
        result = as_attack_result(found, x, self.name)
        self._check(result, x)
        if isinstance(result, Nearest) and self.norm == self.threat:
            return replace(result, eps=min(result.eps, self.eps))
        return result

    def _check(self, result: AttackResult, x: Tensor) -> None:
        x_adv = result.x_adv
        if x_adv.shape != x.shape or x_adv.dtype != x.dtype or x_adv.device != x.device:
            raise UserError(
                f"{self.name} returned {x_adv.dtype} {tuple(x_adv.shape)} on {x_adv.device} for images "
                f"{x.dtype} {tuple(x.shape)} on {x.device}"
            )
        if not bool(((x_adv >= 0) & (x_adv <= 1)).all()):
            raise UserError(f"{self.name} returned pixels outside [0, 1] or NaN; clamp them")
        if isinstance(result, Nearest):
            away = distance(x_adv, x, self.norm)
            wrong = result.found & ~torch.isclose(result.distance.to(away), away, rtol=1e-3, atol=1e-5)
            if bool(wrong.any()):
                raise UserError(f"{self.name} returned distances that are not the {self.norm} ones of x_adv")
        elif self.norm == self.threat and not bool(inside(x_adv, x, self.norm, self.eps).all()):
            most = float(distance(x_adv, x, self.norm).max())
            raise UserError(
                f"{self.name} returned images at {self.norm} distance up to {most:.4g}, outside the ball of "
                f"eps {self.eps:.4g}; project them"
            )


def check_user_attack(name: str) -> None:
    """Import the file of ``file.py:NAME`` and look NAME up.

    Raises:
        UserError: the file or the name is missing, or a class of this name is no attack.
    """
    module = import_user_module(name)
    if _registered_name(module, name) is None:
        _class_of(module, name)


def build_user_attack(name: str, radii: Radii) -> tuple[UserAttack, bool]:
    """The attack ``file.py:NAME`` and whether it may run in half precision.

    NAME is an attack's dataclass, or a name that the file registers.

    Raises:
        UserError: see `check_user_attack`; also numbers or a norm that the attack refuses.
    """
    module = import_user_module(name)
    named = _registered_name(module, name)
    try:
        if named is not None:
            attack: Any = named[0].build(named[1], radii)
        else:
            attack = from_fields(_class_of(module, name), radii, {})
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{name} cannot be built: {error_with_place(error)}") from error
    _check_class(type(attack), name)
    if getattr(attack, "norm", None) not in NORMS:
        raise UserError(
            f"{name} is no attack: it needs a field or property `norm`, one of {', '.join(NORMS)}; "
            'for example the field norm: str = "linf"'
        )
    try:
        json.dumps(asdict(attack))
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{name}: its fields must be plain values, because the cache is keyed by them: {error}"
        ) from None
    source = hashlib.sha256(source_of(module)).hexdigest()
    half_precision = named is not None and named[0].half_precision
    return UserAttack(short_name(name), attack, source, radii.eps, radii.norm), half_precision


def _class_of(module: ModuleType, name: str) -> type:
    """The attack's class that `name` names in `module`."""
    origin, _, attribute = name.rpartition(":")
    cls: Any = getattr(module, attribute, None)
    if cls is None:
        raise UserError(f"{name}: {origin} has no {attribute!r}")
    _check_class(cls, name)
    return cls


def _registered_name(module: ModuleType, name: str) -> tuple[AttackEntry, re.Match[str]] | None:
    """The entry that `module` registers for the class, function or attack of `name`, and the match."""
    name = name.rpartition(":")[2]
    for entry in entries():
        if entry.module == module.__name__:
            listed = next(iter(entry.help))
            if match := entry.match(listed if entry.constructor == name else name):
                return entry, match
    return None


def _check_class(cls: Any, name: str) -> None:
    """Raise UserError unless `cls` is a dataclass that can be called as an attack."""
    if not isinstance(cls, type) or not is_dataclass(cls):
        kind = cls.__name__ if isinstance(cls, type) else type(cls).__name__
        raise UserError(
            f"{name} is no attack: {kind} is not a dataclass; decorate the class with @dataclass(frozen=True)"
        )
    # Of a class without the method, `cls.__call__` is the constructor.
    call: Any = next((vars(base)["__call__"] for base in cls.__mro__ if "__call__" in vars(base)), None)
    try:
        inspect.signature(call).bind(None, None, None, None, generator=None, tick=None)
    except TypeError:
        raise UserError(
            f"{name} is no attack: it needs __call__(self, ascent, x, labels, *, generator=None, "
            "tick=no_tick)"
        ) from None
