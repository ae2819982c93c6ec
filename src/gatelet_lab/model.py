"""Figure 1: the paper's network, built from a recipe."""

import math

import torch
from torch import Tensor, nn

import gatelet
from gatelet_lab.recipes import Recipe


class PaperNet(nn.Module):
    """Class scores of affine(H ∘ h): one conditional layer and an affine layer on top (section 5)."""

    def __init__(self, recipe: Recipe, features: int, classes: int) -> None:
        super().__init__()
        self.layer = gatelet.nn.ConditionalLinear(
            features,
            recipe.experts,
            recipe.bottleneck,
            estimator=gatelet.estimators.ALL[recipe.estimator](**recipe.options),
            target_rate=recipe.target_rate,
            sparsity=controllers(recipe),
        )
        self.output = nn.Linear(recipe.experts, classes)
        self._initialise(recipe)

    def _initialise(self, recipe: Recipe) -> None:
        gates = self.layer.gater.gates
        with torch.no_grad():
            if recipe.sparse_gates is None:
                bound = recipe.gate_scale * math.sqrt(6 / (gates.in_features + gates.out_features))
                gates.weight.uniform_(-bound, bound)
            else:  # each gate hears only a few bottleneck units
                chosen = torch.rand(gates.weight.shape).argsort(dim=1) < recipe.sparse_gates
                gates.weight.copy_(torch.randn(gates.weight.shape) * chosen)
            gates.bias.fill_(recipe.gate_bias)
            bound = math.sqrt(6 / (self.output.in_features + self.output.out_features))
            self.output.weight.uniform_(-bound, bound)
            self.output.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Return the class scores (B, classes)."""
        scores: Tensor = self.output(self.layer(x))
        return scores


def controllers(recipe: Recipe) -> list[gatelet.sparsity.Controller]:
    """Return what holds the share of open gates in this recipe."""
    chosen: list[gatelet.sparsity.Controller] = []
    if recipe.target_rate is not None:
        if recipe.kl_weight is not None:
            chosen.append(gatelet.sparsity.KLRate(recipe.target_rate, recipe.kl_weight))
        if recipe.l1_weight is not None:
            chosen.append(gatelet.sparsity.AdaptiveL1(recipe.target_rate, recipe.l1_weight))
        if recipe.beta_noise is not None:
            chosen.append(gatelet.sparsity.BetaNoise(recipe.target_rate, recipe.beta_noise))
    return chosen
