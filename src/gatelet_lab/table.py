"""The table: ours beside the paper's, as JSON, as Markdown and in the terminal."""

import statistics
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from gatelet_lab.recipes import ROWS, Preset
from gatelet_lab.train import write_atomically, write_json

Result = dict[str, Any]

_COLUMNS: Sequence[tuple[str, Callable[[Result], float], str]] = (
    ("our train", lambda row: row["train_nll"], "{:.1e}"),
    ("our valid", lambda row: row["valid_error"], "{:.2f}"),
    ("our test", lambda row: row["test_error"], "{:.2f}"),
    ("our smpl.", lambda row: row["test_error_sampled"], "{:.2f}"),
    ("open %", lambda row: 100 * row["open_test"], "{:.1f}"),
    ("ep.", lambda row: row["epochs"], "{:.0f}"),
)
_PAPER = (("train_nll", "{:.1e}"), ("valid_error", "{:.2f}"), ("test_error", "{:.2f}"))

LEGEND = (
    "train: negative log-likelihood; valid, test: error in per cent. Ours: weights of the best validation error, "
    "deterministic thresholded gates; smpl.: gates drawn with noise; open: share of gates ≠ 0 on the test set, "
    "deterministic. Paper: its single run."
)


def write(out: Path, results: Sequence[Result], preset: Preset, dataset: str) -> None:
    """Write ``table.json`` and ``table.md``."""
    rows = [{key: value for key, value in row.items() if key != "history"} for row in results]
    write_json(out / "table.json", {"rows": rows, "version": version("gatelet"), "dataset": dataset, "preset": preset})
    header, body = cells(results)
    lines = [" | ".join(line) for line in [header, ["---"] * len(header), *body]]
    text = "\n".join(f"| {line} |" for line in lines)
    text = (
        f"# gatelet reproduce --preset {preset} --dataset {dataset}\n\n{text}\n\n{LEGEND}\n{caveat(preset, dataset)}\n"
    )
    write_atomically(out / "table.md", lambda file: file.write(text.encode()))


def show(results: Sequence[Result], preset: Preset, dataset: str, console: Console) -> None:
    """Print the table, the paper's numbers beside ours."""
    header, body = cells(results)
    grid = Table(title=f"{dataset}, preset {preset}", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, name in enumerate(header):
        grid.add_column(name.replace(" ", "\n"), justify="left" if index == 0 else "right", no_wrap=True)
    for line in body:
        grid.add_row(*line)
    console.print(grid)
    console.print(LEGEND, highlight=False)
    console.print(caveat(preset, dataset), style="bold", highlight=False)


def caveat(preset: Preset, dataset: str) -> str:
    """Return what must be said of this run."""
    if dataset != "mnist":
        return f"The paper's numbers are for MNIST; this is {dataset}."
    if preset == "quick":
        return "This is a quick run of a few epochs, not the paper's result: --preset paper trains to convergence."
    return "One run's test error has a standard error of about 0.13 points."


def cells(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Return the header and a line per row, mean ± standard deviation over its seeds."""
    header = ["row", *(name for name, _, _ in _COLUMNS), "paper train", "paper valid", "paper test"]
    lines = []
    for name, make in ROWS.items():
        runs = [row for row in results if row["row"] == name]
        if not runs:
            continue
        ours = [_spread([value(row) for row in runs], form) for _, value, form in _COLUMNS]
        paper = [_format(form, runs[0]["paper"][key]) for key, form in _PAPER]
        lines.append([make().title, *ours, *paper])
    return header, lines


def _spread(values: Sequence[float], form: str) -> str:
    mean = _format(form, statistics.fmean(values))
    return mean if len(values) == 1 else f"{mean} ± {_format(form, statistics.stdev(values))}"


def _format(form: str, value: float) -> str:
    return form.format(value).replace("e-0", "e-").replace("e+0", "e+")
