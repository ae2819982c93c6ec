"""`gatelet train vae`: a binary-latent VAE, trained with several estimators at equal objective evaluations per step.

The negative ELBO of an image x with latents h ~ q = Bernoulli(σ(a)), a the encoder's logits, is

    E_q[−log p(x|h)] + E_q[log q(h) − log p(h)].

Only the first term goes through an estimator. Inside of it log q(h) would depend on the logits directly, not only
through the gates: score-function estimators could ignore that (E_q[∂ log q/∂a] = 0, at the price of variance), but for
estimators with a path log q at relaxed gates is not the log-density of what was drawn, and its path gradient is no
estimate of anything. For Bernoulli latents it has a closed form, which every estimator gets alike:

    one layer    KL(q ‖ p) = Σ_i σ(a_i)(a_i − c_i) − softplus(a_i) + softplus(c_i), c the prior's (learned) logits;
    two layers   q(h₁|x) q(h₂|h₁), p(h₂) p(h₁|h₂) p(x|h₁): the entropy of q(h₁|x) is analytic; what depends on gates is
                 −log p(x|h₁) − log p(h₁|h₂) + KL(q(h₂|h₁) ‖ p(h₂)), smooth in h₁, so defined for relaxed gates too.

Whatever gates an estimator trains with, the ELBO that is reported is the one of Bernoulli latents.
Pixels are binarised dynamically: every step draws them anew with the grey value as probability; images for evaluation
are drawn once. All randomness follows from (seed, step): all estimators see the same images, and a resumed run repeats
an uninterrupted one.
"""

import ast
import copy
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import gatelet
from gatelet._checks import check_choice, check_count, check_positive
from gatelet.estimators import ALL, Estimator
from gatelet_lab import data
from gatelet_lab.files import CheckpointError, read_json, read_tensors, write_atomically, write_json

ENUMERABLE = 12  # latents up to which the exact gradient is taken
_PROBE = 20  # training images at which the gradient's variance is measured
_CHUNK = 20  # draws of the gradient at once
_EVAL_BATCH = 1000
_EVAL_IMAGES = 10_000  # of the training images, for the training ELBO
_OTHER_GOAL = {"vimco": "estimates the gradient of the K-sample bound, which is not the ELBO"}
_WARM = 30  # steps that a moving-average baseline gets to settle at foreign weights


@dataclass(frozen=True)
class TrainVAE:
    """Train a binary-latent VAE with several estimators, at equal objective evaluations per step."""

    estimators: tuple[str, ...] = (
        "score_function:baseline=none",
        "score_function",
        "leave_one_out",
        "straight_through",
    )
    """Names of gatelet.estimators.ALL, with options if wanted: score_function:baseline=none,decay=0.99."""
    latents: int = 200
    """Bernoulli latents per layer; up to 12 the estimators' bias is measured too, against the exact gradient."""
    layers: Literal[1, 2] = 1
    """Stochastic layers, each linear in the one before."""
    evaluations: int = 4
    """Objective evaluations per image and step that every estimator may spend: on as many samples as they allow."""
    steps: int = 1000
    """Optimiser steps."""
    batch: int = 100
    """Images per step."""
    rate: float = 1e-3
    """Adam's learning rate."""
    seeds: int = 1
    """How many runs of each estimator, with seeds 0, 1, ..."""
    every: int = 250
    """Steps between two reports of ELBO and gradient variance."""
    draws: int = 200
    """Gradient draws for each measurement of the variance."""
    dataset: str = "mnist"
    """mnist, fashion-mnist, digits (needs no download), or a directory of IDX files."""
    data_dir: Path | None = None
    """Where to look for the data set's files first (or the environment variable GATELET_DATA)."""
    device: str = "cpu"
    """Torch device to train on."""
    out: Path = Path("runs/vae")
    """Directory for the table, the plot and the checkpoints."""
    resume: bool = False
    """Continue what is in the output directory; more steps, seeds or estimators may be asked for."""


@dataclass
class Report:
    """What one evaluation showed: ELBO in nats per image, the gradient per logit of the first layer."""

    step: int
    train_elbo: float
    valid_elbo: float
    variance: float
    seconds: float


@dataclass(frozen=True)
class Job:
    """One estimator with one seed."""

    estimator: str
    samples: int
    seed: int

    @property
    def name(self) -> str:
        """The stem of the job's checkpoint."""
        stem = "".join(character if character.isalnum() or character in "_-.=" else "-" for character in self.estimator)
        return f"{stem}-seed{self.seed}"


