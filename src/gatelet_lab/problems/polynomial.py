"""The polynomial of ReinMax, (1/L) Σ |X_i − c|^p: its exact gradient, and training curves."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from gatelet import surrogate
from gatelet.diagnose import ModelReport, Report, diagnose
from gatelet.estimators import Estimator, Objective, resolve
from gatelet_lab.problems.options import Diagnose, head, show, show_table, write_file

_TARGET = 0.45
_POWERS = (1.5, 2.0, 3.0)


def objective_of(power: float) -> Objective:
    """Return X ↦ (1/L) Σ |X_i − c|^p, c = 0.45 (L. Liu et al. 2023, arXiv:2304.08612, section 5)."""

    def objective(gates: Tensor) -> Tensor:
        return (gates - _TARGET).abs().pow(power).mean(-1)

    return objective


def gradient_of(power: float, logits: Tensor) -> Tensor:
    """Return the exact gradient of the expected polynomial, whose terms do not interact."""
    p = logits.detach().to(torch.float64).sigmoid()
    slope: Tensor = p * (1 - p) * ((1 - _TARGET) ** power - _TARGET**power) / logits.shape[-1]
    return slope


def value_of(power: float, logits: Tensor) -> float:
    """Return the exact expected polynomial."""
    p = logits.detach().to(torch.float64).sigmoid()
    return float((p * (1 - _TARGET) ** power + (1 - p) * _TARGET**power).mean())


class Curve(NamedTuple):
    """A training run: the exact expected loss after this many evaluations."""

    evaluations: list[float]
    losses: list[float]


def train(
    power: float, estimator: str | Estimator, latents: int, steps: int, rate: float, evaluations: float, seed: int
) -> Curve:
    """Minimise the expected polynomial with Adam over the logits, from zero, with ``steps`` evaluations."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.zeros(1, latents, requires_grad=True)
    method, objective = resolve(estimator), objective_of(power)
    optimiser = torch.optim.Adam([logits], lr=rate)
    curve = Curve([0.0], [value_of(power, logits)])
    count = int(steps // evaluations)
    for step in range(1, count + 1):
        optimiser.zero_grad()
        surrogate(objective, logits, method, generator=generator).sum().backward()
        optimiser.step()
        if step % max(1, count // 100) == 0:
            curve.evaluations.append(step * evaluations)
            curve.losses.append(value_of(power, logits))
    return curve


def run(options: Diagnose, console: Console) -> str:
    """Diagnose at logit 0, and train with every estimator at equal evaluations, for three powers."""
    text = head(options)
    reports: dict[str, Report] = {}
    curves: dict[str, dict[str, Curve]] = {}
    for power in _POWERS:
        title = f"p = {power:g}"
        logits = torch.zeros(1, options.latents)
        report = diagnose(
            objective_of(power),
            logits,
            options.estimators or None,
            options.samples or 10_000,
            options.budget,
            reference=gradient_of(power, logits),
            exact=False,
            seed=options.seed,
        )
        reports[title] = report
        text += show(console, f"E[(1/L) Σ |X − {_TARGET:g}|^p], {title}, {options.latents} latents, at logit 0", report)
        curves[title] = {
            row.name: train(
                power, row.name, options.latents, options.steps, options.rate, row.evaluations, options.seed
            )
            for row in report.measured
        }
        best = _TARGET**power
        lines = [["estimator", "steps' evaluations", "expected loss − least"]]
        lines += [
            [name, f"{curve.evaluations[-1]:g}", f"{curve.losses[-1] - best:.3g}"]
            for name, curve in sorted(curves[title].items(), key=lambda item: item[1].losses[-1])
        ]
        heading = f"{title}: after training with {options.steps} evaluations (Adam, rate {options.rate:g})"
        text += f"### {heading}\n\n{show_table(console, heading, lines)}\n\n"
    if options.plot is not None:
        beside = options.plot.with_name(f"{options.plot.stem}-bias{options.plot.suffix}")
        write_file(options.plot, "--plot", partial(_plot_curves, curves))
        write_file(beside, "--plot", ModelReport(reports).plot)
        console.print(f"training curves in {options.plot}, bias² and variance in {beside}", highlight=False)
    return text


def _plot_curves(curves: Mapping[str, Mapping[str, Curve]], path: Path) -> None:
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(curves) + 2, 4), layout="constrained")
    handles: dict[str, Any] = {}
    for axes, (title, runs) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        for index, (name, curve) in enumerate(runs.items()):
            style = "-" if index < 20 else "--"
            (handles[name],) = axes.plot(*curve, style, color=colormaps["tab20"](index % 20), linewidth=1.2, label=name)
        axes.set(xlabel="evaluations of the objective", ylabel="expected loss", title=title)
        axes.grid(alpha=0.3)
    if handles:
        figure.legend(list(handles.values()), list(handles), loc="outside right upper", fontsize=7)
    figure.savefig(path, dpi=130)
