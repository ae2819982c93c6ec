"""`gatelet diagnose`: estimators on ready-made problems, and the table that certifies all of them."""

from pathlib import Path
from typing import get_args

from rich.console import Console

from gatelet._checks import check_choice, check_count, check_positive
from gatelet.estimators import ALL
from gatelet_lab.files import write_atomically
from gatelet_lab.problems import certificate, network, polynomial, toy
from gatelet_lab.problems.options import Diagnose, Problem, write_file

CERTIFICATE = Path("runs/certificate.md")


def run(options: Diagnose, console: Console) -> None:
    """Run the command."""
    check(options)
    console.soft_wrap = True
    problems = {"toy": toy, "polynomial": polynomial, "network": network, "certificate": certificate}
    text = problems[options.problem].run(options, console)
    out = options.out or (CERTIFICATE if options.problem == "certificate" else None)
    if out is not None:
        write_file(out, "--out", lambda path: write_atomically(path, lambda file: file.write(text.encode())))
        console.print(f"written to {out}", highlight=False)


def check(options: Diagnose) -> None:
    """Raise for options that do not fit."""
    check_choice(options.problem, get_args(Problem), "problem")
    for name in options.estimators:
        check_choice(name, ALL, "estimator")
    for name in ("latents", "steps", "experts", "bottleneck", "batch"):
        check_count(getattr(options, name), f"--{name}")
    check_positive(options.rate, "--rate")
    if options.samples is not None and options.samples < 10:
        raise ValueError(f"--samples must be at least 10, not {options.samples}")
    if options.units not in (2, 3):
        raise ValueError(f"--units must be 2 or 3, not {options.units}")
    if options.plot is not None and options.problem == "certificate":
        raise ValueError("--plot: the certificate is a table and has no picture")
