"""Tables of results, drawn from the files in bench/results, each with how it was made."""

from collections.abc import Callable, Iterable

from claim_tables import TABLES as CLAIM_TABLES
from gpu_tables import TABLES as GPU_TABLES
from profile_tables import TABLES as PROFILE_TABLES
from scaling_tables import TABLES as SCALING_TABLES
from speedrun_tables import TABLES as SPEEDRUN_TABLES
from speedrun_tables import race_row
from tables import RESULTS, Values, made, number, percent, read, table
from training_tables import TABLES as TRAINING_TABLES

METHODS = {
    "natural": "natural",
    "madry": "Madry",
    "dynat": "DYNAT",
    "trades": "TRADES",
    "lbgat": "LBGAT",
    "dyart": "DyART",
    "fgsm_rs": "FGSM-RS",
}
RELEASED = "released loop in plain PyTorch"
FLOAT32 = "engine_cpu_fp32"
# The operators were timed at this commit, when plain torch projected by bisection; now it sorts.
BISECTED = "cbc46512113149c0"
AUTO = {
    "auto_small_cpu": "`small`, batch 128",
    "auto_small_avx2_cpu": "the same, limited to AVX2",
    "auto_resnet18_cpu": "`resnet18`, batch 8",
}


def controls(name: str) -> str:
    """Natural, Madry and DYNAT: accuracies of the last checkpoints, and the rate of the fastest epoch."""
    values, rows = read(name), []
    trained = [entry for entry in values["commands"] if "epochs" in entry]
    rates = {entry["command"].split("--method ")[1].split()[0]: rate(entry) for entry in trained}
    for result in values["results"]:
        if result["checkpoint"] != "last":
            continue
        accuracy = accuracies(result)
        method, gap = result["method"], f"{100 * result['robustness_gap']:.1f}"
        shares = [percent(accuracy[name]) for name in ("clean", "pgd20")]
        rows.append([METHODS[method], *shares, gap, number(rates[method])])
    return table(["Method", "Clean", "PGD-20", "Gap", "Images/s in training"], rows)


def rate(entry: Values) -> float:
    """Images per second of the fastest epoch."""
    return max(float(epoch["images_per_s"]) for epoch in entry["epochs"])


def accuracies(result: Values) -> dict[str, float]:
    """Accuracy by attack."""
    return {attack["attack"]: attack["accuracy"] for attack in result["attacks"]}


def compare() -> str:
    """Six methods on one budget of seconds."""
    rows = []
    for row in read("compare_cifar10_jpeg_small_cpu")["rows"]:
        if row["checkpoint"] != "last":
            continue
        mean = {name: values["mean"] for name, values in row["accuracy"].items()}
        rows.append(
            [
                METHODS[row["method"]],
                str(row["epochs"]),
                f"{row['train_seconds']['mean']:.0f}",
                f"{row['seconds_per_epoch']['mean']:.1f}",
                number(row["images_per_s"]["mean"]),
                *(percent(mean[name]) for name in ("clean", "pgd20", "cw")),
                f"{100 * row['robustness_gap']['mean']:.1f}",
            ]
        )
    return table(
        ["Method", "Epochs", "Seconds", "s/epoch", "Images/s", "Clean", "PGD-20", "C&W", "Gap"], rows
    )


def report() -> str:
    """The same six runs under AutoAttack."""
    names = ("clean", "fgsm", "pgd20", "cw", "fast-autoattack")
    rows = []
    for result in read("eval_cifar10_jpeg_small_cpu")["results"]:
        accuracy = accuracies(result)
        rows.append([METHODS[result["run"].split("-")[0]], *(percent(accuracy[name]) for name in names)])
    return table(["Method", "Clean", "FGSM", "PGD-20", "C&W", "fast-autoattack"], rows)


