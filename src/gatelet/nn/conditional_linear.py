"""Section 5: the conditional layer, gater × expert."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from gatelet._checks import check_count
from gatelet.estimators import Estimator
from gatelet.kernels import gated_linear
from gatelet.nn.conditional_layer import ConditionalLayer
from gatelet.nn.gaters import glorot_
from gatelet.nn.parts import Affine, all_affine, apply, part_of
from gatelet.sparsity._controller import Controller


class ConditionalLinear(ConditionalLayer):
    """Wide linear layer; a gater opens a few of its units per example.

    y = (W x + b) ∘ h, h = gate(gater(x)) (section 5). The experts are linear: gate × linear generalises
    the rectifier, which is the case h = 1[W x + b > 0].

    Closed units are not computed (:func:`gatelet.kernels.gated_linear`): in ``eval()``, and in training with every
    estimator whose ``support`` is not ``"all"``; where it is ``"sampled"``, the closed units that it asks for are.

    In training the gates follow the estimator and ``sparsity.penalty(model)`` holds their rate; in ``eval()`` they
    are deterministic, with the threshold that ``sparsity.calibrate_thresholds(model, loader)`` sets.

    Args:
        in_features: D.
        out_features: N.
        bottleneck: M, the width of the gater's hidden layer; None where ``gater`` is a module.
        estimator: a name of ``gatelet.estimators.ALL`` or an instance.
        target_rate: the share of gates to be open; ``None``: no constraint, and in ``eval()`` a gate is open iff its
            firing probability exceeds ½. Without meaning for gates that are always open (``"sigmoid"``).
        group_size: consecutive units that share a gate; divides N.
        sparsity: the controllers that hold the rate; by default ``KLRate(target_rate)``, or ``AdaptiveL1(target_rate)``
            where the firing probability has no gradient.
        detach_gater_input: let no gradient pass from the gates into the input.
        gater: a name of ``gatelet.nn.gaters.ALL``: ``"mlp"`` (the paper's, :class:`gatelet.nn.Gater`) or
            ``"two_stage"`` (:class:`gatelet.nn.TwoStageGater`); or any module that maps (..., D) to
            (..., N / group_size) logits.

    Attributes:
        active_fraction: the share of gates ≠ 0 in the last forward pass, a tensor (reading it may synchronise); of
            several processes, of this one's part of the batch.

    Raises:
        ValueError: for sizes that are not integers of at least 1, a group size that does not divide N, a rate
            outside (0, 1), an unknown estimator or gater, a gater whose output has another width, or one by name
            that costs as much as closed units save (of a module's cost a warning tells); at the call for an input of
            another width or not finite.

    >>> import torch
    >>> layer = ConditionalLinear(784, 2000, bottleneck=400, estimator="straight_through", target_rate=0.1)
    >>> layer(torch.rand(32, 784)).shape
    torch.Size([32, 2000])

    Reference: Y. Bengio, N. Léonard, A. Courville, "Estimating or Propagating Gradients Through Stochastic
    Neurons for Conditional Computation", 2013, arXiv:1308.3432, section 5.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bottleneck: int | None = None,
        estimator: str | Estimator = "straight_through",
        target_rate: float | None = 0.1,
        group_size: int = 1,
        sparsity: Sequence[Controller] | None = None,
        detach_gater_input: bool = False,
        gater: str | nn.Module = "mlp",
    ) -> None:
        gating = (estimator, target_rate, group_size, sparsity, detach_gater_input)
        flops = 2 * check_count(in_features, "in_features")
        super().__init__(in_features, out_features, bottleneck, flops, *gating, gater=gater, units_name="out_features")
        self.expert = nn.Linear(in_features, out_features)
        glorot_(self.expert)

    def forward(
        self,
        x: Float[Tensor, "*lead D"],
        *,
        mask: Bool[Tensor, "*lead"] | None = None,
        noise: Float[Tensor, "..."] | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "*lead N"]:
        """Return (W x + b) ∘ h.

        Args:
            x: (..., D).
            mask: (...), false at padding, whose gates are all closed and count neither in ``active_fraction`` nor in
                the penalty.
            noise: of the gates, (..., N / group_size), instead of drawing it.
            generator: the source of the noise (also of the controllers'); torch's global one by default.

        Raises:
            ValueError: for an input of another width or not finite, or noise or a mask of another shape.
            TypeError: for an input that is not floating, or not of the weights' dtype (outside of autocast).
        """
        x, mask = self.without_padding(x, mask)
        gates, support = self.decide_unpadded(x, mask, noise, generator)
        expert = part_of(self.expert)
        if self.needs_dense(x, gates) or not all_affine(expert):
            if self.group_size > 1:
                gates = gates.repeat_interleave(self.group_size, dim=-1)
            return apply(expert, x) * gates
        rate = self.unit.target_rate
        assert isinstance(expert, Affine)
        return gated_linear(x, *expert, gates, support=support, active_fraction=rate)

    def extra_repr(self) -> str:
        """Show the sizes."""
        sizes = f"{self.expert.in_features}, {self.expert.out_features}"
        return f"{sizes}, group_size={self.group_size}"
