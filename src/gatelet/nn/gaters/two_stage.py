"""A gater in two stages: first the groups, then the units inside open groups."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from gatelet._checks import check_count, check_input, check_positive, check_rate
from gatelet.estimators._noise import wide
from gatelet.kernels import gated_linear
from gatelet.nn.gaters.mlp import glorot_
from gatelet.nn.parts import more_than_affine
from gatelet.sparsity.kl_rate import rate_penalty

CLOSED = -1e4
"""The logit of a unit that was not computed; finite, and in half precision too."""


class TwoStageGater(nn.Module):
    """Logits of the gates, computed only in groups that can hold an open gate.

    u = tanh(U x + c) are M units (the bottleneck), g = V₁ u + d₁ the logits of G groups of consecutive gates and
    v = V₂ u + d₂ those of the N gates. A gate is open if its group is and it is itself, two independent decisions, so
    that a_i is the logit of σ(g_group(i)) σ(v_i):

        a_i = g + v_i − log(1 + exp g + exp v_i).

    As a_i < g, a group with g at most the gates' threshold holds no open gate, and v is not computed there
    (:func:`gatelet.kernels.gated_linear`): in ``eval()``, where the layer knows its threshold, and with the same gates.
    In training, and where gates are sampled, all logits are computed. Compiled code computes all of them too.

    Cost O(M(D + G + r N)) per example, r the share of groups with g above the threshold; M(D + N) for :class:`Gater`.
    A penalty, weight · Σ_j KL(group_rate ‖ mean σ(g_j)) over the batch, holds r; the layer adds it to its own;
    ``gatelet.report`` shows the cost that was measured.

    Args:
        in_features: D.
        num_gates: N.
        bottleneck: M.
        detach_input: let no gradient pass from the gates into the input.
        groups: G, which divides N; by default the divisor nearest to √N.
        group_rate: the share of groups that the penalty holds, above the gates' target rate s; by default
            1 − (1 − s)³, and no penalty where there is no s.
        weight: of the penalty.

    Raises:
        ValueError: for a size that is not an integer of at least 1, groups that do not divide N, a rate outside (0, 1),
            a weight that is not above 0.

    >>> import torch
    >>> gater = TwoStageGater(784, 2000, bottleneck=160, groups=50)
    >>> gater(torch.zeros(32, 784)).shape
    torch.Size([32, 2000])

    Reference: none; of its parts the gater is section 5's of Y. Bengio, N. Léonard, A. Courville, "Estimating or
    Propagating Gradients Through Stochastic Neurons for Conditional Computation", 2013, arXiv:1308.3432.
    """

    def __init__(
        self,
        in_features: int,
        num_gates: int,
        bottleneck: int,
        detach_input: bool = False,
        groups: int | None = None,
        group_rate: float | None = None,
        weight: float = 0.1,
    ) -> None:
        super().__init__()
        self.hidden = nn.Linear(check_count(in_features, "in_features"), check_count(bottleneck, "bottleneck"))
        self.gates = nn.Linear(bottleneck, check_count(num_gates, "num_gates"))
        groups = _near_root(num_gates) if groups is None else check_count(groups, "groups")
        if num_gates % groups:
            raise ValueError(f"groups must divide the {num_gates} gates: {groups} does not")
        self.groups = nn.Linear(bottleneck, groups)
        self.detach_input = detach_input
        self.group_rate = None if group_rate is None else check_rate(group_rate, "group_rate")
        self.weight = check_positive(weight, "weight")
        with torch.no_grad():
            glorot_(self.hidden)
            glorot_(self.gates, gain=4.0)
            glorot_(self.groups, gain=4.0)
        self.computed: int | Tensor = 0  # not a buffer: to_empty() would leave it undefined
        self.tokens = 0
        self._last: Tensor | None = None  # the groups' logits of the last forward pass, for the penalty

    def forward(
        self, x: Float[Tensor, "*lead D"], threshold: Float[Tensor, ""] | None = None
    ) -> Float[Tensor, "*lead N"]:
        """Return the logits; with ``threshold``, those that are not above it may be ``CLOSED`` instead.

        Raises:
            ValueError: for an input of another width or not finite.
        """
        check_input(x, self.hidden.weight)
        hidden = self.hidden(x.detach() if self.detach_input else x).tanh()
        groups = self.groups(hidden)
        self._last = groups if self.training else None
        if threshold is None or more_than_affine(self.gates) or torch.is_autocast_enabled(hidden.device.type):
            return _both(groups, self.gates(hidden))
        opened = groups > threshold
        own = gated_linear(
            hidden, self.gates.weight, self.gates.bias, opened.to(hidden.dtype), active_fraction=self.group_rate
        )
        if not torch.compiler.is_exporting():
            self.computed = self.computed + opened.sum()
            self.tokens += opened.shape[:-1].numel()
        size = self.gates.out_features // self.groups.out_features
        return torch.where(opened.repeat_interleave(size, dim=-1), _both(groups, own), CLOSED)

    def start_at(self, logit: float, target_rate: float) -> None:
        """Set the biases to where all gates have this logit, and groups are open at ``group_rate`` or more."""
        if self.group_rate is None:
            self.group_rate = 1 - (1 - target_rate) ** 3
        if self.group_rate <= target_rate:
            raise ValueError(f"group_rate: must lie above target_rate {target_rate:g}, and is {self.group_rate:g}")
        both = 1 / (1 + math.exp(-logit))
        group = max(self.group_rate, math.sqrt(both))
        nn.init.constant_(self.groups.bias, _logit(group))
        nn.init.constant_(self.gates.bias, _logit(both / group))

    def penalty(self, mask: Tensor | None = None) -> Float[Tensor, ""]:
        """Return weight · Σ_j KL(group_rate ‖ mean σ(g_j)) of the last forward pass in training, and forget it."""
        logits, self._last = self._last, None
        if logits is None or self.group_rate is None:
            return self.hidden.weight.new_zeros(())
        logits = logits if mask is None else logits[mask]
        return rate_penalty(logits.to(wide(logits)).sigmoid(), self.group_rate, self.weight)

    @property
    def flops(self) -> int:
        """FLOPs of a token since the mode last changed, twice the multiply-adds; before that, at ``group_rate``."""
        groups, bottleneck = self.groups.out_features, self.hidden.out_features
        share = int(self.computed) / (self.tokens * groups) if self.tokens else self.group_rate or 1.0
        return round(2 * bottleneck * (self.hidden.in_features + groups + share * self.gates.out_features))

    def train(self, mode: bool = True) -> "TwoStageGater":
        """Set the mode; a change of it resets the count of what was computed."""
        if mode != self.training:
            self.computed, self.tokens = 0, 0
        return super().train(mode)

    def __getstate__(self) -> dict[str, object]:
        # A graph can be neither copied nor pickled.
        return {**super().__getstate__(), "_last": None}


def _both(groups: Tensor, own: Tensor) -> Tensor:
    """Return the logit of σ(g) σ(v), never above g."""
    g = groups.repeat_interleave(own.shape[-1] // groups.shape[-1], dim=-1)
    return torch.minimum(g + own - torch.logaddexp(F.softplus(g), own), g)


def _logit(probability: float) -> float:
    return math.log(probability) - math.log1p(-probability)


def _near_root(number: int) -> int:
    """Return the divisor that is nearest to the square root, by ratio."""
    divisors = (each for each in range(1, number + 1) if number % each == 0)
    return min(divisors, key=lambda each: abs(math.log(each * each / number)))
