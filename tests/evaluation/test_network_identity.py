"""Digests by which a stored evaluation knows its network."""

import torch
from torch import Tensor, nn

from fastdynat.evaluation.network_identity import digest, network_digests

IMAGES = torch.rand(20, 3, 4, 4, generator=torch.Generator().manual_seed(1))


class Network(nn.Module):
    """A linear network with a constant, a counter and noise."""

    def __init__(self, mean: tuple[float, ...] = (0.5,), noise: float = 0.0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.linear = nn.Linear(48, 5)
        self.mean, self.noise, self.calls, self.hooks = mean, noise, 0, (print,)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        logits: Tensor = self.linear(x.flatten(1) - self.mean[0])
        return logits + self.noise * torch.randn_like(logits)


def known(network: nn.Module) -> tuple[str, ...]:
    def classes(x: Tensor) -> Tensor:
        with torch.no_grad():
            predicted: Tensor = network(x).argmax(1)
        return predicted

    return tuple(network_digests(network, classes(IMAGES), IMAGES, classes).values())


def test_one_network_has_one_digest_however_often_it_was_called() -> None:
    network = Network()
    assert known(network) == known(network) == known(Network())


def test_constants_weights_and_predictions_count() -> None:
    scaled = Network()
    scaled.linear.weight.data *= 1 + 1e-6
    found = [known(n) for n in (Network(), Network(mean=(0.5 + 1e-9,)), scaled, nn.Sequential(Network()))]
    assert len(set(found)) == 4

    def by_function(factor: float) -> dict[str, str]:
        def classes(x: Tensor) -> Tensor:
            return (factor * x.flatten(1)[:, :5]).argmax(1)

        return network_digests(classes, classes(IMAGES), IMAGES, classes)

    assert by_function(1.0) == by_function(2.0) != by_function(-1.0)


def test_a_network_that_draws_numbers_is_known_by_its_weights() -> None:
    assert known(Network(noise=5.0)) == known(Network(noise=5.0)) != known(Network(noise=6.0))


def test_extra_state_that_is_no_tensor_counts() -> None:
    assert digest([torch.zeros(2), {"bits": 8}]) != digest([torch.zeros(2), {"bits": 4}])
