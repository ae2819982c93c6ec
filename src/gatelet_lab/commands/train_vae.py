"""`gatelet train vae`: a binary-latent VAE with several estimators, at equal objective evaluations per step.

The runs follow one another (those of the paper's table run side by side), because their times per step are compared.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import gatelet
from gatelet._checks import check_count, check_positive
from gatelet.estimators import ALL, Estimator
from gatelet_lab import data, plots, table
from gatelet_lab.files import write_atomically, write_json
from gatelet_lab.output import check_output, make_output
from gatelet_lab.training.fit import fit
from gatelet_lab.training.settings import estimator
from gatelet_lab.training.together import join, several
from gatelet_lab.training.vae import PROBE, Report, Settings, VAEJob, VAETrainer
from gatelet_lab.training.workers import check_device

ENUMERABLE = 12  # latents up to which the exact gradient is taken
_OTHER_GOAL = {"vimco": "estimates the gradient of the K-sample bound, which is not the ELBO"}


@dataclass(frozen=True)
class TrainVAE(Settings):
    """Train a VAE with binary latents by several estimators, with equal evaluations of the objective per step."""

    estimators: tuple[str, ...] = (
        "score_function:baseline=none",
        "score_function",
        "leave_one_out",
        "straight_through",
    )
    """Names of gatelet.estimators.ALL, with options if wanted: score_function:baseline=none,decay=0.99."""
    seeds: int = 1
    """How many runs of each estimator, with seeds 0, 1, ..."""
    dataset: str = "mnist"
    """mnist, fashion-mnist, digits (needs no download), or a directory of IDX files."""
    data_dir: Path | None = None
    """Where to look for the data set's files first (or the environment variable GATELET_DATA)."""
    out: Path = Path("runs/vae")
    """Directory for the table, the plot and the checkpoints."""
    resume: bool = False
    """Continue what is in the output directory; --steps, --seeds and --estimators may have grown."""

    def identity(self) -> dict[str, Any]:
        """Return what all runs of one directory share; steps, seeds and estimators may differ."""
        shared = ("latents", "layers", "evaluations", "batch", "rate", "draws", "dataset")
        return {"command": "train vae", "version": version("gatelet"), **{key: getattr(self, key) for key in shared}}


@several
def run(options: TrainVAE, console: Console) -> None:
    """Train what is missing, then write and show table and plot."""
    jobs = plan(options)
    with join(options.device) as world:
        console = console if world.first else Console(quiet=True)
        if world.first:
            check_output(options.out, options.resume, options.identity())
        split = data.load(options.dataset, options.data_dir)
        if world.first:
            make_output(options.out, options.identity(), "checkpoints")
        console.print(
            f"{split.name}, {options.layers} × {options.latents} latents, {len(jobs)} runs of {options.steps} steps, "
            f"{options.evaluations} evaluations each, output in {options.out}",
            highlight=False,
        )
        failures: dict[str, str] = {}
        trainers: list[VAETrainer] = []
        for job in jobs:
            trainer = VAETrainer(options, job, split, world)
            try:
                train(trainer, options, console)
                trainers.append(trainer)
            except FloatingPointError as error:  # the other estimators go on
                failures[job.name] = str(error)
        if trainers and world.first:
            with gatelet.sparsity.alone():
                finish(options, trainers, console)
        if failures:
            raise RuntimeError("; ".join(f"{name}: {told}" for name, told in failures.items()))


def finish(options: TrainVAE, trainers: Sequence[VAETrainer], console: Console) -> None:
    """Compare what was trained; write and show table and plot."""
    results = collect(options, trainers)
    write_table(options, results)
    plots.vae(results, title(options), options.out / "vae.png")
    console.print(table.grid(title(options), *cells(options, results)))
    console.print(legend(results), highlight=False, markup=False)
    console.print(f"table.json, table.md and vae.png are in {options.out}")


