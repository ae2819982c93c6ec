"""`gatelet claims`: the paper's claims, each tested by short runs of equal length that differ in one thing."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from torch import Tensor

import gatelet
from gatelet._checks import check_count
from gatelet.estimators import ScoreFunction
from gatelet_lab import data, plots, table
from gatelet_lab.files import Location, write_atomically, write_json
from gatelet_lab.training import jobs
from gatelet_lab.training.jobs import Job
from gatelet_lab.training.model import PaperNet
from gatelet_lab.training.paper import PaperTrainer
from gatelet_lab.training.recipe import Recipe
from gatelet_lab.training.recipes import recipe
from gatelet_lab.training.settings import override
from gatelet_lab.training.together import led

Result = dict[str, Any]


class Variant(NamedTuple):
    """A row of the table with some settings."""

    row: str
    settings: tuple[str, ...] = ()


# With a learning rate of 1 and a weak penalty, most gates of a network a quarter as wide close for good (12.7 % error).
_CALM = ("rate=0.3", "gater_rate=1", "kl_weight=0.1", "gate_scale=4", "gate_bias=0")

# The same for all variants, so that two runs differ in one thing, even if the table's rows have better values.
_ALIKE = ("input_dropout=0.2", "hidden_dropout=0", "rate_decay=0.88")

# The setting that a claim is about is set on both sides, whatever the table's recipes say.
VARIANTS: Mapping[str, Variant] = MappingProxyType(
    {
        "noisy_rectifier": Variant("noisy_rectifier", ("gate_bias=-1.28",)),
        "rectifier": Variant("rectifier", ("gate_bias=-1.28",)),
        "noisy_sigmoid": Variant("noisy_sigmoid"),
        "sigmoid": Variant("sigmoid"),
        "straight_through": Variant("straight_through", ("options.slope=identity", *_CALM)),
        "straight_through_slope": Variant("straight_through", ("options.slope=sigmoid", *_CALM)),
        "sts": Variant("smooth_times_stochastic", ("momentum=0.5", "beta_noise=40.1")),
        "sts_no_momentum": Variant("smooth_times_stochastic", ("momentum=0", "beta_noise=40.1")),
        "sts_no_beta_noise": Variant("smooth_times_stochastic", ("momentum=0.5", "beta_noise=none")),
        "sbn": Variant("score_function", ("gater_rate=0.01", "momentum=0")),
        "sbn_frozen_gater": Variant("score_function", ("gater_rate=0", "momentum=0")),
        "sbn_gater_rate_32": Variant("score_function", ("gater_rate=0.32", "momentum=0")),
        "sbn_gater_rate_100": Variant("score_function", ("gater_rate=1", "momentum=0")),
        "sbn_momentum": Variant("score_function", ("gater_rate=0.01", "momentum=0.5")),
    }
)
FOUR = ("noisy_rectifier", "straight_through", "sts", "sbn")


@dataclass(frozen=True)
class Claim:
    """A claim that some variants have a smaller figure than others, or than a limit."""

    text: str
    better: tuple[str, ...]
    worse: tuple[str, ...] = ()
    metric: str = "test_error"
    limit: float | None = None


CLAIMS: Sequence[Claim] = (
    Claim(
        "The four methods all train (test error under 8 %, about that of a linear classifier).",
        better=FOUR,
        limit=8.0,
    ),
    Claim("Noise helps the rectifier, on the training criterion.", ("noisy_rectifier",), ("rectifier",), "train_nll"),
    Claim("Noise helps the rectifier, on the test set.", ("noisy_rectifier",), ("rectifier",)),
    Claim("Noise helps the sigmoid, on the training criterion.", ("noisy_sigmoid",), ("sigmoid",), "train_nll"),
    Claim("Noise helps the sigmoid, on the test set.", ("noisy_sigmoid",), ("sigmoid",)),
    Claim("Straight-through is the best of the four.", ("straight_through",), ("noisy_rectifier", "sts", "sbn")),
    Claim("Straight-through is better without σ′ than with.", ("straight_through",), ("straight_through_slope",)),
    Claim(
        "The stochastic binary neuron's gater learns: better than one frozen at random.",
        ("sbn",),
        ("sbn_frozen_gater",),
    ),
    Claim("It needs a gater rate 100 times smaller than the rest.", ("sbn",), ("sbn_gater_rate_100",)),
    Claim(
        "100 times smaller is of the sum over the batch of 32; of the mean it is 3 times smaller, and better.",
        ("sbn_gater_rate_32",),
        ("sbn",),
    ),
    Claim("Momentum helps STS.", ("sts",), ("sts_no_momentum",)),
    Claim("Momentum hurts the stochastic binary neuron.", ("sbn",), ("sbn_momentum",)),
    Claim(
        "Beta noise makes STS's gates decide: fewer fire with a probability in (0.05, 0.2).",
        ("sts",),
        ("sts_no_beta_noise",),
        "undecided",
    ),
    Claim("Beta noise helps STS.", ("sts",), ("sts_no_beta_noise",)),
    Claim(
        "The sparse rows lose nothing against dense baselines that compute as many units (gaters not counted: kMAC).",
        (*FOUR, "rectifier"),
        ("noisy_sigmoid", "sigmoid"),
    ),
)


@dataclass(frozen=True)
class Claims(jobs.Run):
    """Test the paper's claims in short runs of a narrower network, all of equal length; ten minutes on one core."""

    seeds: int = 2
    """How many runs of each variant, with seeds 0, 1, ..."""
    epochs: int = 8
    """Epochs of every run."""
    train_images: int = 20_000
    """How many of the training images are used; few, so that the command stays short."""
    width: float = 0.25
    """Width of the networks, gaters included, as a fraction of the table's; 1: as in the table."""
    settings: Annotated[tuple[str, ...], tyro.conf.arg(name="set", metavar="KEY=VALUE"), tyro.conf.UseAppendAction] = ()
    """Override a field of the recipe of every variant, as experts=100; may be repeated."""
    out: Location = Path("runs/claims")
    """Directory for claims.json, claims.md, the plots and the runs, or an fsspec URL."""

    measures_here = True

    def identity(self) -> dict[str, str]:
        """Return data set, sizes, version and settings."""
        return {
            "command": "claims",
            "dataset": self.dataset,
            "epochs": str(self.epochs),
            "train_images": str(self.train_images),
            "width": f"{self.width:g}",
            "version": version("gatelet"),
            "set": " ".join(self.settings),
        }

    def load(self) -> data.Split:
        """Return the data with its first training images only."""
        split = super().load()
        keep = self.train_images
        return replace(split, train_images=split.train_images[:keep], train_labels=split.train_labels[:keep])