def run(options: TrainVAE, console: Console) -> None:
    """Train what is missing, then write and show table and plot."""
    jobs = plan(options)
    check_output(options)
    split = data.load(options.dataset, options.data_dir)
    make_output(options)
    console.print(
        f"{split.name}, {options.layers} × {options.latents} latents, {len(jobs)} runs of {options.steps} steps, "
        f"{options.evaluations} evaluations each, output in {options.out}",
        highlight=False,
    )
    failures: dict[str, str] = {}
    trainers: list[Trainer] = []
    for job in jobs:
        trainer = Trainer(options, job, split)
        try:
            train(trainer, options, console)
            trainers.append(trainer)
        except FloatingPointError as error:  # the other estimators go on
            failures[job.name] = str(error)
    if trainers:
        results = collect(options, trainers)
        write_table(options, results)
        plot(options, results, options.out / "vae.png")
        show(options, results, console)
        console.print(f"table.json, table.md and vae.png are in {options.out}")
    if failures:
        raise RuntimeError("; ".join(f"{name}: {told}" for name, told in failures.items()))


# -------------------------------------------------------------------- what to run


def plan(options: TrainVAE) -> list[Job]:
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
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {options.device}: {str(error).splitlines()[0]}") from error
    samples = {spec: affordable(spec, options) for spec in options.estimators}
    return [Job(spec, samples[spec], seed) for spec in options.estimators for seed in range(options.seeds)]


