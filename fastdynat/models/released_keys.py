"""Names of released state dicts, mapped to those of our networks.

DeepMind's code (Gowal et al. 2020, 2021), and what was built on it: DM-Improves-AT, Bartoldson et al. 2024,
Cui et al. 2023, Peng et al. 2023. Most of these releases keep mean and standard deviation in the code:
constants of CIFAR that `--normalize released` has.
"""

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

Rules = tuple[tuple[str, str], ...]
NORMS: Rules = ((r"\.batchnorm_0\.", ".bn1."), (r"\.batchnorm_1\.", ".bn2."))
WIDE: Rules = (
    *NORMS,
    (r"^init_conv\.", "conv1."),
    (r"^batchnorm\.", "bn1."),
    (r"^logits\.", "fc."),
    (r"\.conv_1\.", ".conv2."),
    (r"\.conv_0\.", ".conv1."),
    (r"\.shortcut\.", ".convShortcut."),
    *((rf"^layer\.{group}\.block\.", f"block{group + 1}.layer.") for group in range(3)),
)
SQUEEZED: Rules = (  # the blocks of RaWRN hold a wide block
    *WIDE,
    (r"^(block\d)\.layer\.(\d+)\.(?!se\.)", r"\1.\2.inner."),
    (r"^(block\d)\.layer\.(\d+)\.", r"\1.\2."),
)
PREACT: Rules = (
    *NORMS,
    (r"^conv_2d\.", "conv1."),
    (r"^batchnorm\.", "bn."),
    (r"^logits\.", "linear."),
    (r"\.conv_2d_([12])\.", r".conv\1."),
    (r"\.shortcut\.", ".shortcut.0."),
    *((rf"^layer_{group}\.", f"layer{group + 1}.") for group in range(4)),
)
RA_RESNET: Rules = (
    (r"^normalization\.", "normalize."),
    (r"^stem\.stem\.stem\.0\.", "conv1."),
    (r"^stem\.stem\.stem\.1\.", "bn1."),
    (r"^stages\.stage(\d)\.stage\d-block(\d+)\.", r"layer\1.\2."),
    *((rf"\.F\.{letter}\.0\.", f".conv{number}.") for number, letter in enumerate("abc", 1)),
    *((rf"\.F\.{letter}\.1\.", f".bn{number}.") for number, letter in enumerate("abc", 1)),
    (r"\.F\.se\.", ".se."),
    (r"\.proj\.", ".shortcut."),
)
# A key that only these releases have, without wrappers.
SIGNS = {"init_conv.weight": WIDE, "conv_2d.weight": PREACT, "stem.stem.stem.0.weight": RA_RESNET}
FRONT = re.compile(r"((module|model|_orig_mod)\.)*")


def in_our_names(state: Mapping[str, Tensor], wanted: Iterable[str]) -> dict[str, Tensor]:
    """`state` by our names, without wrappers' prefixes, if it is one of the releases above; else as it is.

    wanted: the keys of the network that takes it; a network that has such names itself keeps them.
    """
    bare = {FRONT.sub("", key, count=1): value for key, value in state.items()}
    names = {key.removeprefix("net.") for key in wanted}
    rules = next((found for sign, found in SIGNS.items() if sign in bare and sign not in names), None)
    if rules is None or len(bare) < len(state):
        return dict(state)
    if rules is WIDE and any(".se." in key for key in bare):
        rules = SQUEEZED
    return {_substituted(key, rules): value for key, value in bare.items()}


def _substituted(key: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key
