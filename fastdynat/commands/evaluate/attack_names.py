"""Every name that --attacks takes, known without torch."""

from fastdynat.attacks.registry import CLEAN, find, listed, split_names
from fastdynat.user_code import is_user_code

AUTOATTACK, FAST_AUTOATTACK, TRANSFER = "autoattack", "fast-autoattack", "transfer-"
_COLUMNS = {
    AUTOATTACK: "AutoAttack (Croce & Hein 2020), standard version, by its reference package (extra "
    "`autoattack`), in float32",
    FAST_AUTOATTACK: (
        "the same four attacks in the same order (apgd-ce, apgd-t, fab-t, square) on the fast engine"
    ),
    f"{TRANSFER}NAME": "NAME made on the network of --source and counted on this one",
    "my_attack.py:MyAttack": "an attack of your own: path/to/file.py:NAME or module:NAME",
}


def known_names() -> dict[str, str]:
    """Every name with one line of help, as ``fastdynat eval --list-attacks`` prints it."""
    return {**listed(), **_COLUMNS}


def check_attack_names(names: str, norm: str) -> None:
    """Refuse the comma-separated `names` that no attack has, before torch is imported.

    Args:
        norm: of the threat model; "auto" is not known yet. Users' files are not looked at.

    Raises:
        UserError: no name, a name twice, an unknown one, or an attack that has no form for `norm`.
    """
    for name in split_names(names):
        inner = name.removeprefix(TRANSFER)
        if inner == CLEAN or name in (AUTOATTACK, FAST_AUTOATTACK) or is_user_code(inner):
            continue
        entry, match = find(inner, known_names())
        if norm != "auto":
            entry.check_norm(match, norm)
