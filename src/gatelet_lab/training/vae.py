"""A binary-latent VAE whose latents get their gradient from an estimator.

The negative ELBO of an image x with latents h ~ q = Bernoulli(σ(a)), a the encoder's logits, is

    E_q[−log p(x|h)] + E_q[log q(h) − log p(h)].

Only the first term goes through an estimator. Inside of it log q(h) would depend on the logits directly, not only
through the gates: score-function estimators could ignore that (E_q[∂ log q/∂a] = 0, at the price of variance), but for
pathwise estimators log q at relaxed gates is not the log-density of what was drawn, and its gradient estimates nothing.
For Bernoulli latents the second term has a closed form, which every estimator uses:

    one layer    KL(q ‖ p) = Σ_i σ(a_i)(a_i − c_i) − softplus(a_i) + softplus(c_i), c the prior's (learned) logits;
    two layers   q(h₁|x) q(h₂|h₁), p(h₂) p(h₁|h₂) p(x|h₁): the entropy of q(h₁|x) is analytic; what depends on gates is
                 −log p(x|h₁) − log p(h₁|h₂) + KL(q(h₂|h₁) ‖ p(h₂)), smooth in h₁, so defined for relaxed gates too.

Whatever gates an estimator trains with, the reported ELBO is that of Bernoulli latents.
Pixels are binarised dynamically: every step draws them again with the grey value as probability. Images for evaluation
are drawn once. All randomness follows from (seed, step): all estimators see the same images, and a resumed run repeats
an uninterrupted one.
"""

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gatelet
from gatelet.estimators import Estimator
from gatelet_lab import data
from gatelet_lab.training.fit import Trainer
from gatelet_lab.training.settings import estimator
from gatelet_lab.training.world import ALONE, World

PROBE = 20  # training images at which the gradient's variance is measured
_CHUNK = 20  # draws of the gradient at once
_EVAL_BATCH = 1000
_EVAL_IMAGES = 10_000  # of the training images, for the training ELBO
_WARM = 30  # steps in which a moving-average baseline adapts to another run's weights


@dataclass(frozen=True)
class Settings:
    """What all runs of a comparison share."""

    latents: int = 200
    """Bernoulli latents per layer; up to 12 the estimators' bias is measured too, against the exact gradient."""
    layers: Literal[1, 2] = 1
    """Stochastic layers, each linear in the one before."""
    evaluations: int = 4
    """Objective evaluations per image and step that every estimator may spend: it takes as many samples as they
    allow."""
    steps: int = 1000
    """Optimiser steps."""
    batch: int = 100
    """Images per step."""
    rate: float = 1e-3
    """Adam's learning rate."""
    every: int = 250
    """Steps between two reports of ELBO and gradient variance."""
    draws: int = 200
    """Gradient draws for each measurement of the variance."""
    device: str = "cpu"
    """Torch device to train on."""


@dataclass
class Report:
    """The figures of one evaluation: ELBO in nats per image, the gradient per logit of the first layer."""

    step: int
    train_elbo: float
    valid_elbo: float
    variance: float
    seconds: float


@dataclass(frozen=True)
class VAEJob:
    """One estimator with one seed."""

    estimator: str
    samples: int
    seed: int

    @property
    def name(self) -> str:
        """The stem of the job's checkpoint."""
        stem = "".join(character if character.isalnum() or character in "_-.=" else "-" for character in self.estimator)
        return f"{stem}-seed{self.seed}"


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


