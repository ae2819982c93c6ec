"""Figure 1: the paper's network, built from a recipe; an ensemble of such networks; a mixture of experts."""

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gatelet
from gatelet.estimators._distributed import batch_mean, is_distributed
from gatelet_lab.training.recipe import Recipe


class PaperNet(nn.Module):
    """Class scores of affine(H ∘ h): conditional layers and an affine layer on top (section 5)."""

    def __init__(self, recipe: Recipe, features: int, classes: int) -> None:
        super().__init__()
        self.recipe = recipe
        make: Callable[[Recipe, int], Layer] = _MAKE[recipe.model.kind]
        self.layer = make(recipe, features)
        self.above = nn.ModuleList(make(recipe, recipe.model.experts) for _ in range(recipe.model.layers - 1))
        self.output = nn.Linear(recipe.model.experts, classes)
        for layer in self.layers:
            if isinstance(layer, gatelet.nn.ConditionalLinear):
                start_gates(layer, recipe)
        bound = math.sqrt(6 / (self.output.in_features + self.output.out_features))
        with torch.no_grad():
            self.output.weight.uniform_(-bound, bound)
            self.output.bias.zero_()

    @property
    def networks(self) -> list["PaperNet"]:
        """This network alone."""
        return [self]

    @property
    def layers(self) -> list["Layer"]:
        """The conditional layers, from the bottom."""
        return [self.layer, *(cast(Layer, layer) for layer in self.above)]

    @property
    def active_fraction(self) -> float:
        """Share of the units computed in the last forward pass, of all layers together."""
        shares = [layer.active_fraction for layer in self.layers]
        return sum(float(share) for share in shares) / len(shares)

    def forward(self, x: Tensor) -> Tensor:
        """Return the class scores (B, classes)."""
        if self.training and self.recipe.augmentation.input_noise:
            x = x + self.recipe.augmentation.input_noise * torch.randn_like(x)
        if self.recipe.augmentation.input_dropout:
            x = F.dropout(x, self.recipe.augmentation.input_dropout, self.training)
        for layer in self.layers:
            x = layer(x)
            if self.recipe.augmentation.hidden_dropout:
                x = F.dropout(x, self.recipe.augmentation.hidden_dropout, self.training)
        scores: Tensor = self.output(x)
        return scores


class Ensemble(nn.Module):
    """Several such networks, whose class probabilities are averaged."""

    def __init__(self, recipe: Recipe, features: int, classes: int) -> None:
        super().__init__()
        self.recipe = recipe
        self.members = nn.ModuleList(PaperNet(recipe, features, classes) for _ in range(recipe.model.members))

    @property
    def networks(self) -> list[PaperNet]:
        """The members."""
        return [cast(PaperNet, member) for member in self.members]

    @property
    def layer(self) -> "Layer":
        """The first member's first."""
        return self.layers[0]

    @property
    def layers(self) -> list["Layer"]:
        """The conditional layers of all members."""
        return [layer for network in self.networks for layer in network.layers]

    @property
    def active_fraction(self) -> float:
        """Share of the units computed in the last forward pass, of all members together."""
        return sum(network.active_fraction for network in self.networks) / len(self.members)

    def forward(self, x: Tensor) -> Tensor:
        """Return the log of the mean class probability (B, classes)."""
        scores = torch.stack([network(x) for network in self.networks])
        return scores.log_softmax(-1).logsumexp(0) - math.log(len(self.members))


def build(recipe: Recipe, features: int, classes: int) -> PaperNet | Ensemble:
    """Return the network of a recipe, or several that vote."""
    return (Ensemble if recipe.model.members > 1 else PaperNet)(recipe, features, classes)


def conditional_layer(recipe: Recipe, features: int) -> gatelet.nn.ConditionalLinear:
    """Return a gater and its experts."""
    layer = gatelet.nn.ConditionalLinear(
        features,
        recipe.model.experts,
        estimator=gatelet.estimators.ALL[recipe.model.estimator](**recipe.model.options),
        target_rate=recipe.sparsity.target_rate,
        group_size=recipe.model.group_size,
        sparsity=controllers(recipe),
        gater=(gater := make_gater(recipe, features)),
    )
    if recipe.gater.gater_norm:
        gater.hidden = NormedLinear(gater.hidden)
    if recipe.optimiser.bfloat16:
        layer.gater.register_forward_hook(_in_float32)
    return layer


