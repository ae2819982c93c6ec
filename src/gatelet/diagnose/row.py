"""What one estimator does on an objective."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from torch import Tensor

Budget = Literal["evaluations", "time"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Row:
    """What one estimator does on the objective. Squares are summed over the units and averaged over the examples."""

    name: str
    unbiased: bool
    """Whether it claims to be unbiased for gates of 0 and 1, and the bias found here does not contradict that."""
    replicas: int
    """Replicas K of one call."""
    left_out: str | None = None
    """Why there are no numbers, if there are none."""
    exact: bool = False
    """Whether mean and variance were enumerated, not measured."""
    bias: float = math.nan
    """‖E[ĝ] − ∇E[L]‖; if it was measured, after ``bias_error``² was subtracted from its square."""
    bias_error: float = math.nan
    """Standard error of the difference, in the same norm: how wrong ‖E[ĝ] − ∇E[L]‖ may be. A much smaller bias cannot
    be detected."""
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


FIGURES: Mapping[str, Callable[[Row], Any]] = MappingProxyType(
    {
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
)
"""The columns of a data frame of rows."""