def train(trainer: VAETrainer, options: TrainVAE, console: Console) -> None:
    """Train one job to its last step, with regular reports and checkpoints."""

    def show(row: Report) -> None:
        console.print(
            f"{trainer.job.name}: step {row.step}: ELBO train {row.train_elbo:.2f} valid {row.valid_elbo:.2f}, "
            f"gradient variance {row.variance:.3g}",
            highlight=False,
            soft_wrap=True,
        )

    checkpoint = options.out / "checkpoints" / f"{trainer.job.name}.pt"
    fit(trainer, checkpoint, show)
    if trainer.steps > options.steps:
        raise ValueError(f"--steps {options.steps}: {checkpoint} is at step {trainer.steps} already")


# -------------------------------------------------------------------- what to run


def plan(options: TrainVAE) -> list[VAEJob]:
    """Check the options and return the jobs."""
    if not options.estimators:
        raise ValueError(f"--estimators: name at least one of {', '.join(ALL)}")
    if len(set(options.estimators)) < len(options.estimators):
        raise ValueError("--estimators: names one twice")
    for name in ("latents", "evaluations", "steps", "batch", "seeds", "every", "draws"):
        check_count(getattr(options, name), f"--{name}")
    if options.draws < 2:
        raise ValueError("--draws must be at least 2: a single draw has no variance")
    check_positive(options.rate, "--rate")
    check_device(options.device)
    samples = {spec: affordable(spec, options) for spec in options.estimators}
    return [VAEJob(spec, samples[spec], seed) for spec in options.estimators for seed in range(options.seeds)]


def suitable(spec: str) -> Estimator:
    """Return the estimator that a specification describes, if it is one for binary latents."""
    method = estimator(spec)
    name = spec.partition(":")[0]
    if "bernoulli" not in method.kinds:
        raise ValueError(f"--estimators {spec}: is for categorical units, the latents are binary")
    if name in _OTHER_GOAL:
        raise ValueError(f"--estimators {spec}: {_OTHER_GOAL[name]}")
    return method


def affordable(spec: str, options: TrainVAE) -> int:
    """Return the largest number of samples whose evaluations of the objective stay within the budget."""
    method = suitable(spec)
    if options.layers > 1 and (method.needs == "objective" or not method.several_layers):
        fit = [name for name, each in ALL.items() if each.needs != "objective" and each.several_layers]
        raise ValueError(
            f"--layers 2: {spec} is for a single stochastic layer; for several take one of {', '.join(fit)}"
        )
    stride = 2 if method.antithetic else 1
    best, least = 0, 0
    for samples in range(method.replicas, options.evaluations + 1, stride):
        spent = evaluations(spec, options.latents, samples)
        least = least or spent
        if spent > options.evaluations:
            break
        best = samples
    if best == 0:
        least = least or evaluations(spec, options.latents, method.replicas)
        raise ValueError(
            f"--evaluations {options.evaluations}: {spec} needs at least {least} for {options.latents} latents"
        )
    return best


def evaluations(spec: str, latents: int, samples: int) -> int:
    """Return how many evaluations of the objective per image an estimator makes."""
    spent = 0

    def objective(gates: Tensor) -> Tensor:
        nonlocal spent
        spent += gates.shape[0]
        return gates.square().sum(-1)

    with torch.random.fork_rng(devices=[]):
        logits = torch.zeros(1, latents, requires_grad=True)
        gatelet.surrogate(objective, logits, estimator(spec), samples=samples).sum().backward()
    return spent


# -------------------------------------------------------------------- results

Result = dict[str, Any]


def legend(results: Sequence[Result]) -> str:
    """Return what the columns are."""
    told = (
        "ELBO: nats per image, Bernoulli latents, one sample. Variance: of the gradient for the first layer's logits, "
        f"mean over {PROBE} images and all latents: with the weights of the own training's end, and with those that "
        f"{results[0]['estimator']} ended with, the same for all; moving averages get used to these first, networks "
        "that an estimator learned stay as they are."
    )
    if "relative_bias" in results[0]:
        told += " Bias, with the same weights: |E[ĝ] − exact| / |exact|, in brackets its standard error."
    return told


