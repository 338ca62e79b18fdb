"""Train a network of your own on data of your own.

Run: python examples/02_own_network_and_data.py

The same on the command line, where the run can be resumed and evaluated by its name alone:

    fastdynat train --model examples/02_own_network_and_data.py:make_net \\
        --data examples/02_own_network_and_data.py:make_data \\
        --method trades --eps 0.1 --epochs 3 --run-dir runs/mine
    fastdynat eval runs/mine
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import fastdynat


def make_net() -> nn.Module:
    """Any module from images (N, C, H, W) in [0, 1] to logits (N, K). A normalisation goes inside."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 10),
    )


def make_data() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Images uint8 (N, C, H, W), or floats in [0, 1]; labels 0, 1, ... (N,). A torch Dataset does as well."""
    digits = load_digits()  # 1,797 images of 8x8 pixels with values from 0 to 16
    images = torch.from_numpy(digits.images * (255 / 16)).round().to(torch.uint8)[:, None]
    labels = torch.from_numpy(digits.target)
    return {"train": (images[:1400], labels[:1400]), "test": (images[1400:], labels[1400:])}


def main() -> None:
    """Train, evaluate and load."""
    torch.manual_seed(0)
    net, data = make_net(), make_data()
    run = fastdynat.train(
        net, data, method="trades", eps=0.1, steps=3, epochs=3, run_dir="runs/example-02", overwrite=True
    )
    # `net` holds the trained weights now, in eval mode.
    assert run.model is net
    print(fastdynat.evaluate(net, data, "clean,pgd20", eps=0.1))

    # The run directory keeps the weights, but a module cannot be rebuilt from a file: bring one.
    again, _ = fastdynat.load_network(run.run_dir, into=make_net())
    images, labels = data["test"]
    correct = (again(images / 255).argmax(1) == labels).float().mean()
    print(f"loaded from {run.run_dir}: clean accuracy {correct:.1%}")


if __name__ == "__main__":
    main()
