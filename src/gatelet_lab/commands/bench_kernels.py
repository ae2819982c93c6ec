"""`gatelet bench kernels`: how much time closed units save, beside dense products and other sparse ways."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from gatelet._checks import check_count, check_weight
from gatelet_lab.bench import kernels
from gatelet_lab.bench.auto import AUTO_SHAPES, check_auto
from gatelet_lab.bench.busy import show_busy
from gatelet_lab.bench.kernels import BATCHES, RATE, Row
from gatelet_lab.bench.lists import show_lists
from gatelet_lab.bench.rows import show_rows
from gatelet_lab.bench.step import show_steps
from gatelet_lab.bench.timing import Ways, interleaved, machine
from gatelet_lab.bench.trained import show_trained
from gatelet_lab.files import write_json


@dataclass(frozen=True)
class BenchKernels:
    """Time the kernels that skip closed units, and their peers, on this machine."""

    quick: bool = False
    """Fewer and shorter measurements: half a minute in place of five."""
    shape: tuple[int, int] | None = None
    """Time this shape, D and N, instead of the table's."""
    auto: bool = False
    """Instead of the table: how much slower backend="auto" is than the faster of its choices, over a grid of layers."""
    step: bool = False
    """Instead of the table: where the time of a training step of the paper's network goes."""
    bottleneck: int = 400
    """Width of the gater's hidden layer, with --step."""
    lists: bool = False
    """Instead of the table: a few open units given as lists, beside embedding_bag, sampled_addmm and CSR products."""
    rows: bool = False
    """Instead of the table: inference over bfloat16 and int8 weights, beside dense layers of the same format."""
    busy: int | None = None
    """Instead of the table: how long single calls take while this many other processes keep the cores busy."""
    trained: Path | None = None
    """Instead of the table: gates of trained networks beside random ones; this directory keeps the trained gates."""
    epochs: int = 2
    """How many epochs to train, with --trained."""
    model: Path | None = None
    """With --trained, also the middle block of this language model (a directory of Hugging Face's or a GGUF file)."""
    plot: Path | None = None
    """Directory for the sweeps' plot and the numbers as JSON; with --lists, --rows and --busy for the numbers alone."""
    patience: float = 10.0
    """Seconds to wait, per line, for a measurement that other processes do not disturb."""

    def __post_init__(self) -> None:
        check_weight(self.patience, "--patience")
        alone = [name for name in ("trained", "step", "auto") if getattr(self, name)]
        beside = [name for name in ("lists", "rows") if getattr(self, name)]
        beside += ["busy"] if self.busy is not None else []
        if len(alone) > 1 or (alone and beside):
            raise ValueError(f"--{alone[0]}: measures one thing; leave out --{[*alone, *beside][1]}")
        if self.model is not None and self.trained is None:
            raise ValueError("--model: goes with --trained")


def run(options: BenchKernels, console: Console) -> None:
    """Show the machine and the table that the options choose."""
    if options.plot is not None and options.plot.exists() and not options.plot.is_dir():
        raise ValueError(f"--plot {options.plot}: exists and is not a directory")
    about = machine()
    console.print(", ".join(f"{key} {value}" for key, value in about.items()), highlight=False)
    budget = 0.2 if options.quick else 1.0

    def seconds(ways: Ways) -> dict[Any, float]:
        return interleaved(ways, budget, options.patience)[0]

    def longer(ways: Ways) -> dict[Any, float]:  # dense is a hundred times the others
        return interleaved(ways, 4 * budget, options.patience)[0]

    if options.lists:
        keep(options, about, "lists", show_lists(options.quick, longer, console))
    if options.rows:
        keep(options, about, "rows", show_rows(options.quick, RATE, seconds, console))
    if options.busy is not None:
        if options.busy < 0:
            raise ValueError(f"--busy {options.busy}: a number of processes is at least 0")
        found = show_busy(options.busy, RATE, 2.0 if options.quick else 8.0, console)
        keep(options, about, f"busy-{options.busy}", found)
    if options.lists or options.rows or options.busy is not None:
        return
    if options.trained is not None:
        epochs = check_count(options.epochs, "--epochs")
        learnt = show_trained(options.trained, epochs, options.model, seconds, console)
        write_json(options.trained / "trained.json", {"machine": about, "results": learnt})
    elif options.step:
        show_steps(budget, options.patience, check_count(options.bottleneck, "--bottleneck"), console)
    elif options.auto:
        check_auto(shapes(options) or AUTO_SHAPES, options.quick, options.patience, console)
    else:
        table(options, about, budget, console)


def keep(options: BenchKernels, about: dict[str, Any], name: str, results: Sequence[dict[str, Any]]) -> None:
    """Write a table's numbers to a file of this name, if a directory was given."""
    if options.plot is not None:
        options.plot.mkdir(parents=True, exist_ok=True)
        write_json(options.plot / f"{name}.json", {"machine": about, "results": results})


def shapes(options: BenchKernels) -> Sequence[tuple[int, int]]:
    """Return the shape that the options give, if they give one."""
    if options.shape is not None and min(options.shape) < 1:
        width, units = options.shape
        raise ValueError(f"--shape: D and N must be at least 1, not {width} {units}")
    return () if options.shape is None else (options.shape,)


def table(options: BenchKernels, about: dict[str, Any], budget: float, console: Console) -> None:
    """Check, time, show; sweeps only when they are to be plotted."""
    rows = [
        Row(f"{width}→{units} units{end}", width, units, backward=bool(end))
        for width, units in shapes(options)
        for end in ("", " f+b")
    ]
    results = []
    console.print(kernels.head(), highlight=False)
    for row in rows or kernels.ROWS:
        for batch in (each for each in row.batches if each in ((1, 32, 256) if options.quick else BATCHES)):
            results.append(kernels.measure(row, batch, RATE, budget, options.patience))
            console.print(kernels.line(results[-1]), highlight=False)
    console.print(
        f"time / dense at {RATE:.0%} open; f+b: forward and backward; speed-up of at most {1 / RATE:.0f}×; others: CPU "
        "of other processes",
        highlight=False,
    )
    report: dict[str, Any] = {"machine": about, "results": results}
    if options.plot is not None:
        report["rates"] = kernels.sweep_rate(budget / 2, options.patience)
        report["units"] = kernels.sweep_units(budget / 2, options.patience)
        options.plot.mkdir(parents=True, exist_ok=True)
        kernels.plot(report, options.plot / "kernels.png")
        write_json(options.plot / "kernels.json", report)
        console.print(f"kernels.png and kernels.json are in {options.plot}")