def engine(name: str) -> str:
    """Attack and step beside torchattacks and the released loop."""
    rows = [row for row in read(name)["rows"] if "images_per_s" in row and not row["switch"]]
    base = {"attack": "torchattacks.PGD", "step": RELEASED}
    speed = {(row["kind"], row["name"]): row["images_per_s"]["median"] for row in rows}
    lines = []
    for (kind, what), value in sorted(speed.items(), key=lambda item: (item[0][0], item[1])):
        ours = next(row["ours"] for row in rows if (row["kind"], row["name"]) == (kind, what))
        first = speed.get((kind, base[kind]))
        ratio = "" if first is None else f"{value / first:.2f}"
        lines.append([kind, f"ours, {what}" if ours else what, f"{value:.1f}", ratio])
    return table(["", "Implementation", "Images/s", "Speed-up over the reference"], lines)


TRANSFORMERS = {"vit_tiny_cpu": "ViT-tiny", "convnext_atto_cpu": "ConvNeXt-atto"}


def transformers() -> str:
    """A ViT and a ConvNeXt: attack and step beside others', and what --grad-checkpointing does."""
    parts = []
    for name, network in measured(TRANSFORMERS).items():
        compared = read(name)["checkpointing"]
        peaks = [f"{compared[key]['peak_bytes'] / 2**20:,.0f} MiB" for key in ("without", "with")]
        times = compared["with"]["seconds"] / compared["without"]["seconds"]
        parts += [
            f"{network}, with `--grad-checkpointing`:",
            engine(name),
            f"Peak memory of {network}'s step: {peaks[0]}, with `--grad-checkpointing` {peaks[1]}; "
            f"the step then takes {times:.2f} times as long.",
        ]
    return "\n\n".join(parts) or "Not measured yet: `bench/transformers.sh`."


def measured(names: Iterable[str]) -> dict[str, str]:
    """Those of the networks `names` whose results are stored."""
    return {name: TRANSFORMERS[name] for name in names if (RESULTS / f"{name}.json").exists()}


def switches() -> str:
    """The gain of each switch of the engine."""
    rows = [
        [entry["kind"], f"`{entry['turned']}`", f"{entry['gain']:.2f}"]
        for entry in read("engine_cpu")["switches"]
    ]
    return table(["", "Compared with", "Gain"], rows)


def profile() -> str:
    """Shares of a step's time."""
    seconds = read("engine_cpu")["profile"]
    total = sum(seconds.values())
    return table(["Part", "Share"], [[name, percent(value / total)] for name, value in seconds.items()])


def auto() -> str:
    """The choices of `auto`, beside the best that was measured."""
    rows = []
    for name, where in AUTO.items():
        for decision in read(name)["decisions"]:
            if "none" in decision["flags"] or ":" in decision["flags"]:
                continue
            rows.append(
                [
                    where,
                    f"`{decision['flags']}`",
                    *(decision[key] for key in ("chosen", "best")),
                    f"{decision['ratio']:.2f}",
                ]
            )
    return table(["Network, machine", "Flags", "Chosen", "Fastest", "Speed relative to the fastest"], rows)


def fidelity() -> str:
    """The strength of the fast attack."""
    rows = []
    for row in read("fidelity_small_cpu")["rows"]:
        if found := row["fidelity"]:
            signs = percent(found["sign_mass"], 2)
            losses = [f"{found[f'loss_{which}']:.4f}" for which in ("clean", "reference", "fast")]
            rows.append([row["name"], *losses, signs])
    return table(
        ["Attack", "Loss, clean", "Loss, reference", "Loss, engine", "Gradient mass with equal signs"], rows
    )


