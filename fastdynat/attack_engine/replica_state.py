"""The state of a captured attack beside its images, for the check of its graph."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from fastdynat.attack_engine.replica import AttackReplica
from fastdynat.execution.graph_check import Stateless


@dataclass(frozen=True)
class ReplicaState(Stateless):
    """The state of a replica; the check perturbs only the replica's own weights, as others are the model's.

    Attributes:
        replica: the attacked network.
        moves: whether an attack updates running statistics, which are the model's.
    """

    replica: AttackReplica
    moves: bool

    def state(self) -> Mapping[str, Tensor]:
        buffers = (
            {f"buffer {name}": t for name, t in self.replica.network.named_buffers()} if self.moves else {}
        )
        return {f"weight {name}": t for name, t in self.replica.own_tensors().items()} | buffers

    def weights(self) -> Sequence[Tensor]:
        return self.replica.own_weights()
