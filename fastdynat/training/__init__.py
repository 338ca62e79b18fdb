"""Training: a configuration becomes a run directory with checkpoints.

In reading order:

1. `resolve`: the user's configuration -> `resolved_config.ResolvedConfig`, without automatic values
   (`resolve_attack`, `resolve_optim`, `resolve_engine`; `trial` times torch.compile).
2. `parts`: the resolved configuration -> networks, step, loader (`build_networks`, `networks`, `schedules`).
3. `step`: inner attack, losses, update of one batch (`awp`, `cycled_sgd`, `average`, `precision`).
4. `trainer`: the loop over epochs (`validation`, `watch`, `metrics`, `epoch_checks`, `fit_outcome`).
5. `checkpoint_writer`: weights (`weight_files`) and everything else (`training_state`) to the disk.

`start` and `resume` join them: `new_run` and `resumed_run` give a `Trainer` that is ready to `fit`;
`resume_or_start` chooses between the two. Under torchrun `rank_start` makes all ranks begin alike, and
`step_agreement` lets them decide together.
"""

from fastdynat.methods.configs import default_config, stored_config
from fastdynat.training.fit_outcome import Diverged, Outcome
from fastdynat.training.parts import attack_switches, build_parts, open_split
from fastdynat.training.resume import resumed_run
from fastdynat.training.resume_or_start import run_of_command
from fastdynat.training.start import new_run
from fastdynat.training.step import TrainStep
from fastdynat.training.trainer import Trainer

__all__ = [
    "Diverged",
    "Outcome",
    "TrainStep",
    "Trainer",
    "attack_switches",
    "build_parts",
    "default_config",
    "new_run",
    "open_split",
    "resumed_run",
    "run_of_command",
    "stored_config",
]
