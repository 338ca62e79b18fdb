"""The columns of an evaluation's table: what `--attacks` names."""

from dataclasses import dataclass

from fastdynat.attacks import APGD, PGD, NamedAttack, parse_attack, stages
from fastdynat.attacks.catalog import AUTOATTACK, FAST_AUTOATTACK, KNOWN, TRANSFER
from fastdynat.commands.evaluate.reference_autoattack import require_reference
from fastdynat.errors import UserError

# Attacks that half precision was shown not to weaken.
AMP_PROVEN = (PGD,)


@dataclass(frozen=True)
class Reference:
    """The numbers of a run of the AutoAttack package."""

    norm: str
    eps: float
    version: str = "standard"


@dataclass(frozen=True)
class Column:
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


def parse_columns(names: str, *, eps: float, step_size: float, norm: str, amp: str) -> list[Column]:
    """The columns that the comma-separated `names` stand for.

    Raises:
        UserError: an unknown name, a name twice, an attack that does not go with `norm` or `amp`, or a
            missing package.
    """
    asked = [name.strip().lower() for name in names.split(",") if name.strip()]
    if not asked:
        raise UserError(f"no attack named in {names!r}; for example clean,fgsm,pgd20,cw")
    if len(set(asked)) != len(asked):
        raise UserError(f"attacks named twice in {names!r}")
    columns = [_column(name, eps=eps, step_size=step_size, norm=norm) for name in asked]
    for column in columns:
        _check_amp(column, amp)
    return columns


def check_classes(columns: list[Column], classes: int) -> None:
    """Raise UserError where an attack of `columns` is not defined for a network with so few classes."""
    for column in columns:
        own = (
            stages(column.reference.norm, column.reference.eps)
            if column.reference is not None
            else column.stages
        )
        for attack in (column.attack, *own):
            if attack is not None and isinstance(attack.search, APGD):
                attack.search.check_classes(classes)


def _column(name: str, *, eps: float, step_size: float, norm: str) -> Column:
    if name == AUTOATTACK:
        require_reference(norm)
        return Column(name, reference=Reference(norm, eps))
    if name == FAST_AUTOATTACK:
        named = (NamedAttack(f"{FAST_AUTOATTACK}/{stage.name}", stage.search) for stage in stages(norm, eps))
        return Column(name, stages=tuple(named))
    inner = name.removeprefix(TRANSFER)
    attack = parse_attack(inner, eps=eps, step_size=step_size, norm=norm, known=KNOWN)
    if inner == name:
        return Column(name, attack)
    if attack.search is None:
        raise UserError(f"{name}: the clean accuracy is no attack, so nothing transfers; name another one")
    return Column(name, NamedAttack(name, attack.search), transfer=True)


def needs_float32(names: str, norm: str) -> str:
    """The first of the comma-separated attack names that half precision might weaken; "" where there is none.

    Names that cannot be read are left to `parse_columns`.
    """
    for name in filter(None, (part.strip().lower() for part in names.split(","))):
        if name in (AUTOATTACK, FAST_AUTOATTACK):
            return name
        try:
            column = _column(name, eps=0.1, step_size=0.1, norm=norm)
        except UserError:
            continue
        if not _proven_in_half(column):
            return name
    return ""


def _proven_in_half(column: Column) -> bool:
    if column.stages or column.reference is not None:
        return False
    return (
        column.attack is None or column.attack.search is None or isinstance(column.attack.search, AMP_PROVEN)
    )


def _check_amp(column: Column, amp: str) -> None:
    if amp != "off" and not _proven_in_half(column):
        raise UserError(
            f"{column.name} in half precision is not shown to be as strong: leave --amp {amp} out, or the attack"
        )
