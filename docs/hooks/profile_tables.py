"""The table of where the time of a float32 attack on the CPU goes."""

from tables import percent, read, table

KINDS = {
    "3x3, Winograd": "3x3 by Winograd",
    "filters of Winograd": "Winograd's filter transforms, once per attack",
    "3x3, direct": "3x3, direct",
    "3x3, stride 2": "3x3, stride 2",
    "1x1, direct": "1x1, stride 1",
    "1x1, stride 2": "1x1, stride 2",
    "first layer": "first layer",
    "ReLU": "ReLU, forward and backward",
    "residual sums": "residual sums, of gradients too",
    "loss": "loss at the logits",
    "attack step": "attack step and start",
    "other": "other",
}


def attack_profile() -> str:
    """Shares by kind of layer, a column for each network and instruction set; last the speed."""
    columns = read("attack_profile_cpu")["rows"]
    found = {kind for column in columns for kind in column["shares"]}
    names = {**KINDS, **{kind: kind for kind in sorted(found - KINDS.keys())}}
    rows = [
        [name, *(percent(column["shares"].get(kind, 0.0)) for column in columns)]
        for kind, name in names.items()
        if kind in found
    ]
    for title, who in (("**ours**", "ours"), ("torchattacks", "torchattacks")):
        rows.append([title, *(f"{column['seconds'][who]:.2f} s" for column in columns)])
    rows.append(["**times faster**", *(f"{column['ratio']:.2f}" for column in columns)])
    header = [
        f"`{c['network']}`, batch {c['batch_size']} of {c.get('side', 32)} pixels, {c['instructions']}"
        for c in columns
    ]
    return table(["", *header], rows)


TABLES = {"attack-profile": (attack_profile, ("attack_profile_cpu",))}
