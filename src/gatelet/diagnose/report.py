"""What a diagnosis returns: rows, the reference, and what follows from them."""

import importlib
import math
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from gatelet._checks import check_choice
from gatelet.diagnose.draw import draw
from gatelet.diagnose.recommend import Recommendation, recommend
from gatelet.diagnose.row import FIGURES, Budget, Row
from gatelet.diagnose.text import UNITS, number, table

WIDTH = 88
"""Characters of a line of the recommendation's reason, about as wide as the table."""


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
        draw({"": self.measured}, self.budget, path)

    def __repr__(self) -> str:
        """Show the table, what was left out, and the recommendation."""
        per = f", averaged to {number(self.amount)} {UNITS[self.budget]}" if self.budget and self.amount else ""
        error = f", standard error {number(self.reference_error)}" if self.reference_error else ""
        lines = [
            f"reference: {self.reference_how}{error}; shape {tuple(self.reference.shape)}{per}",
            *table(self.rows, self.budget),
        ]
        if chosen := self.recommendation:
            reason = textwrap.wrap(chosen.reason, WIDTH, initial_indent="  ", subsequent_indent="  ")
            lines += [f"recommended: {chosen.name}", *reason]
        return "\n".join(lines)


def pandas() -> Any:
    """Return pandas, or say what it is needed for."""
    try:
        return importlib.import_module("pandas")
    except ImportError as error:
        raise ImportError(
            "to_dataframe needs pandas, which is not installed; records() has the same numbers"
        ) from error
