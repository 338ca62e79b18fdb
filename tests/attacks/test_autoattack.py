"""The AutoAttack class and the authors' package: order, resuming, verdicts, warnings and refusals."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import needs
from support.networks import tiny_cnn
from torch import Tensor, nn

from fastdynat.attacks.ball import inside
from fastdynat.commands.evaluate.reference_autoattack import run_reference
from fastdynat.errors import UserError
from fastdynat.evaluation import AutoAttack
from fastdynat.evaluation.defences import check_square, warn_resumed
from fastdynat.evaluation.outcome import unpack_bits

EPS, N = 0.02, 30
CPU = torch.device("cpu")


@pytest.fixture
def task() -> tuple[nn.Module, Tensor, Tensor]:
    model, x = tiny_cnn(3).eval(), torch.rand(N, 3, 8, 8)
    y = model(x).argmax(1)
    y[:3] = (y[:3] + 1) % 10
    return model, x, y


def evaluator(model: Any, names: tuple[str, ...] = ("apgd-ce10", "apgd-t10"), **kwargs: Any) -> AutoAttack:
    return AutoAttack(
        model, eps=EPS, **{"seed": 1, "version": "custom", "attacks": names, "device": "cpu", **kwargs}
    )


def test_the_worst_case_and_the_state_it_leaves(
    task: tuple[nn.Module, Tensor, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, x, y = task
    model.train()
    attack = evaluator(model, log_path=tmp_path / "log.txt")
    with torch.no_grad():
        x_adv, classes = attack.run_standard_evaluation(x, y, 7, return_labels=True)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    model.eval()
    fell = classes != y
    assert torch.equal(model(x_adv).argmax(1), classes)
    assert 3 < int(fell.sum()) < N
    assert torch.equal(x_adv[~fell], x[~fell])
    assert float((x_adv - x).abs().max()) <= EPS * (1 + 1e-5)
    lines = capsys.readouterr().out.splitlines()
    assert lines == (tmp_path / "log.txt").read_text().splitlines()
    assert lines[-1].startswith(
        f"robust accuracy after APGD-T10: {float((~fell).double().mean()):.2%} (total time "
    )
    alone = attack.run_standard_evaluation_individual(x, y, 7)
    assert list(alone) == attack.attacks_to_run
    apart = torch.stack([model(part).argmax(1) != y for part in alone.values()])
    assert int(apart.any(0).sum()) >= int(apart[0].sum())
    assert attack.clean_accuracy(x, y, batch_size=4) == pytest.approx((N - 3) / N)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("eps", EPS / 2),
        ("epsilon", EPS / 2),  # the package's name
        ("norm", "l2"),
        ("model", None),
        ("version", "rand"),
        ("attacks_to_run", ["square"]),
    ],
)
def test_what_the_evaluation_would_not_follow_cannot_be_set(name: str, value: Any) -> None:
    attack = evaluator(tiny_cnn(3))
    with pytest.raises(AttributeError, match=f"^{name} of an AutoAttack cannot be set, .* make a new one"):
        setattr(attack, name, value)
    assert attack.eps == EPS


def test_stages_may_be_changed(task: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = task
    both, one = evaluator(model), evaluator(model, ("apgd-t10",))
    both.stages = both.stages[1:]
    assert both.attacks_to_run == one.attacks_to_run
    both.seed, both.verbose = 1, False
    assert torch.equal(both.run_standard_evaluation(x, y, 7), one.run_standard_evaluation(x, y, 7))


def test_it_can_be_called_as_torchattacks_class(task: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = task
    found = evaluator(model)(x, y)
    assert torch.equal(found, evaluator(model).run_standard_evaluation(x, y))
    broken, wrong = (int((model(images).argmax(1) != y).sum()) for images in (found, x))
    assert broken > wrong
    assert float((found - x.clamp(0, 1)).abs().max()) <= EPS + 1e-6


class Killed(Exception):
    pass


@pytest.mark.parametrize("calls", [1, 3, 6])
def test_a_killed_evaluation_goes_on_to_the_same_verdicts(
    task: tuple[nn.Module, Tensor, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    from fastdynat.evaluation import staged

    model, x, y = task
    whole = evaluator(model, seed=None).run_standard_evaluation(x, y, 5, state_path=tmp_path / "whole.json")
    seed = json.loads((tmp_path / "whole.json").read_text())["seed"]
    write, left = staged.write_text, [calls]

    def dying(path: Path, text: str) -> None:
        write(path, text)
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    monkeypatch.setattr(staged, "write_text", dying)
    with pytest.raises(Killed):
        evaluator(model, seed=seed).run_standard_evaluation(x, y, 5, state_path=tmp_path / "s.json")
    resume = evaluator(model, seed=seed)
    before = json.loads((tmp_path / "s.json").read_text())["robust"]
    lost = int((model(x).argmax(1) == y).sum()) - int(unpack_bits(before, N).sum())
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        x_adv, labels = resume.run_standard_evaluation(
            x, y, 5, return_labels=True, state_path=tmp_path / "s.json"
        )
    robust = float((model(whole).argmax(1) == y).double().mean())
    said = [str(w.message) for w in found if "was resumed" in str(w.message)]
    assert float((labels == y).double().mean()) == pytest.approx(robust + lost / N)
    assert torch.equal(model(x_adv).argmax(1), labels)
    assert len(said) == (lost > 0)
    if lost:
        assert said[0].startswith(f"{lost} image{'s were' if lost > 1 else ' was'} broken")
        assert f"the robust accuracy is {robust:.2%}" in said[0]
    states = [json.loads((tmp_path / name).read_text()) for name in ("whole.json", "s.json")]
    assert states[0]["robust"] == states[1]["robust"]
    assert states[0]["accuracies"] == states[1]["accuracies"]
    assert states[1]["accuracies"]["apgd-t10"] == float((model(whole).argmax(1) == y).double().mean())


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (1, "1 image was broken before .* and is returned unperturbed, with its clean label: .* 50.00%"),
        (
            2,
            "2 images were broken before .* and are returned unperturbed, with their clean labels: .* 50.00%",
        ),
    ],
)
def test_the_warning_of_a_resume_counts_images(images: int, said: str) -> None:
    with pytest.warns(UserWarning, match=said):
        warn_resumed(images, 0.5)


def test_a_foreign_state_is_refused(
    task: tuple[nn.Module, Tensor, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastdynat.evaluation import staged

    model, x, y = task
    path = tmp_path / "s.json"
    evaluator(model, ("apgd-ce2",)).run_standard_evaluation(x, y, state_path=path)
    for changed, what in (
        (
            lambda: evaluator(tiny_cnn(4), ("apgd-ce2",)).run_standard_evaluation(x, y, state_path=path),
            "model, predictions",
        ),
        (
            lambda: evaluator(model, ("apgd-ce2",)).run_standard_evaluation(x[:9], y[:9], state_path=path),
            "images",
        ),
        (lambda: evaluator(model, ("apgd-ce3",)).run_standard_evaluation(x, y, state_path=path), "attacks"),
        (
            lambda: evaluator(model, ("apgd-ce2",), seed=2).run_standard_evaluation(x, y, state_path=path),
            "seed",
        ),
    ):
        with pytest.raises(UserError, match=f"of another evaluation: {what} differ"):
            changed()
    with monkeypatch.context() as patch:
        patch.setattr(staged, "code_version", lambda: "another")
        with pytest.raises(UserError, match=": version of fastdynat differ"):
            evaluator(model, ("apgd-ce2",)).run_standard_evaluation(x, y, state_path=path)
    path.write_text("{}")
    with pytest.raises(UserError, match="is not the state of an AutoAttack evaluation"):
        evaluator(model, ("apgd-ce2",)).run_standard_evaluation(x, y, state_path=path)


def test_functions_are_attacked_as_they_are(task: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = task
    ours = [evaluator(m).run_standard_evaluation(x, y) for m in (model, lambda x: model(x))]
    assert torch.equal(model(ours[0]).argmax(1), model(ours[1]).argmax(1))


def test_the_checks_warn(task: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = task
    generator = torch.Generator().manual_seed(0)
    for victim, text in (
        (lambda x: model(x + 0.1 * torch.randn(x.shape, generator=generator)), "version='rand'"),
        (lambda x: model(x).softmax(1), "leave its softmax out"),
        (lambda x: model((x * 255).round() / 255 + 0 * x), "gradients were zero"),
    ):
        with pytest.warns(UserWarning, match=text):
            evaluator(victim, ("apgd-ce2",)).run_standard_evaluation(x, y)
    with pytest.warns(UserWarning, match=r"broke 3\.00% of the images"):
        check_square({"clean": 0.9, "apgd-ce": 0.5, "square": 0.47})
    with pytest.warns(UserWarning, match=r"broke 3\.00% of the images"):  # in "plus" others come after it
        check_square({"clean": 0.9, "apgd-ce": 0.5, "square": 0.47, "apgd-t": 0.47})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_square({"clean": 0.9, "square": 0.5})
        check_square({"clean": 0.9, "square": 0.5, "apgd-t": 0.4})
        check_square({"clean": 0.9, "apgd-ce": 0.5, "square": 0.499})


def test_few_classes(capsys: pytest.CaptureFixture[str]) -> None:
    x, y = torch.rand(5, 3, 8, 8), torch.zeros(5, dtype=torch.int64)
    evaluator(tiny_cnn(classes=5), ("apgd-t2",)).run_standard_evaluation(x, y)
    assert "apgd-t2: 4 target classes instead of 9" in capsys.readouterr().out
    with pytest.raises(UserError, match="dlr-t needs 4 classes, the network has 3"):
        evaluator(tiny_cnn(classes=3), ("apgd-t2",)).run_standard_evaluation(x, y)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"is_tf_model": True}, "TensorFlow"),
        ({"norm": "L0"}, "norm must be Linf, L2 or L1, got 'L0'"),
        ({"eps": 0}, "eps must be above 0"),
        ({"version": "standard"}, "attacks are named for version='custom'"),
        ({"attacks": ("apdg-ce",)}, "did you mean 'apgd-ce'"),
        ({"attacks": ("clean", "apgd-ce")}, "clean is not an attack"),
        ({"device": "mps"}, "only cpu and cuda"),
    ],
)
def test_bad_arguments(wrong: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        AutoAttack(
            tiny_cnn(), **{"eps": EPS, "version": "custom", "attacks": ("apgd-ce",), "device": "cpu", **wrong}
        )


def test_bad_images(task: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = task
    for bad, text in (
        ((x * 255, y), r"images must be in \[0, 1\], got .*; divide by 255"),
        ((x.double(), y), r"images are torch\.float64 and the model torch\.float32"),
        ((x, y[:5]), r"30 images but labels of shape \(5,\)"),
        ((x, y, 0), "bs must be >= 1, got 0"),
        ((x, y + 5), r"y must be in 0 \.\. 9, the network's classes"),
        ((x, y - 10), r"y must be in 0 \.\. 9, the network's classes"),
    ):
        with pytest.raises(UserError, match=text):
            evaluator(model).run_standard_evaluation(*bad)
    with pytest.raises(
        UserError, match="the model is on meta, images are attacked on cpu; use device='meta'"
    ):
        evaluator(tiny_cnn().to("meta")).clean_accuracy(x, y)


def test_verdicts_are_in_float32_also_under_the_callers_autocast(
    task: tuple[nn.Module, Tensor, Tensor],
) -> None:
    model, x, y = task
    types = set()

    def watched(x: Tensor) -> Tensor:
        logits: Tensor = model(x)
        types.add(logits.dtype)
        return logits

    with torch.autocast("cpu", torch.bfloat16):
        evaluator(watched, ("apgd-ce2",)).run_standard_evaluation(x, y)
    assert types == {torch.float32}


@pytest.mark.parametrize("eps", [1e-4, 8 / 255])
def test_rounding_leads_out_of_no_ball(eps: float) -> None:
    x = torch.rand(20, 3, 16, 16)
    ends = torch.where(torch.rand_like(x) < 0.5, x - eps, x + eps).clamp(0, 1)
    assert inside(ends, x, "linf", eps).all()
    assert not inside((ends + 0.01 * eps * (ends - x).sign()).clamp(0, 1), x, "linf", eps).any()


def test_a_module_without_weights_is_known_by_its_answers(
    task: tuple[nn.Module, Tensor, Tensor], tmp_path: Path
) -> None:
    class Wrapper(nn.Module):
        def __init__(self, function: Any) -> None:
            super().__init__()
            self.function = function

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.function(x)
            return logits

    model, x, y = task
    other = tiny_cnn(5).eval()
    path = tmp_path / "s.json"
    evaluator(Wrapper(lambda x: model(x)), ("apgd-ce2",)).run_standard_evaluation(x, y, state_path=path)
    with pytest.raises(UserError, match="of another evaluation: predictions differ"):
        evaluator(Wrapper(lambda x: other(x)), ("apgd-ce2",)).run_standard_evaluation(x, y, state_path=path)


def test_a_changed_forward_pass_with_the_same_weights_is_another_network(
    task: tuple[nn.Module, Tensor, Tensor], tmp_path: Path
) -> None:
    class Shifted(nn.Module):
        def __init__(self, model: nn.Module, shift: float) -> None:
            super().__init__()
            self.model, self.shift = model, shift

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.model(x)
            return logits + self.shift * torch.arange(logits.shape[1])

    class Rounded(nn.Module):
        """Changes no prediction on 8-bit images."""

        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model, self.calls, self.hook = model, 0, (print,)

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            change = (255 * x).round() / 255 - x
            logits: Tensor = self.model(x + change.detach())
            return logits

        def get_extra_state(self) -> dict[str, int]:
            return {"version": 1}

    model, x, y = task
    x = (255 * x).round() / 255
    bare = nn.Sequential(model)
    known = {
        "bare": bare,
        "shifted": Shifted(model, 0.0),
        "other": Shifted(model, 9.0),
        "rounded": Rounded(model),
    }
    paths = {name: tmp_path / f"{name}.json" for name in known}
    for name, network in known.items():
        evaluator(network, ("apgd-ce2",)).run_standard_evaluation(x, y, state_path=paths[name])
    for name, path in paths.items():
        for other, network in known.items():
            ours = evaluator(network, ("apgd-ce2",))
            if other == name:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of images that the first call broke
                    ours.run_standard_evaluation(x, y, state_path=path)
                continue
            with pytest.raises(UserError, match=r"of another evaluation: model(, predictions)? differ"):
                ours.run_standard_evaluation(x, y, state_path=path)


def test_batches_are_halved_until_they_fit(
    task: tuple[nn.Module, Tensor, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    model, x, y = task

    def small(x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and len(x) > 8:
            raise torch.OutOfMemoryError("too much")
        return model(x)

    x_adv = evaluator(small).run_standard_evaluation(x, y, 30)
    assert caplog.text.count("out of memory") == 2
    assert 3 < int((model(x_adv).argmax(1) != y).sum()) < N


@pytest.mark.peer
@needs("pyautoattack")
def test_the_package_in_parts_is_the_package(
    task: tuple[nn.Module, Tensor, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    messages: list[str],
) -> None:
    import pyautoattack

    class Theirs(pyautoattack.AutoAttack):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.apgd.n_iter, self.apgd.eot_iter = 10, 2  # instead of 100 and 20: seconds

    monkeypatch.setattr(pyautoattack, "AutoAttack", Theirs)
    model, x, y = task[0], task[1][:12], task[2][:12]
    numbers: dict[str, Any] = {
        "norm": "linf",
        "eps": EPS,
        "seed": 3,
        "batch_size": 5,
        "device": CPU,
        "version": "rand",
    }
    before = torch.get_rng_state()
    mask, seconds = run_reference(model, x, y, **numbers, state_path=tmp_path / "s.json")
    assert torch.equal(torch.get_rng_state(), before)
    assert list(seconds) == ["apgd-ce", "apgd-dlr"]
    assert [line.split(":")[0] for line in messages] == [
        "robust accuracy after APGD-CE",
        "robust accuracy after APGD-DLR",
    ]
    theirs = Theirs(model, norm="Linf", eps=EPS, seed=3, device="cpu", version="rand")
    _, classes = theirs.run_standard_evaluation(x, y, batch_size=5)
    assert torch.equal(mask, classes == y)
    assert 0 < int(mask.sum()) < 9
    again, _ = run_reference(model, x, y, **numbers, state_path=tmp_path / "s.json")
    assert torch.equal(again, mask)
    assert len(messages) == 2


@pytest.mark.peer
@needs("pyautoattack")
def test_the_package_on_few_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    import pyautoattack

    class Theirs(pyautoattack.AutoAttack):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.apgd.n_iter = self.apgd_targeted.n_iter = self.fab.n_iter = self.square.n_queries = 3

    monkeypatch.setattr(pyautoattack, "AutoAttack", Theirs)
    model, x = tiny_cnn(classes=5).eval(), torch.rand(4, 3, 8, 8)
    numbers: dict[str, Any] = {
        "norm": "linf",
        "seed": 3,
        "batch_size": 4,
        "device": CPU,
    }
    mask, seconds = run_reference(model, x, model(x).argmax(1), eps=1e-4, **numbers)
    assert mask.all()
    assert len(seconds) == 4


@pytest.mark.peer
@needs("pyautoattack")
def test_a_bad_version(task: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = task
    with pytest.raises(UserError, match="unknown version"):
        run_reference(model, x, y, norm="linf", eps=EPS, seed=3, batch_size=8, device=CPU, version="quick")