def collect(options: TrainVAE, trainers: Sequence[VAETrainer]) -> list[Result]:
    """Return a result per run, with the comparison of all at the first run's weights."""
    model = trainers[0].model
    exact = None
    if options.layers == 1 and options.latents <= ENUMERABLE:
        x = trainers[0].shown[0][:PROBE]
        with torch.no_grad():
            exact = gatelet.exact_gradient(lambda gates: model.reconstruction(gates, x), model.encode(x))
    results = []
    for trainer in trainers:
        last = trainer.history[-1]
        mean, variance = trainer.moments_at(model)
        result: Result = {
            **asdict(trainer.job),
            "evaluations": evaluations(trainer.job.estimator, options.latents, trainer.job.samples),
            "train_elbo": last.train_elbo,
            "valid_elbo": last.valid_elbo,
            "variance": last.variance,
            "variance_same_weights": variance.mean().item(),
            "unbiased": all(getattr(unit, "unbiased", False) for unit in trainer.units),
            "ms_per_step": 1e3 * last.seconds / max(1, last.step),
            "history": [asdict(row) for row in trainer.history],
        }
        if exact is not None:
            # |mean − exact|² is too large by the variance of the mean, which is subtracted.
            noise = variance.sum().item() / options.draws
            excess = (mean - exact).square().sum().item() - noise
            size = exact.norm().item()
            result["relative_bias"] = math.sqrt(max(0.0, excess)) / size
            result["relative_noise"] = math.sqrt(noise) / size
        results.append(result)
    return results


def cells(options: TrainVAE, results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Return the header and a line per estimator, mean ± standard deviation over its seeds."""
    columns: list[tuple[str, str, str]] = [
        ("samples", "samples", "{:.0f}"),
        ("evaluations", "evaluations", "{:.0f}"),
        ("train ELBO", "train_elbo", "{:.2f}"),
        ("valid ELBO", "valid_elbo", "{:.2f}"),
        ("variance, own weights", "variance", "{:.3g}"),
        ("variance, same weights", "variance_same_weights", "{:.3g}"),
    ]
    if "relative_bias" in results[0]:
        columns.append(("bias, same weights", "relative_bias", "{:.3f}"))
    columns.append(("ms per step", "ms_per_step", "{:.1f}"))
    lines = []
    for spec in dict.fromkeys(result["estimator"] for result in results):
        runs = [result for result in results if result["estimator"] == spec]
        line = [spec]
        for _, key, form in columns:
            values = [run[key] for run in runs]
            cell = form.format(statistics.fmean(values))
            if key == "relative_bias":
                cell += f" ({statistics.fmean(run['relative_noise'] for run in runs):.3f})"
            elif len(values) > 1 and "elbo" in key:
                cell += f" ± {form.format(statistics.stdev(values))}"
            line.append(cell)
        lines.append(line)
    return ["estimator", *(name for name, _, _ in columns)], lines


def title(options: TrainVAE) -> str:
    """Return what was compared."""
    layers = f"{options.layers} × {options.latents}" if options.layers > 1 else f"{options.latents}"
    return (
        f"{options.dataset}, {layers} latents, {options.steps} steps of {options.batch} images, at most "
        f"{options.evaluations} evaluations per image and step, seeds: {options.seeds}"
    )


def write_table(options: TrainVAE, results: Sequence[Result]) -> None:
    """Write ``table.json`` and ``table.md``."""
    write_json(options.out / "table.json", {**options.identity(), "steps": options.steps, "rows": list(results)})
    text = f"# {title(options)}\n\n{table.markdown(*cells(options, results))}\n\n{legend(results)}\n"
    write_atomically(options.out / "table.md", lambda file: file.write(text.encode()))