def operators() -> str:
    """Each operator beside plain PyTorch and torch.compile."""
    times: dict[str, dict[str, float]] = {}
    values = read("operators_cpu")
    for row in values["rows"]:
        times.setdefault(row["case"], {})[row["implementation"]] = row["us"]
    sizes = {"cifar": "256x3x32x32", "large-batch": "2048x3x32x32", "imagenet": "64x3x224x224"}
    rows = []
    for case, us in times.items():
        name, _, size = case.partition(" @ ")
        operator, comma, rest = name.partition(",")
        ratios = [f"{us[key] / us['cpp']:.1f}" for key in ("plain", "compiled")]
        label = f"`{operator}`{comma}{rest}"
        rows.append(
            [
                label,
                sizes.get(size, size),
                *(number(us[key]) for key in ("plain", "compiled", "cpp")),
                *ratios,
            ]
        )
    drawn = table(
        ["Operator", "Size", "plain torch", "torch.compile", "`cpp`", "speed-up", "over compiled"], rows
    )
    return f"{drawn}\n\n{bisected()}" if values["commit"].startswith(BISECTED) else drawn


def bisected() -> str:
    """What plain torch means in the rows of the projection."""
    ratios = []
    for case in read("dyart_cost_cpu")["cases"]:
        seconds = {row["name"]: row["seconds"]["median"] for row in case["rows"]}
        sorting, ours = (seconds[f"projections of an iteration: {way}"] for way in ("by sorting", "ours"))
        ratios.append(sorting / ours)
    return (
        "In the rows of `project_on_hyperplane`, plain torch and torch.compile project by 60 rounds of "
        "bisection. The published way, a sort, is faster: [beside it](#dyarts-cost), ours is "
        f"{min(ratios):.0f} to {max(ratios):.0f} times as fast."
    )


def autoattack(name: str) -> str:
    """Ours and the authors', stage by stage."""
    values, rows = read(name), []
    clock = values.get("clock", "seconds")
    for row in values["rows"]:
        theirs, ours = row["reference"], row["ours"]
        seconds = [f"{who[clock]:.1f} s" for who in (theirs, ours)]
        rows.append([row["stage"], *seconds, f"{row['ratio']:.2f}", f"{theirs['robust']}, {ours['robust']}"])
    total = values["seconds"]
    rows.append(
        ["all", f"{total['reference']:.1f} s", f"{total['ours']:.1f} s", f"{values['ratio']:.2f}", ""]
    )
    return table(["Stage", "Theirs", "Ours", "Speed-up", "Robust images: theirs, ours"], rows)


def minimal() -> str:
    """C&W-L2 and DeepFool beside torchattacks."""
    rows = []
    for row in read("minimal_attacks_cpu")["rows"]:
        seconds = [f"{row[key]['median']:.2f} s" for key in ("torchattacks_s", "fastdynat_s")]
        found = [
            f"{percent(row[key]['success'])}, {row[key]['mean_l2']:.4f}"
            for key in ("torchattacks", "fastdynat")
        ]
        rows.append([row["name"], *seconds, f"{row['times_faster']['median']:.1f}", *found])
    return table(["Attack", "Theirs", "Ours", "Speed-up", "Success, mean L2: theirs", "ours"], rows)


def loaders() -> str:
    """Images per second of each loader."""
    speed: dict[str, dict[str, float]] = {}
    for row in read("loaders_cpu")["rows"]:
        speed.setdefault(row["case"], {})[row["loader"].split(",")[0]] = row["images_per_s"]
    names = {
        "memory": "50,000 images of 32x32 in memory",
        "folder": "the same as JPEG files (`resident`: decoded beforehand)",
    }
    kinds = ("resident", "dali", "torch")
    rows = [
        [names[case.split(",")[0]], *(number(rates[kind]) for kind in kinds)] for case, rates in speed.items()
    ]
    return table(["Images", "`resident`", "`dali`", "`torch`"], rows)


def dyart() -> str:
    """The cost of DyART beside PGD training."""
    rows = []
    for case in read("dyart_cost_cpu")["cases"]:
        for row in case["rows"]:
            network = f"{case['network']}, batch {case['batch_size']}"
            milliseconds = 1000 * row["seconds"]["median"]
            rows.append([network, row["name"], str(row["passes"] or ""), f"{number(milliseconds)} ms"])
    return table(["Network", "What", "Forward-equivalents", "Time"], rows)


