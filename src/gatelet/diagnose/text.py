"""Rows as a table of text."""

from collections.abc import Sequence

from gatelet.diagnose.row import Budget, Row

UNITS = {"evaluations": "evaluations", "time": "ms"}
"""What each budget is counted in."""


def table(rows: Sequence[Row], budget: Budget | None) -> list[str]:
    """Return the header and a line per row that has numbers, and then why the others have none."""
    header = ["estimator", "K", "bias", "variance", "var × eval", "snr", "cosine", "ms", "eval"]
    if budget:
        header += ["calls", "var at budget", "mse at budget"]
    body = [_cells(row, budget) for row in rows if row.left_out is None]
    widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
    lines = [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in [header, *body]
    ]
    return [*lines, *(f"{row.name}: left out: {row.left_out}" for row in rows if row.left_out is not None)]


def _cells(row: Row, budget: Budget | None) -> list[str]:
    bias = number(row.bias) + (f" ± {row.bias_error:.1g}" if row.bias_error > 0 else "")
    numbers = [row.variance, row.variance_per_evaluation, row.signal_to_noise, row.cosine, row.milliseconds]
    numbers += [row.evaluations, *([row.calls, row.budget_variance, row.mean_squared_error] if budget else [])]
    return [row.name, str(row.replicas), bias, *map(number, numbers)]


def number(value: float) -> str:
    """Return three digits."""
    return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e+")
