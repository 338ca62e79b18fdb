"""Comparison of a compiled attack with the eager one: loss reached and first gradient, on a few images."""

from dataclasses import replace

import torch
from torch import Tensor

from fastdynat.attack_engine.ascent import Ascent
from fastdynat.attack_engine.compiled_ascent import FEW_IMAGES
from fastdynat.attack_engine.goal import AttackGoal
from fastdynat.attack_engine.pgd import run_pgd
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.attack_engine.shortfall import falls_short
from fastdynat.attack_engine.steps import start_point

# Least share of the eager gradient's L1 norm that must lie on pixels where the compiled gradient has the same
# sign: rounding flips only signs of gradients near 0. By the network's half-precision type; None is float32.
SIGNS = {None: 0.98, torch.float16: 0.95, torch.bfloat16: 0.85}


def compiled_shortfall(compiled: Ascent, eager: Ascent, x: Tensor, goal: AttackGoal, spec: PGDSpec) -> str:
    """Describe in words why `compiled` is weaker than `eager` at images `x` that do not mix; "" if it is not.

    Draws no random numbers from the global generators.
    """
    few = min(len(x), FEW_IMAGES)
    few_goal = replace(goal, target=goal.target[:few])
    spec = replace(spec, restarts=1, target="none")
    generator = torch.Generator(x.device).manual_seed(0)
    start = start_point(x, spec.start, norm=spec.norm, eps=spec.eps, generator=generator)
    compiled_gradient = compiled.goal_gradient(goal.kind)(compiled.to_model_input(start), goal.target)
    eager_gradient = eager.goal_gradient(goal.kind)(eager.to_model_input(start[:few]), few_goal.target)
    actual = compiled_gradient.gradient[:few].double()
    expected = eager_gradient.gradient.double()
    norm = expected.abs().sum()
    same_sign = torch.where(actual.sign() == expected.sign(), expected.abs(), 0).sum()
    share = float(same_sign / norm) if norm > 0 else 1.0
    if not share >= SIGNS[compiled.dtype]:
        return f"{100 * share:.0f} % of its first gradient (by L1 norm) has the uncompiled attack's sign"
    fast = run_pgd(compiled, x, goal, spec, x_start=start).x_adv[:few]
    slow = run_pgd(eager, x[:few], few_goal, spec, x_start=start[:few]).x_adv
    with torch.no_grad():
        clean, reference, loss = (
            few_goal.per_image(eager.logits(images)).double() for images in (x[:few], slow, fast)
        )
    error = float((loss - reference).std(correction=0)) / few**0.5
    means = {"reference": float(reference.mean()), "clean": float(clean.mean())}
    if falls_short(float(loss.mean()), error=error, **means):
        reached, reference_loss = float(loss.mean()), means["reference"]
        return f"it reaches loss {reached:.4g}, uncompiled {reference_loss:.4g} from the same starts"
    return ""