def _in_float32(_: nn.Module, __: tuple[Tensor, ...], logits: Tensor) -> Tensor:
    """Return the logits in float32, because bfloat16 has too few digits for a probability."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def make_gater(recipe: Recipe, features: int) -> gatelet.nn.Gater | gatelet.nn.TwoStageGater:
    """Return the gater of a conditional layer."""
    sizes = features, recipe.model.experts // recipe.model.group_size, recipe.gater.bottleneck
    if recipe.gater.gater == "mlp":
        return gatelet.nn.Gater(*sizes)
    return gatelet.nn.TwoStageGater(
        *sizes,
        groups=recipe.gater.gater_groups,
        group_rate=recipe.sparsity.gater_group_rate,
        weight=0.1 if recipe.sparsity.kl_weight is None else recipe.sparsity.kl_weight,
    )


def start_gates(layer: gatelet.nn.ConditionalLinear, recipe: Recipe) -> None:
    """Draw the gates' weights and set their biases as the recipe says."""
    gates = cast(gatelet.nn.Gater | gatelet.nn.TwoStageGater, layer.gater).gates
    with torch.no_grad():
        if recipe.gater.sparse_gates is None:
            bound = recipe.gater.gate_scale * math.sqrt(6 / (gates.in_features + gates.out_features))
            gates.weight.uniform_(-bound, bound)
        else:  # each gate is connected to only a few bottleneck units
            chosen = torch.rand(gates.weight.shape).argsort(dim=1) < recipe.gater.sparse_gates
            gates.weight.copy_(torch.randn(gates.weight.shape) * chosen)
        if recipe.gater.gate_bias is not None:
            gates.bias.fill_(recipe.gater.gate_bias)


def controllers(recipe: Recipe) -> list[gatelet.sparsity.Controller]:
    """Return what holds the share of open gates in this recipe."""
    chosen: list[gatelet.sparsity.Controller] = []
    if recipe.sparsity.target_rate is not None:
        if recipe.sparsity.kl_weight is not None:
            chosen.append(gatelet.sparsity.KLRate(recipe.sparsity.target_rate, recipe.sparsity.kl_weight))
        if recipe.sparsity.l1_weight is not None:
            chosen.append(gatelet.sparsity.AdaptiveL1(recipe.sparsity.target_rate, recipe.sparsity.l1_weight))
        if recipe.sparsity.beta_noise is not None:
            chosen.append(gatelet.sparsity.BetaNoise(recipe.sparsity.target_rate, recipe.sparsity.beta_noise))
    return chosen


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation over the batch of all processes; torch's own for several processes needs CUDA."""

    def forward(self, x: Tensor) -> Tensor:
        """Return γ·(x − mean)/√(var + ε) + β."""
        if not (self.training and is_distributed()):
            return super().forward(x)
        given, x = x.dtype, x.to(torch.promote_types(x.dtype, torch.float32))
        count = _sum(x.new_tensor(float(len(x))))
        mean = _sum(x.sum(0)) / count
        variance = _sum((x - mean).square().sum(0)) / count
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            assert self.momentum is not None
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1).clamp(min=1), self.momentum)
            self.num_batches_tracked += 1
        return ((x - mean) * torch.rsqrt(variance + self.eps) * self.weight + self.bias).to(given)


