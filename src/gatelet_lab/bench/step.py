"""Where the time of a training step of the paper's network goes."""

from collections.abc import Callable
from typing import Any, cast
from unittest import mock

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from gatelet.kernels import gated_linear
from gatelet.nn import ConditionalLinear, Gater, conditional_linear
from gatelet_lab import data
from gatelet_lab.bench.kernels import RATE
from gatelet_lab.bench.timing import interleaved
from gatelet_lab.training.paper import PaperTrainer
from gatelet_lab.training.recipes import recipe


def show_steps(budget: float, patience: float, bottleneck: int, console: Console) -> None:
    """Print a training step's time, dense and by auto, and the parts of the latter: gater, experts, optimiser."""
    split = data.load("mnist")
    names = ("dense", "auto", "gater", "experts", "dense experts", "optimiser")
    console.print(f"{'ms per step':24}{'open':>6}" + "".join(f"{name:>15}" for name in names))
    for row in ("noisy_rectifier", "smooth_times_stochastic", "score_function"):
        trainer = PaperTrainer(recipe(row, "paper").but(bottleneck=bottleneck), 0, split)
        layer = cast(ConditionalLinear, trainer.model.layer)
        ways = steps(trainer)
        medians, _ = interleaved(ways, budget, patience)
        times = "".join(f"{1e3 * medians[name]:15.3f}" for name in names)
        console.print(f"{row:24}{float(layer.active_fraction):6.1%}{times}", highlight=False)


@torch.no_grad()
def open_at(layer: ConditionalLinear, x: Tensor, rate: float) -> None:
    """Shift all gates' biases until the gates fire at this rate; at a recipe's start they may not."""
    logits, low, high = layer.gater(x), -100.0, 100.0
    for _ in range(40):
        middle = (low + high) / 2
        if layer.unit.estimator.fire_probability(logits + middle).mean() < rate:
            low = middle
        else:
            high = middle
    cast(Gater, layer.gater).gates.bias.add_(low)


def steps(trainer: PaperTrainer) -> dict[str, Callable[[], Any]]:
    """Return a training step with dense experts and with auto's, and what it is made of, forward and backward."""
    layer = cast(ConditionalLinear, trainer.model.layer)
    size = trainer.recipe.optimiser.batch
    x, y = trainer.train_images[:size], trainer.train_labels[:size]
    trainer.model.train()

    def step(linear: Callable[..., Tensor]) -> None:
        # The rate is tiny because one batch is repeated: with a real one the network would memorise it, gates included.
        rates = [1e-6 for _ in trainer.optimizer.param_groups]
        with (
            mock.patch.object(conditional_linear, "gated_linear", linear),
            mock.patch.object(trainer, "rates", return_value=rates),
        ):
            trainer.step((x, y))

    step(gated_linear)  # max-norm takes hold
    images = F.dropout(trainer.train_images[:1000], trainer.recipe.augmentation.input_dropout)  # as in training
    open_at(layer, images, trainer.recipe.sparsity.target_rate or RATE)
    with torch.no_grad():
        gates = layer.unit.estimator.sample(layer.gater(x), torch.rand(len(x), layer.expert.out_features))
    gates.requires_grad_()
    upper = torch.ones_like(gates)
    expert, gater = list(layer.expert.parameters()), list(layer.gater.parameters())

    def dense(x: Tensor, weight: Tensor, bias: Tensor, gate: Tensor, **_: object) -> Tensor:
        return F.linear(x, weight, bias) * gate

    affine = (layer.expert.weight, layer.expert.bias)
    return {
        "dense": lambda: step(dense),
        "auto": lambda: step(gated_linear),
        "gater": lambda: torch.autograd.grad(layer.gater(x), gater, upper),
        "experts": lambda: torch.autograd.grad(gated_linear(x, *affine, gates), [*expert, gates], upper),
        "dense experts": lambda: torch.autograd.grad(dense(x, *affine, gates), [*expert, gates], upper),
        "optimiser": trainer.optimizer.step,
    }
