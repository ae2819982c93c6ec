"""The certificate: every estimator and variant against the exact gradient on standard objectives."""

import itertools
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from statistics import median
from time import perf_counter
from typing import NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from gatelet import surrogate
from gatelet.diagnose import Moments, diagnose, exact_gradient, moments
from gatelet.diagnose.moments import noise_outcomes
from gatelet.diagnose.table import facts, forms
from gatelet.estimators import ALL, Estimator, Objective, ScoreFunction
from gatelet.estimators._noise import NONE
from gatelet_lab.problems.options import Diagnose, head, show_table

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
    """What it declares its expectation to be."""
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
            # An unbiased estimator is compared with the gradient of the expectation of its own value.
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


LEGEND = (
    "bias found: the largest |E[ĝ] − ∇E[L]| over all objectives and units, in float64. ∇E[L] is that of 0/1 gates, by "
    "enumeration; for an estimator that is unbiased for an objective of its own (its gates are not 0 or 1, or it "
    "bounds the loss) that of its own value, by differences of fourth order (good to 1e-10). var: Σ Var ĝ of one "
    "call with K replicas. how: enumeration is a finite sum, exact up to rounding; quadrature is Gauss–Legendre, ± its "
    "distance from the next lower order; Monte Carlo ± 3 standard errors. eval, ms: evaluations of the objective and "
    f"milliseconds, forward and backward, of a call at (B, N) = {_TIMED_SHAPE}. A method for "
    "categorical units only has one variable, whose classes are the outcomes of the N gates."
)


def run(options: Diagnose, console: Console) -> str:
    """Certify every estimator and variant."""
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
    text = show_table(console, title, lines)
    console.print(LEGEND, highlight=False)
    return f"{head(options)}{text}\n\n{LEGEND}\n"
