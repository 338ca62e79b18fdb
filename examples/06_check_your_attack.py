"""Is a robust accuracy real? Check it for masked gradients, and the fast attack against a plain one.

Run: python examples/06_check_your_attack.py
"""

import torch
from torch import Tensor, nn

import fastdynat
from fastdynat.attacks import AttackEngine, PGDSpec
from fastdynat.data import ImageSet, load_test
from fastdynat.evaluation import check_masking
from fastdynat.evaluation.fidelity import check_fidelity

EPS = 0.1
CPU = torch.device("cpu")


class Quantised(nn.Module):
    """A network behind a "defence" that rounds images to five grey values: gradients become zero."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network((4 * x).round() / 4)


def show_masking(name: str, model: nn.Module, images: ImageSet) -> None:
    """Print the checks that warn."""
    report = check_masking(model, images, norm="linf", eps=EPS, device=CPU, batch_size=100, seed=0)
    print(f"{name}: {len(report.warnings)} of {len(report.checks)} checks warn")
    for check in report.warnings:
        print(f"  {check.name}: {check.evidence}; {check.remedy}")


def main() -> None:
    """Check a network that was trained adversarially, and one that hides its gradients."""
    run = fastdynat.train(
        data="digits", method="madry", steps=3, epochs=2, run_dir="runs/example-06", overwrite=True
    )
    found = load_test("digits", None)[1]
    images = ImageSet(found.images[:64], found.labels[:64])
    show_masking("adversarially trained", run.model, images)
    show_masking("quantised", Quantised(run.model).eval(), images)

    # The attack that training and evaluation use, beside an unoptimised one from the same starts.
    x, labels = images.images / 255, images.labels
    engine = AttackEngine(run.model, x[:2])
    print(check_fidelity(engine, run.model, [(x, labels)], PGDSpec(EPS, EPS / 4, steps=10)))


if __name__ == "__main__":
    main()
