"""Section 5: the conditional layer, gater × expert."""

from collections.abc import Sequence
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gatelet._checks import check_count, check_rate, is_transformed
from gatelet.estimators import Estimator, resolve
from gatelet.kernels import gated_linear
from gatelet.nn.gater import Gater, glorot_
from gatelet.sparsity._controller import Controller, Penalised
from gatelet.sparsity.adaptive_l1 import AdaptiveL1
from gatelet.sparsity.kl_rate import KLRate
from gatelet.units import StochasticUnit


class ConditionalLinear(Penalised):
    """Wide linear layer of which a gater opens a few units per example.

    y = (W x + b) ∘ h, h = gate(gater(x)) (section 5). The experts are linear: gate × linear generalises
    the rectifier, which is the case h = 1[W x + b > 0].

    Closed units are not computed (:func:`gatelet.kernels.gated_linear`): in ``eval()``, and in training with every
    estimator whose ``support`` is not ``"all"``; where it is ``"sampled"``, the closed units that it asks for are.

    In training the gates follow the estimator and ``sparsity.penalty(model)`` holds their rate; in ``eval()`` they
    are deterministic, with the threshold that ``sparsity.calibrate_thresholds(model, loader)`` sets.

    Args:
        in_features: D.
        out_features: N.
        bottleneck: M, the width of the gater's hidden layer.
        estimator: a name of ``gatelet.estimators.ALL`` or an instance.
        target_rate: the share of gates to be open; ``None``: no constraint, and in ``eval()`` a gate is open iff its
            firing probability exceeds ½. Without meaning for gates that are always open (``"sigmoid"``).
        group_size: consecutive units that share a gate; divides N.
        sparsity: the controllers that hold the rate; by default ``KLRate(target_rate)``, or ``AdaptiveL1(target_rate)``
            where the firing probability has no gradient.
        detach_gater_input: let no gradient pass from the gates into the input.

    Attributes:
        active_fraction: the share of gates ≠ 0 in the last forward pass, a tensor (reading it may synchronise).

    Raises:
        ValueError: for sizes that are not integers of at least 1, a group size that does not divide N, a rate
            outside (0, 1), an unknown estimator; at the call for an input of another width or not finite.

    >>> import torch
    >>> layer = ConditionalLinear(784, 2000, bottleneck=400, estimator="straight_through", target_rate=0.1)
    >>> layer(torch.rand(32, 784)).shape
    torch.Size([32, 2000])

    Reference: Y. Bengio, N. Léonard, A. Courville, "Estimating or Propagating Gradients Through Stochastic
    Neurons for Conditional Computation", 2013, arXiv:1308.3432, section 5.
    """

    active_fraction: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bottleneck: int,
        estimator: str | Estimator = "straight_through",
        target_rate: float | None = 0.1,
        group_size: int = 1,
        sparsity: Sequence[Controller] | None = None,
        detach_gater_input: bool = False,
    ) -> None:
        super().__init__()
        check_count(out_features, "out_features")
        if out_features % check_count(group_size, "group_size"):
            raise ValueError(f"group_size must divide out_features: {group_size} does not divide {out_features}")
        if target_rate is not None:
            check_rate(target_rate)
        self.group_size = group_size
        self.gater = Gater(in_features, out_features // group_size, bottleneck, detach_gater_input)
        estimator = resolve(estimator)
        if estimator.always_open:
            target_rate = None
        self.unit = StochasticUnit(estimator, 0.5 if target_rate is None else None, target_rate)
        if target_rate is not None:  # start at the target: the paper starts at 0, most gates open, and loses epochs
            nn.init.constant_(self.gater.gates.bias, estimator.logit_at(target_rate))
        self.expert = nn.Linear(in_features, out_features)
        glorot_(self.expert)
        if sparsity is None:
            sparsity = [] if target_rate is None else [self._default_controller(target_rate)]
        self.sparsity = nn.ModuleList(sparsity)
        self.register_buffer("active_fraction", torch.tensor(float("nan")), persistent=False)

    def _default_controller(self, target_rate: float) -> Controller:
        probe = torch.zeros(1, requires_grad=True)
        smooth = self.unit.estimator.fire_probability(probe).requires_grad
        return KLRate(target_rate) if smooth else AdaptiveL1(target_rate)

    def forward(
        self,
        x: Float[Tensor, "*lead D"],
        *,
        noise: Float[Tensor, "..."] | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "*lead N"]:
        """Return (W x + b) ∘ h.

        Args:
            x: (..., D).
            noise: of the gates, (..., N / group_size), instead of drawing it.
            generator: the source of the noise (also of the controllers'); torch's global one by default.

        Raises:
            ValueError: for an input of another width or not finite, or noise of another shape.
            TypeError: for an input that is not floating, or not of the weights' dtype (outside of autocast).
        """
        logits = self.gater(x)
        controllers = cast(list[Controller], list(self.sparsity))
        for controller in controllers:
            logits = controller.shift(logits, generator=generator)
        method, wanted = self.unit.estimator, None
        if method.support == "sampled" and (self.training or self.unit.sample_in_eval):
            # Drawn here, for which closed units are computed is in the noise.
            noise = method.draw_noise(logits.unsqueeze(0), generator).squeeze(0) if noise is None else noise
            wanted = method.computed(noise)
        gates = self.unit(logits, noise=noise, generator=generator)
        self.active_fraction = (gates.detach() != 0).float().mean()
        if self.training:
            terms = [control.penalty(self.unit.estimator, logits, gates) for control in controllers]
            self._penalty = sum((term for term in terms if term is not None), start=logits.new_zeros(()))
        return self._experts(x, gates, wanted)

    def _experts(self, x: Tensor, gates: Tensor, wanted: Tensor | None = None) -> Tensor:
        """Return (W x + b) ∘ h, computed only where gates are open or ``wanted``, if the estimator asks for no more."""
        # support "open" or "none": a closed gate sends no gradient, so its unit need not be known. Straight-through
        # wants ∂L/∂h of all closed gates: dense, as long as there is a gradient to send.
        learns = gates.requires_grad and torch.is_grad_enabled()
        wants_all = self.unit.estimator.support == "all" and learns
        if wants_all or torch.is_autocast_enabled(x.device.type) or is_transformed(x):
            if self.group_size > 1:
                gates = gates.repeat_interleave(self.group_size, dim=-1)
            return cast(Tensor, self.expert(x) * gates)
        support = (gates != 0) | wanted if learns and wanted is not None else None
        return gated_linear(x, self.expert.weight, self.expert.bias, gates, support=support)

    def extra_repr(self) -> str:
        """Show the sizes."""
        sizes = f"{self.expert.in_features}, {self.expert.out_features}"
        return f"{sizes}, group_size={self.group_size}"