class _Sum(torch.autograd.Function):
    """The sum over the processes. Each has its own loss, so gradients are summed too."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        whole = part.clone()
        torch.distributed.all_reduce(whole)
        return whole

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        whole = slope.clone()
        torch.distributed.all_reduce(whole)
        return whole


def _sum(part: Tensor) -> Tensor:
    found: Tensor = _Sum.apply(part)
    return found


class NormedLinear(nn.Linear):
    """Affine map with batch normalisation behind it; at test time the two are one affine map."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features)
        self.load_state_dict(linear.state_dict())
        self.norm = BatchNorm(linear.out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Return norm(W x + b)."""
        normed: Tensor = self.norm(super().forward(x))
        return normed


class Mixture(nn.Module):
    """Top-k mixture of experts, the peer of a conditional layer: k groups of units are computed per example.

    y = relu(W x + b) ∘ r, with r = k · softmax(router(x)) on the k groups where it is largest and 0 elsewhere.
    The loss gets the term E Σ_e f_e P_e, with f_e the share of examples that chose expert e and P_e the mean
    probability, which is least where the load is balanced (Fedus, Zoph, Shazeer 2021, arXiv:2101.03961, eqs. 4–6).
    """

    BALANCE = 0.01  # the balance term's weight in the source

    def __init__(self, features: int, units: int, groups: int, chosen: int) -> None:
        super().__init__()
        self.gater = nn.Linear(features, groups)
        self.expert = nn.Linear(features, units)
        self.chosen, self.group_size = chosen, units // groups
        nn.init.kaiming_uniform_(self.expert.weight, nonlinearity="relu")
        nn.init.zeros_(self.expert.bias)
        self.active_fraction = chosen / groups
        self.balance: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return y (B, units)."""
        logits = self.gater(x)
        probability = logits.softmax(-1)
        opened = torch.zeros_like(logits).scatter(-1, logits.topk(self.chosen, dim=-1).indices, 1.0)
        route = self.chosen * probability * opened
        if self.training:
            load, mean = batch_mean(opened), batch_mean(probability)  # over all processes
            if load is not None and mean is not None:
                self.balance = self.BALANCE * logits.shape[-1] * (load / self.chosen * mean).sum()
        if torch.is_grad_enabled():  # a closed expert gets no gradient either, but at this size dense is faster
            units = self.expert(x) * route.repeat_interleave(self.group_size, dim=-1)
        else:
            units = gatelet.kernels.gated_linear(x, self.expert.weight, self.expert.bias, route)
        return F.relu(units)  # route is positive: relu(u)·r = relu(u·r)


class Dense(nn.Module):
    """All units computed: relu(W x + b), batch normalised before ReLU on request."""

    def __init__(self, features: int, units: int, norm: bool) -> None:
        super().__init__()
        self.units = nn.Linear(features, units)
        nn.init.kaiming_uniform_(self.units.weight, nonlinearity="relu")
        nn.init.zeros_(self.units.bias)
        if norm:
            self.units = NormedLinear(self.units)
        self.active_fraction = 1.0

    def forward(self, x: Tensor) -> Tensor:
        """Return the units (B, N)."""
        return F.relu(self.units(x))


Layer = gatelet.nn.ConditionalLinear | Mixture | Dense


def dense_layer(recipe: Recipe, features: int) -> Dense:
    """Return a layer of the recipe's width."""
    return Dense(features, recipe.model.experts, recipe.model.norm)


def mixture_layer(recipe: Recipe, features: int) -> Mixture:
    """Return a mixture that computes as many units as the gates' target rate asks for."""
    groups = recipe.model.experts // recipe.model.group_size
    chosen = groups if recipe.sparsity.target_rate is None else max(1, round(recipe.sparsity.target_rate * groups))
    return Mixture(features, recipe.model.experts, groups, chosen)


_MAKE: Mapping[str, Callable[[Recipe, int], Layer]] = {
    "gates": conditional_layer,
    "mixture": mixture_layer,
    "dense": dense_layer,
}


def penalty(model: PaperNet | Ensemble) -> Tensor:
    """Return what gates or routers add to the loss."""
    if model.recipe.model.kind == "dense":
        return model.output.weight.new_zeros(()) if isinstance(model, PaperNet) else torch.zeros(())
    if model.recipe.model.kind == "gates":
        return gatelet.sparsity.penalty(model)
    terms = [layer.balance for layer in model.layers if isinstance(layer, Mixture) and layer.balance is not None]
    return torch.stack(terms).sum()


def group_share(model: PaperNet | Ensemble, sums: Callable[..., list[float]] = lambda *own: list(own)) -> float | None:
    """Return the share of groups that two-stage gaters computed since the mode last changed; None without such gaters.

    ``sums`` adds numbers up over processes.
    """
    gaters = [layer.gater for layer in model.layers if isinstance(layer, gatelet.nn.ConditionalLinear)]
    staged = [gater for gater in gaters if isinstance(gater, gatelet.nn.TwoStageGater)]
    if not staged:
        return None
    shares = []
    for gater in staged:
        computed, tokens = sums(int(gater.computed), int(gater.tokens))
        shares.append(computed / max(1, tokens * gater.groups.out_features))
    return sum(shares) / len(staged)


def multiply_adds(
    recipe: Recipe, features: int, classes: int, open_share: float, group_share: float | None = None
) -> Mapping[str, int]:
    """Return the multiply-adds per example at test time: of gaters, open experts and output; and of the dense network.

    A layer above the first reads open units only; so do its experts and its gater. All members' are counted. A gater
    in two stages computes the logits of ``group_share`` of its groups.
    """
    groups = recipe.model.experts // recipe.model.group_size
    if group_share is not None:
        stages = recipe.gater.gater_groups or gatelet.nn.TwoStageGater(1, groups, 1).groups.out_features
        groups = round(stages + group_share * groups)
    open_share = 1.0 if recipe.model.kind == "dense" else open_share
    gater = experts = 0.0
    dense = 0
    inputs: float = features
    for layer in range(recipe.model.layers):
        if recipe.model.kind != "dense":
            gater += inputs * groups if recipe.model.kind == "mixture" else (inputs + groups) * recipe.gater.bottleneck
        experts += inputs * recipe.model.experts * open_share
        dense += (features if layer == 0 else recipe.model.experts) * recipe.model.experts
        inputs = recipe.model.experts * open_share
    return {
        "gater": round(recipe.model.members * gater),
        "experts": round(recipe.model.members * experts),
        "output": round(recipe.model.members * inputs * classes),
        "dense": recipe.model.members * (dense + recipe.model.experts * classes),
    }
