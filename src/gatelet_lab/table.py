"""The table: ours beside the paper's, as JSON, as Markdown and in the terminal."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table

from gatelet_lab.files import write_atomically, write_json

Result = dict[str, Any]
Column = tuple[str, Callable[[Result], float], str]

_COLUMNS: Sequence[Column] = (
    ("our train", lambda row: row["train_nll"], "{:.1e}"),
    ("our valid", lambda row: row["valid_error"], "{:.2f}"),
    ("our test", lambda row: row["test_error"], "{:.2f}"),
    ("our smpl.", lambda row: row["test_error_sampled"], "{:.2f}"),
    ("open %", lambda row: 100 * row["open_test"], "{:.1f}"),
    ("kMAC", lambda row: total(row) / 1e3, "{:.0f}"),
    ("of dense %", lambda row: 100 * total(row) / row["multiply_adds"]["dense"], "{:.0f}"),
    ("ep.", lambda row: row["epochs"], "{:.0f}"),
)
_ALL_COLUMNS: Sequence[Column] = (
    *_COLUMNS[:4],
    ("mean of 10", lambda row: row["test_error_mean_of_10"], "{:.2f}"),
    ("valid smpl.", lambda row: row["valid_error_sampled"], "{:.2f}"),
    ("valid mean of 10", lambda row: row["valid_error_mean_of_10"], "{:.2f}"),
    _COLUMNS[4],
    ("open smpl. %", lambda row: 100 * row["open_test_sampled"], "{:.1f}"),
    *_COLUMNS[5:],
    ("s/epoch", lambda row: row["seconds_per_epoch"], "{:.1f}"),
    ("minutes", lambda row: row["seconds"] / 60, "{:.0f}"),
    ("seeds", lambda row: row["seeds"], "{:.0f}"),
)
_PAPER = (("train_nll", "{:.1e}"), ("valid_error", "{:.2f}"), ("test_error", "{:.2f}"))


def total(row: Result) -> int:
    """Return the multiply-adds per example at test time: gater, open units and output."""
    cost = row["multiply_adds"]
    return int(cost["gater"] + cost["experts"] + cost["output"])


LEGEND = (
    "train: negative log-likelihood; valid, test: error in per cent. Ours: weights of the best validation error (with "
    "a cosine the last), deterministic thresholded gates; smpl.: gates drawn with noise; open: share of gates ≠ 0 on "
    "the test set, deterministic; kMAC: thousand multiply-adds per example at test time, gater, open units and output; "
    "of dense: in per cent of the same units all computed, without a gater. Paper: its single run."
)


def write(out: Path, results: Sequence[Result], run: Mapping[str, Any], title: str, caveat: str) -> None:
    """Write ``table.json``, with what the run was, and ``table.md``."""
    rows = [{key: value for key, value in row.items() if key != "history"} for row in results]
    write_json(out / "table.json", {"rows": rows, "version": version("gatelet"), **run})
    text = (
        f"# {title}\n\n"
        f"{markdown(*cells(results, _ALL_COLUMNS))}\n\n{LEGEND}\n"
        f"Mean of 10: of the class probabilities of 10 samples. s/epoch: the median; minutes: times the epochs.\n"
        f"{caveat}\n"
    )
    write_atomically(out / "table.md", lambda file: file.write(text.encode()))


def markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *body]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def show(results: Sequence[Result], title: str, caveat: str, console: Console) -> None:
    """Print the table, the paper's numbers beside ours."""
    console.print(grid(title, *cells(results)))
    console.print(LEGEND, highlight=False)
    console.print(caveat, style="bold", highlight=False)


def grid(title: str, header: Sequence[str], body: Sequence[Sequence[str]], fold: bool = False) -> Table:
    """Return a table for the terminal; with ``fold`` a cell that is too long continues on the next line."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, name in enumerate(header):
        side: Literal["left", "right"] = "left" if index == 0 else "right"
        table.add_column(name.replace(" ", "\n"), justify=side, no_wrap=not fold, overflow="fold")
    for line in body:
        table.add_row(*line)
    return table


def cells(results: Sequence[Result], columns: Sequence[Column] = _COLUMNS) -> tuple[list[str], list[list[str]]]:
    """Return the header and a line per row, mean ± standard deviation over its seeds."""
    header = ["row", *(name for name, _, _ in columns), "paper train", "paper valid", "paper test"]
    lines = []
    for name in dict.fromkeys(row["row"] for row in results):
        runs = [row for row in results if row["row"] == name]
        runs = [row | {"seeds": len(runs)} for row in runs]
        ours = [over_seeds(runs, value, form) for _, value, form in columns]
        paper = [_format(form, runs[0]["paper"][key]) if runs[0]["paper"] else "–" for key, form in _PAPER]
        lines.append([runs[0]["config"]["title"], *ours, *paper])
    return header, lines


def over_seeds(runs: Sequence[Result], value: Callable[[Result], float], form: str) -> str:
    """Return mean ± standard deviation of a figure over runs, – where it was not measured."""
    try:
        values = [value(row) for row in runs]
    except KeyError:
        return "–"
    mean = _format(form, statistics.fmean(values))
    return mean if len(set(values)) == 1 else f"{mean} ± {_format(form, statistics.stdev(values))}"


def _format(form: str, value: float) -> str:
    return form.format(value).replace("e-0", "e-").replace("e+0", "e+")
