<<<<<<< HEAD
"""Bias, variance and cost of estimators on your own objective."""
=======
"""What a diagnosis returns: rows, the reference, and what follows from them."""
>>>>>>> 77bd2d1 (diagnose: measuring, recommending, text and drawing are four files; gatelet.diagnose is an ordinary function; moments is public; __version__)

import importlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

<<<<<<< HEAD
from gatelet._checks import check_choice, check_count, check_logits
from gatelet.diagnose.exact import MAX_OUTCOMES, check_dims, exact_gradient
from gatelet.diagnose.moments import moments, noise_outcomes
from gatelet.estimators import ALL, Estimator, Objective
from gatelet.estimators._base import AnyKind, evaluate
from gatelet.estimators._kinds import Bernoulli, Kind, make_kind

Budget = Literal["evaluations", "time"]
Estimators = Sequence[str | Estimator] | Mapping[str, str | Estimator]

_CHUNK = 1 << 18  # gates held at once
_ENUMERATED = 1 << 22  # gates, beyond which measuring is faster than enumerating
_ORDER = 64
_BLOCKS = 20  # whose spread gives the standard error of a measured variance
_WARM_UP = 100
_REFERENCE_REPLICAS = 8
_ZERO = 1e-15  # a square under it is rounding, or quadrature, to the plots
_TIMED_CALLS, _TIMED_SECONDS = 31, 0.5
CLEARLY_SMALLER = 0.5
"""A biased estimator is recommended where its mean squared error is below this share of the unbiased one's."""

# What an estimator's call may end with on an objective that does not suit it; its row says so.
_UNSUITABLE = (ArithmeticError, IndexError, RuntimeError, TypeError, ValueError)


class Recommendation(NamedTuple):
    """Which estimator to take, and why."""

    name: str
    reason: str


@dataclass(frozen=True, eq=False, kw_only=True)
class Row:
    """What one estimator does on the objective. Squares are summed over the units and averaged over the examples."""

    name: str
    unbiased: bool
    """Whether it claims to be unbiased, of gates of 0 and 1, and the bias found here does not contradict."""
    replicas: int
    """Replicas K of one call."""
    left_out: str | None = None
    """Why there are no numbers, if there are none."""
    exact: bool = False
    """Whether mean and variance were enumerated, not measured."""
    bias: float = math.nan
    """‖E[ĝ] − ∇E[L]‖; where it was measured, what remains of it after ``bias_error`` is taken off in squares."""
    bias_error: float = math.nan
    """Standard error of the difference, in the same norm: how far off ‖E[ĝ] − ∇E[L]‖ is. A bias well under it is not
    seen."""
    variance: float = math.nan
    """E‖ĝ − E[ĝ]‖² of one call with K replicas."""
    variance_error: float = math.nan
    """Standard error of the measured variance."""
    signal_to_noise: float = math.nan
    """‖E[ĝ]‖ / √variance of one call."""
    cosine: float = math.nan
    """Cosine of the angle between mean estimate and reference, over the whole batch."""
    milliseconds: float = math.nan
    """Milliseconds of one call, forward and backward; the median."""
    evaluations: float = math.nan
    """Evaluations of the objective, per example and call."""
    calls: float = 1.0
    """How many calls the budget buys; 1 without a budget."""
    mean: Tensor | None = None
    """E[ĝ], float64, of the logits' shape."""

    @property
    def variance_per_evaluation(self) -> float:
        """Variance × evaluations: the variance that calls averaged to the cost of one evaluation would have."""
        return self.variance * self.evaluations

    @property
    def budget_variance(self) -> float:
        """Variance of the average of the calls that the budget buys."""
        return self.variance / self.calls

    @property
    def mean_squared_error(self) -> float:
        """bias² + variance, at the budget."""
        return self.bias**2 + self.budget_variance

    def cost(self, budget: Budget | None) -> float:
        """Return what one call costs: milliseconds where time is the budget, else evaluations."""
        return self.milliseconds if budget == "time" else self.evaluations


