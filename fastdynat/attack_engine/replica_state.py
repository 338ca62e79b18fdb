"""The state that a captured attack reads and changes besides its images, on which its graph is checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from fastdynat.attack_engine.replica import AttackReplica
from fastdynat.execution.graph_check import Stateless


@dataclass(frozen=True)
class ReplicaState(Stateless):
    """A `FunctionState` of `fastdynat.execution`. Only the replica's own weights are moved: others may be the
    caller's.

    Attributes:
        moves: whether an attack moves running statistics, which are the model's.
    """

    replica: AttackReplica
    moves: bool

    def state(self) -> Mapping[str, Tensor]:
        buffers = (
            {f"buffer {name}": t for name, t in self.replica.network.named_buffers()} if self.moves else {}
        )
        return {f"weight {name}": t for name, t in self.replica.derived().items()} | buffers

    def weights(self) -> Sequence[Tensor]:
        return [*self.replica.derived().values()]
