"""Square Attack: the reference's search from the same draws; many queries at a time are the same search."""

from typing import Any

import pytest
import torch
from conftest import needs
from hypothesis import given, settings
from hypothesis import strategies as st
from support.networks import tiny_cnn
from torch import Tensor, nn

from fastdynat.attack_engine.ascent import Ascent
from fastdynat.attack_engine.lengths import length
from fastdynat.attacks import parse_attack
from fastdynat.attacks.square import Square
from fastdynat.attacks.square_proposals import Draws, window
from fastdynat.errors import UserError

NORMS = ("linf", "l2", "l1")
# Exact in float32, in which the reference takes it.
EPS = {"linf": 1 / 16, "l2": 0.5, "l1": 4.0}
N = 8


def network() -> nn.Module:
    net = tiny_cnn(0, dtype=torch.float64).eval()
    with torch.no_grad():
        net[6].weight.mul_(10)
    return net.requires_grad_(False)


def batch(net: nn.Module, n: int = N, seed: int = 3) -> tuple[Tensor, Tensor]:
    x = torch.rand(n, 3, 10, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x, net(x).argmax(1)


def drawn(x: Tensor, norm: str, queries: int, seed: int = 0) -> Draws:
    return Draws.draw(x, norm, queries, 0.8, generator=torch.Generator().manual_seed(seed))


def replaying(net: nn.Module, norm: str, draws: Draws, x: Tensor, queries: int, eps: float) -> Any:
    """The reference, whose random numbers are `draws`, in the order in which it asks for them."""
    from pyautoattack.square import SquareAttack

    tiles = len(draws.start_turned) if norm != "linf" else 0
    signs = [*(draws.start[:tiles] if tiles else [draws.start]), *draws.signs]
    corners = draws.corners.flatten().tolist()
    turned = [*draws.start_turned[:tiles].tolist(), *draws.turned.tolist()]

    class Replay(SquareAttack):  # type: ignore[misc]
        def random_choice(self, shape: list[int]) -> Tensor:
            return signs.pop(0).to(x.dtype).reshape(shape)

        def random_int(self, low: int = 0, high: int = 1, shape: tuple[int, ...] = (1,)) -> Tensor:
            return torch.tensor([corners.pop(0)])

        def eta(self, s: int) -> Tensor:
            shape = super().eta(s)  # turned by chance: its right upper corner says whether
            return shape.mT if (float(shape[0, -1]) < 0) != turned.pop(0) else shape

    name = {"linf": "Linf"}.get(norm, norm.upper())
    attack = Replay(net, norm=name, n_queries=queries, eps=eps, resc_schedule=False, device="cpu")
    attack.init_hyperparam(x)
    return attack


@pytest.mark.peer
@needs("pyautoattack")
@pytest.mark.parametrize("places", [1, 20, 100])
def test_from_the_same_draws_it_is_the_references_search(places: int) -> None:
    net, queries = network(), 300
    x, labels = batch(net)
    draws = drawn(x, "linf", queries)
    got = Square(eps=EPS["linf"], queries=queries, places=places).run(Ascent(net), x, labels, draws).x_adv
    _, want = replaying(net, "linf", draws, x, queries, EPS["linf"]).attack_single_run(x, labels)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    broken = net(got).argmax(1) != labels
    assert 0 < int(broken.sum()) < N, "a verdict that cannot go wrong"


@pytest.mark.peer
@needs("pyautoattack")
@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_windows_move_as_the_references(norm: str) -> None:
    """The ball is too small to fool any image: the reference draws only for robust ones."""
    net, queries, eps = network(), 60, EPS[norm] / 64
    x, labels = batch(net)
    draws = drawn(x, norm, queries)
    got = Square(eps=eps, norm=norm, queries=queries).run(Ascent(net), x, labels, draws).x_adv
    _, want = replaying(net, norm, draws, x, queries, eps).attack_single_run(x, labels)
    assert bool((net(want).argmax(1) == labels).all())
    # The windows and the projection on the L1 ball are in float32 there.
    torch.testing.assert_close(got, want.to(got.dtype), rtol=0, atol=1e-4 * eps if norm == "l2" else 1e-5)


@given(norm=st.sampled_from(NORMS), places=st.integers(1, 300), seed=st.integers(0, 1000))
@settings(max_examples=12, deadline=None)
def test_many_queries_at_a_time_are_the_same_search(norm: str, places: int, seed: int) -> None:
    net, queries = network(), 80
    x, labels = batch(net, seed=seed)
    draws = drawn(x, norm, queries, seed)
    one_by_one = Square(eps=EPS[norm], norm=norm, queries=queries, places=1).run(
        Ascent(net), x, labels, draws
    )
    speculative = Square(eps=EPS[norm], norm=norm, queries=queries, places=places).run(
        Ascent(net), x, labels, draws
    )
    torch.testing.assert_close(speculative.x_adv, one_by_one.x_adv, rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_images_do_not_depend_on_their_batch_and_stay_in_the_ball(norm: str) -> None:
    net, queries, eps = network(), 60, EPS[norm]
    x, labels = batch(net)
    labels[2] = (labels[2] + 1) % 10
    draws = drawn(x, norm, queries)
    attack = Square(eps=eps, norm=norm, queries=queries)
    whole = attack.run(Ascent(net), x, labels, draws).x_adv
    one = slice(3, 4)
    alone = Draws(
        draws.sides,
        draws.corners,
        draws.signs if norm == "linf" else draws.signs[:, one],
        draws.turned,
        draws.start[one] if norm == "linf" else draws.start[:, one],
        draws.start_turned,
    )
    torch.testing.assert_close(
        attack.run(Ascent(net), x[one], labels[one], alone).x_adv, whole[one], rtol=0, atol=1e-12
    )
    assert torch.equal(whole[2], x[2])
    assert float(length(whole - x, norm).max()) <= eps * (1 + 1e-6)
    assert float(whole.min()) >= 0
    assert float(whole.max()) <= 1


@pytest.mark.parametrize("norm", NORMS)
def test_more_queries_lower_the_margin(norm: str) -> None:
    net = network()
    x, labels = batch(net, 16)

    def margins(queries: int) -> Tensor:
        attack = Square(eps=EPS[norm] / 4, norm=norm, queries=queries)
        x_adv = attack(Ascent(net), x, labels, generator=torch.Generator().manual_seed(0)).x_adv
        top = net(x_adv).topk(2, dim=1)
        return (top.values[:, 0] - top.values[:, 1]) * torch.where(top.indices[:, 0] == labels, 1, -1)

    clean = net(x).topk(2, dim=1).values
    few, many = margins(5).clamp_min(0), margins(100).clamp_min(0)
    assert float(many.mean()) < float(few.mean()) < float((clean[:, 0] - clean[:, 1]).mean())


def test_no_image_is_asked_about_after_it_fell() -> None:
    net = network()
    x, labels = batch(net)
    asked: list[int] = []

    def counted(images: Tensor) -> Tensor:
        asked.append(len(images))
        return net(images)

    Square(eps=1.0, queries=1000, places=N)(Ascent(counted), x, labels)
    assert sum(asked) < 100 * N


@pytest.mark.parametrize("size", [3, 5, 7, 16])
@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_windows_have_length_one_and_two_signs(size: int, norm: str) -> None:
    shape = window(size, norm)
    assert float(length(shape[None], norm)) == pytest.approx(1)
    assert bool((shape[: size // 2] > 0).all())
    assert bool((shape[size // 2 :] < 0).all())


def test_ticks_and_names() -> None:
    net = network()
    x, labels = batch(net)
    seen: list[float] = []
    Square(eps=0.01, queries=40)(Ascent(net), x, labels, tick=seen.append)
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == (0, 1)
    assert parse_attack("square", eps=0.1, step_size=0.1).search == Square(eps=0.1)
    assert parse_attack("square200", eps=0.5, step_size=0.1, norm="l2").search == Square(
        eps=0.5, norm="l2", queries=200
    )


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"norm": "l0"}, "norm of Square 'l0'"),
        ({"eps": -1.0}, "eps of Square"),
        ({"queries": 0}, "queries >= 1"),
        ({"p_init": 0.0}, "p_init of Square"),
    ],
)
def test_numbers_that_cannot_work(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Square(**{"eps": 0.1, **values})


def test_a_tie_that_the_label_wins_is_attacked() -> None:
    """Logits behind a ReLU are often all 0: the first class is predicted, by a margin of 0."""

    def tied(x: Tensor) -> Tensor:
        brighter = (x.flatten(1).mean(1) - 0.55).relu()
        return torch.stack((torch.zeros_like(brighter), brighter), 1)

    x, labels = torch.full((2, 1, 8, 8), 0.5), torch.tensor([0, 0])
    assert torch.equal(tied(x).argmax(1), labels)
    x_adv = Square(eps=0.1, queries=200)(
        Ascent(tied), x, labels, generator=torch.Generator().manual_seed(0)
    ).x_adv
    assert torch.equal(tied(x_adv).argmax(1), 1 - labels)


def test_a_batch_without_a_right_image_asks_for_no_empty_batch() -> None:
    net = network()

    def flat(x: Tensor) -> Tensor:
        return net(
            x.view(x.shape[0], -1).view(x.shape)
        )  # as many networks do; of no images torch cannot tell what -1 is

    x, labels = batch(net)
    assert torch.equal(Square(eps=0.1, queries=5)(Ascent(flat), x, (labels + 1) % 10).x_adv, x)