_FIGURES: Mapping[str, Callable[[Row], Any]] = {
    "estimator": lambda row: row.name,
    "unbiased": lambda row: row.unbiased,
    "replicas": lambda row: row.replicas,
    "exact": lambda row: row.exact,
    "bias": lambda row: row.bias,
    "bias_error": lambda row: row.bias_error,
    "variance": lambda row: row.variance,
    "variance_error": lambda row: row.variance_error,
    "variance_per_evaluation": lambda row: row.variance_per_evaluation,
    "signal_to_noise": lambda row: row.signal_to_noise,
    "cosine": lambda row: row.cosine,
    "milliseconds": lambda row: row.milliseconds,
    "evaluations": lambda row: row.evaluations,
    "calls": lambda row: row.calls,
    "budget_variance": lambda row: row.budget_variance,
    "mean_squared_error": lambda row: row.mean_squared_error,
    "left_out": lambda row: row.left_out,
}
=======
from gatelet._checks import check_choice
from gatelet.diagnose.draw import draw
from gatelet.diagnose.recommend import Recommendation, recommend
from gatelet.diagnose.row import FIGURES, Budget, Row
from gatelet.diagnose.text import UNITS, number, table
>>>>>>> 77bd2d1 (diagnose: measuring, recommending, text and drawing are four files; gatelet.diagnose is an ordinary function; moments is public; __version__)


@dataclass(frozen=True, eq=False, repr=False)
class Report:
    """What :func:`diagnose` returns: a row per estimator, and what they were compared to. It prints as a table."""

    rows: tuple[Row, ...]
    reference: Tensor
    """∇E[L], float64, of the logits' shape."""
    reference_error: float
    """Standard error of the reference, in the rows' norm; 0 where it is exact."""
    reference_how: str
    """Where the reference comes from."""
    budget: Budget | None
    """What all rows may spend in equal amounts; None without a budget."""
    amount: float | None
    """How much of it, in evaluations or milliseconds: what one call of the most expensive estimator costs."""

    def __getitem__(self, name: str) -> Row:
        """Return the row of this name."""
        return {row.name: row for row in self.rows}[check_choice(name, (row.name for row in self.rows), "row")]

    @property
    def measured(self) -> tuple[Row, ...]:
        """The rows that have numbers."""
        return tuple(row for row in self.rows if row.left_out is None and math.isfinite(row.mean_squared_error))

    @property
    def recommendation(self) -> Recommendation | None:
        """Which estimator to take, and the reason; None where nothing could be measured."""
        return recommend(self.measured, self.budget)

    def to_dataframe(self) -> Any:
        """Return the rows as a ``pandas.DataFrame``.

        Raises:
            ImportError: without pandas.
        """
        return pandas().DataFrame(self.records())

    def records(self) -> list[dict[str, Any]]:
        """Return the rows as dictionaries of numbers, as :meth:`to_dataframe` has them for columns."""
        return [{name: value(row) for name, value in FIGURES.items()} for row in self.rows]

    def plot(self, path: str | Path) -> None:
        """Draw bias² and variance of one call against its cost into a file, in the format of the file's ending.

        Raises:
            ImportError: without matplotlib.
        """
        draw({"": self}, path)

    def __repr__(self) -> str:
        """Show the table, what was left out, and the recommendation."""
        per = f", averaged to {number(self.amount)} {UNITS[self.budget]}" if self.budget and self.amount else ""
        error = f", standard error {number(self.reference_error)}" if self.reference_error else ""
        lines = [
            f"reference: {self.reference_how}{error}; shape {tuple(self.reference.shape)}{per}",
            *table(self.rows, self.budget),
        ]
        chosen = self.recommendation
        return "\n".join([*lines, *([f"recommended: {chosen.name}: {chosen.reason}"] if chosen else [])])


<<<<<<< HEAD
_UNITS = {"evaluations": "evaluations", "time": "ms"}


def _cells(row: Row, budget: Budget | None) -> list[str]:
    bias = _number(row.bias) + (f" ± {row.bias_error:.1g}" if row.bias_error > 0 else "")
    numbers = [row.variance, row.variance_per_evaluation, row.signal_to_noise, row.cosine, row.milliseconds]
    numbers += [row.evaluations, *([row.calls, row.budget_variance, row.mean_squared_error] if budget else [])]
    return [row.name, str(row.replicas), bias, *map(_number, numbers)]


def _number(value: float) -> str:
    return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e+")