@led
def run(options: Claims, console: Console) -> None:
    """Train the variants, measure the baselines' variance, and write what follows for the claims."""
    for name in ("seeds", "epochs", "train_images"):
        check_count(getattr(options, name), f"--{name.replace('_', '-')}")
    if not 0 < options.width <= 1:
        raise ValueError(f"--width: must lie in (0, 1], not {options.width:g}")
    sbn = variant(options, "sbn")
    if (sbn.model.members, sbn.model.layers, sbn.model.kind) != (1, 1, "gates"):
        raise ValueError("--set: members, layers and kind must stay as they are; the variance is of one gated layer")
    planned = [Job(variant(options, name), seed) for name in VARIANTS for seed in range(options.seeds)]
    results = jobs.train(options, planned, console)
    for result in results:
        if "probabilities" in result:
            result["undecided"] = 100 * undecided(result["probabilities"])
    path = options.out / "variance.json"
    if not path.is_file():
        console.print("measuring the variance of the score function's gradient with each baseline")
        write_json(path, baseline_variance(options))
    variance: list[dict[str, float]] = json.loads(path.read_text())
    verdicts = [verdict(claim, results) for claim in CLAIMS]
    errors = ("train_nll", "valid_error", "test_error", "test_error_sampled")
    keep = ("row", "seed", *errors, "open_test", "multiply_adds", "undecided")
    write_json(
        options.out / "claims.json",
        {
            **options.identity(),
            "claims": verdicts,
            "runs": [{key: result[key] for key in keep if key in result} for result in results],
            "baseline_variance": variance,
        },
    )
    text = markdown(options, results, verdicts, variance)
    write_atomically(options.out / "claims.md", lambda file: file.write(text.encode()))
    shown = {name: mean_histogram(results, name) for name in ("straight_through", "sts_no_beta_noise", "sts", "sbn")}
    plots.probabilities(shown, options.out / "claims_gates.png")
    plots.variance(variance, options.out / "claims_variance.png")
    console.print(text, highlight=False, markup=False)
    console.print(f"claims.json, claims.md, claims_gates.png and claims_variance.png are in {options.out}")


