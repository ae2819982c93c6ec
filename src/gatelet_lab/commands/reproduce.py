"""`gatelet reproduce`: train the rows of the paper's table side by side and show them beside the paper's numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from gatelet._checks import check_choice, check_count
from gatelet_lab import plots, table
from gatelet_lab.files import Location
from gatelet_lab.training import jobs
from gatelet_lab.training.jobs import Job
from gatelet_lab.training.recipes import Preset, recipe, rows
from gatelet_lab.training.settings import override
from gatelet_lab.training.together import led


@dataclass(frozen=True)
class Reproduce(jobs.Run):
    """Train the seven rows of the paper's table and show them beside the paper's numbers."""

    preset: Preset = "quick"
    """quick: ten minutes on two cores; not the paper's result. paper: to convergence, by early stopping. best: our own
    recipe, with the same share of open units and with methods that came after the paper."""
    rows: tuple[str, ...] | None = None
    """Rows to train, by name; by default all of the preset."""
    seeds: int = 1
    """How many runs of each row, with seeds 0, 1, ..."""
    epochs: int | None = None
    """Train at most this many epochs, instead of the recipe's number."""
    settings: Annotated[tuple[str, ...], tyro.conf.arg(name="set", metavar="KEY=VALUE"), tyro.conf.UseAppendAction] = ()
    """Override a field of the recipe of every named row, as gater_rate=0 or options.slope=sigmoid; may be repeated."""
    out: Location = Path("runs/reproduce")
    """Directory for the table, the plots, the logs and the checkpoints, or an fsspec URL."""

    def identity(self) -> dict[str, str]:
        """Return preset, data set, version and settings."""
        return {
            "preset": self.preset,
            "dataset": self.dataset,
            "version": version("gatelet"),
            "set": " ".join(self.settings),
        }


@led
def run(options: Reproduce, console: Console) -> None:
    """Train what is missing, then write and show the table."""
    planned = plan(options)
    results = jobs.train(options, planned, console, lambda results: write(options, results))
    write(options, results)
    plots.curves(results, options.out / "curves.png")
    plots.gates(results, options.out, options.out / "gates.png")
    title = ", ".join((options.dataset, f"preset {options.preset}", *options.settings))
    table.show(results, title, caveat(results, options), console)
    console.print(f"table.json, table.md, curves.png, gates.png and tensorboard/ are in {options.out}")


def write(options: Reproduce, results: Sequence[table.Result]) -> None:
    """Write the table of the results there are so far."""
    settings = "".join(f" --set {setting}" for setting in options.settings)
    title = f"gatelet reproduce --preset {options.preset} --dataset {options.dataset}{settings}"
    run = {"dataset": options.dataset, "preset": options.preset, "set": list(options.settings)}
    table.write(options.out, results, run, title, caveat(results, options))


def caveat(results: Sequence[table.Result], options: Reproduce) -> str:
    """Return the note that belongs to this run's table."""
    if options.preset == "best":
        cost, taken = results[0]["multiply_adds"], results[0]["config"]["more_training"]
        teacher = results[0].get("teacher")
        taught = "" if teacher is None else f"The teacher's test error is {teacher['test_error']:.2f} %. "
        return (
            f"{taught}Up to {taken} of the validation images were trained on; valid is of the others. "
            "Thousand multiply-adds per image: "
            + ", ".join(f"{name} {each / 1e3:.0f}" for name, each in cost.items() if name != "dense")
            + f"; all units, without gates {cost['dense'] / 1e3:.0f}. "
            "One run's test error has a standard error of about 0.1 points."
        )
    if options.dataset != "mnist":
        return f"The paper's numbers are for MNIST; this is {options.dataset}."
    if options.preset == "quick":
        return "This is a quick run of a few epochs, not the paper's result: --preset paper trains to convergence."
    return "One run's test error has a standard error of about 0.13 points."


def plan(options: Reproduce) -> list[Job]:
    """Check the options and return the jobs, in the table's order."""
    known = rows(options.preset)
    chosen = tuple(known) if options.rows is None else options.rows
    if not chosen:
        raise ValueError(f"--rows: name at least one of {', '.join(known)}")
    for row in chosen:
        check_choice(row, known, "row")
    check_count(options.seeds, "--seeds")
    if options.epochs is not None:
        check_count(options.epochs, "--epochs")
    recipes = [recipe(row, options.preset) for row in known if row in chosen]
    if options.epochs is not None:
        recipes = [each.but(epochs=options.epochs) for each in recipes]
    recipes = [override(each, options.settings) for each in recipes]
    return [Job(each, seed) for each in recipes for seed in range(options.seeds)]