def summary() -> str:
    """The README's table: what takes how long, theirs and ours."""
    rows = []
    autocast = "torchattacks.PGD under bf16 autocast"
    for what, file, kind, theirs, ours in (
        ("PGD-10 on ResNet-18, torchattacks", FLOAT32, "attack", "torchattacks.PGD", "fp32 compiled"),
        ("DYNAT step on ResNet-18, released loop", FLOAT32, "step", RELEASED, "fp32 compiled"),
        ("PGD-10 in bf16, torchattacks under autocast", "engine_cpu", "attack", autocast, "bf16 compiled"),
        ("DYNAT step, ours in bf16, released loop", "engine_cpu", "step", RELEASED, "bf16 compiled"),
    ):
        speed = {(row["kind"], row["name"]): row for row in read(file)["rows"] if "images_per_s" in row}
        rates = [speed[kind, name]["images_per_s"]["median"] for name in (theirs, ours)]
        rows.append([what, *(f"{rate:.1f} images/s" for rate in rates), f"{rates[1] / rates[0]:.1f}"])
    whole = read("autoattack_small_cpu")
    seconds = [f"{whole['seconds'][who]:.1f} s" for who in ("reference", "ours")]
    rows.append(["AutoAttack on 200 images, its authors' package", *seconds, f"{whole['ratio']:.1f}"])
    for row in read("minimal_attacks_cpu")["rows"]:
        seconds = [f"{row[key]['median']:.2f} s" for key in ("torchattacks_s", "fastdynat_s")]
        rows.append(
            [
                f"{row['name'].split(',')[0]} on 200 images, torchattacks",
                *seconds,
                f"{row['times_faster']['median']:.1f}",
            ]
        )
    return table(["Task, reference", "Theirs", "Ours", "Speed-up"], [*rows, race_row()])


TABLES: dict[str, tuple[Callable[[], str], tuple[str, ...]]] = {
    "summary": (summary, ("engine_cpu", FLOAT32, "autoattack_small_cpu", "minimal_attacks_cpu")),
    "digits": (lambda: controls("digits_small_cpu"), ("digits_small_cpu",)),
    "cifar10": (lambda: controls("cifar10_jpeg_small_cpu"), ("cifar10_jpeg_small_cpu",)),
    "compare": (compare, ("compare_cifar10_jpeg_small_cpu",)),
    "report": (report, ("eval_cifar10_jpeg_small_cpu",)),
    "engine": (lambda: engine("engine_cpu"), ("engine_cpu",)),
    "engine-float32": (lambda: engine("engine_cpu_fp32"), ("engine_cpu_fp32",)),
    "transformers": (transformers, tuple(measured(TRANSFORMERS))),
    "switches": (switches, ("engine_cpu",)),
    "profile": (profile, ("engine_cpu",)),
    "auto": (auto, tuple(AUTO)),
    "fidelity": (fidelity, ("fidelity_small_cpu",)),
    "operators": (operators, ("operators_cpu",)),
    "autoattack": (lambda: autoattack("autoattack_small_cpu"), ("autoattack_small_cpu",)),
    "autoattack-resnet18": (
        lambda: autoattack("autoattack_resnet18_tv_cpu"),
        ("autoattack_resnet18_tv_cpu",),
    ),
    "minimal": (minimal, ("minimal_attacks_cpu",)),
    "loaders": (loaders, ("loaders_cpu",)),
    "dyart": (dyart, ("dyart_cost_cpu",)),
    **CLAIM_TABLES,
    **GPU_TABLES,
    **PROFILE_TABLES,
    **SPEEDRUN_TABLES,
    **SCALING_TABLES,
    **TRAINING_TABLES,
}


def render(name: str) -> str:
    """The table called `name`, and below it how it was made."""
    draw, sources = TABLES[name]
    return f"{draw()}\n\n{made(*sources)}"
