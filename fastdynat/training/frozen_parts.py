"""Parameters that a run does not train (--freeze), by patterns over their names."""

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from fastdynat.attack_engine.network_modes import keep_in_eval_mode
from fastdynat.errors import UserError, shown

FRONT = "net."  # before the names of a network behind the pixel normalisation


class FrozenParts:
    """The parameters of `model` that match one of `patterns`.

    Raises:
        UserError: a pattern is no regular expression or matches no parameter, or all are matched.
    """

    def __init__(self, model: nn.Module, patterns: Sequence[str]) -> None:
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.names: dict[str, str] = {}  # with the pattern that matches
        for pattern in patterns:
            found = [name for name in names if _matches(pattern, name)]
            if not found:
                raise UserError(
                    f"--freeze {shown(pattern)} matches none of the {len(names)} parameters, such as "
                    f"{', '.join([*names[:2], names[-1]])}"
                )
            self.names |= dict.fromkeys(found, pattern)
        if patterns and len(self.names) == len(names):
            raise UserError(
                f"--freeze {' '.join(map(shown, patterns))} matches all {len(names)} parameters, so none "
                "would be trained; use a narrower pattern"
            )
        self._model = model

    def refuse(self, names: Iterable[str], why: str) -> None:
        """Raise UserError if one of the parameters `names` is frozen."""
        for name in names:
            if name in self.names:
                raise UserError(f"--freeze {shown(self.names[name])}: {name} {why}")

    def freeze(self) -> None:
        """Freeze the parameters; a batch norm all of whose parameters are frozen stays in eval mode."""
        for name, parameter in self._model.named_parameters():
            if name in self.names:
                parameter.requires_grad_(False)
        if not self.names:
            return
        for module_name, module in self._model.named_modules():
            own = [f"{module_name}.{name}" for name, _ in module.named_parameters(recurse=False)]
            if own and all(name in self.names for name in own):
                keep_in_eval_mode(module)

    def described(self) -> str:
        """The frozen share of the parameters, in words."""
        counts = {name: p.numel() for name, p in self._model.named_parameters()}
        frozen = sum(counts[name] for name in self.names)
        return (
            f"frozen: {frozen:,} of {sum(counts.values()):,} weights in {len(self.names)} of {len(counts)} "
            "parameters; their batch norms keep their running statistics"
        )


def _matches(pattern: str, name: str) -> bool:
    bare = name.removeprefix(FRONT)
    if not pattern.startswith("^"):
        return fnmatchcase(name, pattern) or fnmatchcase(bare, pattern)
    try:
        return bool(re.search(pattern, name) or re.search(pattern, bare))
    except re.error as error:
        raise UserError(f"--freeze {shown(pattern)} is not a valid regular expression: {error}") from None
