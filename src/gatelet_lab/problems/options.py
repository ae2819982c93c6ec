"""The problems' options, and how results are shown."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich.console import Console

from gatelet.diagnose import ModelReport, Report
from gatelet.diagnose.row import Budget
from gatelet_lab import table

Problem = Literal["toy", "polynomial", "network", "certificate"]


@dataclass(frozen=True)
class Diagnose:
    """Measure bias, variance and cost of estimators on a ready-made problem, or certify them all."""

    problem: tyro.conf.Positional[Problem]
    """toy: E[(b − t)²], with known closed forms. polynomial: ReinMax's, with training curves. network: the paper's
    conditional network on a batch. certificate: every estimator and variant on the standard objectives."""
    estimators: tuple[str, ...] = ()
    """Estimators, by name; by default all that suit the problem."""
    samples: int | None = None
    """Calls over which an estimator is measured, where it cannot be enumerated; 200 for network, else 10000."""
    budget: Budget | None = None
    """Compare at equal evaluations of the objective, or equal time."""
    seed: int = 0
    """Seed of all noise and initial values."""
    plot: Path | None = None
    """File for the picture: bias² and variance against cost. (polynomial: training curves; these in a second file.)"""
    out: Path | None = None
    """Markdown file for what is printed; runs/certificate.md for the certificate."""

    latents: int = 128
    """polynomial: the number of binary latents."""
    steps: int = 1000
    """polynomial: evaluations of the objective in training; with one evaluation per step, this many steps."""
    rate: float = 0.05
    """polynomial: Adam's learning rate."""

    dataset: str = "digits"
    """network: mnist, fashion-mnist, digits (needs no download), or a directory of IDX files."""
    data_dir: Path | None = None
    """network: where to look for the data set's files first."""
    experts: int = 200
    """network: units of the conditional layer."""
    bottleneck: int = 40
    """network: the gater's hidden units."""
    batch: int = 32
    """network: examples in the batch."""

    units: int = 2
    """certificate: N, 2 or 3."""


def show(console: Console, title: str, report: Report | ModelReport) -> str:
    """Print a report and return it as Markdown."""
    console.print(f"\n{title}", style="bold", highlight=False)
    console.print(repr(report), highlight=False, markup=False)
    return f"## {title}\n\n```\n{report!r}\n```\n\n"


def show_table(console: Console, title: str, lines: Sequence[Sequence[str]]) -> str:
    """Print a table, its header first, and return it as Markdown."""
    console.print(table.grid(title, lines[0], lines[1:], fold=True))
    return table.markdown(lines[0], lines[1:])


def head(options: Diagnose) -> str:
    """Return the head of the Markdown."""
    return f"# gatelet diagnose {options.problem}\n\ngatelet {version('gatelet')}, torch {torch.__version__}\n\n"


def write_file(path: Path, name: str, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a file; an error names the option."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
    except OSError as error:
        raise ValueError(f"{name} {path}: cannot be written ({error.strerror})") from error