def diagnose(
    objective: Objective,
    logits: Float[Tensor, "*lead N"],
    estimators: Estimators | None = None,
    samples: int = 10_000,
    budget: Budget | None = None,
    *,
    replicas: int | None = None,
    reference: Tensor | None = None,
    exact: bool = True,
    kind: AnyKind = "bernoulli",
    k: int | None = None,
    seed: int = 0,
) -> Report:
    """Bias, variance and cost of estimators on an objective, side by side.

    bias = ‖E[ĝ] − ∇E[L]‖ and variance = E‖ĝ − E[ĝ]‖², squares summed over the units and averaged over the examples;
    E[L] is the expected loss of gates that are 0 or 1, also for estimators whose own gates are not. Mean and variance
    are enumerated where :func:`~gatelet.diagnose.moments` can in seconds, else measured over ``samples`` calls.
    The reference ∇E[L] is the exact gradient where its outcomes can be enumerated, otherwise a run of leave-one-out
    with 8 replicas, whose standard error is part of ``bias_error``.

    An instance is measured in the state it has. A stateful estimator given by name first sees 100 calls, as its
    moving averages would in training; after that the state is held.

    Bias and variance of the measured numbers: bias² is corrected for the noise in it; standard errors are given. The
    calls are made as one large batch, so one example's estimate must not depend on another example.

    Args:
        objective: maps gates (K, B, N) to losses (K, B), for any K.
        logits: (B, N), any leading shape; (B, N, C) for categorical units.
        estimators: names of ``gatelet.estimators.ALL`` or instances; or a mapping of names for the table to them. By
            default every estimator of the gradient of 0/1 gates.
        samples: the number of calls over which an estimator is measured, at least 10.
        budget: compare at equal ``"evaluations"`` of the objective, or equal ``"time"``: every estimator averages as
            many calls (not a whole number) as the most expensive one's single call costs.
        replicas: K of every call, raised to what an estimator needs; by default the least it works with.
        reference: ∇E[L], of the logits' shape, where it is known.
        exact: ``False``: measure also where the noise could be enumerated.
        kind: what units the names stand for, ``"bernoulli"``, ``"categorical"`` or ``"subset"``.
        k: of subset units, how many are open.
        seed: of the noise; torch's global generator is left alone.

    Returns:
        the report; an estimator that does not suit the objective (if it needs a derivative, say) has a row that says
        why it was left out.

    Raises:
        ValueError: for logits that are not finite or empty, an unknown estimator, budget or kind, too few samples, an
            objective that does not return one loss per replica and example.

    >>> import torch
    >>> a = torch.full((1, 1), -2.0)
    >>> report = diagnose(lambda h: ((h - 0.45) ** 2).sum(-1), a, ["leave_one_out", "straight_through"])
    >>> f"{report['leave_one_out'].bias:.4f} {report['leave_one_out'].variance:.1e}"
    '0.0000 4.1e-04'
    >>> (report["straight_through"].mean - report.reference).round(decimals=2)     # its gradient has the wrong sign
    tensor([[-0.6700]], dtype=torch.float64)
    >>> report.recommendation.name
    'leave_one_out'

    Reference: Y. Bengio, N. Léonard, A. Courville, "Estimating or Propagating Gradients Through Stochastic
    Neurons for Conditional Computation", 2013, arXiv:1308.3432, Theorem 1 (what is estimated).
    """
    check_logits(logits)
    if logits.numel() == 0:
        raise ValueError(f"logits must not be empty, but have shape {tuple(logits.shape)}")
    if check_count(samples, "samples") < 10:
        raise ValueError(f"samples must be at least 10, to measure a variance, not {samples}")
    if budget is not None:
        check_choice(budget, _UNITS, "budget")
    if replicas is not None:
        check_count(replicas, "replicas")
    if isinstance(reference, Tensor) and reference.shape != logits.shape:
        raise ValueError(f"reference must have the logits' shape {tuple(logits.shape)}, not {tuple(reference.shape)}")
    units = make_kind(kind, k)
    check_dims(logits, units)
    chosen = _choose(estimators, units)
    problem = _Problem(objective, logits.detach(), units, samples, seed)
    target = problem.target(reference, exact)
    rows = []
    for index, (name, each) in enumerate(chosen.items()):
        if each.method is None:
            rows.append(Row(name=name, unbiased=False, replicas=0, left_out=each.reason))
        else:
            rows.append(problem.row(name, each, replicas or 1, target, exact, index))
    costs = [row.cost(budget) for row in rows if row.left_out is None]
    amount = max(costs) if budget is not None and costs else None
    if amount is not None:
        rows = [row if row.left_out is not None else replace(row, calls=amount / row.cost(budget)) for row in rows]
    return Report(tuple(rows), target.gradient, target.error, target.how, budget, amount)


