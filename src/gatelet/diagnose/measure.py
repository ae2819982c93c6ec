"""Measuring bias, variance and cost of estimators on your own objective."""

import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from gatelet._checks import check_choice, check_count, check_logits
from gatelet.diagnose.exact import MAX_OUTCOMES, check_dims, exact_gradient
from gatelet.diagnose.moments import moments, noise_outcomes
from gatelet.diagnose.report import Report
from gatelet.diagnose.row import Budget, Row
from gatelet.diagnose.text import UNITS
from gatelet.estimators import ALL, Estimator, Objective
from gatelet.estimators._base import AnyKind, evaluate
from gatelet.estimators._kinds import Bernoulli, Kind, make_kind

Estimators = Sequence[str | Estimator] | Mapping[str, str | Estimator]

_CHUNK = 1 << 18  # gates held at once
_ENUMERATED = 1 << 22  # gates, beyond which measuring is faster than enumerating
_ORDER = 64
_BLOCKS = 20  # whose spread gives the standard error of a measured variance
_WARM_UP = 100
_REFERENCE_REPLICAS = 8
_TIMED_CALLS, _TIMED_SECONDS = 31, 0.5

# Errors that an estimator may raise on an objective that does not suit it; its row then says so.
_UNSUITABLE = (ArithmeticError, IndexError, RuntimeError, TypeError, ValueError)


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
    are enumerated where :func:`gatelet.moments` can in seconds, else measured over ``samples`` calls.
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
        k: for subset units, how many are open.
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
        check_choice(budget, UNITS, "budget")
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
        # An estimator that is unbiased for its own gates only (a noisy rectifier's) does not estimate this gradient.
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
        # An error of the objective itself shows here, before it could be taken for an estimator's.
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
        """Measure one estimator, with at least this many replicas."""
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
