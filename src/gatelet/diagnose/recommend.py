"""Which estimator to take, by what was measured."""

from collections.abc import Sequence
from typing import NamedTuple

from gatelet.diagnose.row import Budget, Row
from gatelet.diagnose.text import number

CLEARLY_SMALLER = 0.5
"""A biased estimator is recommended where its mean squared error is below this share of the unbiased one's."""


class Recommendation(NamedTuple):
    """Which estimator to take, and why."""

    name: str
    reason: str


def recommend(rows: Sequence[Row], budget: Budget | None) -> Recommendation | None:
    """Return which of these estimators to take, and the reason; None where there is none.

    The unbiased one of least variance × cost; a biased one instead where its mean squared error, at the unbiased
    one's cost, is less than half.
    """
    unbiased = [row for row in rows if row.unbiased]
    biased = [row for row in rows if not row.unbiased]
    if unbiased:
        return _with_unbiased(unbiased, biased, budget)
    if not biased:
        return None
    least = min(biased, key=lambda row: row.mean_squared_error)
    return Recommendation(
        least.name,
        f"none of these is unbiased; {least.name} has the least mean squared error, "
        f"{number(least.mean_squared_error)} (bias² {number(least.bias**2)})",
    )


def _with_unbiased(unbiased: Sequence[Row], biased: Sequence[Row], budget: Budget | None) -> Recommendation:
    """Return the best unbiased estimator, or the biased one that is clearly better at its cost."""
    cost = "milliseconds" if budget == "time" else "evaluations"

    def product(row: Row) -> float:
        return row.variance * row.cost(budget)

    best, *others = sorted(unbiased, key=lambda row: (product(row), row.cost(budget)))
    reason = (
        f"unbiased, and of the unbiased ones it has the least variance × {cost}, {number(product(best))} "
        f"({number(best.variance)} × {number(best.cost(budget))})"
    )
    if others:
        reason += f"; next is {others[0].name} with {number(product(others[0]))}"

    def error(row: Row) -> float:
        # An uncertain bias counts as large as it may be.
        return row.bias**2 + row.bias_error**2 + product(row) / best.cost(budget)

    if not biased:
        return Recommendation(best.name, reason)
    rival = min(biased, key=error)
    if error(rival) >= CLEARLY_SMALLER * best.variance:
        no_better = f"; the best biased one, {rival.name}, has no clearly smaller mean squared error at that cost"
        return Recommendation(best.name, f"{reason}{no_better} ({number(error(rival))})")
    # Averaging does not reduce the bias, so beyond some number of calls the unbiased estimator wins.
    seen, turn = rival.bias > 2 * rival.bias_error, ""
    if seen:  # a bias that is not seen may well be measured as 0
        calls = number((best.variance - product(rival) / best.cost(budget)) / rival.bias**2)
        turn = f", which wins where a step averages more than {calls} calls"
    return Recommendation(
        rival.name,
        f"biased, but at equal {cost} its mean squared error is clearly smaller: {number(error(rival))} (of it "
        f"bias² {number(rival.bias**2 + rival.bias_error**2)}{'' if seen else ' at most'}) against "
        f"{number(best.variance)} of {best.name}, the best unbiased one{turn}",
    )
