"""PGD-20 on multiples of the logits, beside AutoAttack, for records of a race, as JSON.

    python bench/logit_scale.py cpu2-noise,cpu2-35 --race runs/speedrun --data-dir cifar10-jpeg \
        --json bench/results/logit_scale_cpu.json

Multiplying the logits changes no prediction, but sharpens the softmax, whose cross-entropy PGD-20 climbs. The
images are the race's sample; AutoAttack's accuracy on them is the race's own.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fastdynat.attacks import parse_attack
from fastdynat.commands.speedrun.lap_judge import sample_rows
from fastdynat.config.eval_config import EvalConfig
from fastdynat.data import Images, load_test
from fastdynat.evaluation.measure import exact_float32, measure
from fastdynat.models import Divide
from fastdynat.runs import describe_environment, load_network, source_commit

SCALES = (0.5, 1.0, 2.0, 4.0, 8.0)


def row_of(lap: dict[str, Any], weights: Path, images: Images, rows: Tensor) -> dict[str, Any]:
    """Accuracies of one lap's network under PGD-20 that reads its logits times each scale.

    images: the race's sample, those at `rows` of the test set.
    """
    network = load_network(weights)[0].requires_grad_(False)
    attack = parse_attack("pgd20", eps=8 / 255, step_size=2 / 255, norm="linf")
    found = {}
    for scale in SCALES:
        measured = measure(
            network,
            images,
            attack,
            device=torch.device("cpu"),
            batch_size=250,
            seed=EvalConfig().seed,  # the race's, so that its starts are the same
            numbers=rows,
            source=nn.Sequential(network, Divide(1 / scale)),
        )
        found[f"{scale:g}"] = measured.accuracy
    sample = lap["sample"]
    return {
        "seed": lap["seed"],
        "pgd20": found,
        "race_pgd20": sample["pgd20"],
        "autoattack": sample["autoattack"]["accuracy"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("records", help="names of records, separated by commas")
    parser.add_argument(
        "--race", type=Path, action="append", required=True, help="folder of a race; once per race"
    )
    parser.add_argument("--data", default="imagefolder")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--json", type=Path, help="where the results go")
    ours = parser.parse_args()
    _, everything = load_test(ours.data, ours.data_dir, image_size=None, download=False)
    rows = sample_rows(everything.labels)
    images = everything.part(rows)
    table = Table(*("record", "seed", *(f"x{scale:g}" for scale in SCALES), "race's", "AutoAttack"))
    records = {}
    with exact_float32():
        for name in ours.records.split(","):
            race = next((folder for folder in ours.race if (folder / f"{name}.json").is_file()), None)
            if race is None:
                sys.exit(f"logit_scale: error: no {name}.json in {', '.join(map(str, ours.race))}")
            laps = json.loads((race / f"{name}.json").read_text())["laps"]
            if any(lap["sample"] is None for lap in laps):
                sys.exit(f"logit_scale: error: {name} was raced with --quick, without AutoAttack")
            records[name] = [row_of(lap, race / lap["folder"] / lap["weights"], images, rows) for lap in laps]
            for row in records[name]:
                shares = (*row["pgd20"].values(), row["race_pgd20"], row["autoattack"])
                table.add_row(name, str(row["seed"]), *(f"{100 * share:.1f}" for share in shares))
    Console(width=110).print(table)
    if ours.json:
        document = {
            "format": "fastdynat-logit-scale/1",
            "command": " ".join(["python", *sys.argv]),
            "commit": source_commit(),
            "environment": describe_environment() | {"threads": torch.get_num_threads()},
            "images": len(images),
            "scales": list(SCALES),
            "records": records,
        }
        ours.json.parent.mkdir(parents=True, exist_ok=True)
        ours.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
