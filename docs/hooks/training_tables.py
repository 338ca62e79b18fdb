"""Tables of trainings with the ingredients of the records, on a CPU."""

from tables import Values, percent, read, table

EXTRA = "extra_images_cifar10_jpeg_small_cpu"
ARMS = {
    "originals": "{originals:,} images",
    "mixture": "{originals:,} images, and {extra:,} extra ones as {share} of each batch",
    "all": "{both:,} images",
}
NETWORKS = {"convnext_atto": "`timm:convnext_atto`", "vit_tiny": "`timm:vit_tiny_patch16_224`"}
TRAINED = tuple(f"{kind}_{name}_64px_cpu" for name in NETWORKS for kind in ("train", "eval"))


def extra_images() -> str:
    """Accuracies of the last checkpoints with and without extra images."""
    values, rows = read(EXTRA), []
    images = values["images"]
    words = {**images, "both": images["originals"] + images["extra"], "share": percent(images["share"], 0)}
    for arm, run in values["runs"].items():
        last = run["metrics"][-1]
        tested = at_the_end(run["test"])
        shares = [last["train_acc"], last["train_adv_acc"], tested["clean"], tested["pgd20"]]
        rows.append([ARMS[arm].format(**words), f"{last['loss']:.3f}", *map(percent, shares)])
    header = ["Training images", "Loss", "Training, clean", "attacked", "Test, clean", "PGD-20"]
    return table(header, rows)


def at_the_end(document: Values) -> dict[str, float]:
    """Accuracy of the last checkpoint by attack."""
    last = max(document["results"], key=lambda result: result["epoch"])
    return {attack["attack"]: attack["accuracy"] for attack in last["attacks"]}


def transformers_trained() -> str:
    """Loss by epoch, test accuracies, and the difference that an interruption makes."""
    rows = []
    for name, network in NETWORKS.items():
        whole, parts = read(f"train_{name}_64px_cpu")["runs"]
        tested = at_the_end(read(f"eval_{name}_64px_cpu"))
        losses = ", ".join(f"{epoch['loss']:.3f}" for epoch in whole["metrics"])
        cut = parts["interrupted_at"]
        rows.append(
            [
                network,
                losses,
                percent(tested["clean"]),
                percent(tested["pgd20"]),
                f"after {cut['epoch']} epochs and {cut['epoch_step']} steps",
                f"{parts['weights_differ_from_first_by']:g}",
            ]
        )
    header = ["Network", "Loss by epoch", "Test, clean", "PGD-20", "Interrupted", "Weight difference"]
    return table(header, rows)


TABLES = {
    "extra-images": (extra_images, (EXTRA,)),
    "transformers-trained": (transformers_trained, TRAINED),
}
