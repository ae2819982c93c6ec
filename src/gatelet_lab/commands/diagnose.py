"""`gatelet diagnose`: estimators on ready problems, and the table that certifies all of them."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, Literal, NamedTuple

import torch
import tyro
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from gatelet import surrogate
from gatelet._checks import check_choice, check_count, check_positive
from gatelet.diagnose import Moments, Report, exact_gradient, moments
from gatelet.diagnose.measure import diagnose
from gatelet.diagnose.models import ModelReport, diagnose_model
from gatelet.diagnose.moments import noise_outcomes
from gatelet.diagnose.row import Budget
from gatelet.diagnose.table import facts, forms
from gatelet.estimators import ALL, Estimator, Objective, ScoreFunction, StraightThrough, resolve
from gatelet.estimators._noise import NONE
from gatelet_lab import data
from gatelet_lab.files import write_atomically
from gatelet_lab.training import recipes
from gatelet_lab.training.model import PaperNet

Problem = Literal["toy", "polynomial", "network", "certificate"]
CERTIFICATE = Path("runs/certificate.md")


@dataclass(frozen=True)
class Diagnose:
    """Measure bias, variance and cost of estimators on a ready problem, or certify them all."""

    problem: tyro.conf.Positional[Problem]
    """toy: E[(b − t)²], with known closed forms. polynomial: ReinMax's, with training curves. network: the paper's
    conditional network on a batch. certificate: every estimator and variant on the standard objectives."""
    estimators: tuple[str, ...] = ()
    """Estimators, by name; by default all that suit the problem."""
    samples: int | None = None
    """Calls over which an estimator is measured, where it cannot be enumerated; 200 for network, else 10000."""
    budget: Budget | None = None
    """Compare at equal evaluations of the objective, or equal time."""
    seed: int = 0
    """Seed of all noise and initial values."""
    plot: Path | None = None
    """File for the picture: bias² and variance against cost. For polynomial it holds training curves, and a second file
    beside it bias² and variance."""
    out: Path | None = None
    """Markdown file for what is printed; runs/certificate.md for the certificate."""

    latents: int = 128
    """polynomial: the number of binary latents."""
    steps: int = 1000
    """polynomial: evaluations of the objective in training; one that needs one per step makes so many steps."""
    rate: float = 0.05
    """polynomial: Adam's learning rate."""

    dataset: str = "digits"
    """network: mnist, fashion-mnist, digits (needs no download), or a directory of IDX files."""
    data_dir: Path | None = None
    """network: where to look for the data set's files first."""
    experts: int = 200
    """network: units of the conditional layer."""
    bottleneck: int = 40
    """network: the gater's hidden units."""
    batch: int = 32
    """network: examples in the batch."""

    units: int = 2
    """certificate: N, 2 or 3."""


def run(options: Diagnose, console: Console) -> None:
    """Run the command."""
    check(options)
    console.soft_wrap = True
    commands = {"toy": _toy, "polynomial": _polynomial, "network": _network, "certificate": _certificate}
    text = commands[options.problem](options, console)
    out = options.out or (CERTIFICATE if options.problem == "certificate" else None)
    if out is not None:
        _write(out, "--out", lambda path: write_atomically(path, lambda file: file.write(text.encode())))
        console.print(f"written to {out}", highlight=False)


def check(options: Diagnose) -> None:
    """Raise for options that do not fit."""
    check_choice(options.problem, ("toy", "polynomial", "network", "certificate"), "problem")
    for name in options.estimators:
        check_choice(name, ALL, "estimator")
    for name in ("latents", "steps", "experts", "bottleneck", "batch"):
        check_count(getattr(options, name), f"--{name}")
    check_positive(options.rate, "--rate")
    if options.samples is not None and options.samples < 10:
        raise ValueError(f"--samples must be at least 10, not {options.samples}")
    if options.units not in (2, 3):
        raise ValueError(f"--units must be 2 or 3, not {options.units}")
    if options.plot is not None and options.problem == "certificate":
        raise ValueError("--plot: the certificate is a table and has no picture")


