"""`gatelet frontier`: test error against the share of units computed, for gates and for a mixture of experts."""

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from torch import Tensor, nn

from gatelet._checks import check_choice, check_count
from gatelet.estimators import ALL
from gatelet_lab import plots, table
from gatelet_lab.files import Location, read_json, read_tensors, write_atomically, write_json
from gatelet_lab.training import jobs
from gatelet_lab.training.jobs import Job
from gatelet_lab.training.model import build, multiply_adds
from gatelet_lab.training.recipe import Augmentation, Gater, Model, Optimiser, Recipe, Sparsity
from gatelet_lab.training.settings import override
from gatelet_lab.training.together import led

Result = dict[str, Any]
MIXTURE = "mixture"
DENSE = "dense"
NARROW = "narrow"
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
METHODS = ("straight_through", "gapped_straight_through", "noisy_rectifier", "smooth_times_stochastic", MIXTURE, NARROW)
_GROUPS = 100  # experts of a mixture, so the least share is a hundredth


@dataclass(frozen=True)
class Frontier(jobs.Run):
    """Train one network at several shares of open units, by several methods: test error against cost."""

    methods: tuple[str, ...] = METHODS
    """Estimators of the gates; mixture: a top-k mixture of 100 experts with as many units computed; narrow: a dense
    ReLU network of as many multiply-adds as the gates' network, gater included."""
    shares: tuple[float, ...] = SHARES
    """Shares of open units. 1 is the network without a constraint; for narrow, the whole width."""
    seeds: int = 1
    """How many runs of each point, with seeds 0, 1, ..."""
    epochs: int = 8
    """Epochs of every run; the learning rate falls to zero over them."""
    time: bool = False
    """Train nothing; measure the inference time of the finished points. Nothing else should run on the machine."""
    settings: Annotated[tuple[str, ...], tyro.conf.arg(name="set", metavar="KEY=VALUE"), tyro.conf.UseAppendAction] = ()
    """Override a field of the recipe of every point, as experts=2000; may be repeated."""
    out: Location = Path("runs/frontier")
    """Directory for frontier.json, frontier.md, the plot and the runs, or an fsspec URL."""

    keeps_weights = True

    def identity(self) -> dict[str, str]:
        """Return data set, epochs, version and settings."""
        return {
            "command": "frontier",
            "dataset": self.dataset,
            "epochs": str(self.epochs),
            "version": version("gatelet"),
            "set": " ".join(self.settings),
        }


@led
def run(options: Frontier, console: Console) -> None:
    """Train what is missing, or time what is there; then write and show the table."""
    planned = plan(options)
    if options.time and options.scheduler is not None:
        raise ValueError("--time: measures on this machine; leave --scheduler out")
    path = options.out / "frontier.json"
    if options.time:
        found = {job.name: jobs.read_result(options.out, job) for job in planned}
        if missing := [name for name, result in found.items() if result is None]:
            raise ValueError(f"--time: these points are not trained yet: {', '.join(missing)}")
        results = [result for result in found.values() if result is not None]
        times = measure(options, planned, console)
    else:
        results = jobs.train(options, planned, console)
        times = read_json(path)["inference"] if path.is_file() else {}
    points = summary(results)
    write_json(path, {**options.identity(), "points": points, "inference": times})
    text = markdown(options, points, times)
    write_atomically(options.out / "frontier.md", lambda file: file.write(text.encode()))
    plots.frontier(points, times, options.out / "frontier.png")
    console.print(text, highlight=False, markup=False, soft_wrap=True)
    console.print(f"frontier.json, frontier.md and frontier.png are in {options.out}")


def plan(options: Frontier) -> list[Job]:
    """Check the options and return the jobs: the dense network, then every method at every share."""
    for name in ("seeds", "epochs"):
        check_count(getattr(options, name), f"--{name}")
    if not options.methods or not options.shares:
        raise ValueError("--methods and --shares: name at least one each")
    for method in options.methods:
        check_choice(method, [*(name for name in ALL if ALL[name].needs != "objective"), MIXTURE, NARROW], "method")
    for share in options.shares:
        if not 0 < share <= 1:
            raise ValueError(f"--shares: must lie in (0, 1], not {share:g}")
    recipes = {}
    for share in options.shares:
        for method in options.methods:
            each = override(point(method, share, options.epochs), options.settings)
            recipes[each.row] = narrowed(each, options, share) if method == NARROW else each
    return [Job(each, seed) for each in recipes.values() for seed in range(options.seeds)]


def point(method: str, share: float, epochs: int) -> Recipe:
    """Return the recipe of a method at a share. Without a constraint all gates are sigmoids: the same network."""
    mixture, narrow, dense = method == MIXTURE, method == NARROW, share == 1
    name = DENSE if dense and not (mixture or narrow) else method
    rectifier = "rectifier" in method
    return Recipe(
        row=f"{name}-{share:g}",
        title=name,
        paper=None,
        model=Model(
            "sigmoid" if dense or mixture or narrow else method,
            kind="mixture" if mixture else "dense" if narrow else "gates",
            experts=1000,
            group_size=1000 // _GROUPS if mixture else 1,
        ),
        gater=Gater(bottleneck=100, gate_bias=None),
        sparsity=Sparsity(
            target_rate=None if dense or narrow else share,
            kl_weight=None if rectifier else 0.01,
            l1_weight=1e-5 if rectifier else None,
        ),
        augmentation=Augmentation(input_dropout=0.2),
        optimiser=Optimiser(
            optimizer="adamw",
            schedule="cosine",
            batch=256,
            rate=0.004,
            max_norm=None,
            gater_max_norm=None,
            output_max_norm=None,
            average=0.998,
            epochs=epochs,
            patience=epochs,
        ),
    )


