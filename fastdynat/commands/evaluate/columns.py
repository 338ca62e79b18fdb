"""The columns of an evaluation's table: what `--attacks` names."""

from dataclasses import dataclass, replace

from fastdynat.attacks import NamedAttack, parse_attack, stages
from fastdynat.attacks.registry import split_names
from fastdynat.attacks.user_attacks import check_user_attack
from fastdynat.commands.evaluate.attack_names import AUTOATTACK, FAST_AUTOATTACK, TRANSFER, known_names
from fastdynat.commands.evaluate.reference_autoattack import require_reference
from fastdynat.errors import UserError
from fastdynat.user_code import is_user_code


@dataclass(frozen=True)
class Reference:
    """The numbers of a run of the AutoAttack package."""

    norm: str
    eps: float
    version: str = "standard"


@dataclass(frozen=True)
class AttackColumn:
    """One column: exactly one of the three ways to fill it.

    Attributes:
        attack: one attack (`measure`).
        stages: attacks one after the other, each on the images that still stand.
        reference: the AutoAttack package.
        transfer: whether `attack` is made on another network.
    """

    name: str
    attack: NamedAttack | None = None
    stages: tuple[NamedAttack, ...] = ()
    reference: Reference | None = None
    transfer: bool = False


def parse_columns(names: str, *, eps: float, step_size: float, norm: str, amp: str) -> list[AttackColumn]:
    """The columns that the comma-separated `names` stand for.

    Raises:
        UserError: an unknown name, a name twice, an attack that does not go with `norm` or `amp`, or a
            missing package.
    """
    columns = [_column(name, eps=eps, step_size=step_size, norm=norm) for name in split_names(names)]
    for column in columns:
        if [other.name for other in columns].count(column.name) > 1:  # two files of one name
            raise UserError(f"attacks named twice in {names!r}: two columns would be called {column.name}")
        _check_amp(column, amp)
    return columns


def check_target_classes(columns: list[AttackColumn], classes: int) -> None:
    """Raise UserError where an attack of `columns` is not defined for a network with so few classes."""
    for column in columns:
        own = (
            stages(column.reference.norm, column.reference.eps)
            if column.reference is not None
            else column.stages
        )
        for attack in (column.attack, *own):
            if attack is not None:
                attack.check_classes(classes)


def _column(name: str, *, eps: float, step_size: float, norm: str) -> AttackColumn:
    if name == AUTOATTACK:
        require_reference(norm)
        return AttackColumn(name, reference=Reference(norm, eps))
    if name == FAST_AUTOATTACK:
        named = (NamedAttack(f"{FAST_AUTOATTACK}/{stage.name}", stage.search) for stage in stages(norm, eps))
        return AttackColumn(name, stages=tuple(named))
    inner = name.removeprefix(TRANSFER)
    attack = parse_attack(inner, eps=eps, step_size=step_size, norm=norm, known=known_names())
    if inner == name:
        return AttackColumn(attack.name, attack)
    if attack.search is None:
        raise UserError(f"{name}: clean accuracy is not an attack, so nothing transfers; name an attack")
    transferred = replace(attack, name=f"{TRANSFER}{attack.name}")
    return AttackColumn(transferred.name, transferred, transfer=True)


def check_user_attacks(names: str) -> None:
    """Load the attacks of users' files among the comma-separated `names`, to refuse wrong ones early.

    Raises:
        UserError: see `check_user_attack`.
    """
    for name in split_names(names):
        if is_user_code(name):
            check_user_attack(name.removeprefix(TRANSFER))


def needs_float32(names: str, norm: str) -> str:
    """The first of the comma-separated attack names that half precision might weaken; "" where there is none.

    Wrong names are left to `parse_columns`.
    """
    try:
        parts = split_names(names)
    except UserError:
        return ""
    for name in parts:
        if name in (AUTOATTACK, FAST_AUTOATTACK):
            return name
        try:
            column = _column(name, eps=0.1, step_size=0.1, norm=norm)
        except UserError:
            continue
        if not _proven_in_half(column):
            return name
    return ""


def _proven_in_half(column: AttackColumn) -> bool:
    if column.stages or column.reference is not None:
        return False
    return column.attack is None or column.attack.half_precision


def _check_amp(column: AttackColumn, amp: str) -> None:
    if amp != "off" and not _proven_in_half(column):
        raise UserError(
            f"{column.name} was not shown to be as strong in half precision: leave --amp {amp} out, or the "
            "attack"
        )