def variant(options: Claims, name: str) -> Recipe:
    """Return a variant's recipe, without early stopping."""
    row, settings = VARIANTS[name]
    full = recipe(row, "paper")
    short = full.but(
        epochs=options.epochs,
        patience=options.epochs,
        experts=max(1, round(options.width * full.model.experts)),
        bottleneck=max(1, round(options.width * full.gater.bottleneck)),
    )
    return override(short, (*_ALIKE, *settings, *options.settings)).but(row=name, title=name)


def undecided(histogram: Sequence[float]) -> float:
    """Return the share of probabilities in (0.05, 0.2)."""
    bins = len(histogram)
    return sum(histogram[round(0.05 * bins) : round(0.2 * bins)])


def _runs(results: Sequence[Result], name: str) -> list[Result]:
    return [result for result in results if result["row"] == name]


def mean_histogram(results: Sequence[Result], name: str) -> list[float]:
    """Return a variant's histogram of firing probabilities, averaged over its seeds."""
    return torch.tensor([each["probabilities"] for each in _runs(results, name)]).mean(0).tolist()


def verdict(claim: Claim, results: Sequence[Result]) -> dict[str, Any]:
    """Return in how many pairs of runs with the same seed the claim holds, and by how much on average."""
    pairs = []
    for name in claim.better:
        for better in _runs(results, name):
            if claim.limit is not None:
                pairs.append((claim.limit, better[claim.metric]))
            for other in claim.worse:
                pairs += [
                    (worse[claim.metric], better[claim.metric])
                    for worse in _runs(results, other)
                    if worse["seed"] == better["seed"]
                ]
    gains = [worse - better for worse, better in pairs]
    return {
        "claim": claim.text,
        "metric": claim.metric,
        "holds_in": sum(gain > 0 for gain in gains),
        "of": len(gains),
        "mean_gain": statistics.fmean(gains),
    }


# ------------------------------------------------------------------ the baselines of the score function

BASELINES = ("none", "running_mean", "per_unit")
_WARM_UP, _DRAWS, _BATCH = 50, 200, 32


