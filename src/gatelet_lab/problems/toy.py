"""E[(b − t)²] of one gate: known closed forms, and estimators whose signal vanishes as t nears a half."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from gatelet.diagnose import ModelReport, Moments, diagnose, exact_gradient, moments
from gatelet.estimators import ALL, Estimator, Objective, ScoreFunction, StraightThrough
from gatelet_lab.problems.options import Diagnose, head, show, show_table, write_file

LOGIT = -2.0


class Known(NamedTuple):
    """A number of the toy problem that has a closed form."""

    what: str
    known: float
    found: float


def objective_at(target: float) -> Objective:
    """Return h ↦ Σ (h − t)²."""

    def objective(gates: Tensor) -> Tensor:
        return (gates - target).square().sum(-1)

    return objective


def checks() -> list[Known]:
    """Return the closed forms at t = .45, logit −2, beside what :func:`gatelet.moments` finds."""
    logits, objective = torch.full((1, 1), LOGIT, dtype=torch.float64), objective_at(0.45)
    p = float(logits.sigmoid())
    high, low = (1 - 0.45) ** 2, 0.45**2
    exact = p * (1 - p) * (high - low)
    plain = p * ((1 - p) * high) ** 2 + (1 - p) * (p * low) ** 2 - exact**2
    # ĝ = (L(1) − L(0))/2 where the two replicas differ, with probability 2p(1 − p)
    pairs = p * (1 - p) * (high - low) ** 2 / 2 - exact**2
    # DisARM: ĝ = (L(1) − L(0))·σ(|a|)/2 where the antithetic two differ, with probability 2·min(p, 1 − p)
    antithetic = 2 * min(p, 1 - p) * (max(p, 1 - p) * (high - low) / 2) ** 2 - exact**2
    through = p * (1 - p) * 2 * (p - 0.45) - exact

    def found(estimator: str | Estimator) -> Moments:
        return moments(objective, logits, estimator)

    known = [
        Known("exact gradient", exact, float(exact_gradient(objective, logits))),
        Known(
            "variance, score function without baseline", plain, float(found(ScoreFunction(baseline="none")).variance)
        ),
        Known("variance, leave-one-out with 2", pairs, float(found("leave_one_out").variance)),
        Known("bias, straight-through (slope σ′)", through, float(found(StraightThrough("sigmoid")).mean) - exact),
    ]
    if "disarm" in ALL:
        known.insert(3, Known("variance, DisARM", antithetic, float(found("disarm").variance)))
    return known


def run(options: Diagnose, console: Console) -> str:
    """Compare with the closed forms, and diagnose at three targets."""
    title = f"t = 0.45, logit {LOGIT:g}: closed forms"
    lines = [["", "closed form", "found"]]
    lines += [[row.what, f"{row.known:.4g}", f"{row.found:.4g}"] for row in checks()]
    text = f"{head(options)}## {title}\n\n{show_table(console, title, lines)}\n\n"
    chosen: Mapping[str, str | Estimator] | None = {name: name for name in options.estimators} or None
    if chosen is None:
        chosen = {
            name: name for name, cls in ALL.items() if "bernoulli" in cls.kinds and (cls.binary or not cls.unbiased)
        }
        chosen |= {
            "score_function, no baseline": ScoreFunction(baseline="none"),
            "straight_through, slope σ′": StraightThrough("sigmoid"),
        }
    reports = {}
    for target in (0.45, 0.49, 0.499):
        logits = torch.full((1, 1), LOGIT)
        report = diagnose(
            objective_at(target), logits, chosen, options.samples or 10_000, options.budget, seed=options.seed
        )
        reports[f"t = {target:g}"] = report
        text += show(console, f"E[(b − t)²], t = {target:g}, logit {LOGIT:g}", report)
    if options.plot is not None:
        write_file(options.plot, "--plot", ModelReport(reports).plot)
    return text