class _Chosen(NamedTuple):
    method: Estimator | None
    warm_up: bool = False
    reason: str = ""  # why there is no method


def _choose(estimators: Estimators | None, kind: Kind) -> dict[str, _Chosen]:
    """Return the estimators (copies) by the names of their rows."""
    if estimators is None:
        # One that is unbiased for gates of its own kind (a noisy rectifier's) has nothing to do with this gradient.
        estimators = [
            name for name, cls in ALL.items() if kind.name in cls.kinds and (bool(cls.binary) or not bool(cls.unbiased))
        ]
    if isinstance(estimators, str | Estimator) or not isinstance(estimators, Mapping | Sequence):
        raise TypeError(
            "estimators must be a sequence of names of gatelet.estimators.ALL and instances, or a mapping to them, not "
            f"{type(estimators).__name__}"
        )
    pairs = estimators.items() if isinstance(estimators, Mapping) else [(None, each) for each in estimators]
    if not pairs:
        raise ValueError(f"estimators: name at least one of {', '.join(ALL)}")
    names = {cls: name for name, cls in ALL.items()}
    chosen: dict[str, _Chosen] = {}
    for label, each in pairs:
        if not isinstance(each, str | Estimator):
            raise TypeError(f"estimators must hold names and instances, not {type(each).__name__}")
        known = each if isinstance(each, str) else names.get(type(each), type(each).__name__)
        base = label or known
        stem = base if base not in chosen else f"{base} #{sum(key.split(' #')[0] == base for key in chosen) + 1}"
        chosen[stem] = _make(each, kind)
    return chosen


def _make(estimator: str | Estimator, kind: Kind) -> _Chosen:
    if isinstance(estimator, Estimator):
        if estimator.form != kind:
            return _Chosen(None, reason=f"is for {estimator.kind} units, not {kind.name} ones")
        return _Chosen(copy.deepcopy(estimator))
    cls = ALL[check_choice(estimator, ALL, "estimator")]
    if kind.name not in cls.kinds:
        return _Chosen(None, reason=f"has no {kind.name} form")
    method = cls() if kind == Bernoulli() else cls(kind=kind)  # not all take a kind
    return _Chosen(method, warm_up=len(method.state_dict()) > len(list(method.parameters())))


class _Target(NamedTuple):
    gradient: Tensor
    error: float
    how: str