def _write(path: Path, name: str, write: Callable[[Path], object]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
    except OSError as error:
        raise ValueError(f"{name} {path}: cannot be written ({error.strerror})") from error


def _show(console: Console, title: str, report: Report | ModelReport) -> str:
    """Print a report and return it as Markdown."""
    console.print(f"\n{title}", style="bold", highlight=False)
    console.print(repr(report), highlight=False, markup=False)
    return f"## {title}\n\n```\n{report!r}\n```\n\n"


def _head(options: Diagnose) -> str:
    return f"# gatelet diagnose {options.problem}\n\ngatelet {version('gatelet')}, torch {torch.__version__}\n\n"


# -------------------------------------------------------------------- E[(b − t)²]

TOY_LOGIT = -2.0


class Known(NamedTuple):
    """A number of the toy problem that has a closed form."""

    what: str
    known: float
    found: float


def toy_objective(target: float) -> Objective:
    """Return h ↦ Σ (h − t)²."""

    def objective(gates: Tensor) -> Tensor:
        return (gates - target).square().sum(-1)

    return objective


def toy_checks() -> list[Known]:
    """Return the closed forms at t = .45, logit −2, beside what :func:`gatelet.moments` finds."""
    logits, objective = torch.full((1, 1), TOY_LOGIT, dtype=torch.float64), toy_objective(0.45)
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


def _toy(options: Diagnose, console: Console) -> str:
    title = f"t = 0.45, logit {TOY_LOGIT:g}: closed forms"
    lines = [["", "closed form", "found"]]
    lines += [[row.what, f"{row.known:.4g}", f"{row.found:.4g}"] for row in toy_checks()]
    _print_table(console, title, lines)
    text = f"{_head(options)}## {title}\n\n{_markdown(lines)}\n\n"
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
        logits = torch.full((1, 1), TOY_LOGIT)
        report = diagnose(
            toy_objective(target), logits, chosen, options.samples or 10_000, options.budget, seed=options.seed
        )
        reports[f"t = {target:g}"] = report
        text += _show(console, f"E[(b − t)²], t = {target:g}, logit {TOY_LOGIT:g}", report)
    if options.plot is not None:
        _write(options.plot, "--plot", ModelReport(reports).plot)
    return text


# -------------------------------------------------------------------- the polynomial of ReinMax

_TARGET = 0.45
_POWERS = (1.5, 2.0, 3.0)


def polynomial_objective(power: float) -> Objective:
    """Return X ↦ (1/L) Σ |X_i − c|^p, c = 0.45 (L. Liu et al. 2023, arXiv:2304.08612, section 5)."""

    def objective(gates: Tensor) -> Tensor:
        return (gates - _TARGET).abs().pow(power).mean(-1)

    return objective


def polynomial_gradient(power: float, logits: Tensor) -> Tensor:
    """Return the exact gradient of the expected polynomial, whose terms do not interact."""
    p = logits.detach().to(torch.float64).sigmoid()
    slope: Tensor = p * (1 - p) * ((1 - _TARGET) ** power - _TARGET**power) / logits.shape[-1]
    return slope


def polynomial_value(power: float, logits: Tensor) -> float:
    """Return the exact expected polynomial."""
    p = logits.detach().to(torch.float64).sigmoid()
    return float((p * (1 - _TARGET) ** power + (1 - p) * _TARGET**power).mean())


class Curve(NamedTuple):
    """A training run: the exact expected loss after so many evaluations."""

    evaluations: list[float]
    losses: list[float]


def train_polynomial(
    power: float, estimator: str | Estimator, latents: int, steps: int, rate: float, evaluations: float, seed: int
) -> Curve:
    """Minimise the expected polynomial with Adam over the logits, from zero, with ``steps`` evaluations."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.zeros(1, latents, requires_grad=True)
    method, objective = resolve(estimator), polynomial_objective(power)
    optimiser = torch.optim.Adam([logits], lr=rate)
    curve = Curve([0.0], [polynomial_value(power, logits)])
    count = int(steps // evaluations)
    for step in range(1, count + 1):
        optimiser.zero_grad()
        surrogate(objective, logits, method, generator=generator).sum().backward()
        optimiser.step()
        if step % max(1, count // 100) == 0:
            curve.evaluations.append(step * evaluations)
            curve.losses.append(polynomial_value(power, logits))
    return curve


def _polynomial(options: Diagnose, console: Console) -> str:
    text = _head(options)
    reports: dict[str, Report] = {}
    curves: dict[str, dict[str, Curve]] = {}
    for power in _POWERS:
        title = f"p = {power:g}"
        logits = torch.zeros(1, options.latents)
        report = diagnose(
            polynomial_objective(power),
            logits,
            options.estimators or None,
            options.samples or 10_000,
            options.budget,
            reference=polynomial_gradient(power, logits),
            exact=False,
            seed=options.seed,
        )
        reports[title] = report
        text += _show(
            console, f"E[(1/L) Σ |X − {_TARGET:g}|^p], {title}, {options.latents} latents, at logit 0", report
        )
        curves[title] = {
            row.name: train_polynomial(
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
        _print_table(console, heading, lines)
        text += f"### {heading}\n\n{_markdown(lines)}\n\n"
    if options.plot is not None:
        beside = options.plot.with_name(f"{options.plot.stem}-bias{options.plot.suffix}")
        _write(options.plot, "--plot", partial(_plot_curves, curves))
        _write(beside, "--plot", ModelReport(reports).plot)
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


# -------------------------------------------------------------------- the paper's network


def _network(options: Diagnose, console: Console) -> str:
    split = data.load(options.dataset, options.data_dir)
    torch.manual_seed(options.seed)
    recipe = recipes.straight_through().but(
        experts=options.experts,
        bottleneck=options.bottleneck,
        input_dropout=0.0,  # noise that is not the gates' would be counted as every estimator's variance
        hidden_dropout=0.0,
    )
    model = PaperNet(recipe, split.train_images.shape[1], split.classes)
    batch = split.train_images[: options.batch], split.train_labels[: options.batch]
    report = diagnose_model(
        model,
        torch.nn.CrossEntropyLoss(reduction="none"),
        batch,
        options.estimators or None,
        options.samples or 200,
        options.budget,
        seed=options.seed,
    )
    if options.plot is not None:
        _write(options.plot, "--plot", report.plot)
    title = f"{split.name}, {options.experts} experts, bottleneck {options.bottleneck}, {len(batch[0])} examples"
    return _head(options) + _show(console, title, report)


# -------------------------------------------------------------------- the certificate

_ORDERS = (96, 64, 48, 32, 24, 16)
_MAX_OUTCOMES = 1 << 21  # of the noise: a few seconds
_TIMED_SHAPE = (32, 8)
_SAMPLED = "Monte Carlo"


def _draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def standard_objectives(units: int) -> dict[str, Objective]:
    """Return the objectives of the certificate, for one example of N units."""
    weight, target, pairs = _draw(1, units), _draw(2, units), _draw(3, units, units)
    entries = _draw(4, 2**units)
    codes = _codes(units)
    first, second = 0.5 * _draw(5, units, 5), 0.7 * _draw(6, 5)

    def table(gates: Tensor) -> Tensor:  # multilinear between the outcomes
        gates = gates.double().unsqueeze(-2)
        return ((gates * codes + (1 - gates) * (1 - codes)).prod(-1) * entries).sum(-1)

    def quadratic(gates: Tensor) -> Tensor:
        gates = gates.double()
        return (gates - target).square().sum(-1) + ((gates @ pairs) * gates).sum(-1)

    return {
        "linear": lambda gates: (gates.double() * weight).sum(-1),
        "quadratic": quadratic,
        "product": lambda gates: 1.5 * (1 - 2 * gates.double()).prod(-1),
        "table": table,
        "network": lambda gates: ((gates.double() @ first - 0.2).tanh() @ second - 0.4).square(),
    }


class Certified(NamedTuple):
    """A line of the certificate."""

    name: str
    declared: str
    """What its expectation is said to be."""
    bias: float
    """max |E[ĝ] − ∇E[L]| over objectives and units."""
    variances: dict[str, float]
    """Σ_i Var ĝ_i on each objective."""
    how: str
    error: float
    """By how much ``bias`` may be off: 0 for a finite sum."""
    replicas: int
    evaluations: float
    milliseconds: float


def cases(names: Sequence[str] = ()) -> list[tuple[str, Estimator]]:
    """Return every estimator in every variant (or those of these names), with its line's name."""
    found = []
    for name in names or ALL:
        for options in forms(ALL[name]):
            made = ALL[name](**options)
            shown = ", ".join(f"{key}={value}" for key, value in options.items())
            found.append((f"{name}({shown})" if shown else name, made))
    return found


def certify(name: str, method: Estimator, units: int, samples: int = 10_000, seed: int = 0) -> Certified:
    """Measure one estimator on all standard objectives."""
    categorical = method.event_dims == 2
    biases, errors, ways = [], [], []
    variances: dict[str, float] = {}
    own = method.unbiased and not method.binary
    for title, standard in standard_objectives(units).items():
        objective = partial(_of_class, standard, _codes(units)) if categorical else standard
        logits = 1.5 * _draw(7, 1, 1, 2**units) if categorical else 1.5 * _draw(7, 1, units)
        found, how, error = _expect(objective, logits, method, samples, seed)
        truth = exact_gradient(objective, logits, method.form)
        if method.unbiased and how != _SAMPLED:
            # What an unbiased estimator is unbiased for is the expectation of its own value.
            plain = moments(objective, logits, ScoreFunction(baseline="none", kind=method.form)).value
            # The tolerance is for the quadrature's error; VIMCO's bound differs by far more.
            if not method.binary or not torch.allclose(found.value, plain, rtol=0, atol=1e-3):
                own, error = True, error + 1e-10
                truth = _own_gradient(objective, logits, method)
        biases.append(float((found.mean - truth).abs().max()))
        errors.append(error)
        variances[title] = float(found.variance.sum())
        ways.append(how)
    evaluations, milliseconds = _cost(method)
    declared = "biased" if not method.unbiased else "none (own objective)" if own else "none"
    return Certified(
        name, declared, max(biases), variances, max(ways), max(errors), method.replicas, evaluations, milliseconds
    )


def _expect(
    objective: Objective, logits: Tensor, method: Estimator, samples: int, seed: int
) -> tuple[Moments, str, float]:
    """Return mean and variance, how they were found, and how far off the mean may be."""
    smooth = method.law != NONE and not facts(method).constant
    for order, coarser in pairwise(_ORDERS):
        try:
            if noise_outcomes(method, logits, method.replicas, order) > _MAX_OUTCOMES:
                continue
            found = moments(objective, logits, method, order=order)
            if not smooth:
                return found, "enumeration", 0.0
            other = moments(objective, logits, method, order=coarser)
        except (RuntimeError, ValueError):  # not to be integrated; or operations that vmap does not know
            break
        return found, f"quadrature, order {order}", float((found.mean - other.mean).abs().max())
    report = diagnose(objective, logits, {"it": method}, samples, exact=False, kind=method.form, seed=seed)
    row = report["it"]
    if row.mean is None:
        raise RuntimeError(f"{type(method).__name__}: {row.left_out}")
    variance = torch.full_like(row.mean, row.variance / row.mean.numel())
    return Moments(row.mean, variance, row.mean.new_zeros(1)), _SAMPLED, 3 * row.bias_error


def _codes(units: int) -> Tensor:
    """Return the 2^N outcomes of N gates, (2^N, N)."""
    return torch.tensor(list(itertools.product((0.0, 1.0), repeat=units)), dtype=torch.float64)


def _of_class(objective: Objective, codes: Tensor, gates: Tensor) -> Tensor:
    """Return the objective of one categorical variable, whose classes are the outcomes of N gates."""
    return objective(gates[..., 0, :].double() @ codes)


def _own_gradient(objective: Objective, logits: Tensor, method: Estimator) -> Tensor:
    """Return the gradient of the estimator's expected value, by differences of fourth order."""
    step = 2e-3

    def value(at: Tensor) -> float:
        for order in _ORDERS:
            try:
                if noise_outcomes(method, at, method.replicas, order) <= _MAX_OUTCOMES:
                    return float(moments(objective, at, method, order=order).value)
            except ValueError:
                break
        raise RuntimeError(f"{type(method).__name__}: its expected value cannot be integrated")

    gradient = torch.zeros_like(logits)
    for index in range(logits.numel()):
        unit = torch.zeros_like(logits).flatten().index_fill(0, torch.tensor([index]), step).reshape(logits.shape)
        near, far = value(logits + unit) - value(logits - unit), value(logits + 2 * unit) - value(logits - 2 * unit)
        gradient.view(-1)[index] = (8 * near - far) / (12 * step)
    return gradient


def _cost(method: Estimator) -> tuple[float, float]:
    """Return evaluations and milliseconds of one call, forward and backward, at (B, N) = (32, 8)."""
    shape = (_TIMED_SHAPE[0], 1, _TIMED_SHAPE[1]) if method.event_dims == 2 else _TIMED_SHAPE
    logits = _draw(8, *shape).float().requires_grad_()
    total = 0

    def objective(gates: Tensor) -> Tensor:
        nonlocal total
        losses = gates.square().flatten(2).sum(-1) if method.event_dims == 2 else gates.square().sum(-1)
        total += losses.numel()
        return losses

    times = []
    for _ in range(12):
        total = 0
        start = perf_counter()
        surrogate(objective, logits, method, generator=torch.Generator().manual_seed(0)).sum().backward()
        times.append(1000 * (perf_counter() - start))
    return total / _TIMED_SHAPE[0], median(times[2:])


def _certificate(options: Diagnose, console: Console) -> str:
    rows = [
        certify(name, method, options.units, options.samples or 10_000, options.seed)
        for name, method in cases(options.estimators)
    ]
    objectives = list(standard_objectives(options.units))
    lines = [["estimator", "bias declared", "bias found", *(f"var {name}" for name in objectives), "K", "eval", "ms"]]
    lines[0].append("how")
    lines += [
        [
            row.name,
            row.declared,
            f"{row.bias:.1e}" + (f" ± {row.error:.0e}" if row.error > 0 else ""),
            *(f"{row.variances[name]:.3g}" for name in objectives),
            str(row.replicas),
            f"{row.evaluations:g}",
            f"{row.milliseconds:.2f}",
            row.how,
        ]
        for row in rows
    ]
    title = f"certificate: gatelet {version('gatelet')}, {len(rows)} estimators and variants, {options.units} units"
    _print_table(console, title, lines)
    console.print(LEGEND, highlight=False)
    return f"{_head(options)}{_markdown(lines)}\n\n{LEGEND}\n"


LEGEND = (
    "bias found: the largest |E[ĝ] − ∇E[L]| over all objectives and units, in float64. ∇E[L] is that of 0/1 gates, by "
    "enumeration; for an estimator that is unbiased for an objective of its own (its gates are not 0 or 1, or it "
    "bounds the loss) that of its own value, by differences of fourth order (good to 1e-10). var: Σ Var ĝ of one "
    "call with K replicas. how: enumeration is a finite sum, exact up to rounding; quadrature is Gauss–Legendre, ± its "
    "distance from the next lower order; Monte Carlo ± 3 standard errors. eval, ms: evaluations of the objective and "
    f"milliseconds, forward and backward, of a call at (B, N) = {_TIMED_SHAPE}. A method for "
    "categorical units only has one variable, whose classes are the outcomes of the N gates."
)


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    rows = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)


def _print_table(console: Console, title: str, lines: Sequence[Sequence[str]]) -> None:
    grid = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, name in enumerate(lines[0]):
        grid.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
    for line in lines[1:]:
        grid.add_row(*line)
    console.print(grid)


__all__ = ["CERTIFICATE", "Diagnose", "Problem", "run"]