def baseline_variance(options: Claims) -> list[dict[str, float]]:
    """Return the variance of the score function's gradient for the logits, per baseline and point in training.

    Weights are held; each baseline first sees 50 training batches, then the gradient of one batch is drawn 200 times.
    The variance is summed over the gates and averaged over the batch's examples.
    """
    split = options.load().without_test()
    trainer = PaperTrainer(variant(options, "sbn"), 0, split, options.device)
    measured = []
    for epoch in range(options.epochs + 1):
        if epoch in (0, 1, 2, options.epochs // 2, options.epochs):
            found = {name: _variance(trainer, name) for name in BASELINES}
            measured.append({"epoch": float(epoch), **found})
        if epoch < options.epochs:
            trainer.advance()
    return measured


@torch.no_grad()
def _variance(trainer: PaperTrainer, baseline: Any) -> float:
    estimator = ScoreFunction(baseline=baseline)
    order = torch.randperm(len(trainer.train_labels), generator=torch.Generator().manual_seed(0))
    noise = torch.Generator().manual_seed(1)
    *before, last = order.split(_BATCH)[: _WARM_UP + 1]
    for index in before:
        logits, gates, losses = _draw(trainer, index, noise)
        estimator.coefficients(logits[None], gates[None], losses[None])
    level = 0.0 if baseline == "none" else estimator.current_baseline(logits.shape[-1])
    total, squares = torch.zeros(()), torch.zeros(())
    for _ in range(_DRAWS):
        logits, gates, losses = _draw(trainer, last, noise)
        gradient = (gates - logits.sigmoid()) * (losses[:, None] - level)
        total, squares = total + gradient, squares + gradient.square()
    variance = (squares - total.square() / _DRAWS) / (_DRAWS - 1)
    return variance.sum(-1).mean().item()


def _draw(trainer: PaperTrainer, index: Tensor, noise: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits, gates and losses of a batch, with fresh noise, leaving the model unchanged."""
    x, y = trainer.train_images[index], trainer.train_labels[index]
    model, layer = trainer.model, trainer.model.layer
    assert isinstance(model, PaperNet)
    assert isinstance(layer, gatelet.nn.ConditionalLinear)
    logits = layer.gater(x)
    gates = ScoreFunction(baseline="none").sample(logits, torch.rand(logits.shape, generator=noise))
    losses = F.cross_entropy(model.output(layer.expert(x) * gates), y, reduction="none")
    return logits, gates, losses


# ------------------------------------------------------------------ what is written

_COLUMNS = (
    ("train NLL", lambda run: run["train_nll"], "{:.1e}"),
    ("valid %", lambda run: run["valid_error"], "{:.2f}"),
    ("test %", lambda run: run["test_error"], "{:.2f}"),
    ("test % sampled", lambda run: run["test_error_sampled"], "{:.2f}"),
    ("open %", lambda run: 100 * run["open_test"], "{:.1f}"),
    ("kMAC", lambda run: table.total(run) / 1e3, "{:.0f}"),
    ("undecided %", lambda run: run["undecided"], "{:.0f}"),
)


def markdown(
    options: Claims,
    results: Sequence[Result],
    verdicts: Sequence[Mapping[str, Any]],
    variance: Sequence[Mapping[str, float]],
) -> str:
    """Return the claims, the runs behind them and the baselines' variance, as Markdown."""
    units = {"train_nll": "nats", "test_error": "points", "undecided": "points"}
    claims = [
        [
            each["claim"],
            {"train_nll": "train NLL", "test_error": "test error", "undecided": "gates undecided"}[each["metric"]],
            f"{each['mean_gain']:+.3g} {units[each['metric']]}",
            f"{each['holds_in']} of {each['of']}",
        ]
        for each in verdicts
    ]
    runs = []
    for name, (row, settings) in VARIANTS.items():
        of_variant = _runs(results, name)
        figures = [table.over_seeds(of_variant, value, form) for _, value, form in _COLUMNS]
        runs.append([name, *figures, " ".join([f"--rows {row}", *(f"--set {setting}" for setting in settings)])])
    drops = [
        [
            f"{each['epoch']:.0f}",
            *(f"{each[name]:.3g}" for name in BASELINES),
            f"{each['per_unit'] / each['running_mean']:.2f}",
        ]
        for each in variance
    ]
    alike = " ".join(f"--set {setting}" for setting in _ALIKE)
    parts = [
        f"{options.seeds} seeds, {options.epochs} epochs, the first {options.train_images} training images of "
        f"{options.dataset}, {options.width:g} times the table's width, all with {alike}, its recipes otherwise. "
        "Undecided: gates that fire with a probability in (0.05, 0.2), on the validation images.",
        table.markdown(["claim", "by", "mean gain", "pairs of runs in which it holds"], claims),
        table.markdown(["variant", *(name for name, _, _ in _COLUMNS), "recipe"], runs),
        "Variance of the stochastic binary neuron's gradient for the logits, summed over the gates:",
        table.markdown(["after epoch", "no baseline", "running mean", "per unit", "per unit / running mean"], drops),
    ]
    return "\n\n".join(parts) + "\n"