def narrowed(recipe: Recipe, options: Frontier, share: float) -> Recipe:
    """Return the dense recipe with as many units as cost what the gates' network does at this share, gater included."""
    if share == 1:
        return recipe
    split = options.load()
    sizes = split.train_images.shape[1], split.classes
    gated = multiply_adds(recipe.but(kind="gates", layers=1), *sizes, share)
    one = multiply_adds(recipe.but(experts=1, group_size=1, layers=1), *sizes, 1.0)["dense"]
    return recipe.but(experts=max(1, round((gated["gater"] + gated["experts"] + gated["output"]) / one)))


def summary(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return a point per recipe, with its figures' means (and the test error's deviation) over the seeds."""
    points = []
    for row in dict.fromkeys(result["row"] for result in results):
        runs = [result for result in results if result["row"] == row]
        errors = [each["test_error"] for each in runs]
        cost = runs[0]["multiply_adds"]
        points.append(
            {
                "point": row,
                "method": runs[0]["config"]["title"],
                "share": float(row.rpartition("-")[2]),
                "open_test": statistics.fmean(each["open_test"] for each in runs),
                "valid_error": statistics.fmean(each["valid_error"] for each in runs),
                "test_error": statistics.fmean(errors),
                "test_error_sd": statistics.stdev(errors) if len(errors) > 1 else None,
                "seeds": len(runs),
                "seconds_per_epoch": statistics.median(each["seconds_per_epoch"] for each in runs),
                "multiply_adds": table.total(runs[0]),
                "multiply_adds_dense": cost["dense"],
            }
        )
    return points


# ------------------------------------------------------------------ inference times

_IMAGES, _ROUNDS = 256, 41


def measure(options: Frontier, planned: Sequence[Job], console: Console) -> dict[str, Any]:
    """Return the median milliseconds of a forward pass per point, beside a dense ReLU network of the same width.

    All take turns in a shuffled order, so that a machine that slows down slows all of them.
    """
    split = options.load()
    x = split.test_images[:_IMAGES].to(options.device)
    calls: dict[str, Callable[[Tensor], Tensor]] = {}
    for job in planned:
        if job.seed == 0:
            model = build(job.recipe, x.shape[1], split.classes).to(options.device)
            weights = read_tensors(jobs.weights_file(options.out, job), options.device)
            model.load_state_dict(weights)
            calls[job.recipe.row] = model.eval()
    width = max(job.recipe.model.experts * job.recipe.model.members for job in planned)
    reference = nn.Sequential(nn.Linear(x.shape[1], width), nn.ReLU(), nn.Linear(width, split.classes))
    calls["reference"] = reference.to(options.device).eval()
    console.print(f"timing {len(calls)} networks on {len(x)} images, {torch.get_num_threads()} threads")
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = random.Random(0)
    with torch.inference_mode():
        for turn in range(_ROUNDS + 3):  # the first compile and warm up
            for name in order.sample(sorted(calls), len(calls)):
                began = time.perf_counter()
                calls[name](x)
                if options.device != "cpu":
                    torch.cuda.synchronize()
                if turn >= 3:
                    times[name].append(1e3 * (time.perf_counter() - began))
    return {
        "milliseconds": {name: statistics.median(each) for name, each in times.items()},
        "images": len(x),
        "threads": torch.get_num_threads(),
    }


# ------------------------------------------------------------------ what is written


def markdown(options: Frontier, points: Sequence[Mapping[str, Any]], times: Mapping[str, Any]) -> str:
    """Return the frontier as a Markdown table."""
    milliseconds = times.get("milliseconds", {})
    lines = []
    for each in points:
        deviation = each["test_error_sd"]
        error = f"{each['test_error']:.2f}" + ("" if deviation is None else f" ± {deviation:.2f}")
        taken = milliseconds.get(each["point"])
        lines.append(
            [
                each["method"],
                f"{100 * each['share']:g}",
                f"{100 * each['open_test']:.1f}",
                f"{each['valid_error']:.2f}",
                error,
                f"{each['seconds_per_epoch']:.1f}",
                f"{each['multiply_adds'] / 1e3:.0f}",
                "–" if taken is None else f"{taken:.2f}",
                "–" if taken is None else f"{taken / milliseconds['reference']:.2f}",
            ]
        )
    header = ["method", "share %", "open %", "valid %", "test %", "s/epoch", "kMAC", "ms", "/ dense"]
    threads = f", {times['images']} images, {times['threads']} threads" if times else ""
    seeds = f"{max(each['seeds'] for each in points)} seed(s)"
    settings = "".join(f" --set {setting}" for setting in options.settings)
    return (
        f"gatelet frontier --dataset {options.dataset} --epochs {options.epochs}{settings}: {seeds}.\n\n"
        f"{table.markdown(header, lines)}\n\n"
        f"share: the target; open: on the test set. s/epoch: training, the median. kMAC: thousand multiply-adds per "
        f"image, gater or router included (dense: {max(each['multiply_adds_dense'] for each in points) / 1e3:.0f}). "
        "narrow: a dense ReLU network with as many multiply-adds in all as the gates' network at this share, at 100 of "
        "its width. "
        f"ms: a forward pass{threads}; / dense: of a ReLU network of the same width without gates.\n"
    )
