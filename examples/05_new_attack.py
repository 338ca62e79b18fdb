"""Write an attack, and compare it with PGD on the same network.

Run: python examples/05_new_attack.py

The same on the command line: fastdynat eval RUN --attacks examples/05_new_attack.py:Decaying,pgd20
"""

from dataclasses import dataclass

import torch
from torch import Tensor

import fastdynat
from fastdynat.attacks import Ascent, AttackGoal, Tick, pgd_step


@dataclass(frozen=True)
class Decaying:
    """PGD with steps that shrink from eps to 0. `eps` and `norm` are those of the evaluation."""

    eps: float
    norm: str = "linf"
    steps: int = 20

    def __call__(
        self,
        ascent: Ascent,
        x: Tensor,
        labels: Tensor,
        *,
        generator: torch.Generator | None = None,
        tick: Tick | None = None,
    ) -> Tensor:
        """Return the attacked images; `ascent` gives logits and input gradients of a fast replica."""
        goal, x_adv = AttackGoal("ce", labels), x
        for step in range(self.steps):
            gradient = ascent.gradient(ascent.to_model_input(x_adv), goal)
            size = self.eps * (1 - step / self.steps)
            x_adv = pgd_step(x_adv, gradient, x, norm=self.norm, step_size=size, eps=self.eps).x_adv
        return x_adv


def main() -> None:
    """Evaluate by the attack in this file."""
    run = fastdynat.train(
        data="digits", method="madry", steps=3, epochs=2, run_dir="runs/example-05", overwrite=True
    )
    ours = f"{__file__}:Decaying"
    table = fastdynat.evaluate(run, attacks=f"clean,pgd20,{ours}", eps=0.1, num_images=100)
    print(table)
    print(f"PGD-20 leaves {table['pgd20']:.1%}, Decaying {table[ours]:.1%}")


if __name__ == "__main__":
    main()