class _Problem:
    """An objective at given logits."""

    def __init__(self, objective: Objective, logits: Tensor, kind: Kind, samples: int, seed: int) -> None:
        self.objective, self.logits, self.kind, self.samples, self.seed = objective, logits, kind, samples, seed
        self.events = events = kind.event_dims
        self.examples = logits.shape[:-events].numel()
        self.outcomes = kind.count(logits.shape)
        # Every error of the objective itself shows here, before an estimator could be blamed for it.
        gates = kind.threshold(logits).unsqueeze(0)
        with torch.no_grad():
            first, again = (evaluate(objective, gates, events) for _ in range(2))
        self.random = not torch.equal(first, again)  # it draws noise of its own, which no enumeration covers
        with torch.enable_grad():
            leaf = gates.clone().requires_grad_()
            losses = evaluate(objective, leaf, events)
            slope = torch.autograd.grad(losses.sum(), leaf, allow_unused=True)[0] if losses.requires_grad else None
        self.differentiable = slope is not None

    def norm(self, square: Tensor) -> float:
        """Return a square's sum over the units, averaged over the examples."""
        return float(square.sum()) / self.examples

    def generator(self, stream: int) -> torch.Generator:
        """Return a source of noise that no other stream shares."""
        return torch.Generator(self.logits.device).manual_seed(self.seed * 1000 + stream)

    def target(self, reference: Tensor | None, exact: bool) -> _Target:
        """Return the gradient of the expected loss, and how well it is known."""
        if reference is not None:
            return _Target(reference.detach().to(torch.float64), 0.0, "given")
        long_run = self.samples * _REFERENCE_REPLICAS
        if not self.random and self.outcomes <= (MAX_OUTCOMES if exact else min(MAX_OUTCOMES, long_run)):
            return _Target(exact_gradient(self.objective, self.logits, self.kind), 0.0, "exact gradient by enumeration")
        method = ALL["leave_one_out"](kind=self.kind)
        mean, error, _, _ = self.measure(method, _REFERENCE_REPLICAS, self.generator(999))
        how = f"{self.samples} calls of leave_one_out with {_REFERENCE_REPLICAS} replicas"
        return _Target(mean, math.sqrt(self.norm(error)), how)

    def row(self, name: str, chosen: _Chosen, replicas: int, target: _Target, exact: bool, stream: int) -> Row:
        """Measure one estimator, with at least so many replicas."""
        method = chosen.method
        assert method is not None
        replicas = max(replicas, method.replicas)
        replicas += replicas % 2 if method.antithetic else 0
        row = Row(name=name, unbiased=bool(method.unbiased and method.binary), replicas=replicas)
        generator = self.generator(stream)
        try:
            evaluations = self.count(method, replicas, generator)
            for _ in range(_WARM_UP if chosen.warm_up else 0):
                self.estimate(method, self.objective, self.logits, replicas, generator)
            milliseconds = self.time(method, replicas, generator)
            found = self.enumerate(method, replicas, evaluations) if exact and not self.random else None
            if found is None:
                mean, error, variance, variance_error = self.measure(method, replicas, generator)
            else:
                mean, error, variance, variance_error = found[0], torch.zeros_like(found[0]), self.norm(found[1]), 0.0
        except _UNSUITABLE as failure:
            lines = str(failure).strip().splitlines() or [type(failure).__name__]
            reason = lines[0]
            if not self.differentiable and method.needs != "loss":
                reason = "needs a differentiable objective, and this one passes no gradient to its gates"
            return replace(row, left_out=reason)
        noise = self.norm(error) + target.error**2
        length = math.sqrt(self.norm(mean.square()))
        product = float(mean.norm() * target.gradient.norm())
        bias = math.sqrt(max(0.0, self.norm((mean - target.gradient).square()) - noise))
        # VIMCO, for one, is unbiased for another objective.
        rounding = 1e-5 * math.sqrt(self.norm(target.gradient.square()) + variance)
        return replace(
            row,
            unbiased=row.unbiased and bias <= 4 * math.sqrt(noise) + rounding,
            exact=found is not None,
            bias=bias,
            bias_error=math.sqrt(noise),
            variance=variance,
            variance_error=variance_error,
            signal_to_noise=length / math.sqrt(variance) if variance > 0 else math.inf,
            cosine=float((mean * target.gradient).sum()) / product if product > 0 else math.nan,
            milliseconds=milliseconds,
            evaluations=evaluations,
            mean=mean,
        )

    def estimate(
        self, method: Estimator, objective: Objective, logits: Tensor, replicas: int, generator: torch.Generator
    ) -> Tensor:
        """Return the gradient of one call."""
        leaf = logits.detach().clone().requires_grad_()
        noise = method.draw_noise(leaf.detach().expand(replicas, *leaf.shape), generator)
        with torch.enable_grad():
            value = method.surrogate(objective, leaf, noise)
            gradient = torch.autograd.grad(value.sum(), leaf, allow_unused=True)[0] if value.requires_grad else None
        if gradient is None:
            raise ValueError("the objective passes no gradient to its gates")
        return gradient

    def count(self, method: Estimator, replicas: int, generator: torch.Generator) -> float:
        """Return the objective's evaluations per example of one call."""
        total = 0

        def counted(gates: Tensor) -> Tensor:
            nonlocal total
            losses: Tensor = self.objective(gates)
            total += losses.numel()
            return losses

        self.estimate(copy.deepcopy(method), counted, self.logits, replicas, generator)
        return total / self.examples

    def time(self, method: Estimator, replicas: int, generator: torch.Generator) -> float:
        """Return the median milliseconds of one call, forward and backward, with its noise drawn."""
        method = copy.deepcopy(method)
        spent: list[float] = []
        for _ in range(_TIMED_CALLS):
            start = time.perf_counter()
            self.estimate(method, self.objective, self.logits, replicas, generator)
            if self.logits.is_cuda:
                torch.cuda.synchronize(self.logits.device)
            spent.append(1000 * (time.perf_counter() - start))
            if len(spent) > 2 and sum(spent) > 1000 * _TIMED_SECONDS:
                break
        return median(spent)

    def enumerate(self, method: Estimator, replicas: int, evaluations: float) -> tuple[Tensor, Tensor] | None:
        """Return exact mean and variance per logit; None where they cannot be computed in reasonable time."""
        try:
            outcomes = noise_outcomes(method, self.logits, replicas, _ORDER)
            if outcomes * max(evaluations, replicas) * self.logits.numel() > _ENUMERATED:
                return None
            found = moments(self.objective, self.logits, method, samples=replicas, order=_ORDER)
        except (RuntimeError, ValueError):  # not to be integrated, or operations that vmap does not know: measure
            return None
        return found.mean, found.variance

    def measure(
        self, method: Estimator, replicas: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, float, float]:
        """Return mean and its squared standard error per logit, the variance and its standard error."""
        size = max(2, min(self.samples // _BLOCKS, _CHUNK // (replicas * self.logits.numel())))
        count = max(2, math.ceil(self.samples / size))

        def folded(gates: Tensor) -> Tensor:  # (K, calls, *lead, N): a call is one more replica to the objective
            losses = evaluate(self.objective, gates.flatten(0, 1), self.events)
            return losses.reshape(*gates.shape[:2], *losses.shape[1:])

        logits = self.logits.expand(size, *self.logits.shape)
        mean, spread = torch.zeros_like(self.logits, dtype=torch.float64), torch.zeros_like(self.logits).double()
        variances = []
        for _ in range(count):
            # A copy: the state is held.
            block = self.estimate(copy.deepcopy(method), folded, logits, replicas, generator).to(torch.float64)
            each = block.var(0)
            mean += block.mean(0) / count
            spread += each / count
            variances.append(self.norm(each))
        return (
            mean,
            spread / (count * size),
            sum(variances) / count,
            float(torch.tensor(variances, dtype=torch.float64).std() / math.sqrt(count)),
        )


def plot(reports: Mapping[str, Report], path: str | Path) -> None:
    """Draw bias² and variance of one call against its cost, a row of panels per report."""
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot needs matplotlib: install gatelet[lab], or matplotlib alone") from error
    names = list(dict.fromkeys(row.name for report in reports.values() for row in report.measured))
    colours = {name: colormaps["tab20"](index % 20) for index, name in enumerate(names)}
    markers = {name: "osD^vP"[index // 20 % 6] for index, name in enumerate(names)}
    height = max(0.7 + 3.2 * len(reports), 0.4 + 0.155 * len(names))  # the legend's lines
    figure = Figure(figsize=(9, height), layout="constrained")
    panels = figure.subplots(len(reports), 2, squeeze=False)
    for (title, report), pair in zip(reports.items(), panels, strict=True):
        panel_titles = ("bias² (hollow: none)", "variance (hollow: none)")
        values = ([row.bias**2 for row in report.measured], [row.variance for row in report.measured])
        for axes, label, heights in zip(pair, panel_titles, values, strict=True):
            # A logarithmic axis has no zero: what rounding left of one is drawn at its foot.
            seen = [height for height in heights if height > _ZERO]
            foot = min(seen, default=1.0) / 10
            for row, height in zip(report.measured, heights, strict=True):
                axes.plot(
                    row.cost(report.budget),
                    height if height > _ZERO else foot,
                    markers[row.name],
                    color=colours[row.name],
                    fillstyle="full" if height > _ZERO else "none",
                    label=row.name,
                )
            cost = "milliseconds a call" if report.budget == "time" else "evaluations a call"
            axes.set(yscale="log", xlabel=cost, title=f"{title} {label}".strip())
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
            axes.title.set_fontsize(9)
            axes.grid(alpha=0.3)
    handles: dict[str, Any] = {}
    for axes in panels.flat:
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if handles:
        figure.legend(list(handles.values()), list(handles), loc="outside right upper", fontsize=7)
    figure.savefig(path, dpi=130)


def _pandas() -> Any:
=======
def pandas() -> Any:
    """Return pandas, or say what it is needed for."""
>>>>>>> 77bd2d1 (diagnose: measuring, recommending, text and drawing are four files; gatelet.diagnose is an ordinary function; moments is public; __version__)
    try:
        return importlib.import_module("pandas")
    except ImportError as error:
        raise ImportError(
            "to_dataframe needs pandas, which is not installed; records() has the same numbers"
        ) from error
