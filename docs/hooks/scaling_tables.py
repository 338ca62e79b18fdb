"""Tables about many processes: what a model predicts for GPUs, and what was measured."""

from tables import Values, number, percent, read, table


def model() -> str:
    """Predicted speed on 8 and 64 GPUs."""
    rows = []
    for row in read("scaling_model")["rows"]:
        times = [row["compute_seconds"], row["all_reduce_seconds"]]
        rows.append(
            [
                f"{row['network']}, {row['attack_steps']} steps",
                str(row["gpus"]),
                f"{row['global_batch']:,}",
                str(row["images_per_gpu"]),
                f"{row['bytes_per_gpu'] / 1e6:,.0f} MB",
                *(f"{1e3 * seconds:.2f} ms" for seconds in times),
                *(percent(row["kept_by_communication"][name]) for name in ("apart", "overlapped")),
                percent(row["efficiency"]["apart"]),
            ]
        )
    header = ["Network, attack", "GPUs", "Batch", "per GPU", "Sent per GPU", "Compute", "All-reduce"]
    return table([*header, "Computing", "if overlapped", "Efficiency"], rows)


def memory() -> str:
    """Momentum of SGD, whole and sharded."""
    rows = []
    for name, row in {row["network"]: row for row in read("scaling_model")["rows"]}.items():
        size = row["momentum_bytes"]
        cells = [size, *(size / world for world in (8, 64))]
        parameters = f"{row['parameters'] / 1e6:.1f} M"
        rows.append([name, parameters, *(f"{value / 2**30:.2f} GiB" for value in cells)])
    return table(["Network", "Parameters", "Momentum on each GPU", "over 8 GPUs", "over 64 GPUs"], rows)


def constants() -> str:
    """The assumptions of the model."""
    c = read("scaling_model")["constants"]
    latency = ", ".join(f"{1e6 * seconds:.0f} us on {gpus} GPUs" for gpus, seconds in c["latency"])
    rows = [
        [
            "bf16 matrix product",
            f"{c['flops'] / 1e12:.0f} TFLOP/s, of which a step reaches {percent(c['share'], 0)}",
        ],
        ["memory", f"{c['copied'] / 1e12:.1f} TB/s"],
        ["shortest kernel, in a CUDA graph", f"{1e6 * c['shortest']:.0f} us"],
        ["NVLink 4, per GPU and direction", f"{c['nvlink'] / 1e9:.0f} GB/s"],
        ["InfiniBand NDR, a 400 Gbit/s card per GPU", f"{c['nic'] / 1e9:.0f} GB/s"],
        ["bandwidth that a collective reaches", percent(c["reached"], 0)],
        ["latency of an all-reduce", latency],
        ["size of a bucket, if overlapped", f"{c['bucket'] >> 20} MiB"],
    ]
    return table(["Assumption", "Value"], rows)


def measured() -> str:
    """Images per second on several processes beside one."""
    rows = []
    for case in read("scaling_cpu")["cases"]:
        for row in case["rows"]:
            rows.append(line(case, row))
    header = ["Network, global batch", "Processes", "Threads each", "Images/s", "Speed-up over one process"]
    return table([*header, "over one with as many threads", "Passed to collectives", "Share of ideal"], rows)


def line(case: Values, row: Values) -> list[str]:
    """One row of `measured`."""
    spread = [row["seconds"][key] for key in ("p80", "p20")]
    slow, fast = (number(case["global_batch"] / seconds) for seconds in spread)
    ratios = [row.get(key) for key in ("speedup", "beside_threads")]
    share = row["share_of_ideal"]
    return [
        f"`{case['network']}`, {case['global_batch']}",
        str(row["processes"]),
        str(row["threads_of_each"]),
        f"{number(row['images_per_s'])} ({slow} to {fast})",
        *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
        f"{row['bytes_handed_over'] / 1e6:.2f} MB" if row["processes"] > 1 else "",
        "" if share is None else f"{share:.3f}",
    ]


def world_sizes() -> str:
    """The same trainings by one process and by two."""
    rows = []
    for name in SAME_TRAININGS:
        for run in read(name)["runs"]:
            last, stopped = run["metrics"][-1], run["interrupted_at"]
            processes = str(run["processes"])
            if stopped:
                processes += f", stopped after {stopped['epoch']} epochs and {stopped['epoch_step']} steps"
            scores = [last[key] for key in ("train_adv_acc", "val_clean_acc", "val_pgd10_acc")]
            memory = ", ".join(f"{held:.2f}" for held in run["peak_gib_by_process"])
            rows.append(
                [
                    NETWORKS[name],
                    processes,
                    f"{last['loss']:.4f}",
                    *map(percent, scores),
                    f"{run['weights_differ_from_first_by']:.2g}",
                    f"{memory} GiB",
                ]
            )
    header = ["Network", "Processes", "Loss", "Training accuracy, attacked", "Validation, clean", "PGD-10"]
    return table([*header, "Largest weight difference", "Memory"], rows)


def drift() -> str:
    """Differences from one process of one thread, by number of updates."""
    found = read("world_size_drift_cpu")["differences"]
    rows = [[updates, *(f"{value:.1e}" for value in row.values())] for updates, row in found.items()]
    names = next(iter(found.values()))
    return table(["Updates", *(name[0].upper() + name[1:] for name in names)], rows)


NETWORKS = {
    "world_sizes_cifar10_jpeg_small_cpu": "`small`, DYNAT",
    "world_sizes_image_folder_convnext_cpu": "`timm:convnext_atto`, Madry",
}
SAME_TRAININGS = tuple(NETWORKS)

TABLES = {
    "world-sizes": (world_sizes, SAME_TRAININGS),
    "world-size-drift": (drift, ("world_size_drift_cpu",)),
    "scaling-model": (model, ("scaling_model",)),
    "scaling-memory": (memory, ("scaling_model",)),
    "scaling-constants": (constants, ("scaling_model",)),
    "scaling": (measured, ("scaling_cpu",)),
}