class VAETrainer(Trainer[tuple[Tensor, torch.Generator], Report]):
    """One estimator, one seed; a row every so many steps, the first before any step.

    All randomness of a step follows from the seed and the step's number.
    """

    row_type = Report

    def __init__(self, settings: Settings, job: VAEJob, split: data.Split, world: World = ALONE) -> None:
        super().__init__(world)
        self.settings, self.job = settings, job
        self.device = torch.device(settings.device)
        self.images = split.train_images.to(self.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(job.seed)
            self.model = VAE(self.images.mean(0), settings.latents, settings.layers).to(self.device)
            self.units = nn.ModuleList(estimator(job.estimator) for _ in range(settings.layers)).to(self.device)
        self.optimizer = torch.optim.Adam([*self.model.parameters(), *self.units.parameters()], lr=settings.rate)
        draw = self.generator(-1)
        self.shown = [
            torch.bernoulli(part.to(self.device), generator=draw)
            for part in (split.train_images[:_EVAL_IMAGES], split.valid_images)
        ]

    def generator(self, step: int) -> torch.Generator:
        """Return the source of all that is random in a step; step −1 is evaluation."""
        return torch.Generator(self.device).manual_seed((self.job.seed + 1) * 1_000_003 + step)

    def stochastic(self, x: Tensor, logits: Tensor, units: Sequence[nn.Module], generator: torch.Generator) -> Tensor:
        """Return the part of the negative ELBO that depends on gates, (B,), with the estimator's gradient."""
        samples, model = self.job.samples, self.model
        if self.settings.layers == 1:
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

    @property
    def finished(self) -> bool:
        """Whether the last step is done and reported."""
        return bool(self.history) and self.steps >= self.settings.steps

    def batches(self) -> Iterator[tuple[Tensor, torch.Generator]]:
        """Yield binarised images and the source of what else is random, for the steps up to the next report."""
        if self.history:
            for step in range(self.steps, min(self.settings.steps, self.steps + self.settings.every)):
                yield self.draw(step)

    def draw(self, step: int) -> tuple[Tensor, torch.Generator]:
        """Return a step's binarised images, and the source of what else is random in it."""
        draw = self.generator(step)
        index = torch.randint(len(self.images), (self.settings.batch,), generator=draw, device=self.device)
        return torch.bernoulli(self.images[index], generator=draw), draw

    def loss(self, batch: tuple[Tensor, torch.Generator]) -> Tensor:
        """Return the negative ELBO, with the estimator's gradient."""
        whole, draw = batch
        rows, count = self.world.part(len(whole)), len(whole)
        x = whole[rows]
        logits = self.model.encode(x)
        with self.world.noise(rows, count):
            stochastic = self.stochastic(x, logits, list(self.units), draw)
        return self.world.mean(stochastic + self.model.analytic(logits), count)

    def look(self) -> Report:
        """Measure ELBO and gradient variance."""
        train, valid = (self.elbo(images) for images in self.shown)
        variance = self.moments(self.model, copy.deepcopy(self.units))[1].mean().item()
        return Report(self.steps, train, valid, variance, self.seconds)

    @torch.no_grad()
    def elbo(self, images: Tensor) -> float:
        """Return the mean ELBO of binary images, one sample each."""
        draw = self.generator(-1)
        return -sum(self.model.negative_elbo(x, draw).sum().item() for x in images.split(_EVAL_BATCH)) / len(images)

    def moments(self, model: VAE, units: nn.ModuleList) -> tuple[Tensor, Tensor]:
        """Return mean and variance of the gradient for the first layer's logits at the probe images, (P, N).

        The draws run side by side, so that a moving-average baseline is the same in all of them.
        """
        x, own, self.model = self.shown[0][:PROBE], self.model, model
        try:
            base, draw, found = model.encode(x).detach(), self.generator(-1), []
            for start in range(0, self.settings.draws, _CHUNK):
                count = min(_CHUNK, self.settings.draws - start)
                logits = base.repeat(count, 1).requires_grad_()
                state = copy.deepcopy(units)
                loss = self.stochastic(x.repeat(count, 1), logits, list(state), draw).sum()
                found.append(torch.autograd.grad(loss, logits)[0].reshape(count, *base.shape))
        finally:
            self.model = own
        gradients = torch.cat(found).double()
        return gradients.mean(0), gradients.var(0)

    def moments_at(self, model: VAE) -> tuple[Tensor, Tensor]:
        """Return mean and variance of the gradient at another run's weights; moving averages first adapt to them.

        What an estimator has learned by gradient (NVIL's network, RELAX's control variate) stays as it is.
        """
        units, own, self.model = copy.deepcopy(self.units), self.model, model
        try:
            for step in range(_WARM):
                x, draw = self.draw(step)
                self.stochastic(x, model.encode(x).detach().requires_grad_(), list(units), draw)
        finally:
            self.model = own
        return self.moments(model, units)

    # ---------------------------------------------------------------- checkpoints

    def identity(self) -> dict[str, Any]:
        """Return the job; what all jobs share is checked with the output directory."""
        return asdict(self.job)

    def state(self) -> dict[str, Any]:
        """Return the weights, and what the estimators learned."""
        return {"model": self.model.state_dict(), "units": self.units.state_dict()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        self.model.load_state_dict(state["model"])
        self.units.load_state_dict(state["units"])

    def of_older(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return the checkpoint with the present names of its entries."""
        if "job" in state:
            return {**state, "identity": json.dumps(state["job"]), "steps": state["step"]}
        return state
