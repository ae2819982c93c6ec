"""Bias² and variance against cost, as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gatelet.diagnose.row import Budget, Row

_ZERO = 1e-15  # a square under it is rounding, or quadrature


def draw(rows: Mapping[str, Sequence[Row]], budget: Budget | None, path: str | Path) -> None:
    """Draw bias² and variance of one call against its cost, a row of panels per title and its estimators."""
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot needs matplotlib: install gatelet[lab], or matplotlib alone") from error
    names = list(dict.fromkeys(row.name for each in rows.values() for row in each))
    colours = {name: colormaps["tab20"](index % 20) for index, name in enumerate(names)}
    markers = {name: "osD^vP"[index // 20 % 6] for index, name in enumerate(names)}
    height = max(0.7 + 3.2 * len(rows), 0.4 + 0.155 * len(names))  # the legend's lines
    figure = Figure(figsize=(9, height), layout="constrained")
    panels = figure.subplots(len(rows), 2, squeeze=False)
    for (title, each), pair in zip(rows.items(), panels, strict=True):
        panel_titles = ("bias² (hollow: none)", "variance (hollow: none)")
        values = ([row.bias**2 for row in each], [row.variance for row in each])
        for axes, label, heights in zip(pair, panel_titles, values, strict=True):
            # A logarithmic axis has no zero: numbers that are zero up to rounding are drawn at its lower end.
            seen = [height for height in heights if height > _ZERO]
            foot = min(seen, default=1.0) / 10
            for row, height in zip(each, heights, strict=True):
                axes.plot(
                    row.cost(budget),
                    height if height > _ZERO else foot,
                    markers[row.name],
                    color=colours[row.name],
                    fillstyle="full" if height > _ZERO else "none",
                    label=row.name,
                )
            cost = "milliseconds a call" if budget == "time" else "evaluations a call"
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