def make(spec: str) -> Estimator:
    """Return the estimator that ``name`` or ``name:option=value,option=value`` describes."""
    name, _, rest = spec.partition(":")
    check_choice(name, ALL, "estimator")
    if "bernoulli" not in ALL[name].kinds:
        raise ValueError(f"--estimators {spec}: is for categorical units, the latents are binary")
    if name in _OTHER_GOAL:
        raise ValueError(f"--estimators {spec}: {_OTHER_GOAL[name]}")
    arguments: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, equals, text = part.partition("=")
        if not equals:
            raise ValueError(f"--estimators {spec}: options are written name:option=value, not {part!r}")
        try:
            arguments[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            arguments[key] = text  # a word
    try:
        return ALL[name](**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"--estimators {spec}: {error}") from error


def affordable(spec: str, options: TrainVAE) -> int:
    """Return the largest number of samples whose objective evaluations stay within the budget."""
    method = make(spec)
    if options.layers > 1 and (method.needs == "objective" or not method.several_layers):
        fit = [name for name, each in ALL.items() if each.needs != "objective" and each.several_layers]
        raise ValueError(
            f"--layers 2: {spec} is for a single stochastic layer; of several are capable: {', '.join(fit)}"
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
    """Count at how many gate vectors per image an estimator evaluates the objective."""
    spent = 0

    def objective(gates: Tensor) -> Tensor:
        nonlocal spent
        spent += gates.shape[0]
        return gates.square().sum(-1)

    with torch.random.fork_rng(devices=[]):
        logits = torch.zeros(1, latents, requires_grad=True)
        gatelet.surrogate(objective, logits, make(spec), samples=samples).sum().backward()
    return spent


def check_output(options: TrainVAE) -> None:
    """See that the output directory is free, or with --resume that it holds this comparison."""
    out = options.out
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: exists and is not a directory")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not options.resume:
        raise ValueError(f"--out {out}: is not empty; continue it with --resume, or name another directory")
    try:
        found = read_json(out / "run.json")
    except CheckpointError as error:
        raise ValueError(f"--out {out}: is not the output of `gatelet train vae`; name another directory") from error
    for key, value in _identity(options).items():
        if found.get(key) != value:
            raise ValueError(f"--out {out}: holds a run of {key} {found.get(key)}, not {value}; name another directory")


def make_output(options: TrainVAE) -> None:
    """Make the output directory and note in it which comparison it holds."""
    try:
        (options.out / "checkpoints").mkdir(parents=True, exist_ok=True)
        write_json(options.out / "run.json", _identity(options))
    except OSError as error:
        raise ValueError(f"--out {options.out}: cannot be written ({error.strerror})") from error


def _identity(options: TrainVAE) -> dict[str, Any]:
    """Return what all runs of one directory share; steps, seeds and estimators may grow."""
    shared = ("latents", "layers", "evaluations", "batch", "rate", "draws", "dataset")
    return {"command": "train vae", "version": version("gatelet"), **{key: getattr(options, key) for key in shared}}


# -------------------------------------------------------------------- the model


class VAE(nn.Module):
    """Linear encoder and decoder with one or two layers of Bernoulli latents, coded −1/+1 for the next layer.

    Args:
        mean: the training images' mean, (D,): it centres the encoder's input and starts the decoder's bias.
        latents: N per layer.
        layers: 1 or 2.
    """

    mean: Tensor

    def __init__(self, mean: Tensor, latents: int, layers: int) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.encoder = nn.Linear(len(mean), latents)
        self.decoder = nn.Linear(latents, len(mean))
        self.prior = nn.Parameter(torch.zeros(latents))
        self.upper_encoder = nn.Linear(latents, latents) if layers > 1 else None
        self.upper_decoder = nn.Linear(latents, latents) if layers > 1 else None
        with torch.no_grad():
            self.decoder.bias.copy_(mean.clamp(1e-3, 1 - 1e-3).logit())

    def encode(self, x: Tensor) -> Tensor:
        """Return the logits of q(h₁|x), (B, N)."""
        logits: Tensor = self.encoder(x - self.mean)
        return logits

    def analytic(self, logits: Tensor) -> Tensor:
        """Return the part of the negative ELBO that needs no gates, (B,): the KL, or minus the entropy of q(h₁|x)."""
        if self.upper_encoder is None:
            return kl(logits, self.prior)
        return (logits.sigmoid() * logits - F.softplus(logits)).sum(-1)

    def reconstruction(self, gates: Tensor, x: Tensor) -> Tensor:
        """Return −log p(x|h₁), (..., B) for gates (..., B, N)."""
        return negative_log(self.decoder(2 * gates - 1), x)

    def upper(self, gates: Tensor, draw: Callable[[Tensor], Tensor]) -> Tensor:
        """Return −log p(h₁|h₂) + KL(q(h₂|h₁) ‖ p(h₂)), with h₂ drawn from its logits by ``draw``."""
        assert self.upper_encoder is not None
        assert self.upper_decoder is not None
        logits = self.upper_encoder(2 * gates - 1)
        return negative_log(self.upper_decoder(2 * draw(logits) - 1), gates) + kl(logits, self.prior)

    def negative_elbo(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return −ELBO of Bernoulli latents by one sample, (B,)."""
        logits = self.encode(x)
        gates = torch.bernoulli(logits.sigmoid(), generator=generator)
        loss = self.reconstruction(gates, x) + self.analytic(logits)
        if self.upper_encoder is not None:
            loss = loss + self.upper(gates, lambda a: torch.bernoulli(a.sigmoid(), generator=generator))
        return loss


def kl(logits: Tensor, prior: Tensor) -> Tensor:
    """Return KL(Bernoulli(σ(logits)) ‖ Bernoulli(σ(prior))), summed over the units."""
    return (logits.sigmoid() * (logits - prior) - F.softplus(logits) + F.softplus(prior)).sum(-1)


def negative_log(logits: Tensor, values: Tensor) -> Tensor:
    """Return −log of the Bernoulli mass of ``values``, summed over the last dimension; linear in the values."""
    return F.softplus(logits).sum(-1) - (logits * values).sum(-1)


# -------------------------------------------------------------------- training


class Trainer:
    """One estimator, one seed. Its state after a step is all that decides the rest, but for (seed, step)."""

    def __init__(self, options: TrainVAE, job: Job, split: data.Split) -> None:
        self.options, self.job = options, job
        self.device = torch.device(options.device)
        self.images = split.train_images.to(self.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(job.seed)
            self.model = VAE(self.images.mean(0), options.latents, options.layers).to(self.device)
            self.units = nn.ModuleList(make(job.estimator) for _ in range(options.layers)).to(self.device)
        self.optimizer = torch.optim.Adam([*self.model.parameters(), *self.units.parameters()], lr=options.rate)
        draw = self.generator(-1)
        self.shown = [
            torch.bernoulli(part.to(self.device), generator=draw)
            for part in (split.train_images[:_EVAL_IMAGES], split.valid_images)
        ]
        self.step, self.seconds = 0, 0.0
        self.history: list[Report] = []

    def generator(self, step: int) -> torch.Generator:
        """Return the source of all that is random in a step; step −1 is evaluation."""
        return torch.Generator(self.device).manual_seed((self.job.seed + 1) * 1_000_003 + step)

    def stochastic(self, x: Tensor, logits: Tensor, units: Sequence[nn.Module], generator: torch.Generator) -> Tensor:
        """Return the part of the negative ELBO that depends on gates, (B,), with the estimator's gradient."""
        samples, model = self.job.samples, self.model
        if self.options.layers == 1:
            (unit,) = units
            assert isinstance(unit, Estimator)
            return gatelet.surrogate(
                lambda gates: model.reconstruction(gates, x), logits, unit, samples=samples, generator=generator
            )
        lower, upper = (gatelet.StochasticUnit(unit) for unit in units if isinstance(unit, Estimator))
        with gatelet.Tape() as tape:
            gates = lower(tape.replicate(logits, samples), generator=generator)
            loss = model.reconstruction(gates, tape.replicate(x, samples))
            loss = loss + model.upper(gates, lambda a: upper(a, generator=generator))
        return tape.surrogate(loss).reshape(samples, -1).mean(0)

    def train_step(self) -> None:
        """Draw a batch and take one step."""
        began, draw = time.perf_counter(), self.generator(self.step)
        index = torch.randint(len(self.images), (self.options.batch,), generator=draw, device=self.device)
        x = torch.bernoulli(self.images[index], generator=draw)
        logits = self.model.encode(x)
        loss = (self.stochastic(x, logits, list(self.units), draw) + self.model.analytic(logits)).mean()
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"training diverged: the loss became {loss.item()} in step {self.step + 1}")
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.step += 1
        self.seconds += time.perf_counter() - began

    def report(self) -> Report:
        """Measure ELBO and gradient variance; changes nothing of what training depends on."""
        train, valid = (self.elbo(images) for images in self.shown)
        variance = self.moments(self.model, copy.deepcopy(self.units))[1].mean().item()
        self.history.append(Report(self.step, train, valid, variance, self.seconds))
        return self.history[-1]

    @torch.no_grad()
    def elbo(self, images: Tensor) -> float:
        """Return the mean ELBO of binary images, one sample each."""
        draw = self.generator(-1)
        return -sum(self.model.negative_elbo(x, draw).sum().item() for x in images.split(_EVAL_BATCH)) / len(images)

    def moments(self, model: VAE, units: nn.ModuleList) -> tuple[Tensor, Tensor]:
        """Return mean and variance of the gradient for the first layer's logits at the probe images, (P, N).

        The draws run side by side, so that a moving-average baseline is the same in all of them.
        """
        x, own, self.model = self.shown[0][:_PROBE], self.model, model
        try:
            base, draw, found = model.encode(x).detach(), self.generator(-1), []
            for start in range(0, self.options.draws, _CHUNK):
                count = min(_CHUNK, self.options.draws - start)
                logits = base.repeat(count, 1).requires_grad_()
                state = copy.deepcopy(units)
                loss = self.stochastic(x.repeat(count, 1), logits, list(state), draw).sum()
                found.append(torch.autograd.grad(loss, logits)[0].reshape(count, *base.shape))
        finally:
            self.model = own
        gradients = torch.cat(found).double()
        return gradients.mean(0), gradients.var(0)

    def moments_at(self, model: VAE) -> tuple[Tensor, Tensor]:
        """Return mean and variance of the gradient at foreign weights, to which moving averages get used first.

        What an estimator has learned by gradient (NVIL's network, RELAX's control variate) stays as it is.
        """
        units, own, self.model = copy.deepcopy(self.units), self.model, model
        try:
            for step in range(_WARM):
                draw = self.generator(step)
                index = torch.randint(len(self.images), (self.options.batch,), generator=draw, device=self.device)
                x = torch.bernoulli(self.images[index], generator=draw)
                self.stochastic(x, model.encode(x).detach().requires_grad_(), list(units), draw)
        finally:
            self.model = own
        return self.moments(model, units)

    # ---------------------------------------------------------------- checkpoints

    @property
    def path(self) -> Path:
        """Where the state is kept."""
        return self.options.out / "checkpoints" / f"{self.job.name}.pt"

    def save(self) -> None:
        """Write the state; a crash in the middle leaves the last good file."""
        state = {
            "job": asdict(self.job),
            "model": self.model.state_dict(),
            "units": self.units.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "history": [asdict(row) for row in self.history],
        }
        write_atomically(self.path, lambda file: torch.save(state, file))

    def load(self) -> None:
        """Continue from the checkpoint."""
        try:
            state = read_tensors(self.path, self.device)
            if state["job"] != asdict(self.job):
                raise ValueError(f"it is of {state['job']}")
            self.model.load_state_dict(state["model"])
            self.units.load_state_dict(state["units"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.seconds = state["step"], state["seconds"]
            self.history = [Report(**row) for row in state["history"]]
        except Exception as error:
            raise CheckpointError(f"{self.path}: cannot be continued ({error})") from error


def train(trainer: Trainer, options: TrainVAE, console: Console) -> None:
    """Train one job to its last step, with a report and a checkpoint every so often."""
    if trainer.path.is_file():
        trainer.load()
        if trainer.step > options.steps:
            raise ValueError(f"--steps {options.steps}: {trainer.path} is at step {trainer.step} already")
    while not trainer.history or trainer.step < options.steps:
        target = min(options.steps, trainer.step + options.every) if trainer.history else trainer.step
        while trainer.step < target:
            trainer.train_step()
        row = trainer.report()
        trainer.save()
        console.print(
            f"{trainer.job.name}: step {row.step}: ELBO train {row.train_elbo:.2f} valid {row.valid_elbo:.2f}, "
            f"gradient variance {row.variance:.3g}",
            highlight=False,
            soft_wrap=True,
        )


# -------------------------------------------------------------------- results

Result = dict[str, Any]


def legend(results: Sequence[Result]) -> str:
    """Return what the columns are."""
    told = (
        "ELBO: nats per image, Bernoulli latents, one sample. Variance: of the gradient for the first layer's logits, "
        f"mean over {_PROBE} images and all latents: with the weights of the own training's end, and with those that "
        f"{results[0]['estimator']} ended with, the same for all; moving averages get used to these first, networks "
        "that an estimator learned stay as they are."
    )
    if "relative_bias" in results[0]:
        told += " Bias, with the same weights: |E[ĝ] − exact| / |exact|, in brackets its standard error."
    return told


def collect(options: TrainVAE, trainers: Sequence[Trainer]) -> list[Result]:
    """Return a result per run, with the comparison of all at the first run's weights."""
    model = trainers[0].model
    exact = None
    if options.layers == 1 and options.latents <= ENUMERABLE:
        x = trainers[0].shown[0][:_PROBE]
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
            # |mean − exact|² is too large by the noise of the mean: its expectation is taken off.
            noise = variance.sum().item() / options.draws
            excess = (mean - exact).square().sum().item() - noise
            size = exact.norm().item()
            result["relative_bias"] = math.sqrt(max(0.0, excess)) / size
            result["relative_noise"] = math.sqrt(noise) / size
        results.append(result)
    return results


def table(options: TrainVAE, results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
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


def _title(options: TrainVAE) -> str:
    layers = f"{options.layers} × {options.latents}" if options.layers > 1 else f"{options.latents}"
    return (
        f"{options.dataset}, {layers} latents, {options.steps} steps of {options.batch} images, at most "
        f"{options.evaluations} evaluations per image and step, seeds: {options.seeds}"
    )


def write_table(options: TrainVAE, results: Sequence[Result]) -> None:
    """Write ``table.json`` and ``table.md``."""
    write_json(options.out / "table.json", {**_identity(options), "steps": options.steps, "rows": list(results)})
    header, body = table(options, results)
    lines = [" | ".join(line) for line in [header, ["---"] * len(header), *body]]
    text = "\n".join(f"| {line} |" for line in lines)
    text = f"# {_title(options)}\n\n{text}\n\n{legend(results)}\n"
    write_atomically(options.out / "table.md", lambda file: file.write(text.encode()))


def show(options: TrainVAE, results: Sequence[Result], console: Console) -> None:
    """Print the table."""
    header, body = table(options, results)
    grid = Table(title=_title(options), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, name in enumerate(header):
        grid.add_column(name, justify="left" if index == 0 else "right", no_wrap=index == 0)
    for line in body:
        grid.add_row(*line)
    console.print(grid)
    console.print(legend(results), highlight=False, markup=False)


def plot(options: TrainVAE, results: Sequence[Result], path: Path) -> None:
    """Plot validation ELBO and gradient variance against steps; the mean over seeds."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    specs = list(dict.fromkeys(result["estimator"] for result in results))
    for index, spec in enumerate(specs):
        histories = [result["history"] for result in results if result["estimator"] == spec]
        style = {"color": plt.get_cmap("tab20" if len(specs) > 10 else "tab10")(index), "marker": ".", "label": spec}
        # The first evaluation of all is the same untrained model: it would only squeeze the axis.
        rows = [[row for row in history if row["step"] > 0] for history in histories]
        steps = [row["step"] for row in rows[0]]
        for axes, key in ((left, "valid_elbo"), (right, "variance")):
            values = [statistics.fmean(history[i][key] for history in rows) for i in range(len(steps))]
            axes.plot(steps, values, **style)
    left.set(xlabel="step", ylabel="validation ELBO (nats per image)")
    right.set(xlabel="step", ylabel="variance of the gradient per logit")
    if all(row["variance"] > 0 for result in results for row in result["history"]):
        right.set_yscale("log")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(_title(options), fontsize=9)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=100))
    plt.close(figure)
